"""Weights of Megatron-LM's 'torch' format: ``iter_N/mp_rank_TT[_PPP]/model_optim_rng.pt``, of the models that are here.

That is rotary positions with LayerNorm, GELU and as many key as query heads, or with RMSNorm, SwiGLU and grouped queries;
Megatron has no parallel residual. Both generations of its names are read, with the layers of every pipeline rank and any
tensor-parallel size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarewarm.checkpoint.foreign.megatron_keys import KEYS, LLAMA_KEYS
from megarewarm.checkpoint.foreign.megatron_names import arrangement_of, our_name
from megarewarm.checkpoint.foreign.pickles import InertRecord, read_pickle
from megarewarm.checkpoint.foreign.pointer import name_in
from megarewarm.checkpoint.foreign.recorded_keys import is_off, refuse_other_functions, require_agreement
from megarewarm.checkpoint.foreign.tensor_parts import merge, sharing_of, whole_shape
from megarewarm.checkpoint.weights import Description, make_model_config
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD, cards

_RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LATEST = "latest_checkpointed_iteration.txt"
_ORIGINAL_POSITIONS = 8192  # of use_rope_scaling, a constant there


def find(path: Path) -> Path | None:
    """The ``iter_N`` folder that ``path`` means: itself, or what its ``latest_checkpointed_iteration.txt`` names."""
    if path.is_dir() and any(_RANK_FOLDER.fullmatch(entry.name) and entry.is_dir() for entry in path.iterdir()):
        return path
    latest = path / _LATEST
    if latest.is_file():
        text = name_in(latest)
        counts = text.isascii() and text.isdecimal() and len(text) < 20
        named = path / (f"iter_{int(text):07d}" if counts else text)
        if not named.is_dir():
            raise UserError(f"{latest}: names {named.name}, which is not beside it; copy it, or name another")
        if find(named) is None:
            raise UserError(
                f"{named}: no mp_rank_* folders; only Megatron-LM's 'torch' format is read: save with --ckpt-format torch, or "
                f"convert it with Megatron's own tools"
            )
        return named
    return None


class MegatronFolder:
    """An ``iter_N`` folder. Raises ``UserError`` naming what is missing or what the model has that no family has."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self.notes: list[str] = []
        files: dict[tuple[int, int], Path] = {}
        for entry in folder.iterdir():
            if (match := _RANK_FOLDER.fullmatch(entry.name)) and entry.is_dir():
                file = next((entry / n for n in ("model_optim_rng.pt", "model_rng.pt") if (entry / n).is_file()), None)
                if file is None:
                    raise UserError(f"{entry}: no model_optim_rng.pt in it; copy it as well")
                files[int(match[2] or 0), int(match[1])] = file
        self._pipeline = 1 + max(stage for stage, _ in files)
        self._tensor = 1 + max(rank for _, rank in files)
        for stage in range(self._pipeline):
            for rank in range(self._tensor):
                if (stage, rank) not in files:
                    raise UserError(f"{folder}: no folder of tensor rank {rank}, pipeline rank {stage}; copy it as well")
        first = read_pickle(files[0, 0])
        self._args = _arguments(first)
        self._is_llama_like = self._args.get("normalization") == "RMSNorm" and bool(self._args.get("swiglu"))
        self._keys = LLAMA_KEYS if self._is_llama_like else KEYS
        self._version = float(first.get("checkpoint_version", 0))
        self._legacy = not any(key.startswith("decoder.") for key in first.get("model") or ())
        # megarewarm's name -> [(file, path of keys in it) of each tensor rank]
        self._parts: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
        self._headers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        offset = 0
        for stage in range(self._pipeline):
            layers = 0
            for rank in range(self._tensor):
                layers = self._index(files[stage, rank], rank, offset)
            offset += layers
        self._layers = offset
        self.model_config = self._read_config()

    def _index(self, file: Path, rank: int, offset: int) -> int:
        """Take the tensors of a rank's file; its layers count from ``offset``. Returns how many layers it has."""
        loaded = read_pickle(file)
        if "model0" in loaded:
            raise UserError(f"{file}: written with a virtual pipeline; save it without --num-layers-per-virtual-pipeline-stage")
        if not isinstance(loaded.get("model"), Mapping):
            raise UserError(f"{file}: no 'model' in it")
        for key, value in _arguments(loaded).items():
            if key in self._keys.read or key in self._keys.only:
                require_agreement(str(file), key, {"the file of rank 0": self._args.get(key), "this one": value})
        layers = 0
        for keys, tensor in _tensors(loaded["model"], ("model",)):
            name, layer = our_name(keys, file, llama=self._is_llama_like)
            if name is None:
                continue
            if layer is not None:
                layers = max(layers, layer + 1)
                name = f"layers.{offset + layer}.{name}"
            parts = self._parts.setdefault(name, [])
            if len(parts) == rank:
                parts.append((file, keys))
            elif name != EMBEDDING:  # the last stage holds a copy of tied embeddings
                raise UserError(f"{file}: {'.'.join(keys)} is in it, but not in the file of every tensor rank before {rank}")
            shape, _ = self._headers.setdefault(name, (tuple(tensor.shape), tensor.dtype))
            if shape != tuple(tensor.shape):
                raise UserError(f"{file}: {'.'.join(keys)} has shape {tuple(tensor.shape)}, the other ranks' is {shape}")
        return layers

    def _read_config(self) -> ModelConfig:
        args = self._args
        if args.get("num_attention_heads") is None:
            raise UserError(f"{self.where}: 'args' in its files has no num_attention_heads; save it with Megatron-LM >= 2")
        for key in ("num_attention_heads", "kv_channels"):
            value = args.get(key)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise UserError(f"{self.where}: {key} is {value!r} in 'args', expected a number above 0")
        if self._layers == 0:
            raise UserError(f"{self.where}: no transformer layers in it")
        refuse_other_functions(self.where, args, self._keys)
        self._refuse_other_shapes()
        found = self._llama() if self._is_llama_like else self._neox()
        self.notes += [
            f"{key} {args[key]} is not used: megarewarm trains without dropout"
            for key in ("attention_dropout", "hidden_dropout")
            if args.get(key)
        ]
        return make_model_config(
            self.where,
            num_layers=self._layers,
            hidden_size=self._hidden,
            num_heads=int(args["num_attention_heads"]),
            vocab_size=self._shape(EMBEDDING)[0],
            max_positions=args.get("max_position_embeddings") or args.get("seq_length") or 2048,
            rotary_base=float(args.get("rotary_base", 10000)),
            tie_embeddings=HEAD not in self._parts,
            attention_bias="layers.0.attention.query_key_value.bias" in self._parts,
            layernorm_eps=float(args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5))),
            **found,
        )

    def _neox(self) -> dict[str, Any]:
        """What is particular of models with LayerNorm and GELU."""
        args = self._args
        # today's models have the kernel's approximation with bias_gelu_fusion alone; openai_gelu is of the older ones
        tanh = bool(args.get("bias_gelu_fusion") or (self._legacy and args.get("openai_gelu")))
        self.notes.append(
            f"sequential residual, as in Megatron-LM, and {'tanh' if tanh else 'exact (erf)'} GELU, from bias_gelu_fusion"
            f"{' and openai_gelu' if self._legacy else ''}; give 'model' to say otherwise"
        )
        return {
            "ffn_size": self._ffn_size,
            "rotary_fraction": float(args.get("rotary_percent", 1.0)),
            "activation": "gelu_tanh" if tanh else "gelu_erf",
            "residual": "sequential",
        }

    def _llama(self) -> dict[str, Any]:
        """What is particular of models with RMSNorm and SwiGLU: the family by its biases, norms and window."""
        args, heads = self._args, int(self._args["num_attention_heads"])
        biases = [f"layers.0.{name}.bias" in self._parts for name in ("attention.query_key_value", "attention.dense")]
        found: dict[str, Any] = {"family": "llama", "mlp_bias": "layers.0.mlp.gate_up.bias" in self._parts}
        if "layers.0.attention.query_norm.weight" in self._parts:
            found["family"] = "qwen3"
        elif biases == [True, False]:
            found["family"] = "qwen2"
        if args.get("use_rope_scaling"):
            factor = float(args.get("rope_scaling_factor") or 8.0)
            found["rotary_scaling"] = {"kind": "llama3", "factor": factor, "original_positions": _ORIGINAL_POSITIONS}
        if window := self._window():
            found["sliding_window"] = window
            found["family"] = "mistral" if found["family"] == "llama" else found["family"]
        groups = self._groups
        return found | {
            "output_bias": None if biases[0] == biases[1] else biases[1],
            "num_kv_heads": None if groups == heads else groups,
            "head_dim": None if self._channels * heads == self._hidden else self._channels,
            "ffn_size": self._ffn_size,
        }

    def _window(self) -> int | None:
        """Positions that each one attends to; Megatron-LM's count is of those before it."""
        window = self._args.get("window_size")
        if window is None or is_off(window):
            return None
        if not (isinstance(window, list | tuple) and len(window) == 2 and isinstance(window[0], int) and window[0] > 0):
            raise UserError(f"{self.where}: window_size is {window!r}, expected (W, 0)")
        if window[1] != 0:
            raise UserError(f"{self.where}: window_size is {window!r}, expected a second number of 0: attention is causal here")
        return window[0] + 1

    @property
    def _norm(self) -> str:
        return "layers.0.attention_norm.weight" if self._is_llama_like else "layers.0.input_layernorm.weight"

    @property
    def _ffn_size(self) -> int:
        if self._is_llama_like:
            return self._shape("layers.0.mlp.gate_up.weight")[0] // 2
        return self._shape("layers.0.mlp.dense_h_to_4h.weight")[0]

    @property
    def _channels(self) -> int:
        """Of a head."""
        heads = int(self._args["num_attention_heads"])
        said = self._args.get("kv_channels") if self._is_llama_like else None
        return int(said or self._hidden // heads or 1)

    @property
    def _groups(self) -> int:
        """Heads of keys and values, by the tensors."""
        rows = self._shape("layers.0.attention.query_key_value.weight")[0]
        return max((rows // self._channels - int(self._args["num_attention_heads"])) // 2, 0)

    @property
    def _hidden(self) -> int:
        return self._shape(self._norm)[0]

    def _refuse_other_shapes(self) -> None:
        """Refuse positions and heads in 'args' that NeoX here does not have, and shapes that contradict the tensors."""
        args, heads = self._args, self._args["num_attention_heads"]
        positions = args.get("position_embedding_type")
        if positions not in (None, "rope", "rotary") and not (
            positions == "learned_absolute" and args.get("use_rotary_position_embeddings")
        ):
            raise UserError(f"{self.where}: position_embedding_type is {positions!r}, only rotary ones ('rope') can be loaded")
        # today's models say it by the type, older ones by the flag, which stays false beside the type
        if positions is None and args.get("use_rotary_position_embeddings") is False:
            raise UserError(f"{self.where}: learned positions, only rotary ones can be loaded")
        groups = args.get("num_query_groups")
        if not self._is_llama_like and args.get("group_query_attention") and groups not in (None, heads):
            raise UserError(
                f"{self.where}: group_query_attention with {groups} num_query_groups, expected {heads}: with LayerNorm every "
                f"head here has its own keys and values"
            )
        if self._is_llama_like:
            self._refuse_other_heads(heads)
        scale, channels = args.get("softmax_scale"), self._channels if self._is_llama_like else self._hidden / heads
        if scale is not None and not math.isclose(scale, channels**-0.5, rel_tol=1e-6):
            raise UserError(
                f"{self.where}: softmax_scale is {scale!r}, expected {channels**-0.5:.6g}, 1 / sqrt(head's channels)"
            )
        held = {
            "num_layers": self._layers,
            "hidden_size": self._hidden,
            "kv_channels": self._channels,
            "ffn_hidden_size": self._ffn_size,
            "padded_vocab_size": self._shape(EMBEDDING)[0],
            "tensor_model_parallel_size": self._tensor,
            "pipeline_model_parallel_size": self._pipeline,
        }
        for key, value in held.items():
            require_agreement(self.where, key, {"'args'": args.get(key), "the tensors": value})
        untied = args.get("untie_embeddings_and_output_weights")
        if untied is False and HEAD in self._parts:  # the last pipeline stage holds a copy of tied embeddings
            del self._parts[HEAD], self._headers[HEAD]
        elif untied and HEAD not in self._parts:
            raise UserError(f"{self.where}: untie_embeddings_and_output_weights is True, yet output_layer.weight is not there")

    def _refuse_other_heads(self, heads: int) -> None:
        """The same for the grouped queries of Llama-like models."""
        args, groups, rows = self._args, self._groups, self._shape("layers.0.attention.query_key_value.weight")[0]
        if groups < 1 or rows != (heads + 2 * groups) * self._channels or heads % groups:
            raise UserError(
                f"{self.where}: query_key_value has {rows} rows, which are not those of {heads} num_attention_heads with "
                f"{self._channels} channels (kv_channels)"
            )
        if "group_query_attention" in args:
            said = args.get("num_query_groups") if args["group_query_attention"] else heads
            require_agreement(self.where, "num_query_groups", {"'args'": said, "the tensors": groups})
        if self._version < 2 and groups != heads:
            raise UserError(f"{self.where}: checkpoint_version {self._version:g} is older than grouped queries; save it again")
        if args.get("qk_layernorm") and "layers.0.attention.query_norm.weight" not in self._parts:
            raise UserError(f"{self.where}: qk_layernorm is True, yet no q_layernorm is in its files")

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._headers:
            raise UserError(f"{self.where}: no {name} in its files, under Megatron-LM's name of it")
        return whole_shape(self._headers[name][0], len(self._parts[name]), sharing_of(name, biases_added=False))

    def describe(self) -> Mapping[str, Description]:
        return {
            name: Description(self._shape(name), dtype, f"{'.'.join(self._parts[name][0][1])} in {self._parts[name][0][0]}")
            for name, (_, dtype) in self._headers.items()
        }

    def read(self, name: str) -> Tensor:
        parts = []
        for file, keys in self._parts[name]:
            value = read_pickle(file)
            for key in keys:
                value = value[key]
            parts.append(self._in_order(name, value))
        return merge(parts, sharing_of(name, biases_added=False))

    def _in_order(self, name: str, part: Tensor) -> Tensor:
        """A rank's part in our order of rows."""
        card = cards(self.model_config).get(name)
        if card is None:
            return part
        arranged = arrangement_of(card)
        if arranged is not None:
            return arranged.to_ours(part)
        return self._heads_in_order(part) if card.by_head else part

    def _heads_in_order(self, part: Tensor) -> Tensor:
        """QKV rows as [head][q, k, v][channel], which older versions stored in other orders."""
        if self._version >= 2:
            return part
        heads = self.model_config.num_heads // self._tensor
        rest = part.shape[1:]
        if self._version == 0:  # [q, k, v][head][channel]
            return part.view(3, heads, -1, *rest).transpose(0, 1).reshape(part.shape)
        return part.view(heads, -1, 3, *rest).transpose(1, 2).reshape(part.shape)  # [head][channel][q, k, v]


def _arguments(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    args = loaded.get("args")
    return args.values if isinstance(args, InertRecord) else args if isinstance(args, Mapping) else {}


def _tensors(value: Mapping[str, Any], keys: tuple[str, ...]) -> list[tuple[tuple[str, ...], Tensor]]:
    found = []
    for key, item in value.items():
        if isinstance(item, Tensor):
            found.append(((*keys, key), item))
        elif isinstance(item, Mapping):
            found += _tensors(item, (*keys, key))
    return found
