"""Hugging Face GPT-NeoX folders, as transformers 4.x and 5.x wrote them: the model's shape and its weights.

Tensor names are NeoX's own with the prefix ``gpt_neox.``; only the head lacks it: ``embed_out`` (on disk) or ``lm_head`` (in
memory of transformers 5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarewarm.checkpoint.foreign.huggingface_keys import KEYS, ROPE_KEYS
from megarewarm.checkpoint.foreign.pickles import read_pickle
from megarewarm.checkpoint.foreign.recorded_keys import refuse_other_functions, require_agreement
from megarewarm.checkpoint.weights import Description, make_model_config, unreadable
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import HEAD
from megarewarm.untrusted import is_name

PREFIX = "gpt_neox."
# Causal masks and rotary frequencies that older versions stored; fp16 ones are too coarse to be of use.
_BUFFERS = re.compile(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^rotary_emb\.inv_freq$")
# in the order in which transformers looks for them
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


# ---- the shape ------------------------------------------------------------------------------------------------------


def read_model_config(folder: str | Path) -> tuple[ModelConfig, list[str]]:
    """The shape in ``folder/config.json``, and notes on what a reader of it may not expect. Raises UserError naming the file
    and key for another model type or a feature NeoX here does not have."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "gpt_neox":
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}, only 'gpt_neox' can be loaded")
    if missing := [key for key in SHAPE.values() if raw.get(key) is None]:
        raise UserError(f"{path}: missing {', '.join(repr(key) for key in missing)}")
    refuse_other_functions(str(path), raw, KEYS)
    fraction, base = _rotary(path, raw)
    activation = raw.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim * raw["num_attention_heads"] != raw["hidden_size"]:
        raise UserError(f"{path}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    config = make_model_config(
        str(path),
        **{ours: raw[theirs] for ours, theirs in SHAPE.items()},
        max_positions=raw.get("max_position_embeddings", 2048),
        rotary_fraction=fraction,
        rotary_base=base,
        activation=_ACTIVATIONS[activation],
        residual="parallel" if raw.get("use_parallel_residual", True) else "sequential",
        tie_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", True),
        layernorm_eps=raw.get("layer_norm_eps", 1e-5),
        init_std=raw.get("initializer_range", 0.02),
    )
    return config, _notes(raw, activation)


def _rotary(path: Path, raw: Mapping[str, Any]) -> tuple[float, float]:
    """(share of a head's channels, base). Versions of transformers look in different places, which have to agree."""
    places = {}
    for key in ("rope_parameters", "rope_scaling"):
        block = raw.get(key) or {}
        if not isinstance(block, Mapping):
            raise UserError(f"{path}: {key} is {block!r}, expected a mapping")
        kind = block.get("rope_type") or block.get("type") or "default"
        if kind != "default":
            raise UserError(f"{path}: {key}: rope_type is {kind!r}, only unscaled rotary embeddings ('default') can be loaded")
        refuse_other_functions(f"{path}: {key}", block, ROPE_KEYS)
        places[key] = block
    found = []
    for within, keys, default in (
        ("partial_rotary_factor", ("rotary_pct", "partial_rotary_factor"), 0.25),
        ("rope_theta", ("rotary_emb_base", "rope_theta"), 10000.0),
    ):
        said = {f"{place}.{within}": block.get(within) for place, block in places.items()} | {key: raw.get(key) for key in keys}
        if not any(said[place] is not None for place in said if place != keys[1]):
            said["transformers' default"] = default  # no version reads the second key where the others are missing
        found.append(float(require_agreement(str(path), within, said)))
    return found[0], found[1]


SHAPE = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


def _notes(raw: Mapping[str, Any], activation: str) -> list[str]:
    notes = []
    if _ACTIVATIONS[activation] == "gelu_erf":
        notes.append(
            f"hidden_act {activation!r} is the exact GELU; GPT-NeoX trained Pythia with the tanh approximation: "
            "set model.activation to gelu_tanh to continue such a model as it was trained"
        )
    notes += [f"{key} {raw[key]} is not used: megarewarm trains without dropout" for key in _DROPOUT if raw.get(key)]
    return notes


_DROPOUT = ("attention_dropout", "hidden_dropout")


# ---- the weights ----------------------------------------------------------------------------------------------------


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
    """The weights in a folder, from headers until they are read. Old buffers are left out."""

    def __init__(self, folder: str | Path) -> None:
        self.where = str(folder)
        self._found: dict[str, Description] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for file in weight_files(Path(folder)):
            for stored, shape, dtype in _headers(file):
                name = stored.removeprefix(PREFIX)
                if _BUFFERS.search(name):
                    continue
                name = HEAD if name == "lm_head.weight" else name
                self._found[name] = Description(shape, dtype, f"{stored} in {file.name}")
                self._places[name] = file, stored

    def describe(self) -> Mapping[str, Description]:
        return self._found

    def read(self, name: str) -> Tensor:
        file, stored = self._places[name]
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


# ---- small things ---------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``UserError`` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.absolute()}: no such file; expected a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """A one-line version of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
