"""Samples of s + 1 tokens out of one token file, in one of four orders.

``PermutedSamples`` and ``SequentialSamples`` need no index and no memory; ``NeoxSamples`` and ``MegatronSamples`` give the
exact samples of GPT-NeoX and Megatron-LM. Sample i is always (s + 1,) ids: the inputs and, one further on, the targets.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.listed_documents import ListedDocuments
from megarewarm.data.files.shuffled_documents import ShuffledDocuments
from megarewarm.data.files.token_file import TokenView
from megarewarm.data.order.array_cache import Arrays, cached
from megarewarm.data.order.permutation import Permutation, derive_key
from megarewarm.data.order.sample_order import Kind, SampleOrder, SamplesRead
from megarewarm.errors import UserError

_BLOCK = 2**20  # documents in memory at a time beside the arrays that stay
CACHED = 2**21  # documents and samples from which on an order is kept on the disk: some tenths of a second to make


class Samples(ABC):
    """An order of samples. ``samples_per_epoch`` is floor((t - 1) / s) of the view's t tokens.

    ``num_samples`` is how many there are, None for without end. ``UserError`` for a view of less than s + 1 tokens, where
    the order can't make a sample out of several epochs.
    """

    order: str
    num_samples: int | None
    least_tokens: int | None = None
    """Tokens that a view must have; None: those of one sample."""
    is_packed = False
    """Whether its samples say where documents begin, and hold padding (``packed_rows``)."""

    def __init__(self, tokens: TokenView, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.samples_per_epoch = (tokens.num_tokens - 1) // sequence_length
        if tokens.num_tokens < (sequence_length + 1 if self.least_tokens is None else self.least_tokens):
            key = "documents" if isinstance(tokens, ListedDocuments) else "split"
            raise UserError(
                f"{tokens.file.path} gives {tokens.num_tokens} tokens ({tokens.num_documents} documents), one sample "
                f"takes {sequence_length + 1}: shorten data.sequence_length, change '{key}' or remove the source"
            )

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """Sample ``index``, (s + 1,) int64."""
        out = np.empty((1, self.sequence_length + 1), np.int64)
        self.fill(np.array([index], np.int64), out)
        return out[0]

    def fill(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> None:
        """Write the samples ``indices``, (k,), into the rows of ``out``, (k, s + 1); ``IndexError`` past the last."""
        self._check(indices)
        if indices.size:
            out[:] = self.tokens.file.read_pieces(*self.pieces(indices)).reshape(out.shape)

    def _check(self, indices: npt.NDArray[np.int64]) -> None:
        """Raise ``IndexError`` for a sample that there is not."""
        if indices.size and (
            int(indices.min()) < 0 or (self.num_samples is not None and int(indices.max()) >= self.num_samples)
        ):
            raise IndexError(f"{self.tokens.file.path} has {self.num_samples} samples, asked for {indices.max()}")

    @abstractmethod
    def pieces(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the samples ``indices``, (k,), lie in the file: (first tokens, lengths) of the runs of tokens, all of the first
        sample's, then all of the second's; the lengths sum to k (s + 1)."""

    @abstractmethod
    def sample_order(self) -> SampleOrder:
        """What finds these samples again in the same file."""

    def read_between(self, first: int, last: int) -> SamplesRead:
        """A record of the samples [first, last) as having been read."""
        return SamplesRead(order=self.sample_order(), ranges=((first, last),) if last > first else ())

    @property
    def grid(self) -> Hashable:
        """What identifies the windows that ``windows`` numbers, None for samples that are not of one grid of windows: samples
        of equal grids and the same window are the same tokens, and those of others share no token but the last."""
        return None

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the windows that the samples ``indices`` are, of those of ``grid``. ``TypeError`` without one."""
        raise TypeError(f"samples in the order '{self.order}' lie on no grid")

    def _sample_order(self, kind: Kind, **rest: Any) -> SampleOrder:
        view = self.tokens
        first, last = view.documents_of
        if isinstance(view, ListedDocuments):
            rest |= {"documents": view.documents, "scores": view.scores, "descending": view.descending}
        return SampleOrder(
            kind=kind,
            sequence_length=self.sequence_length,
            dtype=view.file.dtype.name,
            first_document=first,
            last_document=last,
            **rest,
        )


class _Windows(Samples):
    """The M windows of s + 1 tokens that start every s tokens of the view, all of them in each epoch: sample i is one of epoch
    floor(i / M). ``max_epochs``, which may be fractional, limits the number of samples to floor(max_epochs * M); None is
    without end."""

    def __init__(self, tokens: TokenView, sequence_length: int, max_epochs: float | None = 1.0) -> None:
        super().__init__(tokens, sequence_length)
        self.num_samples = None if max_epochs is None else math.floor(max_epochs * self.samples_per_epoch)

    @property
    def grid(self) -> Hashable:
        order = self.sample_order()
        listed = (order.documents, order.scores, order.descending)
        # empty documents at the ends of a range of the file change nothing, so its tokens identify it
        return self.tokens.span, self.tokens.num_tokens, listed, order.scores and self.tokens.documents_of, self.sequence_length

    def pieces(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self.tokens.runs(self.windows(indices) * self.sequence_length, self.sequence_length + 1)


class SequentialSamples(_Windows):
    """The windows one after another, as the documents are written or, of a view that was sorted, in its order, every epoch."""

    def __init__(self, tokens: TokenView, sequence_length: int, max_epochs: float | None = 1.0) -> None:
        super().__init__(tokens, sequence_length, max_epochs)
        self.order = "sequential"
        if isinstance(tokens, ListedDocuments) and tokens.scores is not None:
            self.order += f" by {tokens.scores.digest} {'descending' if tokens.descending else 'ascending'}"

    def sample_order(self) -> SampleOrder:
        return self._sample_order("sequential")

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return indices % self.samples_per_epoch


class PermutedSamples(_Windows):
    """The windows permuted by a key from (seed, e) in epoch e = floor(i / M): sample i is window permutation_e(i mod M)."""

    order = "permuted"

    def __init__(self, tokens: TokenView, sequence_length: int, seed: int, max_epochs: float | None = 1.0) -> None:
        super().__init__(tokens, sequence_length, max_epochs)
        self._seed = seed

    def sample_order(self) -> SampleOrder:
        return self._sample_order("permuted", key=self._seed)

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return permuted(indices, self.samples_per_epoch, self._seed)


def permuted(indices: npt.NDArray[np.int64], size: int, seed: int) -> npt.NDArray[np.int64]:
    """Index i as permutation_e(i mod ``size``), e = floor(i / size), whose key is (``seed``, e). (n,) to (n,)."""
    epochs, places = np.divmod(indices, size)
    found = np.empty(len(indices), np.int64)
    for epoch in np.unique(epochs):
        (rows,) = np.nonzero(epochs == epoch)
        found[rows] = Permutation(size, derive_key(seed, int(epoch)))(places[rows])
    return found


class _ShuffledSamples(Samples):
    """What GPT-NeoX and Megatron-LM have in common: shuffled documents, cut into samples, which are shuffled again.

    Both write down the document and offset of every sample. These are simply where flat token k s of the shuffled
    documents lies, which is found when a sample is read (``ShuffledDocuments``). Memory: about 6 bytes per document and
    epoch (10 from 2**31 documents on), 4 (8 from 2**32 - 2 samples on) per sample; 4 per document more while it is built.

    ``epoch_ranges`` replaces what follows from the request ``num_samples``: an order that was recorded.
    """

    order: Literal["neox", "megatron"]

    def __init__(
        self,
        tokens: TokenView,
        sequence_length: int,
        seed: int,
        num_samples: int,
        *,
        epoch_ranges: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(tokens, sequence_length)
        if num_samples < 1:
            raise ValueError(f"{num_samples} samples of {tokens.file.path} requested, expected at least 1")
        self._seed = seed
        self.num_epochs = -(-(num_samples * sequence_length + 1) // tokens.num_tokens)
        if epoch_ranges is not None:
            self.num_epochs = epoch_ranges[-1][1]
        self.num_samples: int = self._samples_in(self.num_epochs)
        # The documents are shuffled within these ranges of epochs, the samples within the ranges of samples they make.
        self.epoch_ranges = self._epoch_ranges(num_samples) if epoch_ranges is None else list(epoch_ranges)
        large = tokens.num_documents * self.num_epochs + self.num_samples >= CACHED
        arrays = cached(self._cache_key(), self._make) if large else self._make()
        self._documents = ShuffledDocuments(arrays)
        self._shuffle = arrays["shuffle"]

    def _make(self) -> Arrays:
        random = np.random.RandomState(self._seed)
        order = self._shuffled_documents(random)
        arrays = ShuffledDocuments.arrays_of(order, _sizes(self.tokens), self.tokens.first_document)
        bounds = [0] + [self._samples_in(last) for _, last in self.epoch_ranges]
        kind = np.uint32 if self.num_samples < 2**32 - 2 else np.int64
        shuffle = np.arange(self.num_samples, dtype=kind)
        for i in range(len(self.epoch_ranges)):
            random.shuffle(shuffle[bounds[i] : bounds[i + 1]])
        return arrays | {"shuffle": shuffle}

    def _cache_key(self) -> dict[str, Any]:
        """All that the arrays depend on. The sizes are hashed whole; a fingerprint of a large file is of samples of it."""
        digest, view = hashlib.blake2b(digest_size=16), self.tokens
        for first in range(view.first_document, view.last_document, _BLOCK):
            digest.update(view.sizes_between(first, min(first + _BLOCK, view.last_document)).tobytes())
        # of a list's documents the arrays hold their places in it, so which ones these are is no part of it
        order = self.sample_order().model_copy(update={"documents": None}).model_dump(mode="json")
        return {"version": 1, "sizes": digest.hexdigest(), **order}

    def sample_order(self) -> SampleOrder:
        return self._sample_order(self.order, key=self._seed, epochs=tuple(self.epoch_ranges))

    def _samples_in(self, epochs: int) -> int:
        return (epochs * self.tokens.num_tokens - 1) // self.sequence_length

    @abstractmethod
    def _epoch_ranges(self, num_samples: int) -> list[tuple[int, int]]:
        """Ranges of epochs, which together are range(num_epochs), that are shuffled each for itself."""

    def _shuffled_documents(self, random: np.random.RandomState) -> np.ndarray:
        view = self.tokens
        count = view.num_documents
        order = np.empty(self.num_epochs * count, np.int32 if view.last_document < 2**31 else np.int64)
        for first in range(0, count, _BLOCK):
            ids = np.arange(view.first_document + first, view.first_document + min(first + _BLOCK, count))
            for epoch in range(self.num_epochs):
                order[epoch * count + first : epoch * count + first + len(ids)] = ids
        for first, last in self.epoch_ranges:
            random.shuffle(order[first * count : last * count])
        return order

    @property
    def document_order(self) -> np.ndarray:
        """Document ids (of the whole file; of a list: places in it) in the order they are read, all epochs; GPT-NeoX's
        ``doc_idx``."""
        return self._documents.order

    @property
    def shuffle(self) -> np.ndarray:
        """The place in the row of cut samples of each sample, (num_samples,); GPT-NeoX's ``shuffle_idx``."""
        return self._shuffle

    def starts(self, places: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Rows of GPT-NeoX's ``sample_idx``, (..., 2): index into ``document_order`` and offset of flat token k s."""
        return np.stack(self._documents.locate(np.asarray(places, np.int64) * self.sequence_length), axis=-1)

    def pieces(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        view, documents = self.tokens, self._documents
        first = self._shuffle[indices].astype(np.int64) * self.sequence_length
        rows, begins, lengths = documents.pieces(first, self.sequence_length + 1)
        return view.file.starts_of(view.in_file(documents.order[rows].astype(np.int64))) + begins, lengths


def _sizes(view: TokenView) -> npt.NDArray[np.int32]:
    sizes = np.empty(view.num_documents, np.int32)
    for first in range(0, view.num_documents, _BLOCK):
        last = min(first + _BLOCK, view.num_documents)
        sizes[first:last] = view.sizes_between(view.first_document + first, view.first_document + last)
    return sizes


class NeoxSamples(_ShuffledSamples):
    """GPT-NeoX's order: documents of all epochs shuffled together, then samples of all epochs shuffled together.

    ``num_samples`` is the request, which decides the number of epochs: the smallest E with floor((E t - 1) / s) of at
    least that many samples. All of these then exist. A run that needs 1.2 epochs thus reads some text twice and some
    never. Samples cross from one epoch into the next, so a view shorter than one sample (a small test split) will do.
    """

    order: Literal["neox", "megatron"] = "neox"
    least_tokens = 1

    def _epoch_ranges(self, num_samples: int) -> list[tuple[int, int]]:
        return [(0, self.num_epochs)]


class MegatronSamples(_ShuffledSamples):
    """Megatron-LM's order: as GPT-NeoX's, but a last epoch of which less than 80% is needed is shuffled for itself."""

    order: Literal["neox", "megatron"] = "megatron"

    def _epoch_ranges(self, num_samples: int) -> list[tuple[int, int]]:
        last = self.num_epochs - 1
        if last and num_samples - self._samples_in(last) < int(0.80 * self.samples_per_epoch):
            return [(0, last), (last, self.num_epochs)]
        return [(0, self.num_epochs)]
