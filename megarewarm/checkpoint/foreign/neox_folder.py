"""Checkpoint folders of GPT-NeoX: which files there are, whose weights they hold, and the model's shape.

``SAVE/latest`` names ``global_stepN``. In it, weights lie in ``layer_XX-model_YY-model_states.pt`` (pipe_parallel_size of 1 and
more: embedding 00, layers from 02 on, norm L + 3, head L + 4) or inside ``mp_rank_YY_model_states.pt`` (size 0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megarewarm.checkpoint.foreign.neox_names import arrangement_of, is_first_norm, piece_name, whole_of
from megarewarm.checkpoint.foreign.pickles import InertRecord, read_pickle
from megarewarm.checkpoint.foreign.pointer import name_in
from megarewarm.checkpoint.foreign.recorded_keys import require_agreement
from megarewarm.checkpoint.foreign.tensor_parts import merge, sharing_of, whole_shape
from megarewarm.checkpoint.weights import Description, check, expected_shapes, make_model_config
from megarewarm.config.model import ModelConfig
from megarewarm.config.neox_family import is_llama_like
from megarewarm.config.neox_function import another_function
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD, cards

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO3_FILE = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_STEP = re.compile(r"global_step(\d+)")


def find(path: Path) -> Path | None:
    """The ``global_stepN`` folder that ``path`` means: itself, or what ``latest`` in it names; None if it is none."""
    if _is_checkpoint(path):
        return path
    latest = path / "latest"
    if latest.is_file():
        named = path / name_in(latest)
        if not _is_checkpoint(named):
            raise UserError(f"{latest}: names {named.name}, which is no checkpoint folder beside it; copy it, or name another")
        return named
    return None


def _is_checkpoint(path: Path) -> bool:
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    if any(_ZERO3_FILE.fullmatch(name) for name in names):
        raise UserError(
            f"{path}: written with ZeRO stage 3, whose files hold a part of every parameter; only stages 0, 1 and 2 can be "
            f"read: make whole weights with DeepSpeed's zero_to_fp32.py, and save them as {{'module': weights}} in "
            f"mp_rank_00_model_states.pt of another folder, with configs/ beside it"
        )
    return any(_LAYER_FILE.fullmatch(name) or _RANK_FILE.fullmatch(name) for name in names)


class NeoXFolder:
    """A ``global_stepN`` folder. Raises ``UserError`` naming what is missing or doesn't fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)
        names = [file.name for file in folder.iterdir()]
        self._layer_files: dict[tuple[int, int], Path] = {}
        for name in names:
            if match := _LAYER_FILE.fullmatch(name):
                self._layer_files[int(match[1]), int(match[2])] = folder / name
        self.rank_files = {int(match[1]): folder / name for name in names if (match := _RANK_FILE.fullmatch(name))}
        self._settings = _settings(folder)
        self.state: Mapping[str, Any] = read_pickle(self.rank_files[min(self.rank_files)]) if self.rank_files else {}
        self.tensor_ranks = self._count_tensor_ranks()
        # megarewarm's name, or that of a piece -> [(file, key in it) of each tensor rank]
        self._parts: dict[str, list[tuple[Path, str]]] = {}
        self._headers: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._rotary_dims: int | None = None
        self._has_old_names = False  # of the MLP of Llama-like models
        self._index()
        self._pieces: dict[str, list[str]] = {}
        for piece in sorted(self._parts):
            self._pieces.setdefault(whole_of(piece), []).append(piece)
        self.model_config, self.notes = self._read_config()
        check(self, expected_shapes(self.model_config))

    @property
    def tokenizer_file(self) -> str | None:
        """The file of the tokenizer that the run's own YAML names."""
        name = self._settings.get("vocab_file")
        return name if isinstance(name, str) else None

    # ---- files -----------------------------------------------------------------------------------------------------

    def _count_tensor_ranks(self) -> int:
        if self._layer_files:
            ranks = {rank for _, rank in self._layer_files}
            for layer in sorted({layer for layer, _ in self._layer_files}):
                for rank in range(max(ranks) + 1):
                    if (layer, rank) not in self._layer_files:
                        name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                        raise UserError(f"{self.folder / name}: missing, other ranks of the layer are there; copy it as well")
            return max(ranks) + 1
        for rank in range(max(self.rank_files) + 1):
            if rank not in self.rank_files:
                raise UserError(f"{self.folder / f'mp_rank_{rank:02d}_model_states.pt'}: missing, a later rank's is there")
        return len(self.rank_files)

    def _modules(self, rank: int) -> list[tuple[Path, str, Mapping[str, Any]]]:
        """(file, prefix that makes names 'N.rest', tensors) of all files of a tensor rank."""
        if self._layer_files:
            files = sorted(item for item in self._layer_files.items() if item[0][1] == rank)
            return [(path, f"{layer}.", read_pickle(path)) for (layer, _), path in files]
        path = self.rank_files[rank]
        module = read_pickle(path).get("module")
        if not isinstance(module, Mapping):
            raise UserError(f"{path}: holds no weights ('module' is {type(module).__name__}) and there are no layer files")
        return [(path, "", module)]

    def _index(self) -> None:
        found = [
            (rank, path, prefix, key, tensor)
            for rank in range(self.tensor_ranks)
            for path, prefix, tensors in self._modules(rank)
            for key, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        ]
        numbered = [
            (prefix + key).removeprefix("sequential.").split(".")[0] for _, _, prefix, key, _ in found if is_first_norm(key)
        ]
        positions = [int(number) for number in numbered if number.isdecimal()]
        for _, path, prefix, key, _ in found:
            if not (prefix + key).removeprefix("sequential.")[:1].isdecimal() and not key.startswith("tied_modules."):
                raise UserError(
                    f"{path}: '{key}' is no name of GPT-NeoX's, so this is a DeepSpeed folder of another program; where that "
                    f"was transformers' Trainer, give the folder above, with config.json"
                )
        if not positions:
            raise UserError(f"{self.folder}: no transformer layer with an input_layernorm in it; is it a GPT-NeoX model?")
        self.layers = max(positions) - 1
        if sorted(set(positions)) != list(range(2, self.layers + 2)):
            missing = sorted(set(range(2, self.layers + 2)) - set(positions))
            raise UserError(f"{self.folder}: the file of layer {missing[0]:02d} is missing; copy it as well")
        self.is_llama_like = any(key.endswith("input_layernorm.scale") for _, _, _, key, _ in found)
        self._require_norm(found[0][1])
        for rank, path, prefix, key, tensor in found:
            if key.endswith("rotary_emb.inv_freq"):
                self._rotary_dims = 2 * tensor.numel()
            name = self.our_name(prefix + key)
            if name is None:
                continue
            parts = self._parts.setdefault(name, [])
            if name == EMBEDDING and len(parts) == rank + 1:
                continue  # tied embeddings lie in the last layer's file as well
            if len(parts) != rank:
                raise UserError(f"{path}: {key} is in it, but not in the files of every rank before {rank}")
            parts.append((path, key))
            shape, dtype = self._headers.setdefault(name, (tuple(tensor.shape), tensor.dtype))
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise UserError(f"{path}: {key} has shape {tuple(tensor.shape)}, rank 0's has {shape}")

    def _require_norm(self, path: Path) -> None:
        """Refuse the files of one norm beside the settings of another."""
        if self._settings and is_llama_like(self._settings) != self.is_llama_like:
            said = self._settings.get("norm", "layernorm")
            held = "RMSNorm's ('scale')" if self.is_llama_like else "LayerNorm's ('weight', no 'scale')"
            raise UserError(f"{path}: norm is {said!r} by configs/*.yml, and the norms in the file are {held}: of two models")

    def our_name(self, stored: str) -> str | None:
        """megarewarm's name of a stored parameter or of the piece of one that it is; None for a buffer."""
        return piece_name(stored, self.layers, llama=self.is_llama_like)

    # ---- the shape -------------------------------------------------------------------------------------------------

    def _read_config(self) -> tuple[ModelConfig, list[str]]:
        settings, args = self._settings, _mapping(self.state.get("args"))
        heads = settings.get("num_attention_heads", args.get("num_attention_heads"))
        if heads is None:
            raise UserError(
                f"{self.folder}: nothing in it says how many heads there are (no configs/*.yml, no 'args' in mp_rank_00): copy "
                f"the run's YAML into {self.folder / 'configs'}"
            )
        if not isinstance(heads, int) or heads < 1:
            raise UserError(f"{self.folder}: num_attention_heads is {heads!r}, expected a number above 0")
        self._agree()
        self.parallel_residual = not self.is_llama_like and bool(settings.get("gpt_j_residual", not settings))
        found, notes = self._llama(heads) if self.is_llama_like else self._neox(heads)
        config = make_model_config(
            str(self.folder),
            num_layers=self.layers,
            hidden_size=self._hidden,
            num_heads=heads,
            vocab_size=self._rows(EMBEDDING),
            max_positions=settings.get("max_position_embeddings", args.get("max_position_embeddings", 2048)),
            rotary_base=settings.get("rotary_emb_base", 10000.0),
            tie_embeddings=HEAD not in self._parts,
            attention_bias="layers.0.attention.query_key_value.bias" in self._parts,
            **found,
        )
        return config, notes

    @property
    def _hidden(self) -> int:
        norm = "attention_norm" if self.is_llama_like else "input_layernorm"
        return int(self._headers[f"layers.0.{norm}.weight"][0][0])

    def _rows(self, name: str) -> int:
        """Rows of a parameter, or of a piece, whose rows the tensor ranks share."""
        if name not in self._headers:
            raise UserError(f"{self.folder}: no {name} in its files; is it a GPT-NeoX model?")
        return whole_shape(self._headers[name][0], self.tensor_ranks, "rows")[0]

    def _neox(self, heads: int) -> tuple[dict[str, Any], list[str]]:
        """What is particular of GPT-NeoX's own models, and notes."""
        settings, notes, h = self._settings, [], self._hidden
        if "rotary_pct" in settings:
            fraction = float(settings["rotary_pct"])
            if self._rotary_dims is not None:
                dims = {"configs/*.yml": int(h // heads * fraction), "the tensor rotary_emb.inv_freq": self._rotary_dims}
                require_agreement(self.where, "the number of rotated channels", dims)
        elif self._rotary_dims is not None:
            fraction = self._rotary_dims / (h // heads)
        else:
            fraction = 1.0 if settings else 0.25
            notes.append(f"rotary_pct is not recorded there: {fraction:g} is assumed")
        if not settings:
            notes.append(
                "no configs/*.yml in the checkpoint: parallel residual and tanh GELU are assumed, as in Pythia; give 'model' "
                "to say otherwise"
            )
        tanh = bool(settings.get("bias_gelu_fusion", not settings))
        notes.append(f"{'tanh' if tanh else 'exact (erf)'} GELU, from bias_gelu_fusion" if settings else "tanh GELU")
        return {
            "ffn_size": self._rows("layers.0.mlp.dense_h_to_4h.weight"),
            "rotary_fraction": fraction,
            "activation": "gelu_tanh" if tanh else "gelu_erf",
            "residual": "parallel" if self.parallel_residual else "sequential",
            "layernorm_eps": settings.get("layernorm_epsilon", 1e-5),
        }, notes

    def _llama(self, heads: int) -> tuple[dict[str, Any], list[str]]:
        """What is particular of Llama-like models, and notes."""
        settings, notes = self._settings, []
        gate, fused = "layers.0.mlp.gate_up.weight", "layers.0.attention.query_key_value.weight"
        self._has_old_names = gate not in self._parts
        width = self._rows(f"{gate}/0") if self._has_old_names else self._rows(gate) // 2
        channels, rows = self._hidden // heads, self._rows(fused)
        keys = (rows // channels - heads) // 2 if channels else 0
        if keys < 1 or rows != (heads + 2 * keys) * channels or keys % self.tensor_ranks or width % self.tensor_ranks:
            raise UserError(
                f"{self.folder}: {rows} rows of query_key_value and {width} of the gate, by {self.tensor_ranks} ranks, are not "
                f"those of {heads} heads with {channels} channels; num_attention_heads is of another model"
            )
        said = settings.get("num_kv_heads") or (heads if settings else None)
        require_agreement(self.where, "num_kv_heads", {"configs/*.yml": said, "the tensors": keys})
        require_agreement(
            self.where, "the number of rotated channels", {"the family": channels, "rotary_emb.inv_freq": self._rotary_dims}
        )
        if keys != heads and self._has_old_names:
            notes.append("grouped queries beside w1 and w3: read as GPT-NeoX laid them out until November 2024")
            if channels * keys % heads:
                raise UserError(
                    f"{self.folder}: GPT-NeoX up to 2024 had no {keys} keys for {heads} heads of {channels} channels"
                )
        window = settings.get("sliding_window_width")
        if not isinstance(window, int | None):
            raise UserError(f"{self.folder}: sliding_window_width is {window!r}, expected a number")
        if not settings:
            notes.append(
                "no configs/*.yml in the checkpoint: rms_norm_epsilon 1e-5, rotary_emb_base 10000 and no window are assumed; "
                "give 'model' to say otherwise"
            )
        return {
            "family": "llama" if window is None else "mistral",
            "num_kv_heads": None if keys == heads else keys,
            "ffn_size": width,
            "mlp_bias": "layers.0.mlp.gate_up.bias" in self._parts,
            "layernorm_eps": settings.get("rms_norm_epsilon", 1e-8) if settings else 1e-5,
            **({} if window is None else {"sliding_window": window + 1}),
        }, notes

    def _agree(self) -> None:
        """Raise ``UserError`` if the recorded settings contradict the files: some were not copied, or belong to another
        model."""
        settings, args = self._settings, _mapping(self.state.get("args"))
        layers = settings.get("num_layers", args.get("num_layers"))
        if layers is not None and int(layers) != self.layers:
            raise UserError(f"{self.folder}: it had {layers} layers, its files hold {self.layers}; copy all layer_* files")
        held = {
            "hidden_size": self._hidden,
            "padded_vocab_size": self._rows(EMBEDDING),
            "model_parallel_size": self.tensor_ranks,
        }
        for key in {**held, **dict.fromkeys(("num_attention_heads", "max_position_embeddings"))}:
            said = {"configs/*.yml": settings.get(key), "'args' in mp_rank_*": args.get(key), "the tensors": held.get(key)}
            require_agreement(self.where, key, said)
        for file in self.rank_files.values():
            other = read_pickle(file)
            for key in ("iteration", "args"):
                one, two = self.state.get(key), other.get(key)
                if not isinstance(two, InertRecord):
                    require_agreement(str(file), key, {"the file of the first rank": one, "this one": two})
        if self._settings.get("no_weight_tying") and HEAD not in self._parts:
            name = f"layer_{self.layers + 4:02d}-model_00-model_states.pt"
            raise UserError(f"{self.folder / name}: the head (final_linear.weight) is missing; copy the file as well")

    # ---- weights ---------------------------------------------------------------------------------------------------

    def names(self, tensor_rank: int | None = None) -> list[str]:
        """megarewarm's names of the stored parameters (pieces where one here is stored in several), in the order in which
        GPT-NeoX registers them: of one tensor rank, or of any."""
        return [name for name, parts in self._parts.items() if tensor_rank is None or tensor_rank < len(parts)]

    def part_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor rank's part of stored parameter ``name``."""
        return self._headers[name][0]

    def setting(self, key: str, default: Any = None) -> Any:
        """A key of the run's own YAML, where the checkpoint holds it."""
        return self._settings.get(key, default)

    def describe(self) -> Mapping[str, Description]:
        found = {}
        for name, pieces in self._pieces.items():
            kind = sharing_of(name, biases_added=self.parallel_residual)
            shapes = [whole_shape(self._headers[piece][0], len(self._parts[piece]), kind) for piece in pieces]
            dtype = self._headers[pieces[0]][1]
            for piece in pieces[1:]:
                dtype = torch.promote_types(dtype, self._headers[piece][1])
            stored = [self._parts[piece][0] for piece in pieces]
            place = " and ".join(f"{key} in {file.name}" for file, key in stored)
            found[name] = Description((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype, place)
        return found

    def read(self, name: str) -> Tensor:
        return self.assembled(name, self._read, biases_added=self.parallel_residual)

    def _read(self, piece: str) -> list[Tensor]:
        parts = []
        for path, key in self._parts[piece]:
            loaded = read_pickle(path)
            parts.append((loaded if self._layer_files else loaded["module"])[key])
        return parts

    def assembled(self, name: str, parts_of: Callable[[str], Sequence[Tensor]], *, biases_added: bool) -> Tensor:
        """Parameter ``name``, whole and in our order of rows. ``parts_of``: the tensor ranks' parts of a stored parameter;
        those of weights, masters or moments are laid out alike. ``biases_added``: see ``tensor_parts``."""
        card, pieces = cards(self.model_config).get(name), self._pieces[name]
        sharing = sharing_of(name, biases_added=biases_added)
        if card is None:
            return merge(parts_of(pieces[0]), sharing)
        if len(pieces) > 1 and card.interleaved is not None:
            return card.interleaved.join([merge(parts_of(piece), sharing) for piece in pieces])
        arranged = arrangement_of(card, self.model_config, old=self.is_llama_like and self._has_old_names)
        return merge([part if arranged is None else arranged.to_ours(part) for part in parts_of(pieces[0])], sharing)


def _settings(folder: Path) -> dict[str, Any]:
    """The run's own YAML files, which GPT-NeoX copies into a checkpoint, merged; dashes read as underscores. Raises
    ``UserError`` for keys under which the weights are another function, and where two files contradict each other."""
    merged: dict[str, Any] = {}
    places: dict[str, Path] = {}
    beside = sorted(folder.glob("*.y*ml"))  # where published checkpoints have them
    for path in sorted((folder / "configs").glob("*.y*ml")) or beside:
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8").expandtabs())  # tabs: JSON has them, YAML refuses them
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
        if isinstance(read, Mapping):
            for written, value in read.items():
                key = str(written).replace("-", "_")
                if key in merged and merged[key] != value:
                    raise UserError(
                        f"{path}: {key} is {value!r}, and {merged[key]!r} in {places[key].name}: of two models; remove one"
                    )
                merged[key], places[key] = value, path
    for key, reason in another_function(merged).items():
        raise UserError(f"{places[key]}: {key} is {merged[key]!r}, under which the weights are another model: {reason}")
    if merged and "pos_emb" not in merged:
        raise UserError(
            f"{next(iter(places.values()))}: 'pos_emb' is missing, so the keys of the model are in another file (its default "
            f"is 'learned'); copy all of the run's YAML files, or write 'pos_emb: rotary' and the rest of the model's keys"
        )
    return merged


def _mapping(value: Any) -> Mapping[str, Any]:
    return value.values if isinstance(value, InertRecord) else value if isinstance(value, Mapping) else {}


def step_of(folder: Path) -> int | None:
    """The N of ``global_stepN``."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None
