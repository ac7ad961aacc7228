"""Megatron-LM's 'torch' checkpoints after the documented layout: a second writer, which shares no code with ours."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

LAYERS, HIDDEN, HEADS, VOCABULARY = 4, 16, 4, 32


@dataclass(frozen=True)
class Shape:
    """How a folder is written. ``version``: 0 stores q, k, v of all heads one after another, 1 interleaves them per channel."""

    tensor: int = 1
    pipeline: int = 1
    names: Literal["core", "legacy"] = "core"
    version: float = 3.0
    tied: bool = False
    args: dict[str, Any] = field(default_factory=dict)


CORE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
    "attention.query_key_value.": "self_attention.linear_qkv.",
    "attention.dense.": "self_attention.linear_proj.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
}


def whole_model(seed: int, *, tied: bool = False) -> dict[str, Tensor]:
    """Every parameter under Hugging Face's names without the prefix."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    model = {"embed_in.weight": draw(VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attention.query_key_value", 3 * HIDDEN, HIDDEN),
            ("attention.dense", HIDDEN, HIDDEN),
            ("mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN),
            ("mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN),
        ):
            model |= {f"layers.{i}.{name}.weight": draw(rows, columns), f"layers.{i}.{name}.bias": draw(rows)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            model |= {f"layers.{i}.{name}.weight": draw(HIDDEN), f"layers.{i}.{name}.bias": draw(HIDDEN)}
    model |= {"final_layer_norm.weight": draw(HIDDEN), "final_layer_norm.bias": draw(HIDDEN)}
    return model if tied else model | {"embed_out.weight": draw(VOCABULARY, HIDDEN)}


def _stored_order(part: Tensor, version: float, heads: int) -> Tensor:
    split = part.view(heads, 3, -1, *part.shape[1:])  # [head][q, k, v][channel]
    if version >= 2:
        return part
    order = split.transpose(0, 1) if version == 0 else split.transpose(1, 2)
    return order.reshape(part.shape).clone()


def _part(name: str, whole: Tensor, rank: int, shape: Shape) -> Tensor:
    if any(key in name for key in ("embed", "query_key_value", "h_to_4h")):
        part = whole.chunk(shape.tensor, 0)[rank].clone()
        return _stored_order(part, shape.version, HEADS // shape.tensor) if "query_key_value" in name else part
    if name.endswith(("attention.dense.weight", "4h_to_h.weight")):
        return whole.chunk(shape.tensor, 1)[rank].clone()
    return whole.clone()


def write(place: Path, shape: Shape, model: dict[str, Tensor]) -> Path:
    """Write ``place/iter_0000005`` and the file that names it."""
    folder = place / "iter_0000005"
    per_stage = LAYERS // shape.pipeline
    for stage in range(shape.pipeline):
        for rank in range(shape.tensor):
            tensors: dict[str, Any] = {}
            for name, whole in model.items():
                part = _part(name, whole, rank, shape)
                if name == "embed_in.weight":
                    if stage == 0:
                        tensors["embedding.word_embeddings.weight"] = part
                    elif shape.tied and stage == shape.pipeline - 1:
                        tensors["output_layer.weight"] = part
                elif name == "embed_out.weight" and stage == shape.pipeline - 1:
                    tensors["output_layer.weight"] = part
                elif name.startswith("final_layer_norm") and stage == shape.pipeline - 1:
                    tensors[f"decoder.final_layernorm.{name.rsplit('.', 1)[1]}"] = part
                elif name.startswith("layers."):
                    _, number, rest = name.split(".", 2)
                    if int(number) // per_stage == stage:
                        tensors[f"decoder.layers.{int(number) % per_stage}.{_named(rest, shape)}"] = part
            tensors["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
            args = {
                "num_layers": LAYERS,
                "num_attention_heads": HEADS,
                "max_position_embeddings": 8,
                "position_embedding_type": "rope",
                "rotary_percent": 0.5,
                "normalization": "LayerNorm",
                "use_rotary_position_embeddings": False,
                "untie_embeddings_and_output_weights": not shape.tied,
                **shape.args,
            }
            content = {
                "args": argparse.Namespace(**args),
                "checkpoint_version": shape.version,
                "iteration": 5,
                "model": tensors if shape.names == "core" else _legacy(tensors),
            }
            target = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if shape.pipeline > 1 else ""))
            target.mkdir(parents=True)
            torch.save(content, target / "model_optim_rng.pt")
    (place / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


def _named(rest: str, shape: Shape) -> str:
    if shape.names == "legacy":
        return rest.replace("attention.", "self_attention.", 1) if rest.startswith("attention.") else rest
    for theirs, ours in CORE.items():
        if rest.startswith(theirs):
            return ours + rest.removeprefix(theirs)
    raise AssertionError(rest)


def _legacy(tensors: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionaries of before Megatron core."""
    model: dict[str, Any] = {"language_model": {"encoder": {}}}
    for name, tensor in tensors.items():
        if name.startswith("embedding."):
            model["language_model"]["embedding"] = {"word_embeddings": {"weight": tensor}}
        elif name.startswith("output_layer."):
            model["language_model"]["output_layer"] = {"weight": tensor}
        elif tensor is not None:
            model["language_model"]["encoder"][name.removeprefix("decoder.")] = tensor
    return model
