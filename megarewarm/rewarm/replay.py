"""Replay: a share of every batch comes from old data, the new data get the rest (arXiv 2403.08763, section 4.2).

The accounting is compute-equivalent: the run's token budget stays what it is, so replaying a share x means that only
(1 - x) of the budget are new tokens.

``of: lineage`` replays what the start checkpoint's lineage records: pools of samples that were truly read, one for each order
of each file, by the number of tokens seen of it. Replays count: after 300B tokens of the Pile and 100B of new data with 5%
replay, a third stage takes Pile and new data as 305 : 95, which is what that paper did. A pool is replayed in the order in
which it was first read, going on where the last replay of it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megarewarm.checkpoint.lineage import Lineage
from megarewarm.config.data import DataConfig, ReplayConfig, Source
from megarewarm.data.blend import Order, normalised
from megarewarm.data.mixture import open_view
from megarewarm.data.phases import AnySource
from megarewarm.data.sample_order import SampleOrder
from megarewarm.data.seen_samples import SeenSource, union
from megarewarm.errors import UserError


def with_replay(
    new: Sequence[AnySource], old: Sequence[AnySource], fraction: float, order: Order = "permuted"
) -> list[AnySource]:
    """All training sources with weights that sum to 1: ``new`` share 1 - fraction, the replayed ones, ``old``, share fraction.

    Within each group the weights keep their proportions (Ibrahim et al. 2024: D1 gets (1 - x)B, replay xB). They are divided by
    their sum as the trainer of ``order`` divides them.
    """
    if not old or not fraction:
        return _scaled(new, 1.0, order)
    return _scaled(new, 1.0 - fraction, order) + _scaled(old, fraction, order)


def _scaled(sources: Sequence[AnySource], share: float, order: Order) -> list[AnySource]:
    shares = normalised([source.weight for source in sources], order)
    return [source.with_weight(part * share) for source, part in zip(sources, shares, strict=True)]


def replayed(replay: ReplayConfig | None, history: Lineage) -> list[AnySource]:
    """The old data that ``replay`` asks for, weighted among themselves. ``history``: the start checkpoint's stages.

    Raises ``UserError`` where the history doesn't say what was read.
    """
    if replay is None:
        return []
    return [*(replay.sources or ()), *(seen_sources(replay, history) if replay.of == "lineage" else ())]


@dataclass
class _Pool:
    """All that was read of one order of one file."""

    name: str
    run: str
    path: str
    fingerprint: str
    order: SampleOrder
    ranges: list[tuple[int, int]] = field(default_factory=list)
    tokens: int = 0
    next: int | None = None


def seen_sources(replay: ReplayConfig, history: Lineage) -> list[SeenSource]:
    """One source for each pool of ``history``, weighted by the tokens seen of it, replays included."""
    pools: dict[tuple[str, SampleOrder], _Pool] = {}
    for stage in history.stages:
        if (not stage.data and not replay.sources) or any(seen.samples and seen.read is None for seen in stage.data):
            raise UserError(
                f"replay of lineage: the start checkpoint's stage '{stage.run}' ({stage.intent}) doesn't record which samples "
                f"it has read; give what it was trained on as replay.sources (with 'tokens' seen of each, beside 'of: lineage' "
                f"if later stages are recorded)"
            )
        for seen in stage.data:
            if seen.read is None or not seen.samples:
                continue
            order = seen.read.order
            first = _Pool(seen.name, stage.run, seen.path, seen.fingerprint, order)
            pool = pools.setdefault((seen.fingerprint, order), first)
            pool.tokens += seen.tokens
            if seen.read.again:
                pool.next = seen.read.ranges[-1][1]
            else:
                pool.ranges += seen.read.ranges
                pool.path = seen.path  # the newest place of the file
    if unknown := sorted(set(replay.paths) - {pool.name for pool in pools.values()}):
        raise UserError(
            f"replay.paths: the lineage has no source '{unknown[0]}', but {', '.join(sorted({p.name for p in pools.values()}))}"
        )
    if not pools:
        raise UserError("replay of lineage: the start checkpoint has read nothing yet; give replay.sources instead")
    names = [pool.name for pool in pools.values()]
    return [
        SeenSource(
            name=f"replay of {pool.name}" + (f" in {pool.run}" if names.count(pool.name) > 1 else ""),
            pool=pool.name,
            path=replay.paths.get(pool.name, pool.path),
            fingerprint=pool.fingerprint,
            order=pool.order,
            seen=union(pool.ranges),
            first=_rank(union(pool.ranges), pool.next),
            weight=float(pool.tokens),
            max_epochs=replay.max_epochs,
        )
        for pool in pools.values()
    ]


def _rank(ranges: Sequence[tuple[int, int]], index: int | None) -> int:
    """How many numbers of the ascending ``ranges`` lie below ``index``; 0 where that is all of them: around to the start."""
    if index is None:
        return 0
    below = sum(max(0, min(last, index) - first) for first, last in ranges)
    return below % sum(last - first for first, last in ranges)


def check_apart(data: DataConfig, old: Sequence[AnySource], vocab_size: int) -> None:
    """Raise ``UserError`` where an upstream validation set reads documents that are replayed as well.

    The loss on them would fall because they are trained on, not because little is forgotten.
    """
    held_out = [
        (item.name, open_view(source, data, vocab_size))
        for item in data.validation
        if item.role == "upstream"
        for source in item.sources
    ]
    if not held_out:
        return
    for source in old:
        if isinstance(source, Source):
            view = open_view(source, data, vocab_size)
            name, fingerprint = source.name or source.path, view.file.fingerprint()
            first, last = view.first_document, view.last_document
        else:
            name, fingerprint = source.name, source.fingerprint
            first, last = source.order.first_document, source.order.last_document
        for item, view in held_out:
            if view.file.fingerprint() == fingerprint and first < view.last_document and view.first_document < last:
                raise UserError(
                    f"validation set '{item}' (upstream) and '{name}', which is replayed, both read documents "
                    f"{max(first, view.first_document)} to {min(last, view.last_document) - 1} of {view.file.path}: the loss "
                    f"on what is trained on does not measure forgetting; give the set held-out documents (another file, or "
                    f"'split' and 'part' on both sides)"
                )
