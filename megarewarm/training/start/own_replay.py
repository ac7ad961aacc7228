"""Before training, the start checkpoint writes its own replay, if the run asks for it: what it will cost, and doing it."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from rich.console import Console

from megarewarm.checkpoint.source import OpenedCheckpoint, open_checkpoint
from megarewarm.config.data import Source
from megarewarm.errors import UserError
from megarewarm.parallel.collective import collective
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.own_replay import OwnReplay, as_source, manifest, write
from megarewarm.rewarm.switches import training_phases
from megarewarm.spelling import duration_text, tokens_text
from megarewarm.training.start.inputs import open_inputs
from megarewarm.training.start.micro_batch import with_micro_batch
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.planned import PlannedCheckpoint
from megarewarm.training.start.texts import settle_texts

_LINE_EVERY = 30.0  # seconds


@collective
def with_own_replay(plan: Plan, ranks: Ranks, console: Console) -> tuple[Plan, list[str]]:
    """(``plan`` with what its start wrote, notes); written now if it is not in the cache. All ranks call it.

    Everything else that the run reads is checked first. Raises ``UserError``.
    """
    if not plan.awaits_replay:
        return plan, []
    check_own_replay(plan)
    alone = without_replay(plan)
    if alone.config.training.micro_batch == "auto":
        alone = with_micro_batch(alone, 1)
    open_inputs(alone, ranks.world_size, ranks.device)
    own = described(plan)
    on_gpu = ranks.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    shown = _Progress(console, plan.config.name, own)
    write(own, ranks.device, dtype, shown, shown.waits)
    assert plan.config.replay is not None
    about = manifest(own.prefix)
    share = 100 * (1 - about["ended"] / about["documents_written"])
    note = (
        f"own replay: written by {own.writer}, at least {own.settings.tokens:,} tokens in {own.prefix}; {share:.1f} % of its "
        f"documents did not end within {own.new_tokens:,} tokens and were cut there"
    )
    source = as_source(str(own.prefix), own.writer, own.settings, plan.config.replay.max_epochs)
    return replace(plan, own_replay=source), [note]


def described(plan: Plan) -> OwnReplay:
    """What the start of ``plan`` is to write. Raises ``UserError`` where it can't."""
    settings, source = plan.config.replay, plan.source
    assert settings is not None and settings.generate is not None and source is not None
    if plan.policy.weights == "initialise":
        raise UserError(
            "replay of start: the start's weights are not loaded (start.weights: initialise), so nothing can write it"
        )
    name = plan.config.start.from_ if plan.resumed else source.name
    eod = settle_texts(without_replay(plan)).eod
    opened: OpenedCheckpoint = open_checkpoint(name or "")
    if eod is None:
        known = opened.tokenizer
        eod = known.eod if known.eod is not None else known.stated.get("eos")
    if eod is None:
        raise UserError("replay.generate: which token ends a document is not known: give data.eod")
    return OwnReplay(opened, settings.generate, eod)


def check_own_replay(plan: Plan) -> None:
    """Raise ``UserError`` if the run replays more than its start is to write, and for switches that never happen."""
    replay, config = plan.config.replay, plan.config
    assert replay is not None and replay.generate is not None
    if replay.max_epochs is None:
        return
    own = Source.model_validate({"path": "<own replay>", "tokens": f"{replay.generate.tokens} tokens"})
    phases = training_phases(config, plan.schedule, plan.origin, [*(replay.sources or ()), own])
    ends = [*(phase.first for phase in phases[1:]), plan.samples(config.total_steps)]
    wanted = config.data.sequence_length * sum(
        source.weight * (end - max(phase.first, plan.origin.samples))
        for phase, end in zip(phases, ends, strict=True)
        for source in phase.sources
        if isinstance(source, Source) and source.path == own.path
    )
    if wanted > replay.generate.tokens * replay.max_epochs:
        raise UserError(
            f"replay.generate.tokens: {replay.generate.tokens:,}, and the run replays {wanted:,.0f} of them: give more, or "
            f"raise replay.max_epochs ({replay.max_epochs:g})"
        )


def without_replay(plan: Plan) -> Plan:
    """The plan as far as it does not depend on what the start writes."""
    return replace(plan, config=plan.config.model_copy(update={"replay": None}))


def cost(plan: Plan, ranks: int, device: str) -> str | None:
    """What writing takes on ``ranks`` of a type of ``device``, for a dry run; None where nothing is to be written."""
    if not plan.awaits_replay or isinstance(plan.source, PlannedCheckpoint):
        return None
    own = described(plan)
    seen = own.seen_rate(ranks, device)
    time = "how long is not known: nothing like it was written on this machine before"
    if seen is not None:
        time = (
            f"about {duration_text(own.settings.tokens / seen[0])}, at the {tokens_text(seen[0])} tokens/s of {seen[1]} before"
        )
    return (
        f"{own.settings.tokens:,} tokens, written by {own.writer} before training unless the cache has them: at most "
        f"{own.flops:.3g} FLOPs, {own.batch} documents at a time; {time}"
    )


class _Progress:
    """A line every half minute: how much is written, and the time left."""

    def __init__(self, console: Console, name: str, own: OwnReplay) -> None:
        self._console, self._name, self._writer = console, name, own.writer
        self._began: tuple[float, int] | None = None
        self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
            self._console.print(f"{self._name}: {self._writer} writes its own replay, {total:,} tokens", highlight=False)
        if now - self._shown < _LINE_EVERY:
            return
        self._shown = now
        rate = max(done - self._began[1], 1) / max(now - self._began[0], 1e-9)
        left = duration_text(max(0, total - done) / rate)
        line = f"{self._name}: own replay {min(100, 100 * done // total)} %, {tokens_text(rate)} tokens/s, left {left}"
        self._console.print(line, highlight=False)

    def waits(self) -> None:
        """Another run writes the same."""
        self._console.print(f"{self._name}: another run writes the same own replay; waiting for it", highlight=False)
