"""Weights of Megatron-LM's 'torch' format: ``iter_N/mp_rank_TT[_PPP]/model_optim_rng.pt``, of the models that GPT-NeoX knows.

That is rotary positions, LayerNorm, GELU, as many key as query heads; Megatron has no parallel residual. Both generations of
its names are read, with the layers of every pipeline rank and any tensor-parallel size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarewarm.checkpoint.foreign.megatron_keys import KEYS
from megarewarm.checkpoint.foreign.pickles import InertRecord, read_pickle
from megarewarm.checkpoint.foreign.pointer import name_in
from megarewarm.checkpoint.foreign.recorded_keys import refuse_other_functions, require_agreement
from megarewarm.checkpoint.foreign.tensor_parts import merge, sharing_of, whole_shape
from megarewarm.checkpoint.weights import Description, make_model_config
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD, kind_of

_RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LATEST = "latest_checkpointed_iteration.txt"
_IGNORED = re.compile(r"(_extra_state|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq)$")
_LAYER = re.compile(r"(?:decoder\.|encoder\.|transformer\.)?layers\.(\d+)\.(.+)")
_IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv.layer_norm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1.layer_norm": "post_attention_layernorm",
    "self_attention.query_key_value": "attention.query_key_value",
    "attention.query_key_value": "attention.query_key_value",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.dense": "attention.dense",
    "attention.dense": "attention.dense",
    "self_attention.linear_proj": "attention.dense",
    "mlp.dense_h_to_4h": "mlp.dense_h_to_4h",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h": "mlp.dense_4h_to_h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "word_embeddings.weight": EMBEDDING,
    "word_embeddings_for_head.weight": EMBEDDING,
    "word_embeddings_for_head.word_embeddings.weight": EMBEDDING,
    "output_layer.weight": HEAD,
    "final_layernorm.weight": "final_layer_norm.weight",
    "final_layernorm.bias": "final_layer_norm.bias",
}


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
    """An ``iter_N`` folder. Raises ``UserError`` naming what is missing or what the model has that GPT-NeoX has not."""

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
            if key in KEYS.read or key in KEYS.only:
                require_agreement(str(file), key, {"the file of rank 0": self._args.get(key), "this one": value})
        layers = 0
        for keys, tensor in _tensors(loaded["model"], ("model",)):
            name, layer = _our_name(keys, file)
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
        if self._layers == 0:
            raise UserError(f"{self.where}: no transformer layers in it")
        refuse_other_functions(self.where, args, KEYS)
        self._refuse_other_shapes()
        heads = int(args["num_attention_heads"])
        # today's models have the kernel's approximation with bias_gelu_fusion alone; openai_gelu is of the older ones
        tanh = bool(args.get("bias_gelu_fusion") or (self._legacy and args.get("openai_gelu")))
        self.notes.append(
            f"sequential residual, as in Megatron-LM, and {'tanh' if tanh else 'exact (erf)'} GELU, from bias_gelu_fusion"
            f"{' and openai_gelu' if self._legacy else ''}; give 'model' to say otherwise"
        )
        self.notes += [
            f"{key} {args[key]} is not used: megarewarm trains without dropout"
            for key in ("attention_dropout", "hidden_dropout")
            if args.get(key)
        ]
        return make_model_config(
            self.where,
            num_layers=self._layers,
            hidden_size=self._hidden,
            num_heads=heads,
            ffn_size=self._shape("layers.0.mlp.dense_h_to_4h.weight")[0],
            vocab_size=self._shape(EMBEDDING)[0],
            max_positions=args.get("max_position_embeddings") or args.get("seq_length") or 2048,
            rotary_fraction=float(args.get("rotary_percent", 1.0)),
            rotary_base=float(args.get("rotary_base", 10000)),
            activation="gelu_tanh" if tanh else "gelu_erf",
            residual="sequential",
            tie_embeddings=HEAD not in self._parts,
            attention_bias="layers.0.attention.query_key_value.bias" in self._parts,
            layernorm_eps=float(args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5))),
        )

    @property
    def _hidden(self) -> int:
        return int(self._headers["layers.0.input_layernorm.weight"][0][0])

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
        if args.get("group_query_attention") and groups not in (None, heads):
            raise UserError(
                f"{self.where}: group_query_attention with {groups} num_query_groups, expected {heads}: every head here has "
                f"its own keys and values"
            )
        scale, channels = args.get("softmax_scale"), self._hidden / heads
        if scale is not None and not math.isclose(scale, channels**-0.5, rel_tol=1e-6):
            raise UserError(
                f"{self.where}: softmax_scale is {scale!r}, expected {channels**-0.5:.6g}, 1 / sqrt(head's channels)"
            )
        held = {
            "num_layers": self._layers,
            "hidden_size": self._hidden,
            "kv_channels": self._hidden // heads,
            "ffn_hidden_size": self._shape("layers.0.mlp.dense_h_to_4h.weight")[0],
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

    def _shape(self, name: str) -> tuple[int, ...]:
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
            parts.append(self._heads_in_order(value) if kind_of(name).by_head else value)
        return merge(parts, sharing_of(name, biases_added=False))

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


def _our_name(keys: tuple[str, ...], file: Path) -> tuple[str | None, int | None]:
    """(megarewarm's name, None) outside the layers, (name within the layer, its number in the file) inside, (None, None) for
    buffers."""
    dotted = ".".join(keys)
    if _IGNORED.search(dotted):
        return None, None
    plain = re.sub(r"^model\.(module\.)*(language_model\.)?", "", dotted)
    if match := _LAYER.fullmatch(plain):
        module, parameter = match[2].rsplit(".", 1)
        if parameter.startswith("layer_norm_"):
            module, parameter = f"{module}.layer_norm", parameter.removeprefix("layer_norm_")
        if module in _IN_LAYER and parameter in ("weight", "bias"):
            return f"{_IN_LAYER[module]}.{parameter}", int(match[1])
    outside = re.sub(r"^(decoder|encoder|transformer)\.", "", plain)
    if outside in _OUTSIDE:
        return _OUTSIDE[outside], None
    raise UserError(f"{file}: '{dotted}' is no part of a GPT-NeoX model; only GPT models with LayerNorm and GELU can be read")
