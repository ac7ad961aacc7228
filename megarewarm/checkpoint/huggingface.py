"""Hugging Face GPT-NeoX folders: read what transformers 4.x and 5.x wrote, write what both load.

Tensor names are NeoX's own with the prefix ``gpt_neox.``; only the head stands outside it, as ``embed_out`` (on disk)
or ``lm_head`` (in memory of transformers 5).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megarewarm import __version__
from megarewarm.config.schema import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.neox import NeoX

_PREFIX = "gpt_neox."
_HEAD = "embed_out.weight"
# Causal masks and rotary frequencies that older versions stored; fp16 ones are too coarse to be of use.
_BUFFERS = re.compile(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^rotary_emb\.inv_freq$")
_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
SHARD_BYTES = 5 * 10**9


# ---- where it is ----------------------------------------------------------------------------------------------------


def resolve(name_or_folder: str) -> Path:
    """The folder of a checkpoint: the folder itself, or the local copy of the hub's ``organisation/name@revision``.

    The local Hugging Face cache comes first, so that a run starts without a network and from the same files again;
    what it lacks is downloaded. Raises UserError where neither works.
    """
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    match = _HUB_NAME.fullmatch(name_or_folder)
    if not match:
        raise UserError(f"{name_or_folder}: no such folder, and not a hub name (organisation/name@revision)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name_or_folder}: no such folder; for a model of that name on the Hugging Face hub, pip install huggingface_hub"
        ) from None
    repository, revision = match["repository"], match["revision"]
    problem: Exception | None = None
    # Hub folders often hold the same weights twice: .bin files only where there is nothing else.
    for local, weights in ((True, "*"), (False, "*.safetensors"), (False, "*.bin")):
        try:
            folder = Path(
                snapshot_download(repository, revision=revision, allow_patterns=["*.json", weights], local_files_only=local)
            )
        except Exception as error:  # the hub's own errors, and those of whatever carries its requests
            problem = error
            continue
        if _is_complete(folder):
            return folder
        problem = None
    if problem is None:
        raise UserError(f"{name_or_folder}: the repository holds none of {', '.join(_WEIGHTS)}")
    raise UserError(
        f"{name_or_folder}: neither a folder, nor in the Hugging Face cache, nor to be downloaded "
        f"({_first_line(problem)}): give a folder, or run 'hf download {repository}' where there is a network and copy it"
    ) from problem


def _is_complete(folder: Path) -> bool:
    """Whether configuration and weights are there, every shard of them."""
    try:
        return (folder / "config.json").is_file() and all(file.is_file() for file in _weight_files(folder))
    except UserError:
        return False


def _weight_files(folder: Path) -> list[Path]:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: no weights found; expected one of {', '.join(_WEIGHTS)}")
    if found.suffix != ".json":
        return [found]
    index = _read_json(found).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{found}: no 'weight_map' in it, which names the file of each tensor")
    return [folder / name for name in sorted(set(index.values()))]


# ---- reading --------------------------------------------------------------------------------------------------------


def read_model_config(folder: str | Path) -> tuple[ModelConfig, list[str]]:
    """The shape in ``folder/config.json``, and notes on what a reader of it may not expect.

    Raises UserError naming the file and key for another model type or a feature NeoX here does not have.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    if raw.get("model_type") != "gpt_neox":
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}, only 'gpt_neox' can be loaded")
    if missing := [key for key in _SHAPE.values() if raw.get(key) is None]:
        raise UserError(f"{path}: missing {', '.join(repr(key) for key in missing)}")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise UserError(f"{path}: rope_type is {kind!r}, only unscaled rotary embeddings ('default') can be loaded")
    activation = raw.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
    if raw.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantized ('quantization_config'): take the unquantized model")
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim * raw["num_attention_heads"] != raw["hidden_size"]:
        raise UserError(f"{path}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    try:
        config = ModelConfig(
            **{ours: raw[theirs] for ours, theirs in _SHAPE.items()},
            max_positions=raw.get("max_position_embeddings", 2048),
            rotary_fraction=_first(rope.get("partial_rotary_factor"), raw.get("rotary_pct"), 0.25),
            rotary_base=_first(rope.get("rope_theta"), raw.get("rotary_emb_base"), 10000.0),
            activation=_ACTIVATIONS[activation],
            residual="parallel" if raw.get("use_parallel_residual", True) else "sequential",
            tie_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", True),
            layernorm_eps=raw.get("layer_norm_eps", 1e-5),
            init_std=raw.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{problem['msg']}") from error
    return config, _notes(raw, activation)


_SHAPE = {
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


def load_weights(folder: str | Path, model: NeoX) -> None:
    """Fill every parameter of ``model`` from the weights in ``folder``, cast to the parameter's dtype.

    Rows of a padded vocabulary become zero. Otherwise as ``fill_weights``.
    """
    parameters = dict(model.named_parameters())
    vocabulary = model.config.vocab_size
    shapes = {
        name: (vocabulary, *parameter.shape[1:]) if _is_padded(name) else tuple(parameter.shape)
        for name, parameter in parameters.items()
    }

    def fill(name: str, tensor: Tensor) -> None:
        parameters[name][: len(tensor)].copy_(tensor)
        parameters[name][len(tensor) :].zero_()

    with torch.no_grad():
        fill_weights(folder, shapes, fill)


def fill_weights(folder: str | Path, shapes: Mapping[str, tuple[int, ...]], fill: Callable[[str, Tensor], None]) -> None:
    """Call ``fill(name, tensor)`` for every parameter of ``shapes`` with what ``folder`` holds under its name.

    Reads safetensors, or else .bin files, single or sharded, one tensor at a time. All names and shapes are checked before
    the first call: raises one UserError with what is missing, unexpected or of another shape. ``shapes`` without a head
    (tied embeddings) refuses a stored head that is not the embedding.
    """
    tied = _HEAD not in shapes
    problems: list[str] = []
    missing = set(shapes)
    files = _weight_files(Path(folder))
    for file in files:
        with _open(file) as tensors:
            for stored, name in _names(tensors):
                if name == _HEAD and tied:
                    continue
                if name not in shapes:
                    problems.append(f"unexpected tensor {stored} in {file.name}")
                    continue
                missing.discard(name)
                shape, dtype = tensors.describe(stored)
                if dtype not in _DTYPES.values():
                    problems.append(f"{stored} in {file.name} has dtype {dtype}, expected {', '.join(_DTYPES.values())}")
                if shape != shapes[name]:
                    problems.append(f"{stored} in {file.name} has shape {shape}, expected {shapes[name]}")
    problems += [f"missing tensor {name}" for name in sorted(missing)]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{folder}: weights do not fit the model: {'; '.join(problems[:5])}{more}")

    ends: dict[str, Tensor] = {}
    for file in files:
        with _open(file) as tensors:
            for stored, name in _names(tensors):
                tensor = tensors.read(stored)
                if tied and name in (_HEAD, "embed_in.weight"):
                    ends[name] = tensor
                if name != _HEAD or not tied:
                    fill(name, tensor)
    if len(ends) == 2 and not torch.equal(*(end.float() for end in ends.values())):
        raise UserError(f"{folder}: tie_word_embeddings is true, yet the head is not the embedding: set it to false")


def _is_padded(name: str) -> bool:
    """Whether the tensor has a row per vocabulary entry, and rows beyond it in a padded model."""
    return name in ("embed_in.weight", _HEAD)


class _Tensors:
    """The tensors of one file by name, read when asked for."""

    def __init__(self, file: Any, names: list[str], lazy: bool) -> None:
        self.file, self.names, self.lazy = file, names, lazy

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype, without reading the values."""
        if not self.lazy:
            return tuple(self.file[name].shape), str(self.file[name].dtype).removeprefix("torch.")
        header = self.file.get_slice(name)
        return tuple(header.get_shape()), _DTYPES.get(header.get_dtype(), header.get_dtype())

    def read(self, name: str) -> Tensor:
        return self.file.get_tensor(name) if self.lazy else self.file[name]


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextmanager
def _open(file: Path) -> Iterator[_Tensors]:
    try:
        if file.suffix == ".bin":
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield _Tensors(loaded, [name for name, value in loaded.items() if isinstance(value, Tensor)], lazy=False)
        else:
            with safe_open(file, framework="pt") as opened:
                yield _Tensors(opened, list(opened.keys()), lazy=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file, yet the index beside it names it") from error
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError, AttributeError) as error:
        raise UserError(f"{file}: not a readable weight file ({_first_line(error)})") from error


def _names(tensors: _Tensors) -> Iterator[tuple[str, str]]:
    """(name in the file, name in NeoX) of all but the old buffers."""
    for stored in tensors.names:
        name = stored.removeprefix(_PREFIX)
        if not _BUFFERS.search(name):
            yield stored, _HEAD if name == "lm_head.weight" else name


# ---- writing --------------------------------------------------------------------------------------------------------


def export(
    model: NeoX,
    config: ModelConfig,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that ``GPTNeoXForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load.

    Weights keep their dtype; rows of a padded vocabulary are cut off; more than ``shard_bytes`` go to several files.
    The folder appears whole or not at all, and replaces an earlier export. Raises UserError where it would replace
    anything else.
    """
    folder = Path(folder)
    if folder.exists() and not _is_replaceable(folder):
        raise UserError(f"{folder}: exists and is not an export of megarewarm: choose another folder or remove it")
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise UserError(f"{tokenizer}: no such tokenizer file, so it cannot be copied into the export")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        end_of_text = 0 if tokenizer is None else _end_of_text(Path(tokenizer))
        _write_json(new / "config.json", _to_huggingface(config, model.head.dtype, end_of_text))
        _write_json(new / "generation_config.json", {"bos_token_id": end_of_text, "eos_token_id": end_of_text})
        _write_weights(model, config.vocab_size, new, shard_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, new / "tokenizer.json")
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)


def _is_replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    config = folder / "config.json"
    return config.is_file() and str(_read_json(config).get("exported_by", "")).startswith("megarewarm")


def _to_huggingface(config: ModelConfig, dtype: torch.dtype, end_of_text: int) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "exported_by": f"megarewarm {__version__}",
        **{theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()},
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
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _end_of_text(tokenizer: Path) -> int:
    """Id of ``<|endoftext|>``, which ends and begins documents; 0, as in Pythia, where the tokenizer has none."""
    added = _read_json(tokenizer).get("added_tokens") or []
    return next((token["id"] for token in added if token.get("content") == "<|endoftext|>"), 0)


def _write_weights(model: nn.Module, vocabulary: int, folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()[:vocabulary] if _is_padded(name) else parameter.detach()
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name if name == _HEAD else _PREFIX + name] = tensor
        size += tensor.nbytes
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for file, shard in zip(names, shards, strict=True):
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        save_file(on_cpu, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


# ---- small things ---------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({_first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
