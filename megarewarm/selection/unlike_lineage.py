"""Drops documents that a checkpoint was trained on, as its lineage records them: by their place where the input is a file that
was read, by their n-grams where it is another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.data import ReplayConfig
from megarewarm.data.files.file_identity import identity_of
from megarewarm.data.files.manifest import refuse_other_tokenizers
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.data.order.seen_samples import SeenSource, reopen
from megarewarm.errors import UserError
from megarewarm.rewarm.replay import seen_sources
from megarewarm.selection.desk import Desk
from megarewarm.selection.opening import end_of, made
from megarewarm.selection.overlap import GRAM, OtherText, overlap
from megarewarm.selection.step import BLOCK, Chosen, Corpus, Mask, Numbers
from megarewarm.selection.unlike import chosen

_SAMPLES = 2**16  # looked at at a time


class UnlikeLineage:
    """``checkpoint``: a run or checkpoint; ``share``: of n-grams, from which on a document of a file that was not read goes;
    ``paths``: new places of files that have moved, by their names in the lineage. Raises ``UserError`` where the lineage
    records nothing, and where a file of it that is needed is gone or was made with another tokenizer than ``corpus``."""

    name = "unlike-lineage"

    def __init__(self, checkpoint: str, share: float, corpus: Corpus, paths: Mapping[str, str] | None = None) -> None:
        self._share = share
        self._pools, self._notes = _pools(checkpoint, dict(paths or {}))
        self._own = [[identity_of(file).agrees_with(pool.file) for file in corpus.files] for pool in self._pools]
        self._files = [None if all(own) else _opened(pool) for pool, own in zip(self._pools, self._own, strict=True)]
        refuse_other_tokenizers(made([*corpus.files, *(file for file in self._files if file is not None)]))
        self.words = (
            f"drop documents that {checkpoint} was trained on: of a file that it read those of which a token was read, of "
            f"other files those of which at least {share:.0%} of the {GRAM}-grams of tokens were read"
        )
        self.settings: Mapping[str, Any] = {
            "read": [
                {
                    "file": pool.file.model_dump(exclude={"path"}),
                    "order": part.order.model_dump(mode="json"),
                    "samples": part.seen,
                }
                for pool in self._pools
                for part in pool.parts
            ],
            "share": share,
            "gram": GRAM,
        }

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        score, notes = np.zeros(corpus.num_documents), list(self._notes)
        for pool, own, file in zip(self._pools, self._own, self._files, strict=True):
            elsewhere = [np.empty(0, np.int64)]
            for index, is_own in enumerate(own):
                mine = corpus.members(kept, index)
                if is_own:
                    read = _read_documents(pool, corpus.files[index], corpus.ends[index], desk)
                    mine = mine[read[mine - int(corpus.firsts[index])]]
                    score[mine] = 1.0
                    notes.append(f"{len(mine):,} documents of {corpus.files[index].path} were read as '{pool.pool}'")
                else:
                    elsewhere.append(mine)
            if file is not None and len(documents := np.concatenate(elsewhere)):
                texts = partial(_texts, pool, file, end_of(file))
                doing = f"overlap with '{pool.pool}'"
                like = overlap(corpus, documents, texts, _tokens(pool), desk, doing, of_others=False)
                found = chosen(documents, like.own, self._share)
                score[found.dropped] = np.maximum(score[found.dropped], found.score)
                notes += [f"{len(found.dropped):,} documents are like what was read as '{pool.pool}'", *found.notes]
        dropped = np.flatnonzero(score > 0)
        return Chosen(dropped, np.full(len(dropped), -1, np.int64), score[dropped], notes)


def _tokens(pool: SeenSource) -> int:
    return sum((last - first) * (part.order.sequence_length + 1) for part in pool.parts for first, last in part.seen)


def _pools(checkpoint: str, paths: dict[str, str]) -> tuple[list[SeenSource], list[str]]:
    """(what the lineage has read, lines on what it does not record)."""
    stages = open_checkpoint(checkpoint).lineage.stages
    known = [stage for stage in stages if _is_recorded(stage)]
    if not known:
        raise UserError(
            f"--unlike-lineage {checkpoint}: doesn't record what it was trained on; name files that it has read with --unlike"
        )
    unknown = ", ".join(f"'{stage.run}' ({stage.intent})" for stage in stages if not _is_recorded(stage))
    notes = [f"what {unknown} has read is not recorded, and not dropped: name its files with --unlike"] if unknown else []
    try:
        return seen_sources(ReplayConfig(fraction=0.0, of="lineage", paths=paths), Lineage(stages=known)), notes
    except UserError as error:
        raise UserError(f"--unlike-lineage {checkpoint}: {str(error).replace('replay.paths', '--lineage-path')}") from error


def _is_recorded(stage: Stage) -> bool:
    left_out = not stage.left_out or all(seen.left_out is not None for seen in stage.data if seen.samples)
    return bool(stage.data) and left_out and all(seen.read is not None for seen in stage.data if seen.samples)


def _opened(pool: SeenSource) -> TokenFile:
    """The file of ``pool``. Raises ``UserError`` if it is gone, or another one."""
    try:
        file = open_tokens(pool.path, dtype=pool.parts[0].order.dtype)
    except UserError as error:
        raise UserError(
            f"--unlike-lineage: '{pool.pool}' was read from {pool.path}, which is needed to compare other files with it: "
            f"{error}; if it has moved, add --lineage-path {pool.pool}=NEW_PATH"
        ) from error
    if (difference := identity_of(file).differing(pool.file)) is not None:
        raise UserError(
            f"--unlike-lineage: {file.path} is not the file that was read as '{pool.pool}' ({difference}): say where that one "
            f"is with --lineage-path {pool.pool}=PATH"
        )
    return file


def _read_documents(pool: SeenSource, file: TokenFile, end: int | None, desk: Desk) -> Mask:
    """Of which documents of ``file`` a token other than the ``end`` was read, (documents,) bool."""
    offsets = file.offsets
    steps = np.zeros(file.num_documents + 1, np.int64)
    for part in pool.parts:
        samples = reopen(part.order, file)
        for indices in _blocks(part.seen, _SAMPLES):
            starts, lengths = samples.pieces(indices)
            starts, lengths = starts[lengths > 0], lengths[lengths > 0]
            firsts = np.searchsorted(offsets, starts, side="right") - 1
            lasts = np.searchsorted(offsets, starts + lengths - 1, side="right") - 1
            if end is not None:  # a sample may begin with the token that ends a document
                at_end = np.flatnonzero(starts == offsets[firsts + 1] - 1)
                ids = file.read_pieces(starts[at_end], np.ones(len(at_end), np.int64))
                firsts[at_end[ids == end]] += 1
            some = firsts <= lasts
            np.add.at(steps, firsts[some], 1)
            np.add.at(steps, lasts[some] + 1, -1)
    desk.show(f"documents read as '{pool.pool}'", 1, 1)
    return np.cumsum(steps)[:-1] > 0


def _texts(pool: SeenSource, file: TokenFile, end: int | None) -> Iterator[OtherText]:
    """What was read, cut where documents end."""
    number = 0
    for part in pool.parts:
        samples = reopen(part.order, file)
        for indices in _blocks(part.seen, max(1, BLOCK // (part.order.sequence_length + 1))):
            starts, lengths = samples.pieces(indices)
            ids = file.read_pieces(starts, lengths)
            ends = np.flatnonzero(ids == end) + 1 if end is not None else np.empty(0, np.int64)
            bounds = np.unique(np.concatenate([[0], np.cumsum(lengths), ends]))
            sizes = np.diff(bounds)
            if end is not None:
                sizes = sizes - (ids[bounds[1:] - 1] == end)
            yield OtherText(number + np.arange(len(sizes)), ids, bounds[:-1], sizes)
            number += len(sizes)


def _blocks(ranges: tuple[tuple[int, int], ...], size: int) -> Iterator[Numbers]:
    for first, last in ranges:
        for begin in range(first, last, size):
            yield np.arange(begin, min(begin + size, last))
