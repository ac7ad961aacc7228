"""Writing GPT-NeoX checkpoint folders: layer files for any tensor-parallel size, as its pipeline modules read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarewarm.checkpoint.export.replace import new_folder
from megarewarm.checkpoint.export.tokenizer_files import write_files
from megarewarm.checkpoint.export.torch_stream import write_streaming
from megarewarm.checkpoint.foreign.neox_names import arrangement_of, stored_name
from megarewarm.checkpoint.foreign.tensor_parts import Sharing, part_shape, require_divisible, sharing_of, split
from megarewarm.checkpoint.weights import Weights, check, expected_shapes
from megarewarm.config.model import ModelConfig
from megarewarm.config.yaml_text import write_yaml
from megarewarm.errors import UserError
from megarewarm.model.parameters import cards

MARK = "megarewarm.json"


def export_neox(
    weights: Weights,
    config: ModelConfig,
    folder: Path,
    *,
    step: int = 0,
    tensor_ranks: int = 1,
    dtype: torch.dtype | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``folder/global_stepN`` and ``folder/latest``: weights only, to be loaded with ``finetune: true``.

    One parameter is held at a time. The MLP has today's names (linear1, linear2). Beside the layers there are
    ``mp_rank_YY_model_states.pt`` with the counters that GPT-NeoX asks for, and ``configs/model.yml`` with the model's keys.
    ``tokenizer``: its files by name, to lie beside ``latest``.
    Raises ``UserError`` if ``tensor_ranks`` doesn't divide the model, where GPT-NeoX has no key for its shape,
    and where ``folder`` holds anything else.
    """
    shapes = expected_shapes(config)
    check(weights, shapes)
    keys = neox_keys(config, tensor_ranks)
    if config.num_heads % tensor_ranks:
        raise UserError(f"--tp {tensor_ranks}: the {config.num_heads} heads can't be shared evenly; choose a divisor of them")
    if config.kv_heads % tensor_ranks:
        raise UserError(
            f"--tp {tensor_ranks}: the {config.kv_heads} heads of keys can't be shared evenly; choose a divisor of them"
        )
    for name, shape in shapes.items():
        require_divisible(name, shape, tensor_ranks, _sharing(name, config))
    stored = weights.describe()
    with new_folder(folder, lambda there: (there / MARK).is_file()) as new:
        target = new / f"global_step{step}"
        target.mkdir()
        for layer, names in _files(config):
            dtypes = {theirs: dtype or stored[name].dtype for theirs, name in names.items()}
            for rank in range(tensor_ranks):
                path = target / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                _write_layer(path, weights, names, dtypes, config, rank, tensor_ranks)
        for rank in range(tensor_ranks):
            torch.save(_counters(config, step, tensor_ranks), target / f"mp_rank_{rank:02d}_model_states.pt")
        (target / "configs").mkdir()
        (target / "configs" / "model.yml").write_text(write_yaml(keys), encoding="utf-8")
        write_files(tokenizer or {}, new)
        (new / "latest").write_text(target.name, encoding="utf-8")
        (new / MARK).write_text(json.dumps({"format": "gpt-neox", "tensor_ranks": tensor_ranks}) + "\n", encoding="utf-8")


def _write_layer(
    path: Path,
    weights: Weights,
    names: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
    config: ModelConfig,
    rank: int,
    ranks: int,
) -> None:
    """Write rank ``rank``'s part of a layer. ``names``: GPT-NeoX's names within the layer -> ours."""

    def part(theirs: str) -> Tensor:
        name = names[theirs]
        share = split(weights.read(name).to(dtypes[theirs]), ranks, _sharing(name, config), name)[rank]
        arranged = arrangement_of(cards(config)[name], config)
        return share if arranged is None else arranged.to_theirs(share)

    stored = weights.describe()
    parts = {theirs: part_shape(stored[name].shape, ranks, _sharing(name, config)) for theirs, name in names.items()}
    write_streaming(path, {theirs: (shape, dtypes[theirs]) for theirs, shape in parts.items()}, part)


def _sharing(name: str, config: ModelConfig) -> Sharing:
    return sharing_of(name, biases_added=config.residual == "parallel")


def _files(config: ModelConfig) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the layer file, its names -> ours)."""
    files: dict[int, dict[str, str]] = {}
    for name in cards(config):
        number, theirs = stored_name(name, config)
        files.setdefault(number, {})[theirs] = name
    yield from sorted(files.items())


def _counters(config: ModelConfig, step: int, tensor_ranks: int) -> dict[str, Any]:
    return {
        "module": None,
        "optimizer": None,
        "lr_scheduler": None,
        "iteration": step,
        "global_steps": step,
        "global_samples": 0,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": tensor_ranks,
        "args": {
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_heads,
            "max_position_embeddings": config.max_positions,
            "padded_vocab_size": config.vocab_size,
            "model_parallel_size": tensor_ranks,
        },
    }


def _missing_there(config: ModelConfig) -> dict[str, bool]:
    """Keys of megarewarm's for which GPT-NeoX has none, and whether ``config`` needs one."""
    windows = {config.window_of(layer) for layer in range(config.num_layers)}
    return {
        "rotary_base": config.rotary_base != int(config.rotary_base),
        "rotary_scaling": config.rotary_scaling is not None,
        "unrotated_layers": bool(config.unrotated_layers),
        "window_layers": len(windows) > 1,
        "head_dim": config.head_width * config.num_heads != config.hidden_size,
        "norm_place": config.norm_place != "before",
        "qk_norm": config.qk_norm != "none",
        "output_bias": config.attention_output_bias != config.attention_bias,
    }


def neox_keys(config: ModelConfig, tensor_ranks: int) -> dict[str, Any]:
    """The model in GPT-NeoX's keys, of the types that its reader insists on. Raises ``UserError`` for a model that these keys
    can't describe."""
    for key, missing in _missing_there(config).items():
        if missing and key == "rotary_base":
            raise UserError(
                f"model.rotary_base {config.rotary_base!r}: GPT-NeoX's rotary_emb_base is a whole number; export to hf"
            )
        if missing:
            raise UserError(f"model.{key}: GPT-NeoX has nothing like it (family '{config.family}'); export to hf")
    return {
        "pipe_parallel_size": 1,
        "model_parallel_size": tensor_ranks,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "seq_length": config.max_positions,
        "max_position_embeddings": config.max_positions,
        "pos_emb": "rotary",
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": int(config.rotary_base),
        "no_weight_tying": not config.tie_embeddings,
        "gpt_j_residual": config.residual == "parallel",
        "output_layer_parallelism": "column",
        "use_bias_in_attn_linear": config.attention_bias,
        **(_neox_only(config) if config.norm == "layer" else _llama_only(config)),
        # whatever the size of the tokenizer is, it is padded to the rows that there are
        "make_vocab_size_divisible_by": config.vocab_size // tensor_ranks,
    }


def _neox_only(config: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.mlp_size,
        "norm": "layernorm",
        "layernorm_epsilon": config.layernorm_eps,
        "activation": "gelu",
        "bias_gelu_fusion": config.activation == "gelu_tanh",
    }


def _llama_only(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "intermediate_size": 3 * config.mlp_size,  # GPT-NeoX makes the gate a third as wide
        "norm": "rmsnorm",
        "rms_norm_epsilon": config.layernorm_eps,
        "activation": "swiglu",
        "use_bias_in_mlp": config.mlp_bias,
        "use_bias_in_norms": False,
    }
    if config.kv_heads != config.num_heads:
        keys["num_kv_heads"] = config.kv_heads
    if (window := config.window_of(0)) is not None:  # which only flash attention has there, without the position itself
        keys |= {"sliding_window_width": window - 1, "attention_config": [[["flash"], config.num_layers]]}
    return keys
