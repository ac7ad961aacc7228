"""The checkpoint a run starts from, whatever its format: what it holds, and how to load each part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megarewarm.checkpoint.foreign import hub, huggingface, neox_folder
from megarewarm.checkpoint.foreign.card import read_card
from megarewarm.checkpoint.foreign.json_file import read_json
from megarewarm.checkpoint.foreign.megatron import MegatronFolder
from megarewarm.checkpoint.foreign.megatron import find as find_megatron
from megarewarm.checkpoint.foreign.neox_state import read_training, with_masters
from megarewarm.checkpoint.lineage import Lineage, Stage, StatedTerms
from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.folder import locate
from megarewarm.checkpoint.own.integrity import SUMS_FILE, find_damage
from megarewarm.checkpoint.own.state import TrainingState, read_state
from megarewarm.checkpoint.own.store import Tensors
from megarewarm.checkpoint.tokenizer_source import (
    TokenizerSource,
    loaded,
    readable_tokenizer,
    stated_ids,
    still_there,
    tokenizer_files_in,
)
from megarewarm.checkpoint.weights import Description, Weights, fill
from megarewarm.config.model import ModelConfig
from megarewarm.config.yaml_text import read_yaml
from megarewarm.data.files.manifest import Made
from megarewarm.data.text.end_of_document import TOKENIZER_FILES
from megarewarm.errors import UserError
from megarewarm.model.documents import DocumentRules
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.placement import TensorSlice
from megarewarm.record.layout import CONFIG_FILE

ALL_LINES = frozenset({"moments", "optimizer_step", "schedule", "iteration", "data", "rng", "loss_scale"})


class CheckpointSource(Protocol):
    """``keeps``: the rows of the reset table, beside the weights, that the checkpoint can provide. ``training``: the
    counters; None for weights only."""

    name: str
    format: str
    model_config: ModelConfig
    notes: list[str]
    training: TrainingState | None
    lineage: Lineage
    keeps: frozenset[str]

    @property
    def tokenizer(self) -> TokenizerSource:
        """The tokenizer of the weights' ids, as far as it is known."""

    def load_weights(self, model: ParallelModel) -> None:
        """Fill this rank's part of the parameters. All ranks call it."""

    def load_tensors(self, tensors: Tensors) -> None:
        """Fill named training tensors (moments, RNG state) in place."""


class OpenedCheckpoint(CheckpointSource, Protocol):
    """``stored``: the parameters as they are in the files, whole; ``weights``: in full precision, from other files if there
    are fp32 masters beside fp16 weights."""

    @property
    def stored(self) -> Weights:
        """As stored."""

    @property
    def weights(self) -> Weights:
        """In full precision."""


class OwnCheckpoint:
    """A native checkpoint: weights, moments and every counter; fewer if it was converted from a format with fewer. Its
    checksums are verified before the first tensor is loaded, unless ``verified``."""

    format = "megarewarm"

    def __init__(self, folder: Path, *, verified: bool = False) -> None:
        self.folder = folder
        self.name = str(folder)
        self.state = read_state(folder)
        self.keeps = ALL_LINES if self.state.keeps is None else self.state.keeps
        self.training: TrainingState | None = self.state if self.keeps else None
        self.model_config = self.state.model
        self.lineage = self.state.lineage
        self.notes: list[str] = []
        self.stored: Weights = _OwnWeights(self)
        self.weights: Weights = self.stored
        self._verified = verified
        if (rows := store.misplaced_rows(folder)) is not None:
            lost = ", ".join(map(str, rows.unread))
            self.notes.append(
                f"in {folder} an old revision misplaced rows {rows.first} to {rows.last} of the vocabulary (tensor ranks with "
                f"sharding; embedding, head and moments); they are read where they belong. If that run had itself begun or "
                f"gone on from a checkpoint of megarewarm in that layout, it lost row {lost} then: docs/reliability.md"
            )

    @cached_property
    def tokenizer(self) -> TokenizerSource:
        """The tokenizer of the run's configuration, if it still exists, else that of the newest stage with one, else one
        that its token files were made with. Tokenizers from before the vocabulary was extended are left out."""
        stages, newest = self.lineage.stages, self.lineage.of_vocabulary
        made = TokenizerSource(still_there([known for stage in reversed(newest) for known in stage.tokenizers]))
        extended = newest and newest[0].new_rows is not None
        found = self.own_tokenizer().over(made) if extended else self.own_tokenizer()
        places = [(self._run_config.get("start") or {}).get("from")]
        for stage in reversed(stages):
            places += [stage.started_from, stage.run if stage.intent.startswith("foreign") else None]
        for place in dict.fromkeys(filter(None, places)):
            if found.file is not None and found.stated:
                break
            with contextlib.suppress(UserError):  # it is gone
                start = open_checkpoint(place)
                earlier = start.own_tokenizer() if isinstance(start, OwnCheckpoint) else start.tokenizer
                found = found.over(replace(earlier, file=None) if extended else earlier)
        return found.over(made)

    def own_tokenizer(self) -> TokenizerSource:
        """The configuration's and the newest stage's, without earlier stages."""
        data = self._run_config.get("data") or {}
        stated = data.get("eod")
        recorded = self.lineage.stages[-1].eod if self.lineage.stages else None
        return TokenizerSource(readable_tokenizer(data.get("tokenizer")), recorded if stated is None else stated)

    @property
    def document_rules(self) -> DocumentRules | None:
        """The document rules that its run trained and evaluated with; None if a sequence was one text or it is unknown."""
        data = self._run_config.get("data") or {}
        reset, mask, eod = bool(data.get("reset_at_eod")), bool(data.get("mask_eod_loss")), self.own_tokenizer().eod
        return DocumentRules(eod, reset, mask) if eod is not None and (reset or mask) else None

    @cached_property
    def _run_config(self) -> dict[str, Any]:
        for config in (self.folder.parent.parent / CONFIG_FILE, self.folder.parent / CONFIG_FILE):  # step_N, average
            if config.is_file():
                return read_yaml(config)[0]
        return {}

    @collective
    def verify(self, *, alone: bool = False) -> None:
        """Raise ``UserError`` naming a file that is not as it was written. All ranks call it, unless ``alone``."""
        if self._verified:
            return
        if self.state.format < 2 and not (self.folder / SUMS_FILE).exists():
            self.notes.append(f"{self.name} was written before checkpoints had checksums: it can't be verified")
        elif (damage := find_damage(self.folder, alone=alone)) is not None:
            raise UserError(f"{damage}; use another checkpoint, or copy this one again")
        self._verified = True

    def load_weights(self, model: ParallelModel) -> None:
        self.load_tensors(weight_tensors(model))

    def load_tensors(self, tensors: Tensors) -> None:
        self.verify()
        store.load(self.folder, tensors)

    def whole_model(self) -> Transformer:
        """The model on one device (the CPU), whatever layout wrote it. For one rank to call."""
        with torch.device("meta"):
            model = Transformer(self.model_config)
        model.to_empty(device="cpu")
        self.verify(alone=True)
        store.load(self.folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()}, alone=True)
        return model


class _OwnWeights:
    """The weights in a native folder. For one process: other ranks are not involved."""

    def __init__(self, checkpoint: OwnCheckpoint) -> None:
        self.where = checkpoint.name
        self._checkpoint, self._folder = checkpoint, checkpoint.folder

    def describe(self) -> Mapping[str, Description]:
        stored = store.stored_tensors(self._folder)
        return {
            name.removeprefix("model."): Description(shape, dtype, f"{name} in {self._folder.name}")
            for name, (shape, dtype) in stored.items()
            if name.startswith("model.")
        }

    def read(self, name: str) -> Tensor:
        self._checkpoint.verify(alone=True)
        shape, dtype = store.stored_tensors(self._folder)[f"model.{name}"]
        tensor = torch.empty(shape, dtype=dtype)
        store.load(self._folder, {f"model.{name}": tensor}, alone=True)
        return tensor


@dataclass(eq=False)
class ForeignCheckpoint:
    """Weights in another program's format, opened when they are needed; subclasses may have more."""

    name: str
    format: str
    model_config: ModelConfig
    open: Callable[[], Weights]
    notes: list[str]
    tokenizer: TokenizerSource = TokenizerSource()  # noqa: RUF009 (frozen)
    training: TrainingState | None = None
    keeps: frozenset[str] = frozenset()
    card: StatedTerms | None = None
    config: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        intent = f"foreign checkpoint ({self.format})"
        optimizer = self.card.optimizer if self.card is not None else None
        stage = Stage(
            run=self.name,
            intent=intent,
            optimizer=optimizer,
            card=self.card,
            config=self.config,
            generation=self.generation,
        )
        self.lineage = Lineage(stages=[stage])

    @cached_property
    def stored(self) -> Weights:
        return self.open()

    @cached_property
    def weights(self) -> Weights:
        return self.stored

    def load_weights(self, model: ParallelModel) -> None:
        fill(self.weights, model.shapes, model.fill)

    def load_tensors(self, tensors: Tensors) -> None:
        raise UserError(f"{self.name}: only weights are read from this format; set start.moments to 'reset'")


class NeoXCheckpoint(ForeignCheckpoint):
    """A ``global_stepN`` folder of GPT-NeoX: weights, and with its optimizer's files moments and fp32 masters."""

    def __init__(self, name: str, folder: Path) -> None:
        files = neox_folder.NeoXFolder(folder)
        # a megarewarm export has it; else its own configuration names it, if that file is on this machine
        beside = tokenizer_files_in(folder.parent)
        tokenizer = TokenizerSource(beside[0] if beside else readable_tokenizer(files.tokenizer_file))
        super().__init__(name, "gpt-neox", files.model_config, lambda: files, files.notes, tokenizer)
        self.training, self._optimizer, notes = read_training(files)
        self.notes += notes
        if self.training is not None:
            self.keeps, self.lineage = ALL_LINES - {"rng"}, self.training.lineage
        if self._optimizer is not None:
            self.weights = with_masters(files, self._optimizer)

    def load_tensors(self, tensors: Tensors) -> None:
        assert self._optimizer is not None
        for key, tensor in tensors.items():
            kind, moment, name = key.split(".", 2)
            assert kind == "optimizer" and moment in ("exp_avg", "exp_avg_sq"), key
            whole = self._optimizer.read(moment, name)  # type: ignore[arg-type]
            store.local(tensor).copy_(tensor.of(whole) if isinstance(tensor, TensorSlice) else whole)


def tokenizers_of(source: CheckpointSource, known: Sequence[Made] = ()) -> list[Made]:
    """The tokenizers of the data of a checkpoint's history; if not recorded, the one that comes with it. Of several forms
    (tokenizer.json, tokenizer.model) it chooses one that agrees with those ``known``, if any."""
    found = [
        Made(f"{stage.run}, in the history of {source.name}, was trained on ids of the tokenizer {tokenizer.file}", tokenizer)
        for stage in source.lineage.of_vocabulary
        for tokenizer in stage.tokenizers
    ]
    file = source.tokenizer.file
    if found or file is None:
        return found
    for form in [file, *(other for other in tokenizer_files_in(file.parent) if file.name in TOKENIZER_FILES)]:
        with contextlib.suppress(UserError):  # an unusable tokenizer is ignored
            found.append(Made(f"{source.name} comes with the tokenizer {form}", loaded(form).identity()))
    agreeing = [each for each in found if all(each.tokenizer.agrees_with(other.tokenizer) for other in known)]
    return (agreeing or found)[:1]


def weight_tensors(model: ParallelModel) -> Tensors:
    """The parameters on this rank under the names they have in a checkpoint."""
    return {f"model.{name}": tensor for name, tensor in model.weights().items()}


def _own(name: str, path: Path) -> OpenedCheckpoint | None:
    own, notes = locate(path)
    if own is None:
        return None
    found = OwnCheckpoint(own, verified=own != path)
    found.notes += notes
    return found


def _huggingface(name: str, path: Path) -> OpenedCheckpoint | None:
    if not (path / "config.json").is_file():
        return None
    shape, notes = huggingface.read_model_config(path)
    files = tokenizer_files_in(path)
    raw = read_json(path / "config.json")
    tokenizer = TokenizerSource(files[0] if files else None, stated=stated_ids(raw))
    weights, card = lambda: huggingface.HuggingFaceWeights(path), read_card(name, path)
    beside = path / "generation_config.json"
    generation = read_json(beside) if beside.is_file() else None
    return ForeignCheckpoint(
        name, "huggingface", shape, weights, notes, tokenizer, card=card, config=raw, generation=generation
    )


def _neox(name: str, path: Path) -> OpenedCheckpoint | None:
    folder = neox_folder.find(path)
    return None if folder is None else NeoXCheckpoint(name, folder)


def _megatron(name: str, path: Path) -> OpenedCheckpoint | None:
    if (folder := find_megatron(path)) is None:
        return None
    files = MegatronFolder(folder)
    return ForeignCheckpoint(name, "megatron-lm", files.model_config, lambda: files, files.notes)


Opener = Callable[[str, Path], OpenedCheckpoint | None]

FORMATS: dict[str, tuple[Opener, str]] = {
    "megarewarm": (_own, "a run or checkpoint folder of megarewarm (no finished step_N in it)"),
    "huggingface": (_huggingface, "a Hugging Face folder (no config.json)"),
    "gpt-neox": (_neox, "one of GPT-NeoX (no 'latest', no layer_* or mp_rank_* files)"),
    "megatron-lm": (_megatron, "one of Megatron-LM (no iter_N with mp_rank_*)"),
}
"""Every readable format, tried in this order: a function that opens a checkpoint from its name and folder, from headers only
(None for a folder of another format), and a description of such folders with what a folder of another format lacks."""


def open_checkpoint(name: str) -> OpenedCheckpoint:
    """The checkpoint ``name``: a folder in one of ``FORMATS``, or a hub name. Reads headers only. Raises ``UserError`` for a
    folder in none of them, and for a hub name that can't be resolved."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise UserError(f"{name} is a file; name the folder of the checkpoint")
    here = path.is_dir()
    for opens, _ in FORMATS.values() if here else [FORMATS["huggingface"]]:
        if (found := opens(name, path if here else hub.resolve(name))) is not None:
            return found
    raise UserError(f"{name} is neither {', nor '.join(kind for _, kind in FORMATS.values())}")
