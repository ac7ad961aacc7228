"""Writing folders that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load with ``from_pretrained``, versions 4 and 5."""

from __future__ import annotations

import contextlib
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
from megarewarm.checkpoint.foreign.families import ModelType, model_type_of_family
from megarewarm.checkpoint.foreign.json_file import read_json
from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.tokenizer_source import ROLES, TokenizerSource, named_tokenizer
from megarewarm.checkpoint.weights import Description, Weights, check, expected_shapes
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import FUNCTION_KEYS, SHAPE_KEYS, cards
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
        written = _written_config(config, dtype, lineage)
        ids = _ids(tokenizer, written)
        _write_json(new / "config.json", written | ids)
        _write_json(new / "generation_config.json", _generation(tokenizer, ids, lineage))
        _write_weights(weights, config, dtype, new, shard_bytes)
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


def _written_config(config: ModelConfig, dtype: torch.dtype, lineage: Lineage | None) -> dict[str, Any]:
    """config.json: the start checkpoint's own keys, and those of ``config`` where the two differ."""
    kind = model_type_of_family(config)
    kept = lineage.started_config if lineage else {}
    written = kind.write(config)
    if kept.get("model_type") == kind.name:
        kept = kept | {"vocab_size": config.vocab_size}
        ways = (written | kept, kept | written, written)
        written = next((way for way in ways if _says(way, kind, config)), written)
    name = str(dtype).removeprefix("torch.")
    return written | {
        "architectures": [kind.architecture],
        "model_type": kind.name,
        "exported_by": f"megarewarm {__version__}",
        "torch_dtype": name,
        "dtype": name,
    }


def _says(written: dict[str, Any], kind: ModelType, config: ModelConfig) -> bool:
    """Whether a reader of ``written`` finds the model ``config``."""
    with contextlib.suppress(UserError):
        found, _ = kind.read(Path("config.json"), written)
        return all(getattr(found, key) == getattr(config, key) for key in (*SHAPE_KEYS, *FUNCTION_KEYS, "max_positions"))
    return False


def _ids(tokenizer: ExportedTokenizer, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens' ids: the tokenizer's, where the start's config.json does not name them among several."""
    ids = {}
    for role in ROLES:
        key, ours = f"{role}_token_id", tokenizer.ids[role]
        theirs = kept.get(key)
        among = ours is None or ours in (theirs if isinstance(theirs, list) else [theirs])
        ids[key] = theirs if theirs is not None and among else ours
    return ids


def _generation(tokenizer: ExportedTokenizer, ids: dict[str, Any], lineage: Lineage | None) -> dict[str, Any]:
    """generation_config.json: the start checkpoint's own; of the ids that it names, the tokenizer's where they are others."""
    kept = lineage.started_generation if lineage else {}
    if not kept:
        return {"_from_model_config": True, **ids}
    return kept | {key: value for key, value in _ids(tokenizer, kept).items() if key in kept}


def _write_weights(weights: Weights, config: ModelConfig, dtype: torch.dtype, folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    stored = _Stored(weights, config)
    for theirs, shape in stored.shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][theirs] = shape
        size += nbytes
        total += nbytes
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for file, shard in zip(names, shards, strict=True):
        write_streaming(folder / file, shard, dtype, stored.read)
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


class _Stored:
    """``weights`` under the names of their model type. ``shapes``: of all, those that are one tensor here in turn."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self._weights, self._cards = weights, cards(config)
        self._places: dict[str, tuple[str, int]] = {}
        self._split: tuple[str, list[Tensor]] = "", []
        self.shapes: dict[str, tuple[int, ...]] = {}
        kind = model_type_of_family(config)
        for ours, card in self._cards.items():
            theirs = kind.stored(ours)
            rows = (card.shape[0],) if len(theirs) == 1 else card.interleaved.rows(card.shape[0])  # type: ignore[union-attr]
            for i, (name, count) in enumerate(zip(theirs, rows, strict=True)):
                self._places[name] = ours, i
                self.shapes[name] = (count, *card.shape[1:])

    def read(self, name: str) -> Tensor:
        ours, i = self._places[name]
        interleaved = self._cards[ours].interleaved
        if self.shapes[name] == self._cards[ours].shape or interleaved is None:
            return self._weights.read(ours)
        if self._split[0] != ours:
            self._split = ours, interleaved.split(self._weights.read(ours))
        return self._split[1][i]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
