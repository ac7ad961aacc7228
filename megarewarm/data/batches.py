"""Training batches: rows of s + 1 ids at any position of the run, the same for every number of data-parallel ranks."""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from megarewarm.config.schema import DataConfig, Source
from megarewarm.data.blend import Blend, greedy_blend
from megarewarm.data.permutation import derive_key
from megarewarm.data.row_samples import RowSamples
from megarewarm.data.samples import Description, MegatronSamples, NeoxSamples, PermutedSamples, Samples
from megarewarm.data.split import Rule, split_documents
from megarewarm.data.token_file import TokenView, open_tokens
from megarewarm.errors import UserError

T = TypeVar("T")

ORDER_VERSION = 1  # part of every fingerprint; to be raised when the same config would give another order

Locate = Callable[[npt.NDArray[np.int64]], tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]]


class BlendedRows:
    """Rows out of several sources: ``locate`` says of which source, and which sample of it, each position is.

    ``names`` and ``samples`` have one entry per source. Rows are checked against ``vocab_size`` when they are read.
    """

    def __init__(self, names: Sequence[str], samples: Sequence[Samples], locate: Locate, vocab_size: int) -> None:
        self.names = list(names)
        self.samples = list(samples)
        self.sequence_length = samples[0].sequence_length
        self._locate = locate
        self._vocab_size = vocab_size

    def sources(self, first: int, count: int) -> npt.NDArray[np.int16]:
        """The source of each of the positions [first, first + count), (count,)."""
        return self._locate(np.arange(first, first + count))[0]

    def read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Rows of the positions [first, first + count), (count, s + 1) int64. ``UserError`` for an id out of range."""
        source, index = self._locate(np.arange(first, first + count))
        rows = np.empty((count, self.sequence_length + 1), np.int64)
        for i in np.unique(source).tolist():
            (places,) = np.nonzero(source == i)
            part = np.empty((len(places), self.sequence_length + 1), np.int64)
            self.samples[i].fill(index[places], part)
            self._check(i, index[places], part)
            rows[places] = part
        return rows

    def _check(self, source: int, index: npt.NDArray[np.int64], part: npt.NDArray[np.int64]) -> None:
        if int(part.max()) >= self._vocab_size or int(part.min()) < 0:
            row, column = np.argwhere((part >= self._vocab_size) | (part < 0))[0]
            raise UserError(
                f"{self.samples[source].tokens.file.path}: sample {index[row]} of source '{self.names[source]}' holds "
                f"id {part[row, column]}, outside of the model's vocabulary of {self._vocab_size} ids: the file was "
                f"made with another tokenizer, or is damaged"
            )


class TrainingBatches:
    """The samples of a run, ``total_samples`` of them, any of which is read without reading those before it."""

    def __init__(self, rows: BlendedRows, total_samples: int, fingerprint: str) -> None:
        self._rows = rows
        self.total_samples = total_samples
        self.sequence_length = rows.sequence_length
        self.names = rows.names
        self._fingerprint = fingerprint

    def rows(self, first_sample: int, count: int) -> npt.NDArray[np.int64]:
        """Samples [first_sample, first_sample + count), (count, s + 1) int64. ``UserError`` past the run's end."""
        self._check_range(first_sample, count)
        return self._rows.read(first_sample, count)

    def share(self, first_sample: int, global_batch: int, rank: int, world: int) -> npt.NDArray[np.int64]:
        """A rank's rows [rank B/W, (rank + 1) B/W) of the global batch of B that starts at ``first_sample``.

        (B/W, s + 1) int64; the ranks' shares in their order are ``rows(first_sample, B)``, whatever their number.
        """
        if global_batch % world or not 0 <= rank < world:
            raise ValueError(f"no share of rank {rank} of {world} in a global batch of {global_batch} sequences")
        self._check_range(first_sample, global_batch)
        size = global_batch // world
        return self._rows.read(first_sample + rank * size, size)

    def tokens_per_source(self, first_sample: int, count: int) -> dict[str, int]:
        """Training tokens (s per sample) that each source gives to the samples [first_sample, first_sample + count)."""
        self._check_range(first_sample, count)
        counts = np.zeros(len(self.names), np.int64)
        for start in range(first_sample, first_sample + count, 2**20):
            sources = self._rows.sources(start, min(2**20, first_sample + count - start))
            counts += np.bincount(sources, minlength=len(self.names))
        return dict(zip(self.names, (counts * self.sequence_length).tolist(), strict=True))

    def fingerprint(self) -> str:
        """32 hex digits of all that decides which tokens stand at which position: files, splits, weights, order, seed.

        In the ``permuted`` order it doesn't depend on the length of the run; in the others on their number of epochs.
        """
        return self._fingerprint

    def describe(self) -> list[Description]:
        """One line per source: name, path, fingerprint of the file, tokens, order and epochs."""
        return [
            {
                "name": name,
                "path": str(samples.tokens.file.path),
                "fingerprint": samples.tokens.file.fingerprint(),
                "tokens": samples.tokens.num_tokens,
                **samples.describe(),
            }
            for name, samples in zip(self.names, self._rows.samples, strict=True)
        ]

    def _check_range(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.total_samples:
            raise UserError(
                f"samples {first} to {first + count} were asked for, the run's data end at {self.total_samples}: raise "
                f"training.budget, or set start.data to 'restart'"
            )


def build_training_batches(
    data: DataConfig, sources: Sequence[Source], *, total_samples: int, vocab_size: int
) -> TrainingBatches:
    """Open the sources, whose weights are final, and lay out ``total_samples`` samples (steps x global batch).

    Raises ``UserError`` for files that can't be read or hold ids outside of the vocabulary, for sources too short for
    one sample, and where the run would read a source more often than its ``max_epochs``.
    """
    rows, fingerprint = lay_out(data, sources, total_samples=total_samples, vocab_size=vocab_size)
    return TrainingBatches(rows, total_samples, fingerprint)


def lay_out(data: DataConfig, sources: Sequence[Source], *, total_samples: int, vocab_size: int) -> tuple[BlendedRows, str]:
    """The rows of ``total_samples`` samples in ``data.order``, and the fingerprint of that order."""
    names = source_names(sources)
    views = [open_view(source, data, vocab_size) for source in sources]
    weights = [source.weight for source in sources]
    samples = _open_samples(data, sources, views, total_samples)
    locate: Locate
    if data.order == "permuted" or len(sources) == 1:
        blend = Blend(weights)
        shares = blend.numerators.tolist()
        counts = blend.counts(total_samples)
        locate = blend.locate
    else:
        order, index = greedy_blend(weights, total_samples)
        shares = [share.hex() for share in weights]
        counts = np.bincount(order, minlength=len(sources))
        locate = _table(order, index)
    for name, source, part, need in zip(names, sources, samples, counts.tolist(), strict=True):
        _check_epochs(name, source, part, need)
        if source.max_epochs is None and part.num_samples is not None and need > part.num_samples:
            raise UserError(
                f"source '{name}' gives {part.num_samples} samples and the blend asks it for {need}: order '{data.order}' "
                f"allows half a percent more than its weight's share, too little for so few samples; change its weight a little"
            )
    return BlendedRows(names, samples, locate, vocab_size), fingerprint_of(data, data.seed, samples, shares)


def source_names(sources: Sequence[Source]) -> list[str]:
    """The sources' names, else their files'. Raises ``UserError`` where two are the same."""
    names = [source.name or Path(source.path.removesuffix(".bin").removesuffix(".idx")).name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are named '{name}': give each its own 'name'")
    return names


def open_view(source: Source, data: DataConfig, vocab_size: int) -> TokenView:
    """The tokens of a source, or of its part of a split, after a check of the ids.

    Splits follow Megatron-LM's rounding in the ``megatron`` order, else GPT-NeoX's, whose data they are to fit.
    """
    file = open_tokens(source.path, dtype=source.dtype, vocab_size=vocab_size)
    file.check_vocabulary(vocab_size)
    if source.split is None:
        return file.view()
    if file.index_path is None:
        raise UserError(f"{file.path} has no .idx, so no documents to split: remove 'split', or split the file itself")
    rule: Rule = "megatron" if data.order == "megatron" else "neox"
    return file.view(*split_documents(source.split, file.num_documents, rule)[source.part])


def fingerprint_of(data: DataConfig, seed: int, samples: Sequence[Samples], shares: Sequence[int | str]) -> str:
    """Fingerprint of an order of samples: see ``TrainingBatches.fingerprint``."""
    sources = [
        {
            "file": part.tokens.file.fingerprint(),
            "documents": [part.tokens.first_document, part.tokens.last_document],
            "order": part.order,
            "shuffled": getattr(part, "epoch_ranges", None),
            "share": share,
        }
        for part, share in zip(samples, shares, strict=True)
    ]
    content = {"version": ORDER_VERSION, "seed": seed, "sequence_length": data.sequence_length, "sources": sources}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _open_samples(data: DataConfig, sources: Sequence[Source], views: Sequence[TokenView], total_samples: int) -> list[Samples]:
    s, seed = data.sequence_length, data.seed
    if data.order == "permuted":
        # The place in the list goes into the key, so that a file that is listed twice is read in two orders.
        return [
            RowSamples(view, s, source.first_row, source.max_epochs)
            if source.layout == "rows"
            else PermutedSamples(view, s, derive_key(seed, i), source.max_epochs)
            for i, (view, source) in enumerate(zip(views, sources, strict=True))
        ]
    # Both trainers ask each source of a blend for half a percent more than its share; this decides the epochs.
    total_weight = sum(source.weight for source in sources)
    if math.isclose(total_weight, 1.0, rel_tol=1e-12):
        total_weight = 1.0  # shares already: to divide them once more could change their last bit, and by it the epochs
    kind = NeoxSamples if data.order == "neox" else MegatronSamples
    samples: list[Samples] = []
    for view, source in zip(views, sources, strict=True):
        if source.layout == "rows":
            samples.append(RowSamples(view, s, source.first_row, source.max_epochs))
            continue
        share = source.weight / total_weight
        if len(sources) == 1 and not data.blend_of_one:
            wanted = total_samples
        elif data.order == "neox":
            wanted = math.ceil(total_samples * share * 1.005)
        else:
            wanted = math.ceil(math.ceil(total_samples * share) * 1.005)
        samples.append(kind(view, s, seed, wanted))
    return samples


def _table(source: npt.NDArray[np.int16], index: npt.NDArray[np.int64]) -> Locate:
    return lambda positions: (source[positions], index[positions])


def _check_epochs(name: str, source: Source, samples: Samples, need: int) -> None:
    if source.max_epochs is None:
        return
    have = math.floor(source.max_epochs * samples.samples_per_epoch)
    if need > have == 0 == samples.samples_per_epoch:
        raise UserError(f"source '{name}' is shorter than one sample: set its max_epochs to null, or remove it")
    if need > have:
        s = samples.sequence_length
        epochs = math.ceil(need / samples.samples_per_epoch * 100) / 100
        raise UserError(
            f"source '{name}' gives {have} samples ({have * s} tokens) in max_epochs {source.max_epochs:g}, the run "
            f"needs {need} ({need * s} tokens): set its max_epochs to {epochs:g} or more, lower its weight, or shorten "
            f"training.budget"
        )


class Prefetch(Generic[T]):
    """Iterates over ``items``, which a thread computes up to ``depth`` ahead. Also a context manager that closes it.

    An exception in ``items`` is raised by the ``next`` that would have given the item. ``close`` ends the thread after
    the item it is working on.
    """

    def __init__(self, items: Iterable[T], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, items: Iterable[T]) -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                if self._stop.is_set():
                    return
                self._queue.put((item, None))
        except BaseException as error:
            end = error
        self._queue.put((None, end))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._ended = True
            self._thread.join()
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread and drop what it has prepared. Further items: none."""
        self._ended = True
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
