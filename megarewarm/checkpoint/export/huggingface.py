"""Writing folders that ``GPTNeoXForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load, versions 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarewarm import __version__
from megarewarm.checkpoint.export.model_card import model_card
from megarewarm.checkpoint.export.replace import new_folder
from megarewarm.checkpoint.export.safetensors_stream import write_streaming
from megarewarm.checkpoint.export.tokenizer_files import ExportedTokenizer, exported_tokenizer, write_files
from megarewarm.checkpoint.foreign.huggingface import PREFIX, SHAPE, read_json
from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.tokenizer_source import ROLES, TokenizerSource, named_tokenizer
from megarewarm.checkpoint.weights import Description, Weights, check, expected_shapes
from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import HEAD, cards
from megarewarm.model.transformer import Transformer

SHARD_BYTES = 5 * 10**9


class ModelWeights:
    """The parameters of a model in memory; rows of a padded vocabulary are cut off."""

    where = "the model"

    def __init__(self, model: Transformer) -> None:
        rows = {name: card.shape[0] for name, card in cards(model.config).items()}
        self._tensors = {name: parameter.detach()[: rows[name]] for name, parameter in model.named_parameters()}

    def describe(self) -> Mapping[str, Description]:
        return {name: Description(tuple(t.shape), t.dtype, name) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].cpu()


def export(
    weights: Weights,
    config: ModelConfig,
    folder: str | Path,
    *,
    tokenizer: ExportedTokenizer | str | Path | None = None,
    dtype: torch.dtype | None = None,
    lineage: Lineage | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``folder``: weights, configuration, generation configuration, tokenizer, and a model card from ``lineage``.

    Weights are read and written one at a time, in ``dtype`` or else the one they have; more than ``shard_bytes`` go to
    several files. The folder appears whole or not at all, and replaces an earlier export. Raises ``UserError``
    where it would replace anything else, where the tokenizer can't be exported, and where weights do not fit ``config``.
    """
    folder = Path(folder)
    if not isinstance(tokenizer, ExportedTokenizer):
        file = None if tokenizer is None else named_tokenizer(tokenizer, "the export's tokenizer")
        tokenizer = exported_tokenizer(TokenizerSource(file), config)
    shapes = expected_shapes(config)
    check(weights, shapes)
    dtype = dtype or _common_dtype(weights)
    with new_folder(folder, _is_export) as new:
        ids = {f"{role}_token_id": tokenizer.ids[role] for role in ROLES}
        _write_json(new / "config.json", _to_huggingface(config, dtype) | ids)
        _write_json(new / "generation_config.json", {"_from_model_config": True, **ids})
        _write_weights(weights, shapes, dtype, new, shard_bytes)
        write_files(tokenizer.files, new)
        if lineage is not None:
            name = lineage.stages[-1].run if lineage.stages else folder.name
            (new / "README.md").write_text(model_card(name, config, lineage, tokenizer), encoding="utf-8")


def _common_dtype(weights: Weights) -> torch.dtype:
    dtypes = {item.dtype for item in weights.describe().values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _is_export(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and str(read_json(config).get("exported_by", "")).startswith("megarewarm")


def _to_huggingface(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "exported_by": f"megarewarm {__version__}",
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE.items()},
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "gelu" if config.activation == "gelu_erf" else "gelu_pytorch_tanh",
        "use_parallel_residual": config.residual == "parallel",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "layer_norm_eps": config.layernorm_eps,
        "initializer_range": config.init_std,
        # transformers 4 reads the first two, transformers 5 the third.
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_fraction,
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _write_weights(
    weights: Weights, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, folder: Path, shard_bytes: int
) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    ours = {}
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        theirs = name if name == HEAD else PREFIX + name
        ours[theirs] = name
        shards[-1][theirs] = shape
        size += nbytes
        total += nbytes
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for file, shard in zip(names, shards, strict=True):
        write_streaming(folder / file, shard, dtype, lambda name: weights.read(ours[name]))
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
