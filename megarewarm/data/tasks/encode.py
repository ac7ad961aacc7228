"""Items as rows of token ids, cut exactly where lm-eval cuts them (``TemplateLM._encode_pair``, ``HFLM._loglikelihood_tokens``
of version 0.4.13), and in batches that depend on nothing but the items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megarewarm.data.tasks.items import Task
from megarewarm.data.text.tokenizers import Tokenizer
from megarewarm.errors import UserError

_STEP = 8
"""What the length of a batch is a multiple of, so that few lengths occur."""


@dataclass(frozen=True)
class Prefix:
    """``alone``: the id that stands for an empty context. ``added``: ids that the tokenizer's own rules put before a text."""

    alone: int
    added: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """A choice of an item: ``ids`` (t,), of which the last ``scored`` are the choice's; the model reads all but the last."""

    ids: npt.NDArray[np.int64]
    scored: int


@dataclass(frozen=True)
class EncodedTask:
    """``rows``: of all choices of all items, one after another. ``cut``: how many contexts lost their beginning, and the line
    of the first."""

    task: Task
    rows: list[Row]
    cut: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class RowBatch:
    """``inputs`` (b, s) int64, right-padded. ``places`` (n,): which of the b x s positions predict ``targets`` (n,); ``rows``
    (n,): the row of the batch that each belongs to; ``numbers`` (b,): the rows' numbers in the list that was batched."""

    inputs: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]


def encode_task(
    task: Task, tokenizer: Tokenizer, prefix: Prefix, positions: int, vocab_size: int, *, truncate: bool
) -> EncodedTask:
    """The rows of ``task`` for a model of ``positions``. ``truncate``: drop the beginning of a context that is too long, don't
    refuse it. Raises ``UserError`` naming file and line for a choice that doesn't fit, or has no token of its own."""
    texts: dict[str, None] = {}
    cuts = [[_cut(context, choice) for context, choice in item.pairs] for item in task.items]
    for context, choice in (pair for item in cuts for pair in item):
        texts |= {context: None, context + choice: None} if context else {choice: None}
    ids = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))
    added, begins = np.array(prefix.added, np.int64), tokenizer.decode([prefix.alone])

    def encoded(text: str) -> npt.NDArray[np.int64]:
        own = ids[text].astype(np.int64)
        return own if begins and text.startswith(begins) else np.concatenate([added, own])

    rows: list[Row] = []
    dropped: list[int] = []
    for item, pairs in zip(task.items, cuts, strict=True):
        for number, (context, choice) in enumerate(pairs):
            where = f"{task.source}, line {item.line}: " + (f"choice {number}" if len(pairs) > 1 else "the continuation")
            if context:
                before = encoded(context)
                after = encoded(context + choice)[len(before) :]
            else:
                after = ids[choice].astype(np.int64)
                before = np.array([prefix.alone], np.int64)
                if len(after) and after[0] == prefix.alone:
                    before, after = after[:1], after[1:]
            if not len(after) or not len(before):
                raise UserError(f"{where} has no token of its own with the tokenizer {tokenizer.path}; give it more text")
            if len(after) > positions:
                raise UserError(f"{where} has {len(after):,} tokens, the model has {positions:,} positions; shorten it")
            whole = np.concatenate([before, after])
            if len(whole) > positions + 1:
                if not truncate:
                    raise UserError(
                        f"{where} has {len(whole) - 1:,} tokens with its context, the model has {positions:,} positions; "
                        f"shorten the context, or set evaluation.tasks_truncate (--truncate) to drop its beginning, as "
                        f"lm-eval does"
                    )
                dropped.append(item.line)
                whole = whole[-(positions + 1) :]
            if whole.max() >= vocab_size:
                raise UserError(
                    f"{where} has id {whole.max()}, outside of the model's vocabulary of {vocab_size} ids: {tokenizer.path} is "
                    f"another model's tokenizer"
                )
            rows.append(Row(whole, len(after)))
    return EncodedTask(task, rows, (len(set(dropped)), dropped[0]) if dropped else (0, 0))


def _cut(context: str, choice: str) -> tuple[str, str]:
    """Spaces at the end of the context belong to the choice, where most tokenizers have them."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + choice


def batches(rows: Sequence[Row], tokens: int, multiple: int = 1) -> list[RowBatch]:
    """``rows`` in batches of similar length, the longest first, of at most ``tokens`` positions each (or one row).

    ``multiple``: what lengths must be multiples of, for ranks that share a sequence.
    """
    lengths = np.array([len(row.ids) - 1 for row in rows])
    step = int(np.lcm(_STEP, multiple))
    found: list[RowBatch] = []
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        width = -(-int(lengths[order[first]]) // step) * step
        last = min(len(order), first + max(1, tokens // width))
        found.append(_batch(rows, order[first:last], width))
        first = last
    return found


def _batch(rows: Sequence[Row], numbers: npt.NDArray[np.int64], width: int) -> RowBatch:
    inputs = np.zeros((len(numbers), width), np.int64)
    places, targets, owners = [], [], []
    for i, number in enumerate(numbers):
        row = rows[number]
        end = len(row.ids) - 1
        inputs[i, :end] = row.ids[:-1]
        places.append(i * width + np.arange(end - row.scored, end))
        targets.append(row.ids[-row.scored :])
        owners.append(np.full(row.scored, i))
    return RowBatch(inputs, np.concatenate(places), np.concatenate(targets), np.concatenate(owners), numbers)


def spans(tasks: Sequence[EncodedTask]) -> list[slice]:
    """Where each task's rows are in the rows of all of them."""
    ends = list(accumulate(len(task.rows) for task in tasks))
    return [slice(end - len(task.rows), end) for end, task in zip(ends, tasks, strict=True)]
