"""Weight averages of several checkpoints, one parameter at a time: a cheap remedy for forgetting.

The mean of the last checkpoints acts like a decayed learning rate; interpolation between the start and the end of a
re-warmed run trades what was learnt against what was forgotten (Wortsman et al., arXiv 2109.01903; Ilharco et al., arXiv
2208.05592). The result is a checkpoint whose history names its parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarewarm.checkpoint.convert import FORMS, Conversion, ConvertOptions, Watched
from megarewarm.checkpoint.lineage import Stage
from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.source import ForeignCheckpoint, OwnCheckpoint, open_checkpoint, tokenizers_of
from megarewarm.checkpoint.weights import Description, OnBytes, Weights, check, expected_shapes, refuse_another_head
from megarewarm.config.budget import Budget
from megarewarm.config.model import ModelConfig
from megarewarm.config.run_identity import difference_of_runs
from megarewarm.data.files.manifest import refuse_other_tokenizers
from megarewarm.errors import UserError
from megarewarm.model.parameters import FUNCTION_KEYS, SHAPE_KEYS
from megarewarm.record.config_yaml import read_settings
from megarewarm.record.layout import CHECKPOINTS
from megarewarm.schedules.merging import decay_shares, note_on_rates, within
from megarewarm.schedules.schedule import Schedule

# formats name the activation of one model differently
_SAME_FUNCTION = tuple(key for key in FUNCTION_KEYS if key != "activation")


def mean_shares(count: int) -> list[float]:
    """Equal shares of ``count`` checkpoints."""
    return [1 / count] * count


def ema_shares(count: int, decay: float) -> list[float]:
    """Shares of a moving average that starts at the first (oldest): average = decay * average + (1 - decay) * next. Raises
    ``UserError`` for a decay outside [0, 1)."""
    if not 0 <= decay < 1:
        raise UserError(f"--ema {decay:g}: the decay must lie in [0, 1)")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def interpolation_shares(alpha: float) -> list[float]:
    """Shares of start and end: (1 - alpha) * start + alpha * end. Beyond 0 and 1 it extrapolates."""
    return [1 - alpha, alpha]


def decay_like(shape: str, names: Sequence[str], window: Budget | None) -> Merge:
    """The average that stands for a decay of ``shape`` (WSM, arXiv 2507.17634).

    ``names``: a run's folder, of which those of the last ``window`` count; or checkpoints of one run, without ``window``.
    Raises ``UserError`` for checkpoints of several runs, without steps, or fewer than two within the window.
    """
    if window is None and len(names) < 2:
        raise UserError(f"--like {shape}: how much of {names[0]} is to decay? Give --window, such as 10%, or checkpoints")
    if window is not None and len(names) > 1:
        raise UserError(f"--window: goes with a run's folder; the {len(names)} checkpoints given are a window themselves")
    paths = [str(path) for _, path in _in_run(names[0])] if window is not None else list(names)
    states = sorted(((_state_of(path), path) for path in paths), key=lambda pair: pair[0].step)
    if window is not None:
        states = _within(window, names[0], states)
    _refuse_several_runs(states)
    steps = [state.step for state, _ in states]
    shares = decay_shares(shape, steps)
    what = f"{shape} decay over steps {steps[0]:,} to {steps[-1]:,} by merging"
    return Merge([path for _, path in states], shares.tolist(), what, _falling(states))


def _state_of(name: str) -> TrainingState:
    source = open_checkpoint(name)
    if not isinstance(source, OwnCheckpoint) or source.training is None:
        raise UserError(f"{name} ({source.format}) does not say after which step of a run it was saved; use --mean")
    return source.training


def _within(window: Budget, run: str, states: list[tuple[TrainingState, str]]) -> list[tuple[TrainingState, str]]:
    newest = states[-1][0]
    steps = newest.step - newest.start_position[0]
    if window.unit == "epochs" or not steps:
        raise UserError(f"--window {window}: give it in steps, tokens, or as a share of the run, such as 10%")
    length = window.in_steps(newest.tokens // steps, steps)
    if not 0 < length <= steps:
        raise UserError(f"--window {window}: is {length:g} of the {steps:,} steps of {run}; give more than 0, at most all")
    found = states[-len(within(length, [state.step for state, _ in states])) :]
    if len(found) < 2:
        kept = ", ".join(f"{state.step:,}" for state, _ in states)
        raise UserError(
            f"--window {window}: within the last {length:g} steps {run} holds only its newest checkpoint (there are: {kept}); "
            f"give a longer window, or keep more (checkpoint.every, keep_last)"
        )
    return found


def _refuse_several_runs(states: Sequence[tuple[TrainingState, str]]) -> None:
    def run(state: TrainingState) -> object:
        history = state.lineage.stages[:-1]
        return state.run, state.start_position, state.start_losses, state.schedule, history

    (first, name), *others = states
    for state, other in others:
        if run(state) != run(first):
            raise UserError(f"--like: {other} is no checkpoint of the run of {name}; give those of one run")
        if (different := difference_of_runs(*_settings_of(name, other))) is not None:
            key, one, another = different
            raise UserError(
                f"--like: {other} is no checkpoint of the run of {name}: {key} is {another!r} there, here {one!r}; give those "
                f"of one run"
            )
    steps = [state.step for state, _ in states]
    if twice := [step for step, next_ in itertools.pairwise(steps) if step == next_]:
        raise UserError(f"--like: two checkpoints are of step {twice[0]:,}; give each once")


def _settings_of(*names: str) -> list[dict[str, Any]]:
    """The configurations of the runs in whose folders checkpoints lie, all empty unless each has one."""
    opened = [open_checkpoint(name) for name in names]
    settings = [read_settings(each.folder.parent.parent) for each in opened if isinstance(each, OwnCheckpoint)]
    return settings if all(settings) else [{} for _ in names]


def _falling(states: Sequence[tuple[TrainingState, str]]) -> str:
    """A note where the rate was no constant within the window."""
    first, last = states[0][0], states[-1][0]
    return note_on_rates(Schedule.from_spec(last.schedule), first.schedule_position, last.schedule_position)


class Combination:
    """The sum of ``shares[i] * weights[i]``, computed in float64, given in fp32."""

    def __init__(self, weights: Sequence[Weights], shares: Sequence[float]) -> None:
        self._weights, self._shares = list(weights), list(shares)
        self.where = " + ".join(f"{share:.4g} x {each.where}" for share, each in zip(shares, weights, strict=True))

    def describe(self) -> Mapping[str, Description]:
        first = self._weights[0].describe()
        return {name: Description(item.shape, torch.float32, item.place) for name, item in first.items()}

    def read(self, name: str) -> Tensor:
        total: Tensor | None = None
        for weights, share in zip(self._weights, self._shares, strict=True):
            if share == 0:
                continue
            part = weights.read(name)
            total = torch.zeros(part.shape, dtype=torch.float64) if total is None else total
            total.add_(part, alpha=share)
        assert total is not None, "all shares are zero"
        return total.float()


def check_alike(models: Sequence[tuple[str, ModelConfig]]) -> None:
    """Raise ``UserError`` naming what differs between the models of several checkpoints."""
    (first, one), *others = models
    for name, other in others:
        for key in (*SHAPE_KEYS, *_SAME_FUNCTION):
            if getattr(one, key) != getattr(other, key):
                raise UserError(
                    f"{name}: {key} is {getattr(other, key)}, in {first} it is {getattr(one, key)}; only checkpoints of "
                    f"the same model can be averaged"
                )


@dataclass(frozen=True)
class Merge:
    """Names of checkpoints, the share of each, what that is in words, and what a user must know of it."""

    names: Sequence[str]
    shares: Sequence[float]
    what: str
    note: str = ""

    @property
    def description(self) -> str:
        """A description for messages."""
        parts = " + ".join(f"{share:.4g} x {name}" for share, name in zip(self.shares, self.names, strict=True))
        return f"{self.what}: {parts}"


def last_of(count: str, run: str) -> list[str]:
    """The names of a run's newest ``count`` checkpoints, oldest first. Raises ``UserError`` if there are fewer."""
    found = _in_run(run)
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"--last {count}: the number of checkpoints comes first, then the run's folder")
    if len(found) < int(count):
        raise UserError(
            f"{run}: holds {len(found)} checkpoints, {count} were asked for; ask for fewer, or keep more (checkpoint.keep_last)"
        )
    return [str(path) for _, path in found[-int(count) :]]


def _in_run(run: str) -> list[tuple[int, Path]]:
    folder = Path(run)
    if not (found := checkpoints_in(folder / CHECKPOINTS) or checkpoints_in(folder)):
        raise UserError(f"{run}: no checkpoints are in it; name a run's folder")
    return found


def bytes_to_read(merged: Merge) -> int:
    """What ``merge`` reads: every parameter of every checkpoint whose share is not zero."""
    opened = [open_checkpoint(name) for name, share in zip(merged.names, merged.shares, strict=True) if share]
    return sum(item.nbytes for source in opened for item in source.weights.describe().values())


def merge(merged: Merge, destination: Path, options: ConvertOptions, on_bytes: OnBytes = lambda _: None) -> list[str]:
    """Write ``merged``. Returns notes. ``on_bytes`` is called with the bytes that were read. Raises ``UserError`` for a
    single checkpoint, for models that differ, and where ``destination`` holds anything else; nothing is written then."""
    if len(merged.names) < 2:
        raise UserError("at least two checkpoints are needed for an average")
    sources = [open_checkpoint(name) for name in merged.names]
    check_alike([(source.name, source.model_config) for source in sources])
    first = sources[0]
    refuse_other_tokenizers([made for source in sources for made in tokenizers_of(source)])
    per_read = sum(share != 0 for share in merged.shares)
    combination = Watched(Combination([source.weights for source in sources], merged.shares), lambda n: on_bytes(n * per_read))
    shapes = expected_shapes(first.model_config)
    for source in sources:
        check(source.weights, shapes)
        refuse_another_head(source.weights, shapes)
    tokenizer = first.tokenizer
    for source in sources[1:]:
        tokenizer = tokenizer.over(source.tokenizer)
    average = ForeignCheckpoint(destination.name, "merged", first.model_config, lambda: combination, [], tokenizer)
    average.lineage = sources[-1].lineage.extended(Stage(run=destination.name, intent=f"merged: {merged.description}"))
    return FORMS[options.form].write(Conversion(average, combination, first.model_config, destination, options))
