"""A GPT-NeoX configuration as a megarewarm config. Rules and defaults are GPT-NeoX's; sections are built one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarewarm.config import neox_keys
from megarewarm.config.neox_model import model_of
from megarewarm.config.neox_precision import loss_scale_of, precision_of
from megarewarm.config.neox_read import NeoxFile
from megarewarm.config.neox_tokenizer import KNOWN_ENDS, tokenizer_size, usable_tokenizer
from megarewarm.config.neox_values import NeoxValues
from megarewarm.errors import UserError
from megarewarm.untrusted import one_line

_CURVES = {"linear": "linear_clipped", "cosine": "cosine", "exponential": "exponential", "constant": "constant"}


@dataclass(frozen=True)
class Translation:
    """``mapping``: a megarewarm config without ``start`` and the vocabulary of a model that is loaded, for which the checkpoint
    has to be opened. ``load``: its name. ``vocabulary``: the rows that the file's tokenizer asks for. ``notes``: what a reader
    of the file may not expect. ``idle``: honoured keys that have no effect beside the others of this file, with why."""

    mapping: dict[str, Any]
    load: str | None
    finetune: bool
    keeps_rng: bool
    overrides_schedule: bool
    vocabulary: Callable[[], int]
    notes: list[str] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)

    def vocabulary_or_none(self) -> int | None:
        """The padded vocabulary that the file asks for, None where it can't be known from it."""
        try:
            return self.vocabulary()
        except UserError:
            return None


def ranks_asked(file: NeoxFile) -> int:
    """The least number of ranks that ``file`` can be trained on: what it says itself, or what its layout and batch need."""
    given = file.values
    if isinstance(said := given.get("global_num_gpus"), int) and said > 0:
        return said
    total, micro, steps = (
        given.get(key) or 0 for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    data = max(1, total // (micro * steps)) if min(total, micro, steps) > 0 else 1
    return data * max(1, given.get("model_parallel_size") or 1) * max(1, given.get("pipe_parallel_size") or 1)


def translate(file: NeoxFile, world_size: int) -> Translation:
    """``file`` for ``world_size`` ranks. Raises ``UserError`` naming file, line and key."""
    translator = _Translator(file, world_size)
    try:
        return translator.translate()
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        # the types of whole keys are checked, not what is inside of their lists and mappings
        raise UserError(f"{file.place(translator.asked)}: is not what GPT-NeoX takes there ({one_line(str(error))})") from error


class _Translator(NeoxValues):
    def __init__(self, file: NeoxFile, world_size: int) -> None:
        super().__init__(file)
        self._world = world_size

    def translate(self) -> Translation:
        tensor, pipeline = self.get("model_parallel_size"), max(1, self.get("pipe_parallel_size"))
        if self._world % (tensor * pipeline):
            raise self.error(
                "model_parallel_size",
                f"{tensor} x {pipeline} pipeline stages don't divide the {self._world} ranks; start a multiple of "
                f"{tensor * pipeline}",
            )
        self._data_ranks = self._world // (tensor * pipeline)
        self._iterations = self.require("train_iters")
        self._batch, micro = self._batches()
        self._load = self.get("load")
        save = self.get("save")
        name = self._name(save)
        if save is None:
            self.notes.append(f"'save' is not given: the run folder is runs/{name}")
        precision = precision_of(self)
        mapping: dict[str, Any] = {
            "name": name,
            "folder": save,
            "model": self._model(tensor),
            "data": self._data(),
            "schedule": self._schedule(),
            "training": {
                "budget": self._iterations,
                "global_batch": self._batch,
                "micro_batch": micro,
                "precision": precision,
                "recompute": "full" if self.get("checkpoint_activations") else "none",
                "seed": self.get("seed"),
            },
            "optimizer": self._optimizer(),
            "evaluation": {"every": self.get("eval_interval") or None, "windows": "moving", "at_start": False},
            "checkpoint": self._checkpoint(),
            "logging": self._logging(),
            "parallel": self._parallel(tensor, pipeline),
        }
        if scale := loss_scale_of(self, precision):
            mapping["training"]["loss_scale"] = scale
        self._check_overwritten(micro)
        return Translation(
            mapping=mapping,
            load=self._load,
            finetune=bool(self.get("finetune")),
            keeps_rng=not self.get("no_load_rng"),
            overrides_schedule=bool(self.get("override_lr_scheduler")),
            vocabulary=lambda: self.padded_vocabulary(tensor),
            notes=self.notes,
            idle={key: why for key, why in self.idle.items() if key in self.file.honoured},
        )

    def _check_overwritten(self, micro: int) -> None:
        """Raise ``UserError`` for a key that GPT-NeoX overwrites with another value than the file gives it."""
        counts = {
            "lr": self.get("optimizer.params.lr"),
            "clip_grad": self.get("gradient_clipping"),
            "optimizer_type": str(self.get("optimizer.type")).lower(),
            "zero_stage": self.get("zero_optimization.stage"),
            "batch_size": micro,
            "gas": self.file.values.get("gradient_accumulation_steps") or self._batch // (micro * self._data_ranks),
            "is_pipe_parallel": self.get("pipe_parallel_size") >= 1,
        }
        for key, (default, other) in neox_keys.OVERWRITTEN.items():
            given = self.file.values.get(key, default)
            given = given.lower() if isinstance(given, str) else given
            if given is not None and given != default and given != counts[key]:
                raise self.error(
                    key, f"{given!r} has no effect in GPT-NeoX, where {other} counts, which is {counts[key]!r}; write it there"
                )

    def _name(self, save: str | None) -> str:
        text = Path(save).name if save else Path(self.file.name).stem
        return "".join(c if c.isalnum() or c in "_.-" else "_" for c in text) or "run"

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _batches(self) -> tuple[int, int]:
        """(global batch, micro-batch). Any two of the three give the third by whole division; then the product is checked."""
        self.asked = "train_micro_batch_size_per_gpu"
        total, micro, steps = (
            self.file.values.get(key)
            for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        ranks = self._data_ranks
        if total is None and micro is None:
            raise UserError(f"{self.file.name}: 'train_micro_batch_size_per_gpu' is missing (or give train_batch_size)")
        if micro is None:
            micro = total // ranks // (steps or 1)
        if steps is None:
            steps = 1 if total is None else total // micro // ranks if micro else 0
        if total is None:
            total = micro * steps * ranks
        if min(total, micro, steps) < 1 or micro * steps * ranks != total:
            key = "train_batch_size" if "train_batch_size" in self.file.values else "train_micro_batch_size_per_gpu"
            raise self.error(
                key, f"{total} is not micro-batch {micro} x {steps} accumulation steps x {ranks} data-parallel ranks"
            )
        return total, micro

    # ---- the model -------------------------------------------------------------------------------------------------

    def _model(self, tensor: int) -> dict[str, Any]:
        model = model_of(self)
        if self._load is None:
            model["vocab_size"] = self.padded_vocabulary(tensor)
        return model

    def padded_vocabulary(self, tensor: int) -> int:
        """GPT-NeoX's rule: the tokenizer's size, up to a multiple of make_vocab_size_divisible_by x tensor-parallel ranks."""
        if (given := self.get("padded_vocab_size")) is not None:
            return int(given)
        size = tokenizer_size(self)
        multiple = self.get("make_vocab_size_divisible_by") * tensor
        return math.ceil(size / multiple) * multiple

    # ---- the data --------------------------------------------------------------------------------------------------

    def _data(self) -> dict[str, Any]:
        length = self.require("seq_length")
        tokens = self.get("eval_iters") * self._batch * length
        weighted = self.get("train_data_paths")
        if weighted and self.get("data_path"):
            raise self.error("data_path", "given beside train_data_paths; remove one of the two")
        sources = {part: self._sources(part) for part in ("train", "valid", "test")}
        if not sources["train"]:
            raise UserError(f"{self.file.name}: 'data_path' is missing (or give train_data_paths)")
        sets = [
            {"name": part, "role": "downstream", "tokens": tokens, "when": when, "sources": sources[part]}
            for part, when in (("valid", "always"), ("test", "end"))
            if sources[part] and tokens
        ]
        tokenizer = usable_tokenizer(self)
        return {
            "sequence_length": length,
            "order": "neox",
            "seed": self.get("seed"),
            "blend_of_one": bool(weighted),
            "train": sources["train"],
            "validation": sets,
            "tokenizer": tokenizer,
            "mask_eod_loss": self._masks_eod(tokenizer is not None and self.get("tokenizer_type") in KNOWN_ENDS),
        }

    def _masks_eod(self, tokenizer: bool) -> bool:
        masks = bool(self.get("eod_mask_loss"))
        if masks and not tokenizer:
            raise self.error(
                "eod_mask_loss",
                f"the end of a document is known only of a tokenizer_type {' or '.join(KNOWN_ENDS)} whose files are there",
            )
        if masks:
            self.notes.append(
                "eod_mask_loss: the mean is over all remaining tokens of the global batch, not of each micro-batch"
            )
        return masks

    def _sources(self, part: str) -> list[dict[str, Any]]:
        if (path := self.get("data_path")) is not None:
            split = self.get("split").replace("/", ",")
            return [{"path": path, "split": split, "part": part, "max_epochs": None}]
        paths, weights = self.get(f"{part}_data_paths"), self.get(f"{part}_data_weights")
        if not paths:
            return []
        weights = [1.0] * len(paths) if weights is None else weights
        if len(weights) != len(paths):
            raise self.error(f"{part}_data_weights", f"{len(weights)} weights for {len(paths)} paths; give one for each")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
                raise self.error(f"{part}_data_weights", f"{weight!r} is no weight; expected numbers above 0")
        # two files of the same name are distinguished by their place in the list
        names = [Path(path).name for path in paths]
        return [
            {"path": path, "weight": float(weight), "max_epochs": None}
            | ({"name": f"{name}_{i}"} if names.count(name) > 1 else {})
            for i, (path, name, weight) in enumerate(zip(paths, names, weights, strict=True))
        ]

    # ---- schedule and optimizer ------------------------------------------------------------------------------------

    def _schedule(self) -> dict[str, Any]:
        style = self.choice("lr_decay_style", _CURVES)
        end = self.get("lr_decay_iters")
        if end is None:
            fraction = self.get("lr_decay_fraction")
            end = self._iterations if fraction is None else math.floor(self._iterations * fraction)
        if end < 1:
            raise self.error("lr_decay_iters", f"the decay would be {end} iterations long; at least 1 is needed")
        peak = self.get("optimizer.params.lr")
        if peak is None:
            raise UserError(f"{self.file.name}: the learning rate is missing: give optimizer.params.lr")
        schedule: dict[str, Any] = {
            "curve": style,
            "max_lr": float(peak),
            "warmup": f"{float(self.get('warmup') * end)!r} steps",
            "unclamped": True,
        }
        floor = float(self.get("min_lr"))
        if style != "constant":
            return schedule | {"min_lr": floor, "length": f"{end} steps"}
        if floor > float(peak):
            raise self.error("min_lr", f"{floor:g} is above the learning rate {float(peak):g}")
        if floor:
            self.notes.append("min_lr has no effect on a constant rate")
        return schedule

    def _optimizer(self) -> dict[str, Any]:
        kind = self.get("optimizer.type")
        if str(kind).lower() not in ("adam", "adamw"):
            raise self.error(
                "optimizer.type", f"type {kind!r} can't be honoured, only 'Adam' (with decoupled weight decay); say that"
            )
        return {
            "betas": self.get("optimizer.params.betas"),
            "eps": self.get("optimizer.params.eps"),
            "weight_decay": self.get("weight_decay"),
            "clip_norm": self.get("gradient_clipping") or None,
        }

    # ---- the rest --------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> dict[str, Any]:
        factor = self.get("checkpoint_factor")
        extra = [int(step) for step in self.get("extra_save_iters") or []]
        scale = self.get("checkpoint_scale")
        if scale not in ("linear", "log"):
            raise self.error("checkpoint_scale", f"{scale!r} is neither 'linear' nor 'log'")
        every = None
        if scale == "linear":
            if factor is not None and factor != int(factor):
                raise self.error("checkpoint_factor", f"{factor!r} is no whole number, which 'linear' needs")
            every = int(factor) if factor else None
        elif factor is None or factor <= 1:
            raise self.error("checkpoint_scale", "'log' needs a checkpoint_factor above 1")
        else:
            step = 1.0
            while step < self._iterations:
                if len(extra) > 10_000:
                    raise self.error("checkpoint_factor", f"{factor!r} asks for more than 10,000 checkpoints; make it larger")
                extra.append(int(step))
                step *= factor
        keep_last = self.get("keep_last_n_checkpoints")
        if keep_last is not None and keep_last < 1:
            raise self.error("keep_last_n_checkpoints", f"{keep_last} leaves no checkpoint; keep at least 1")
        if keep_last is not None and extra:
            self.notes.append("the checkpoints of extra_save_iters stay, beside the newest keep_last_n_checkpoints")
        return {
            "every": every,
            "keep_last": keep_last or 1,
            "keep_every": every if keep_last is None else None,  # GPT-NeoX removes none unless asked to
            "extra_steps": sorted({step for step in extra if step <= self._iterations}),
        }

    def _logging(self) -> dict[str, Any]:
        logging: dict[str, Any] = {
            "every": self.get("log_interval"),
            "tensorboard": self.get("tensorboard_dir") is not None,
        }
        if self.get("use_wandb"):
            logging["wandb"] = {"project": self.get("wandb_project"), "entity": self.get("wandb_team")}
        return logging

    def _parallel(self, tensor: int, pipeline: int) -> dict[str, Any]:
        stage = self.get("zero_optimization.stage")
        if stage not in (0, 1, 2, 3):
            raise self.error("zero_optimization.stage", f"stage {stage!r} is none of 0, 1, 2, 3")
        sharding = ("none", "zero2", "zero2", "zero3")[stage] if self._data_ranks > 1 else "none"
        return {
            "tensor": tensor,
            "sequence": self.get("sequence_parallel") and tensor > 1,
            "pipeline": pipeline,
            "sharding": sharding,
        }
