"""Replay: a share of every batch comes from old data, the new data get the rest (arXiv 2403.08763, section 4.2).

The accounting is compute-equivalent: the run's token budget stays what it is, so replaying a share x means that only
(1 - x) of the budget are new tokens.

``of: lineage`` replays what the start checkpoint's lineage records: pools of samples that were truly trained on, one for each
file, by the number of tokens seen of it. Replays count: after 300B tokens of the Pile and 100B of new data with 5% replay, a
third stage takes Pile and new data as 305 : 95, which is what that paper did. A pool is a set: a sample that was read twice, in
another stage, order or epoch, is in it once, and what a skipped step has read is not. It is replayed in the order in which it
was first read, going on where the last replay of it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.config.data import Order, ReplayConfig, Source
from megarewarm.data.files.file_identity import FileIdentity
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.listed_documents import ListedDocuments
from megarewarm.data.files.manifest import manifest_of
from megarewarm.data.files.token_file import TokenView
from megarewarm.data.mixture.blend import normalised
from megarewarm.data.mixture.phases import AnySource
from megarewarm.data.order.sample_order import SampleOrder
from megarewarm.data.order.seen_samples import SeenPart, SeenSource, union, view_of
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


def replayed(replay: ReplayConfig | None, history: Lineage, own: Source | None = None) -> list[AnySource]:
    """The old data that ``replay`` describes, weighted among themselves. ``history``: the start checkpoint's stages; ``own``:
    what that checkpoint wrote (own_replay.py). Raises ``UserError`` if the history doesn't record what was read."""
    if replay is None:
        return []
    if replay.of == "start" and own is None:
        raise UserError("replay of start: the start checkpoint has not written its replay yet")
    seen = seen_sources(replay, history) if replay.of == "lineage" else []
    return [*(replay.sources or ()), *seen, *([own] if own is not None else [])]


@dataclass
class _Pool:
    """Everything read from one file, order by order. ``ended``: the order and index at which the last replay ended."""

    names: list[str]
    run: str
    file: FileIdentity
    ranges: dict[SampleOrder, list[tuple[int, int]]] = field(default_factory=dict)
    tokens: int = 0
    ended: tuple[SampleOrder, int] | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def parts(self) -> tuple[SeenPart, ...]:
        return tuple(SeenPart(order, seen) for order, ranges in self.ranges.items() if (seen := union(ranges)))

    @property
    def place(self) -> tuple[int, int] | None:
        """(part, index) of ``ended``."""
        orders = [part.order for part in self.parts]
        return None if self.ended is None or self.ended[0] not in orders else (orders.index(self.ended[0]), self.ended[1])


def history_to_replay(stages: Sequence[Stage], *, goes_on: bool) -> Lineage:
    """What 'lineage' means to a run that follows on ``stages``.

    ``goes_on``: it reads on in the data of the last one (resume, branch). Then these are its data too, and they were blended
    from what was there before that stage, or before the first of several that went on in the same data.
    """
    before = list(stages)
    while goes_on and before:
        last = before.pop()
        goes_on = last.intent in ("resume", "branch") if last.goes_on is None else last.goes_on
    return Lineage(stages=before)


def seen_sources(replay: ReplayConfig, history: Lineage) -> list[SeenSource]:
    """One source for each pool of ``history``, weighted by the tokens seen of it, replays included. What a model wrote of its
    own stands for the stages before that which recorded nothing."""
    pools: list[_Pool] = []
    written = [i for i, stage in enumerate(history.stages) if any(seen.generated_by for seen in stage.data)]
    for number, stage in enumerate(history.stages):
        if stage.grown:  # it read nothing
            continue
        if not stage.data and written and number < written[-1]:
            continue
        if (not stage.data and not replay.sources) or any(seen.samples and seen.read is None for seen in stage.data):
            raise UserError(
                f"replay of lineage: the start checkpoint's stage '{stage.run}' ({stage.intent}) doesn't record which samples "
                f"it has read; give what it was trained on as replay.sources (with 'tokens' seen of each, beside 'of: lineage' "
                f"if later stages are recorded)"
            )
        if stage.left_out and any(seen.samples and seen.left_out is None for seen in stage.data):
            raise UserError(
                f"replay of lineage: stage '{stage.run}' left out steps ({_steps(stage)}), and its checkpoint, written by an "
                f"earlier megarewarm, doesn't say which samples these were; give what it was trained on as replay.sources "
                f"instead of 'of: lineage'"
            )
        for seen in stage.data:
            if seen.read is None or not seen.samples:
                continue
            order, trained_on = seen.read.order, seen.tokens - (seen.left_out or 0) * seen.read.order.sequence_length
            pool = next((pool for pool in pools if seen.file.agrees_with(pool.file)), None)
            if pool is None:
                pools.append(pool := _Pool([], stage.run, seen.file))
            pool.tokens += trained_on
            if seen.read.again:
                if seen.read.ranges:
                    pool.ended = order, seen.read.ranges[-1][1]
                continue
            pool.names += [seen.name]
            pool.ranges.setdefault(order, []).extend(seen.read.ranges)
            pool.file = seen.file  # the newest place of the file
    pools = [pool for pool in pools if any(part.seen for part in pool.parts)]
    known = sorted({name for pool in pools for name in pool.names})
    if unknown := sorted(set(replay.paths) - set(known)):
        raise UserError(f"replay.paths: the lineage has no source '{unknown[0]}', but {', '.join(known)}")
    if not pools:
        raise UserError("replay of lineage: the start checkpoint has read nothing yet; give replay.sources instead")
    names = [pool.name for pool in pools]
    return [
        SeenSource(
            name=f"replay of {pool.name}" + (f" in {pool.run}" if names.count(pool.name) > 1 else ""),
            pool=pool.name,
            path=next((replay.paths[name] for name in pool.names if name in replay.paths), pool.file.path),
            file=pool.file,
            parts=pool.parts,
            ended=pool.place,
            weight=float(pool.tokens),
            max_epochs=replay.max_epochs,
        )
        for pool in pools
    ]


def _steps(stage: Stage) -> str:
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in stage.left_out[:4])


def check_apart(files: TokenFiles, old: Sequence[AnySource]) -> None:
    """Raise ``UserError`` if an upstream validation set reads documents that are replayed as well. The loss on them would
    fall because they are trained on, not because little is forgotten. And if any set reads what a model wrote."""
    for held_set in files.data.validation:
        for held_source in held_set.sources:
            told = manifest_of(Path(held_source.path.removesuffix(".idx").removesuffix(".bin") + ".bin")) or {}
            if isinstance(writer := told.get("generated"), dict):
                raise UserError(
                    f"validation set '{held_set.name}' reads {held_source.path}, which {writer.get('by')} wrote as its own "
                    f"replay: the loss on it measures that model, not what is remembered; give the set real text"
                )
    if not old:
        return
    held_out = [
        (item.name, files.view(source)) for item in files.data.validation if item.role == "upstream" for source in item.sources
    ]
    for source in old:
        if isinstance(source, Source):
            view = files.view(source)
            name, fingerprint = source.name or source.path, view.file.fingerprint()
            views = [view]
        else:
            name, fingerprint = source.name, source.file.fingerprint
            views = [view_of(part.order, files.open(source.path, part.order.dtype)) for part in source.parts]
        for (item, held), read in product(held_out, views):
            if held.file.fingerprint() == fingerprint and (both := _in_both(held, read)) is not None:
                raise UserError(
                    f"validation set '{item}' (upstream) and '{name}', which is replayed, both read documents "
                    f"{both[0]} to {both[1]} of {held.file.path}: the loss "
                    f"on what is trained on does not measure forgetting; give the set held-out documents (another file, or "
                    f"'split' and 'part' on both sides)"
                )


def _in_both(one: TokenView, other: TokenView) -> tuple[int, int] | None:
    """The first and the last document of their file that both views hold; None without any."""
    if isinstance(one, ListedDocuments) or isinstance(other, ListedDocuments):
        mine, others = (view.in_file(np.arange(view.first_document, view.last_document)) for view in (one, other))
        both = np.intersect1d(mine, others)
        return (int(both[0]), int(both[-1])) if both.size else None
    first, last = max(one.first_document, other.first_document), min(one.last_document, other.last_document)
    return (first, last - 1) if first < last else None
