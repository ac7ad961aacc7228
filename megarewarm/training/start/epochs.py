"""Lengths in epochs, which become steps once the training data of a run are there to be counted."""

from __future__ import annotations

from fractions import Fraction

from megarewarm.config.budget import Budget, in_epochs, without_epochs
from megarewarm.config.data import DataConfig, Source
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import part_of
from megarewarm.data.files.token_file import TokenView, open_tokens
from megarewarm.data.order.packed_samples import PackedSamples
from megarewarm.data.order.row_samples import RowSamples
from megarewarm.errors import UserError


def settle_epochs(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """``config`` with every length that is in epochs in steps, and the lines that say so; opens the training files for it.

    An epoch is as many samples as all sources of ``data.train`` hold; what is replayed comes on top. The budget is rounded down
    to whole steps, and its sources may be read as often as it says where they don't say otherwise. Raises ``UserError``.
    """
    keys = list(in_epochs(config))
    if not keys:
        return config, []
    new, batch = _samples(config, keys[0]), config.training.global_batch
    replayed = Fraction(repr(config.replay.fraction)) if config.replay is not None else Fraction(0)
    steps = new / (1 - replayed) / batch
    settled = without_epochs(config, steps)
    budget = config.training.budget
    if budget.unit == "epochs":
        whole = int(Fraction(repr(budget.amount)) * steps)
        if whole < 1:
            raise UserError(
                f"training.budget: {budget} of {new:,} samples is less than one step of {batch:,}; lower "
                f"training.global_batch, or give more epochs"
            )
        training = settled.training.model_copy(update={"budget": Budget(amount=whole, unit="steps")})
        settled = settled.model_copy(update={"training": training, "data": _readable(config, budget.amount)})
    lengths = [f"{key} {_at(config, key)} is {_at(settled, key)}" for key in keys]
    share = f", and {float(replayed):.4g} of each batch is replayed" if replayed else ""
    each = f"an epoch is {new:,} samples of {config.data.sequence_length:,} tokens{share}"
    return settled, [f"{'; '.join(lengths)}: {each}"]


def _samples(config: RunConfig, key: str) -> int:
    try:
        return sum(_samples_of(source, config) for source in config.data.train)
    except UserError as error:
        raise UserError(f"{key}: epochs are counted in the training data: {error}") from error


def _samples_of(source: Source, config: RunConfig) -> int:
    if config.data.pack is not None and source.layout != "rows":
        return packed(source, config).samples_per_epoch
    view, length = _view(source, config), config.data.sequence_length
    if source.layout == "rows":
        return RowSamples(view, length, source.first_row).samples_per_epoch
    return max(0, view.num_tokens - 1) // length


def packed(source: Source, config: RunConfig) -> PackedSamples:
    """The rows that ``data.pack`` makes of a training source, in their documents' order."""
    return PackedSamples(_view(source, config), config.data.sequence_length, None)


def _view(source: Source, config: RunConfig) -> TokenView:
    vocab_size = config.model.vocab_size if config.model is not None else None
    return part_of(open_tokens(source.path, dtype=source.dtype, vocab_size=vocab_size), source, config.data)


def _readable(config: RunConfig, epochs: float) -> DataConfig:
    """The data section whose sources may be read ``epochs`` times, where they don't say how often."""
    train = [
        source if "max_epochs" in source.model_fields_set or epochs <= 1 else source.model_copy(update={"max_epochs": epochs})
        for source in config.data.train
    ]
    return config.data.model_copy(update={"train": train})


def _at(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config
