"""A checkpoint with rows for the new tokens of an extended tokenizer, made of the rows of each token's old pieces.

A new token t was the old tokens p_1 ... p_n. Its rows of the embedding E and of the head H, for each way of ``ROW_INITS``:

    mean      E_t = 1/n sum_i E_(p_i), and so H_t (Gee et al. 2022, fast vocabulary transfer)
    weighted  E_t = sum_i exp(2i) E_(p_i) / sum_i exp(2i): the last piece is where a model has read the whole token;
              H_t = sum_i exp(-2i) H_(p_i) / sum_i exp(-2i): the first piece is what predicts it (AdaptiVocab, arXiv 2503.19693)
    zero      0: an embedding that says nothing, a logit of 0
    noise     drawn from a normal with the mean and standard deviation, channel by channel, of all old rows (Hewitt 2021, with a
              diagonal covariance)

A tied matrix is the embedding. Old rows stay bit for bit, so logits of old tokens on text of old tokens do too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megarewarm.checkpoint.compare_logits import LogitsDifference, SampleTokens, compare
from megarewarm.checkpoint.convert import FORMS, Conversion, ConvertOptions, Watched, weights_for
from megarewarm.checkpoint.export.tokenizer_files import exported_tokenizer, refuse_existing
from megarewarm.checkpoint.lineage import Stage
from megarewarm.checkpoint.source import ForeignCheckpoint, OpenedCheckpoint
from megarewarm.checkpoint.tokenizer_source import TokenizerSource, loaded, named_tokenizer
from megarewarm.checkpoint.vocabulary import resize
from megarewarm.checkpoint.weights import Description, OnBytes, Weights, check, expected_shapes, refuse_another_head
from megarewarm.config.model import ModelConfig
from megarewarm.data.text.extended_tokenizer import pieces_of
from megarewarm.data.text.tokenizers import HuggingFaceTokenizer
from megarewarm.errors import UserError
from megarewarm.model.initialize import generator_of
from megarewarm.model.parameters import EMBEDDING, HEAD

_BLOCK = 4096
"""Rows that are computed at a time, in float64."""


@dataclass(frozen=True)
class NewTokens:
    """The tokens that ``new`` has and ``old`` lacks, ids ``first`` to ``stop`` - 1; ``pieces``: the old ids of each."""

    old: HuggingFaceTokenizer
    new: HuggingFaceTokenizer
    first: int
    stop: int
    pieces: list[list[int]]

    def rows(self, config: ModelConfig) -> int:
        """Rows of the vocabulary of the extended model, padded ones of the old included."""
        return max(config.vocab_size, self.stop)

    def description(self, config: ModelConfig) -> str:
        """For people: which rows are new, and whether the padding of the model ``config`` holds them."""
        padding, more = config.vocab_size - self.first, self.rows(config) - config.vocab_size
        new = f"{self.stop - self.first:,} new rows, {self.first}-{self.stop - 1}"
        held = f"the checkpoint's {config.vocab_size:,} rows" + (f", {padding:,} of them padding," if padding else "")
        return f"{new}: {held} " + (f"became {config.vocab_size + more:,}" if more else "are enough")


def new_tokens(source: OpenedCheckpoint, tokenizer: Path, old: Path | None = None) -> NewTokens:
    """Of ``tokenizer`` (a file or folder) over that of ``source``, or over ``old``. Raises ``UserError`` where the latter is
    not known, where an old id has another token, and where nothing is new."""
    file = source.tokenizer.file if old is None else named_tokenizer(old, "--old-tokenizer")
    if file is None:
        raise UserError(f"{source.name}: comes with no tokenizer, so what its ids are is not known; give --old-tokenizer")
    # the lineage names it, wherever the next command is started
    before, after = loaded(file), loaded(named_tokenizer(tokenizer, "--tokenizer").absolute())
    for each in (before, after):
        if not isinstance(each, HuggingFaceTokenizer):
            raise UserError(f"{each.path}: a sentencepiece model's tokens have no old pieces here; give a tokenizer.json")
    assert isinstance(before, HuggingFaceTokenizer) and isinstance(after, HuggingFaceTokenizer)
    rows = source.model_config.vocab_size
    if before.vocab_size > rows:
        raise UserError(
            f"{before.path} has ids up to {before.vocab_size - 1}, {source.name} has {rows} rows: it is another model's "
            f"tokenizer; give --old-tokenizer"
        )
    for token, number in before.vocabulary.items():
        if (found := after.vocabulary.get(token)) != number:
            now = "has no id" if found is None else f"has id {found}"
            raise UserError(
                f"{after.path}: token {token!r} {now}, it is {number} in {before.path}, with which {source.name} was trained; "
                f"old ids must stay, as 'megarewarm extend-tokenizer' keeps them"
            )
    if among := [token for token, i in after.vocabulary.items() if i < before.vocab_size and token not in before.vocabulary]:
        raise UserError(
            f"{after.path}: new token {among[0]!r} has id {after.vocabulary[among[0]]}, which {source.name} has a row for: give"
            f" new tokens ids from {before.vocab_size} on, as 'megarewarm extend-tokenizer' does"
        )
    if after.vocab_size <= before.vocab_size:
        raise UserError(
            f"{after.path}: has {after.vocab_size:,} ids, no more than {before.path}, with which {source.name} was trained; "
            f"give a tokenizer of 'megarewarm extend-tokenizer'"
        )
    first, stop = before.vocab_size, after.vocab_size
    return NewTokens(before, after, first, stop, pieces_of(before, after, range(first, stop)))


class ExtendedVocabulary:
    """``weights`` with rows for new tokens. ``embeddings`` (new, h): those of the embedding, where they are known already."""

    def __init__(
        self, weights: Weights, config: ModelConfig, new: NewTokens, init: str, seed: int = 0, embeddings: Tensor | None = None
    ) -> None:
        self.where = f"{weights.where}, extended"
        self.config = config.model_copy(update={"vocab_size": new.rows(config)})
        self._weights, self._new, self._init, self._seed, self._embeddings = weights, new, init, seed, embeddings

    def describe(self) -> Mapping[str, Description]:
        shapes = expected_shapes(self.config)
        found = self._weights.describe()
        return {name: Description(shape, found[name].dtype, found[name].place) for name, shape in shapes.items()}

    def read(self, name: str) -> Tensor:
        old = self._weights.read(name)
        if name not in (EMBEDDING, HEAD):
            return old
        first, stop = self._new.first, self._new.stop
        extended = torch.zeros(self.config.vocab_size, *old.shape[1:], dtype=old.dtype)
        extended[: len(old)] = old
        known = name == EMBEDDING and self._embeddings is not None
        extended[first:stop] = (self._embeddings if known else self.rows(name, old[:first])).to(old.dtype)  # type: ignore[union-attr]
        return extended

    def rows(self, name: str, old: Tensor) -> Tensor:
        """(new, h) float64: the new rows of the embedding or the head ``name``, from its ``old`` ones (first, h)."""
        new = self._new.stop - self._new.first
        if self._init == "zero":
            return torch.zeros(new, old.shape[1], dtype=torch.float64)
        if self._init == "noise":
            mean, deviation = _moments(old)
            drawn = torch.randn(new, old.shape[1], generator=generator_of(self._seed, name), dtype=torch.float64)
            return mean + deviation * drawn
        slope = 0.0 if self._init == "mean" else 2.0 if name == EMBEDDING else -2.0
        return torch.cat([_weighted(old, self._new.pieces[i : i + _BLOCK], slope) for i in range(0, new, _BLOCK)])


def _weighted(old: Tensor, pieces: Sequence[Sequence[int]], slope: float) -> Tensor:
    """(len(pieces), h) float64: of the rows of each list of pieces, the i-th weighted by exp(slope i); zeros for none."""
    weights = [torch.softmax(slope * torch.arange(len(each), dtype=torch.float64), 0) for each in pieces]
    of = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([len(each) for each in pieces]))
    taken = old[[piece for each in pieces for piece in each]].double() * torch.cat(weights)[:, None]
    return torch.zeros(len(pieces), old.shape[1], dtype=torch.float64).index_add_(0, of, taken)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (h,) float64."""
    mean = torch.stack([block.double().sum(0) for block in rows.split(_BLOCK)]).sum(0) / len(rows)
    squares = torch.stack([(block.double() - mean).square().sum(0) for block in rows.split(_BLOCK)]).sum(0)
    return mean, (squares / len(rows)).sqrt()


def bytes_to_read(source: OpenedCheckpoint, new: NewTokens, options: ConvertOptions) -> int:
    """What ``extend`` reports: the source once, the extended model when it is compared and when it is written."""
    weights = weights_for(source, options)
    extended = ExtendedVocabulary(weights, source.model_config, new, "zero").describe()
    return sum(item.nbytes for item in weights.describe().values()) + 2 * sum(item.nbytes for item in extended.values())


def refuse(source: OpenedCheckpoint, destination: Path, new: NewTokens, options: ConvertOptions) -> None:
    """Raise ``UserError`` for what ``extend`` could not write: where ``destination`` exists, weights do not fit their model, or
    the tokenizer can't be exported."""
    refuse_existing(destination)
    config, weights = source.model_config, weights_for(source, options)
    check(weights, expected_shapes(config))
    refuse_another_head(weights, expected_shapes(config))
    if not FORMS[options.form].training:
        exported_tokenizer(_tokenizer(source, new), config.model_copy(update={"vocab_size": new.rows(config)}))


def _tokenizer(source: OpenedCheckpoint, new: NewTokens) -> TokenizerSource:
    return replace(source.tokenizer, file=new.new.path)


def extend(
    source: OpenedCheckpoint,
    destination: Path,
    new: NewTokens,
    init: str,
    options: ConvertOptions,
    tokens: SampleTokens,
    *,
    seed: int = 0,
    embeddings: Tensor | None = None,
    intent: str = "",
    on_bytes: OnBytes = lambda _: None,
) -> tuple[LogitsDifference, list[str]]:
    """Write ``source`` with the rows ``new``; returns the comparison of both models on ``tokens``, old ids, and notes.

    ``embeddings``: as in ``ExtendedVocabulary``; ``intent``: more words for the lineage. ``on_bytes``: called with the bytes of
    each tensor that was compared or written. Raises ``UserError`` before anything is written: as ``refuse``, and where a logit
    of an old id is another.
    """
    refuse(source, destination, new, options)
    config, weights = source.model_config, weights_for(source, options)
    extended = ExtendedVocabulary(weights, config, new, init, seed, embeddings)
    watched = Watched(extended, on_bytes)
    old, old_config, _ = resize(Watched(weights, on_bytes), config, new.first)
    difference = compare((old, old_config), (watched, extended.config), tokens)
    if difference.largest != 0:
        raise UserError(
            f"{source.name}: logits of old tokens moved by {difference.largest:.3g}, which they should not, so nothing was "
            f"written: are its weights finite?"
        )
    result = ForeignCheckpoint(destination.name, "extended", extended.config, lambda: extended, [], _tokenizer(source, new))
    result.lineage = source.lineage.extended(
        Stage(
            run=destination.name,
            intent=f"vocabulary extended by {new.stop - new.first:,} rows ({init}){intent}",
            started_from=source.name,
            grown=True,
            new_rows=(new.first, new.stop),
            tokenizers=[new.new.identity()],
            eod=source.tokenizer.eod,
        )
    )
    return difference, FORMS[options.form].write(Conversion(result, watched, extended.config, destination, options))
