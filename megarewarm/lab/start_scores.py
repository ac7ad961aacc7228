"""Scores of candidates for a start, from one pass each over the same tokens: losses, and LogME on next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from megarewarm_kernels import linear_cross_entropy
from numpy.typing import NDArray

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.checkpoint.weights import load_module
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.errors import UserError
from megarewarm.lab.candidates import Candidate
from megarewarm.laws.evidence import logme, standardised
from megarewarm.model.transformer import LOSS_MEMORY

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class NextTokens:
    """The positions at which LogME looks: ``places`` among all of a set's windows, flat and ascending, and ``targets``, the
    next token at each, (n,) both. ``share``: of all targets those that are among the ``classes`` commonest."""

    places: Numbers
    targets: Numbers
    classes: int
    share: float


def choose_positions(windows: ValidationWindows, classes: int, most: int, seed: int, vocabulary: int) -> NextTokens:
    """At most ``most`` positions of ``windows`` whose target is one of its ``classes`` commonest, drawn by ``seed``. Raises
    ``UserError`` for a set in which only one token occurs."""
    targets = np.concatenate([rows[:, 1:].ravel() for rows in windows.slice(0).micro_batches(0, 1, 64)])
    counts = np.bincount(targets, minlength=vocabulary)
    commonest = np.argsort(-counts, kind="stable")[: min(classes, int((counts > 0).sum()))]
    if len(commonest) < 2:
        raise UserError(f"{windows.name}: holds only one token, so LogME has nothing to tell apart")
    among = np.flatnonzero(np.isin(targets, commonest))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(among))[:most])
    return NextTokens(among[chosen], targets[among[chosen]], len(commonest), len(among) / len(targets))


@dataclass(frozen=True)
class Scores:
    """Of one candidate: ``losses`` in nats per token by set, the first of which it is to learn, and ``logme`` there, in nats
    per position; ``after``: losses after its probe run, empty without one."""

    losses: dict[str, float]
    logme: float
    after: dict[str, float]


@torch.inference_mode()
def score(
    candidate: Candidate,
    sets: Sequence[ValidationWindows],
    positions: NextTokens,
    device: torch.device,
    micro_batch: int,
    progress: Callable[[int], None],
) -> Scores:
    """Load ``candidate`` in fp32 and score it; attention keeps within documents where its own run's did, every target counts.
    In memory: the model and the states at ``positions``. ``progress``: called with the tokens of each batch."""
    module = load_module(candidate.source.weights, candidate.source.model_config, device, torch.float32)
    rules = candidate.source.document_rules if isinstance(candidate.source, OwnCheckpoint) else None
    losses: dict[str, float] = {}
    kept: list[NDArray[np.float32]] = []
    for number, windows in enumerate(sets):
        total, count, seen = 0.0, 0, 0
        for rows in windows.slice(0).micro_batches(0, 1, micro_batch):
            batch = torch.from_numpy(rows).to(device)
            inputs, targets = batch[:, :-1], batch[:, 1:]
            hidden = module(inputs, rules.starts(inputs) if rules is not None else None).flatten(0, 1)
            valid = candidate.source.model_config.vocab_size
            loss, counted = linear_cross_entropy(
                hidden, module.head, targets.flatten(), valid_rows=valid, memory_budget=LOSS_MEMORY
            )
            total, count = total + float(loss), count + int(counted)
            if number == 0:
                first, last = np.searchsorted(positions.places, [seen, seen + len(hidden)])
                mine = torch.from_numpy(positions.places[first:last] - seen).to(device)
                kept.append(hidden[mine].float().cpu().numpy())
                seen += len(hidden)
            progress(targets.numel())
        losses[windows.name] = total / count
        if not isfinite(total):
            raise UserError(
                f"{candidate.name}: its loss on {windows.name} is {losses[windows.name]}, so it is no start and can't be "
                f"compared; leave it out"
            )
    return Scores(losses, logme(standardised(np.concatenate(kept)), positions.targets), {})


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b, from -1 to 1; None for fewer than three pairs, or where all of one are equal."""
    from scipy.stats import kendalltau

    if len(one) < 3:
        return None
    tau = float(kendalltau(one, other).statistic)
    return tau if np.isfinite(tau) else None
