"""From any checkpoint we read to any form we write, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megarewarm.checkpoint.export.huggingface import export
from megarewarm.checkpoint.export.neox import export_neox
from megarewarm.checkpoint.export.own import export_own
from megarewarm.checkpoint.export.tokenizer_files import exported_tokenizer
from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.source import OpenedCheckpoint
from megarewarm.checkpoint.tokenizer_source import TokenizerSource, named_tokenizer
from megarewarm.checkpoint.vocabulary import resize
from megarewarm.checkpoint.weights import Description, Weights
from megarewarm.config.schema import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.optimizer_state import state_bytes
from megarewarm.model.size import count_parameters

Form = Literal["hf", "neox", "megarewarm"]
Advance = Callable[[int], None]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Wish:
    """What is to be written. ``dtype`` None: as it is stored. ``vocab_size`` None: as many rows as there are. ``tokenizer``
    None: the one that comes with the checkpoint."""

    form: Form
    dtype: torch.dtype | None = None
    tensor_ranks: int = 1
    vocab_size: int | None = None
    tokenizer: Path | None = None


class _Watched:
    """``weights`` that report the bytes of each tensor once it is read."""

    def __init__(self, weights: Weights, advance: Advance) -> None:
        self.where = weights.where
        self._weights, self._advance = weights, advance

    def describe(self) -> Mapping[str, Description]:
        return self._weights.describe()

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        self._advance(tensor.nbytes)
        return tensor


def bytes_to_read(source: OpenedCheckpoint, wish: Wish) -> int:
    """What ``convert`` will read and report."""
    size = sum(item.nbytes for item in _weights_for(source, wish).describe().values())
    if wish.form == "megarewarm" and source.training is not None:
        return size + round(state_bytes(source.training.optimizer, source.model_config) * count_parameters(source.model_config))
    return size * (wish.tensor_ranks if wish.form == "neox" else 1)


def convert(source: OpenedCheckpoint, destination: Path, wish: Wish, advance: Advance = lambda _: None) -> list[str]:
    """Write ``source`` to ``destination`` and return notes on what a reader may not expect.

    ``advance`` is called with the bytes of each tensor that was read. Raises ``UserError`` where the destination holds anything
    else, where the ranks don't divide the model, and for a wish that can't be; nothing is written then.
    """
    if wish.tensor_ranks != 1 and wish.form != "neox":
        raise UserError(f"--tp {wish.tensor_ranks}: only '--to neox' has files for each tensor rank; leave it out")
    if wish.dtype not in (None, torch.float32) and wish.form == "megarewarm":
        raise UserError("--dtype: megarewarm's own checkpoints hold fp32 masters; leave it out")
    rows = wish.vocab_size if wish.vocab_size is not None else source.model_config.vocab_size
    if rows < 1:
        raise UserError(f"--vocab-size {rows}: at least one row is needed")
    weights: Weights = _Watched(_weights_for(source, wish), advance)
    weights, config, resized = resize(weights, source.model_config, rows)
    notes = [resized] if resized else []
    if wish.form == "megarewarm":
        if resized and source.training is not None:
            raise UserError("--vocab-size: with Adam's moments in the checkpoint rows can't be changed; convert to hf first")
        notes += export_own(source, weights, config, destination, advance)
    else:
        notes += write_weights(weights, config, destination, wish, source.lineage, source.tokenizer, step=_step(source))
    return notes


def write_weights(
    weights: Weights,
    config: ModelConfig,
    destination: Path,
    wish: Wish,
    lineage: Lineage,
    tokenizer: TokenizerSource,
    *,
    step: int = 0,
) -> list[str]:
    """Write weights alone in one of the foreign forms, with ``tokenizer``, where the wish names none; notes and errors as
    ``convert``."""
    if wish.tokenizer is not None:
        tokenizer = replace(tokenizer, file=named_tokenizer(wish.tokenizer, "--tokenizer"))
    notes = [] if wish.form == "hf" else ["weights only: load it with 'finetune: true'"]
    try:
        texts = exported_tokenizer(tokenizer, config)
    except UserError as error:
        if wish.tokenizer is not None:
            raise
        texts = exported_tokenizer(replace(tokenizer, file=None), config)
        notes.append(str(error))
    if wish.form == "hf":
        export(weights, config, destination, tokenizer=texts, dtype=wish.dtype, lineage=lineage)
        return [*notes, *texts.notes, *([] if texts.files else ["give one with --tokenizer"])]
    files = {name: data for name, data in texts.files.items() if name == "tokenizer.json"}
    ranks = wish.tensor_ranks
    export_neox(weights, config, destination, step=step, tensor_ranks=ranks, dtype=wish.dtype, tokenizer=files)
    if files:
        notes.append(f"GPT-NeoX's tokenizer_type is HFTokenizer, its vocab_file {destination / 'tokenizer.json'}")
    return notes


def _step(source: OpenedCheckpoint) -> int:
    return source.training.step if source.training is not None else 0


def _weights_for(source: OpenedCheckpoint, wish: Wish) -> Weights:
    """The stored weights, so that a round trip gives the same bits; the fp32 masters where fp32 is asked for."""
    full = wish.form == "megarewarm" or wish.dtype == torch.float32
    return source.weights if full else source.stored
