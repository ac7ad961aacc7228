"""Hugging Face folders, as transformers 4.x and 5.x wrote them: the model's shape and its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarewarm.checkpoint.foreign.families import model_type_of
from megarewarm.checkpoint.foreign.json_file import first_line, read_json
from megarewarm.checkpoint.foreign.pickles import read_pickle
from megarewarm.checkpoint.weights import FLOATS, Description, misfit, unreadable
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD, cards
from megarewarm.untrusted import is_name

# Causal masks and rotary frequencies that older versions stored; fp16 ones are too coarse to be of use.
_BUFFERS = re.compile(r"(^|\.)(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
# in the order in which transformers looks for them
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def read_model_config(folder: str | Path) -> tuple[ModelConfig, list[str]]:
    """The shape in ``folder/config.json``, and notes on what a reader of it may not expect. Raises UserError naming the file
    and key for another model type or a feature that is not there here."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    return model_type_of(path, raw).read(path, raw)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights in ``folder``: safetensors, or else .bin. Raises ``UserError`` if there are none."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder / 'adapter_config.json'}: transformers adds the adapter that it describes to the weights; merge the two "
            f"(peft: merge_and_unload, save_pretrained), or remove the file to load the weights without it"
        )
    there = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not there:
        zero = "; its weights are in DeepSpeed's files alone: write them with zero_to_fp32.py beside them"
        zero = zero if (folder / "latest").is_file() else ""
        raise UserError(f"{folder}: no weights found; expected one of {', '.join(WEIGHT_FILES)}{zero}")
    found = there[0]
    if found.suffix != ".json":
        return [found]
    index = read_json(found).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{found}: no 'weight_map' in it, which names the file of each tensor")
    for name in index.values():
        if not is_name(name):
            raise UserError(f"{found}: names {name!r}, which is no file beside it; get the folder from a source you trust")
    return [folder / name for name in sorted(set(index.values()))]


class HuggingFaceWeights:
    """The weights in a folder, from headers until they are read. Old buffers are left out. What is stored in several tensors
    and is one here appears where all of them fit; otherwise each appears under its stored name."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.where = str(folder)
        self._stored: dict[str, tuple[Path, Description]] = {}
        path = folder / "config.json"
        raw = read_json(path)
        self._type = model_type_of(path, raw)
        self._config, _ = self._type.read(path, raw)
        self._cards = cards(self._config)
        for file in weight_files(folder):
            for name, shape, dtype in _headers(file):
                if not _BUFFERS.search(name):
                    self._stored[name] = file, Description(shape, dtype, f"{name} in {file.name}")
        self._names = {name: self._type.stored(name) for name in self._cards}
        self._names.setdefault(HEAD, self._type.stored(HEAD))  # stored beside tied embeddings, it must equal them
        self._tolerate_other_prefixes()

    def _tolerate_other_prefixes(self) -> None:
        """Names without the prefix of all (the bare model was saved), and GPT-NeoX's head as transformers 5 calls it."""
        prefix = self._type.prefix
        if not any(name.startswith(prefix) for name in self._stored):
            self._names = {ours: tuple(each.removeprefix(prefix) for each in theirs) for ours, theirs in self._names.items()}
        if "lm_head.weight" in self._stored:
            self._names[HEAD] = ("lm_head.weight",)

    def describe(self) -> Mapping[str, Description]:
        """As ``Weights``. Raises ``UserError`` for tensors that do not fit config.json, by their stored names."""
        self._refuse_misfits()
        found, used = {}, set()
        for ours, theirs in self._names.items():
            if parts := [self._stored[name][1] for name in theirs if name in self._stored]:
                used |= set(theirs)
                found[ours] = parts[0] if len(theirs) == 1 else self._together(ours, parts)
        return found | {name: item for name, (_, item) in self._stored.items() if name not in used}

    def _refuse_misfits(self) -> None:
        problems = []
        embedding, head = self._names[EMBEDDING][0], self._names[HEAD][0]
        rows = self._stored[embedding][1].shape[:1] if embedding in self._stored else ()
        if rows and rows != (self._config.vocab_size,):
            raise UserError(
                f"{self.where}: vocab_size in config.json is {self._config.vocab_size}, yet {embedding} has {rows[0]} rows: a "
                f"vocabulary that was resized in one of them alone; write {rows[0]} into config.json, or resize the tensors"
            )
        if head not in self._stored and not self._config.tie_embeddings and len(self._stored) > 1:
            raise UserError(
                f"{self.where}: missing tensor {head}, the head, since tie_word_embeddings in config.json is false: set it to "
                f"true if the head is the embedding, or get all of the weights"
            )
        for ours, card in self._cards.items():
            theirs = self._names[ours]
            together = card.interleaved if len(theirs) > 1 else None
            counts = (card.shape[0],) if together is None else together.rows(card.shape[0])
            for name, count in zip(theirs, counts, strict=True):
                shape = (count, *card.shape[1:])
                if name not in self._stored:
                    problems.append(f"missing tensor {name}")
                elif (item := self._stored[name][1]).shape != shape:
                    problems.append(f"{item.place} has shape {item.shape}, expected {shape} by config.json")
        if problems:
            raise misfit(self.where, problems)

    def _together(self, ours: str, parts: list[Description]) -> Description:
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype) if {dtype, part.dtype} <= set(FLOATS) else torch.int8
        return Description(self._cards[ours].shape, dtype, " and ".join(part.place for part in parts))

    def read(self, name: str) -> Tensor:
        theirs = self._names.get(name, (name,))
        if len(theirs) == 1:
            return self._read(theirs[0])
        interleaved = self._cards[name].interleaved
        assert interleaved is not None
        return interleaved.join([self._read(each) for each in theirs])

    def _read(self, stored: str) -> Tensor:
        file, _ = self._stored[stored]
        # reopened for each tensor, so that pages of earlier ones do not stay in memory
        if file.suffix == ".bin":
            return read_pickle(file)[stored]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(stored)


def _headers(file: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    if file.suffix == ".bin":
        return [
            (name, tuple(value.shape), value.dtype) for name, value in read_pickle(file).items() if isinstance(value, Tensor)
        ]
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            return [(name, tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), torch.int8)) for name, s in slices.items()]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file, yet the index beside it names it") from error
    except (SafetensorError, OSError) as error:
        raise unreadable(file, "safetensors file", first_line(error)) from error
