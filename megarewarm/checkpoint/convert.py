"""Conversion from any readable checkpoint format to any writable one, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megarewarm.checkpoint.export.huggingface import export
from megarewarm.checkpoint.export.neox import export_neox
from megarewarm.checkpoint.export.own import export_own
from megarewarm.checkpoint.export.tokenizer_files import ExportedTokenizer, exported_tokenizer, without_tokenizer
from megarewarm.checkpoint.source import OpenedCheckpoint
from megarewarm.checkpoint.tokenizer_source import named_tokenizer
from megarewarm.checkpoint.vocabulary import resize
from megarewarm.checkpoint.weights import Description, OnBytes, Weights, expected_shapes, refuse_another_head
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.optimizer_state import state_bytes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ConvertOptions:
    """What is to be written. ``form``: of ``FORMS``. ``dtype`` None: as it is stored. ``vocab_size`` None: as many rows as
    there are. ``tokenizer`` None: the one that comes with the checkpoint."""

    form: str
    dtype: torch.dtype | None = None
    tensor_ranks: int = 1
    vocab_size: int | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Conversion:
    """What a form's writer is given: ``weights`` of a model of shape ``config``, and the ``source`` that knows the rest.
    ``on_bytes``: to be called with the bytes of what is read beside the weights."""

    source: OpenedCheckpoint
    weights: Weights
    config: ModelConfig
    destination: Path
    options: ConvertOptions
    on_bytes: OnBytes = lambda _: None


@dataclass(frozen=True)
class Form:
    """A form that is written. ``write`` returns notes on what a reader may not expect, and raises ``UserError`` where the
    destination holds anything else, and before anything is written. ``training``: it holds a training state too, and
    therefore fp32 masters. ``divided``: it has files for each tensor rank."""

    write: Callable[[Conversion], list[str]]
    training: bool = False
    divided: bool = False


class Watched:
    """``weights`` that report the bytes of each tensor once it is read."""

    def __init__(self, weights: Weights, on_bytes: OnBytes) -> None:
        self.where = weights.where
        self._weights, self._on_bytes = weights, on_bytes

    def describe(self) -> Mapping[str, Description]:
        return self._weights.describe()

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        self._on_bytes(tensor.nbytes)
        return tensor


def bytes_to_read(source: OpenedCheckpoint, options: ConvertOptions) -> int:
    """What ``convert`` will read and report."""
    size = sum(item.nbytes for item in weights_for(source, options).describe().values())
    if FORMS[options.form].training and source.training is not None:
        return size + state_bytes(source.training.optimizer, source.model_config, source.training.trained)
    return size * options.tensor_ranks


def convert(
    source: OpenedCheckpoint, destination: Path, options: ConvertOptions, on_bytes: OnBytes = lambda _: None
) -> list[str]:
    """Write ``source`` to ``destination`` and return notes on what a reader may not expect.

    ``on_bytes`` is called with the bytes of each tensor that was read. Raises ``UserError`` if the destination holds
    anything else, where the ranks don't divide the model, and for options that can't be met; nothing is written then.
    """
    form = FORMS[options.form]
    if options.tensor_ranks != 1 and not form.divided:
        able = " or ".join(f"'--to {name}'" for name, other in FORMS.items() if other.divided)
        raise UserError(f"--tp {options.tensor_ranks}: only {able} has files for each tensor rank; leave it out")
    if options.dtype not in (None, torch.float32) and form.training:
        raise UserError(f"--dtype: {options.form}'s own checkpoints hold fp32 masters; leave it out")
    rows = options.vocab_size if options.vocab_size is not None else source.model_config.vocab_size
    if rows < 1:
        raise UserError(f"--vocab-size {rows}: at least one row is needed")
    refuse_another_head(weights_for(source, options), expected_shapes(source.model_config))
    weights: Weights = Watched(weights_for(source, options), on_bytes)
    weights, config, resized = resize(weights, source.model_config, rows)
    notes = [resized] if resized else []
    if form.training and resized and source.training is not None:
        raise UserError("--vocab-size: with Adam's moments in the checkpoint rows can't be changed; convert to hf first")
    notes += form.write(Conversion(source, weights, config, destination, options, on_bytes))
    if form.training and source.training is None:
        notes.append("weights only: start.intent 'rewarm' can load it")
    return notes


def _own(it: Conversion) -> list[str]:
    export_own(it.source, it.weights, it.config, it.destination, it.on_bytes)
    return []


def _huggingface(it: Conversion) -> list[str]:
    texts = _texts(it)
    export(it.weights, it.config, it.destination, tokenizer=texts, dtype=it.options.dtype, lineage=it.source.lineage)
    return [*texts.notes, *([] if texts.files else ["give one with --tokenizer"])]


def _neox(it: Conversion) -> list[str]:
    texts = _texts(it)
    notes = [] if texts.files else list(texts.notes)
    files = {name: data for name, data in texts.files.items() if name == "tokenizer.json"}
    step = it.source.training.step if it.source.training is not None else 0
    ranks, dtype = it.options.tensor_ranks, it.options.dtype
    export_neox(it.weights, it.config, it.destination, step=step, tensor_ranks=ranks, dtype=dtype, tokenizer=files)
    if files:
        notes.append(f"GPT-NeoX's tokenizer_type is HFTokenizer, its vocab_file {it.destination / 'tokenizer.json'}")
    return ["weights only: load it with 'finetune: true'", *notes]


FORMS: dict[str, Form] = {
    "hf": Form(_huggingface),
    "neox": Form(_neox, divided=True),
    "megarewarm": Form(_own, training=True),
}
"""Every form that is written, by its word after ``--to``; ``arguments.FORMS`` holds the words for the command lines."""


def _texts(it: Conversion) -> ExportedTokenizer:
    """The tokenizer's files for ``it``; without them, and with a note, where the one of the source can't be exported."""
    tokenizer, given = it.source.tokenizer, it.options.tokenizer
    if given is not None:
        return exported_tokenizer(replace(tokenizer, file=named_tokenizer(given, "--tokenizer")), it.config)
    try:
        return exported_tokenizer(tokenizer, it.config)
    except UserError as error:
        return without_tokenizer(tokenizer, str(error))


def weights_for(source: OpenedCheckpoint, options: ConvertOptions) -> Weights:
    """The stored weights, so that a round trip gives the same bits; the fp32 masters where fp32 is asked for."""
    full = FORMS[options.form].training or options.dtype == torch.float32
    return source.weights if full else source.stored
