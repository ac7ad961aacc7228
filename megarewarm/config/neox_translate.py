"""A GPT-NeoX configuration in our words. Rules and defaults are GPT-NeoX's; the sections of ours are built one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarewarm.config import neox_blocks, neox_keys
from megarewarm.config.load import path_text
from megarewarm.config.neox_read import NeoxFile
from megarewarm.errors import UserError
from megarewarm.untrusted import one_line

_CURVES = {"linear": "linear_clipped", "cosine": "cosine", "exponential": "exponential", "constant": "constant"}
_INIT = {"normal": "normal", "small_init": "small"}
_OUTPUT_INIT = {"normal": "normal", "wang_init": "wang", "scaled_normal": "scaled_normal"}
_PRECISIONS = {"fp16": "fp16", "float16": "fp16", "bfloat16": "bf16", "bf16": "bf16", "fp32": "fp32"}


@dataclass(frozen=True)
class Translation:
    """``mapping``: a run in our words, but for ``start`` and the vocabulary of a model that is loaded, for which the checkpoint
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
    sizes = [given.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    data = 1
    if all(isinstance(size, int) and size > 0 for size in sizes):
        total, micro, steps = sizes
        data = max(1, total // (micro * steps))
    return data * max(1, given.get("model_parallel_size") or 1) * max(1, given.get("pipe_parallel_size") or 1)


def translate(file: NeoxFile, world_size: int) -> Translation:
    """``file`` for ``world_size`` ranks. Raises ``UserError`` naming file, line and key."""
    translator = _Translator(file, world_size)
    try:
        return translator.translate()
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        # the types of whole keys are checked, not what is inside of their lists and mappings
        raise UserError(f"{file.place(translator.asked)}: is not what GPT-NeoX takes there ({one_line(str(error))})") from error


class _Translator:
    def __init__(self, file: NeoxFile, world_size: int) -> None:
        self._file, self._world = file, world_size
        self._notes: list[str] = []
        self._idle: dict[str, str] = {}
        self.asked = ""  # the key that was looked up last

    def translate(self) -> Translation:
        tensor, pipeline = self._get("model_parallel_size"), max(1, self._get("pipe_parallel_size"))
        if self._world % (tensor * pipeline):
            raise self._error(
                "model_parallel_size",
                f"{tensor} x {pipeline} pipeline stages don't divide the {self._world} ranks; start a multiple of "
                f"{tensor * pipeline}",
            )
        self._data_ranks = self._world // (tensor * pipeline)
        self._iterations = self._require("train_iters")
        self._batch, micro = self._batches()
        self._load = self._get("load")
        save = self._get("save")
        name = self._name(save)
        if save is None:
            self._notes.append(f"'save' is not given: the run folder is runs/{name}")
        precision = self._precision()
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
                "recompute": "full" if self._get("checkpoint_activations") else "none",
                "seed": self._get("seed"),
            },
            "optimizer": self._optimizer(),
            "evaluation": {"every": self._get("eval_interval") or None, "windows": "moving", "at_start": False},
            "checkpoint": self._checkpoint(),
            "logging": self._logging(),
            "parallel": self._parallel(tensor, pipeline),
        }
        if scale := self._loss_scale(precision):
            mapping["training"]["loss_scale"] = scale
        self._check_overwritten(micro, pipeline)
        return Translation(
            mapping=mapping,
            load=self._load,
            finetune=bool(self._get("finetune")),
            keeps_rng=not self._get("no_load_rng"),
            overrides_schedule=bool(self._get("override_lr_scheduler")),
            vocabulary=lambda: self.padded_vocabulary(tensor),
            notes=self._notes,
            idle={key: why for key, why in self._idle.items() if key in self._file.honoured},
        )

    def _check_overwritten(self, micro: int, pipeline: int) -> None:
        """Raise ``UserError`` for a key that GPT-NeoX overwrites with another value than the file gives it."""
        counts = {
            "lr": self._get("optimizer.params.lr"),
            "clip_grad": self._get("gradient_clipping"),
            "optimizer_type": str(self._get("optimizer.type")).lower(),
            "zero_stage": self._get("zero_optimization.stage"),
            "batch_size": micro,
            "gas": self._file.values.get("gradient_accumulation_steps") or self._batch // (micro * self._data_ranks),
            "is_pipe_parallel": self._get("pipe_parallel_size") >= 1,
        }
        for key, (default, other) in neox_keys.OVERWRITTEN.items():
            given = self._file.values.get(key, default)
            given = given.lower() if isinstance(given, str) else given
            if given is not None and given != default and given != counts[key]:
                raise self._error(
                    key, f"{given!r} has no effect in GPT-NeoX, where {other} counts, which is {counts[key]!r}; write it there"
                )

    # ---- small things ----------------------------------------------------------------------------------------------

    def _get(self, key: str) -> Any:
        """The value of a key, dotted inside of a block, or GPT-NeoX's default. null is false where a switch is expected."""
        self.asked = key
        known = (neox_blocks if "." in key else neox_keys).HONOURED[key]
        value: Any = self._file.values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return known.default
            value = value[part]
        if value is not None and key in neox_keys.PATHS:
            where = self._file.place(key)
            return [path_text(str(path), where) for path in value] if isinstance(value, list) else path_text(value, where)
        return False if value is None and bool in known.types else value

    def _require(self, key: str) -> Any:
        if self._file.values.get(key) is None:
            raise UserError(f"{self._file.name}: '{key}' is missing and has no default")
        return self._file.values[key]

    def _error(self, key: str, what: str) -> UserError:
        return UserError(f"{self._file.place(key)}: {what}")

    def _choice(self, key: str, choices: dict[str, str]) -> str:
        value = self._get(key)
        if value not in choices:
            raise self._error(key, f"{value!r} can't be honoured, only {', '.join(map(repr, choices))}")
        return choices[value]

    def _name(self, save: str | None) -> str:
        text = Path(save).name if save else Path(self._file.name).stem
        return "".join(c if c.isalnum() or c in "_.-" else "_" for c in text) or "run"

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _batches(self) -> tuple[int, int]:
        """(global batch, micro-batch). Any two of the three give the third by whole division; then the product is checked."""
        self.asked = "train_micro_batch_size_per_gpu"
        total, micro, steps = (
            self._file.values.get(key)
            for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        ranks = self._data_ranks
        if total is None and micro is None:
            raise UserError(f"{self._file.name}: 'train_micro_batch_size_per_gpu' is missing (or give train_batch_size)")
        if micro is None:
            micro = total // ranks // (steps or 1)
        if steps is None:
            steps = 1 if total is None else total // micro // ranks if micro else 0
        if total is None:
            total = micro * steps * ranks
        if min(total, micro, steps) < 1 or micro * steps * ranks != total:
            key = "train_batch_size" if "train_batch_size" in self._file.values else "train_micro_batch_size_per_gpu"
            raise self._error(
                key, f"{total} is not micro-batch {micro} x {steps} accumulation steps x {ranks} data-parallel ranks"
            )
        return total, micro

    # ---- the model -------------------------------------------------------------------------------------------------

    def _model(self, tensor: int) -> dict[str, Any]:
        hidden = self._require("hidden_size")
        self._check_attention()
        ffn, factor = self._get("intermediate_size"), self._get("expansion_factor")
        if ffn is not None and factor is not None:
            raise self._error("expansion_factor", "given beside intermediate_size; GPT-NeoX refuses both, remove one")
        if ffn is None and factor is not None:
            ffn = int(factor * hidden)
        tanh = self._get("bias_gelu_fusion")
        self._notes.append(
            f"bias_gelu_fusion {str(tanh).lower()}: {'tanh' if tanh else 'exact (erf)'} GELU, whatever the checkpoint says"
        )
        model = {
            "num_layers": self._require("num_layers"),
            "hidden_size": hidden,
            "num_heads": self._require("num_attention_heads"),
            "ffn_size": ffn,
            "max_positions": self._get("max_position_embeddings") or self._require("seq_length"),
            "rotary_fraction": self._get("rotary_pct"),
            "rotary_base": self._get("rotary_emb_base"),
            "activation": "gelu_tanh" if tanh else "gelu_erf",
            "residual": "parallel" if self._get("gpt_j_residual") else "sequential",
            "tie_embeddings": not self._get("no_weight_tying"),
            "attention_bias": self._get("use_bias_in_attn_linear"),
            "layernorm_eps": self._get("layernorm_epsilon"),
            "init": self._choice("init_method", _INIT),
            "output_init": self._choice("output_layer_init_method", _OUTPUT_INIT),
            "init_std": self._get("init_method_std"),
        }
        if self._load is None:
            model["vocab_size"] = self.padded_vocabulary(tensor)
        return model

    def _check_attention(self) -> None:
        layers = self._require("num_layers")
        given = self._get("attention_config")
        if given is None:
            return
        kinds: list[str] = []
        shape = 'a list of [[kinds], count], such as [[["flash"], 24]]; count may be "all"'
        for item in given:
            if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[0]):
                raise self._error("attention_config", f"{item!r} is not of the form [[kinds], count]: expected {shape}")
            pattern, count = item
            if count == "all":
                count = layers // len(pattern)
            if isinstance(count, bool) or not isinstance(count, int):
                raise self._error("attention_config", f'count {count!r} is neither a number nor "all": expected {shape}')
            if count > layers:
                described = len(kinds) + len(pattern) * count
                raise self._error("attention_config", f"describes {described} layers, num_layers is {layers}")
            kinds += pattern * count
        if len(kinds) != layers:
            raise self._error("attention_config", f"describes {len(kinds)} layers, num_layers is {layers}")
        if other := [kind for kind in kinds if kind not in ("global", "flash")]:
            raise self._error(
                "attention_config", f"{other[0]!r} can't be honoured: only 'global' and 'flash' attention is known"
            )

    def padded_vocabulary(self, tensor: int) -> int:
        """GPT-NeoX's rule: the tokenizer's size, up to a multiple of make_vocab_size_divisible_by x tensor-parallel ranks."""
        if (given := self._get("padded_vocab_size")) is not None:
            return int(given)
        size = self._tokenizer_size()
        multiple = self._get("make_vocab_size_divisible_by") * tensor
        return math.ceil(size / multiple) * multiple

    def _tokenizer_size(self) -> int:
        kind, name = self._get("tokenizer_type"), self._get("vocab_file")
        if kind == "CharLevelTokenizer":
            return 512
        if name is None:
            raise UserError(
                f"{self._file.name}: 'vocab_file' is missing: the vocabulary's size can't be known (or give padded_vocab_size)"
            )
        if not Path(name).is_file():
            raise self._error("vocab_file", f"{name}: no such file, so the vocabulary's size can't be known")
        if kind == "HFTokenizer":
            from tokenizers import Tokenizer

            try:
                return int(Tokenizer.from_file(name).get_vocab_size())
            except Exception as error:  # the library's own class is Exception
                raise self._error("vocab_file", f"{name}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
        if kind == "SPMTokenizer":
            from sentencepiece import SentencePieceProcessor

            return int(SentencePieceProcessor(model_file=name).get_piece_size())
        if kind in ("GPT2BPETokenizer", "HFGPT2Tokenizer"):
            import json

            return len(json.loads(Path(name).read_text(encoding="utf-8")))
        raise self._error("tokenizer_type", f"{kind!r} is not known here; give padded_vocab_size")

    # ---- the data --------------------------------------------------------------------------------------------------

    def _data(self) -> dict[str, Any]:
        length = self._require("seq_length")
        tokens = self._get("eval_iters") * self._batch * length
        weighted = self._get("train_data_paths")
        if weighted and self._get("data_path"):
            raise self._error("data_path", "given beside train_data_paths; remove one of the two")
        sources = {part: self._sources(part) for part in ("train", "valid", "test")}
        if not sources["train"]:
            raise UserError(f"{self._file.name}: 'data_path' is missing (or give train_data_paths)")
        sets = [
            {"name": part, "role": "downstream", "tokens": tokens, "when": when, "sources": sources[part]}
            for part, when in (("valid", "always"), ("test", "end"))
            if sources[part] and tokens
        ]
        vocab_file = self._get("vocab_file")
        usable = vocab_file is not None and self._get("tokenizer_type") == "HFTokenizer" and Path(vocab_file).is_file()
        return {
            "sequence_length": length,
            "order": "neox",
            "seed": self._get("seed"),
            "blend_of_one": bool(weighted),
            "train": sources["train"],
            "validation": sets,
            "tokenizer": vocab_file if usable else None,
            "mask_eod_loss": self._masks_eod(usable),
        }

    def _masks_eod(self, tokenizer: bool) -> bool:
        masks = bool(self._get("eod_mask_loss"))
        if masks and not tokenizer:
            raise self._error(
                "eod_mask_loss", "the end of a document is known only of a tokenizer_type HFTokenizer whose vocab_file is there"
            )
        if masks:
            self._notes.append(
                "eod_mask_loss: the mean is over all remaining tokens of the global batch, not of each micro-batch"
            )
        return masks

    def _sources(self, part: str) -> list[dict[str, Any]]:
        if (path := self._get("data_path")) is not None:
            split = self._get("split").replace("/", ",")
            return [{"path": path, "split": split, "part": part, "max_epochs": None}]
        paths, weights = self._get(f"{part}_data_paths"), self._get(f"{part}_data_weights")
        if not paths:
            return []
        weights = [1.0] * len(paths) if weights is None else weights
        if len(weights) != len(paths):
            raise self._error(f"{part}_data_weights", f"{len(weights)} weights for {len(paths)} paths; give one for each")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
                raise self._error(f"{part}_data_weights", f"{weight!r} is no weight; expected numbers above 0")
        # two files of the same name are told apart by their place in the list
        names = [Path(path).name for path in paths]
        return [
            {"path": path, "weight": float(weight), "max_epochs": None}
            | ({"name": f"{name}_{i}"} if names.count(name) > 1 else {})
            for i, (path, name, weight) in enumerate(zip(paths, names, weights, strict=True))
        ]

    # ---- schedule and optimizer ------------------------------------------------------------------------------------

    def _schedule(self) -> dict[str, Any]:
        style = self._choice("lr_decay_style", _CURVES)
        end = self._get("lr_decay_iters")
        if end is None:
            fraction = self._get("lr_decay_fraction")
            end = self._iterations if fraction is None else math.floor(self._iterations * fraction)
        if end < 1:
            raise self._error("lr_decay_iters", f"the decay would be {end} iterations long; at least 1 is needed")
        peak = self._get("optimizer.params.lr")
        if peak is None:
            raise UserError(f"{self._file.name}: the learning rate is missing: give optimizer.params.lr")
        schedule: dict[str, Any] = {
            "curve": style,
            "max_lr": float(peak),
            "warmup": f"{float(self._get('warmup') * end)!r} steps",
            "unclamped": True,
        }
        floor = float(self._get("min_lr"))
        if style != "constant":
            return schedule | {"min_lr": floor, "length": f"{end} steps"}
        if floor > float(peak):
            raise self._error("min_lr", f"{floor:g} is above the learning rate {float(peak):g}")
        if floor:
            self._notes.append("min_lr has no effect on a constant rate")
        return schedule

    def _optimizer(self) -> dict[str, Any]:
        kind = self._get("optimizer.type")
        if str(kind).lower() not in ("adam", "adamw"):
            raise self._error(
                "optimizer.type", f"type {kind!r} can't be honoured, only 'Adam' (with decoupled weight decay); say that"
            )
        return {
            "betas": self._get("optimizer.params.betas"),
            "eps": self._get("optimizer.params.eps"),
            "weight_decay": self._get("weight_decay"),
            "clip_norm": self._get("gradient_clipping") or None,
        }

    def _precision(self) -> str:
        """What 'precision', 'fp16' and 'bf16' say together. GPT-NeoX's versions differ on contradictions; these are refused."""
        said = {key: value for key in ("precision", "fp16.type") if (value := self._get(key)) is not None}
        wanted = {key: self._choice(key, _PRECISIONS) for key in said}
        fp16 = self._file.values.get("fp16") or {}
        if fp16 and "enabled" not in fp16:
            if wanted.get("fp16.type") != "bf16":
                raise self._error("fp16", "'enabled' is missing in it, which GPT-NeoX asks for; add true or false")
        elif fp16 and not self._get("fp16.enabled"):
            if wanted.pop("fp16.type", "fp16") == "bf16" or wanted.get("precision") == "fp16":
                raise self._error("fp16.enabled", "false, yet the file asks for 16 bits (type or precision); make them agree")
        elif fp16:
            wanted.setdefault("fp16.type", "fp16")
        if self._get("bf16.enabled"):
            wanted["bf16.enabled"] = "bf16"
        elif self._file.values.get("bf16") and wanted.get("precision") == "bf16":
            raise self._error("bf16.enabled", "not true, yet 'precision' is bfloat16; make them agree")
        if len(set(wanted.values())) > 1:
            both = " and ".join(f"{key.replace('fp16.type', 'fp16')} asks for {value}" for key, value in wanted.items())
            raise self._error(next(reversed(wanted)).partition(".")[0], f"{both}; they contradict each other, choose one")
        precision = next(iter(wanted.values()), "fp32")
        if wanted.get("fp16.type") == "bf16":
            self._notes.append(
                "fp16.type bfloat16: bf16, as in GPT-NeoX up to 2.0, which trained Pythia 1B so; later ones don't read 'type' "
                "and would train in fp16"
            )
        return precision

    def _loss_scale(self, precision: str) -> dict[str, Any]:
        """The loss scale of fp16. In DeepSpeed, hysteresis counts under ZeRO only, and a fixed scale makes the others idle."""
        fixed = self._get("fp16.loss_scale") or None
        used = {"fp16.loss_scale"}
        scale: dict[str, Any] = {"fixed": fixed}
        if fixed is None:
            used |= {"fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.min_loss_scale"}
            scale |= {
                "initial": 2.0 ** self._get("fp16.initial_scale_power"),
                "window": int(self._get("fp16.loss_scale_window")),
                "smallest": float(self._get("fp16.min_loss_scale")),
            }
            if self._get("zero_optimization.stage"):
                used |= {"fp16.hysteresis", "fp16.consecutive_hysteresis"}
                scale |= {"hysteresis": self._get("fp16.hysteresis"), "refill": self._get("fp16.consecutive_hysteresis")}
        others = {key for key in neox_blocks.HONOURED if key.startswith("fp16.") and key not in ("fp16.enabled", "fp16.type")}
        for key in others - used if precision == "fp16" else others:
            why = "in DeepSpeed it counts under ZeRO only" if fixed is None else "the loss scale is fixed"
            self._idle[key] = why if precision == "fp16" else f"{precision} has no loss scale"
        return scale if precision == "fp16" else {}

    # ---- the rest --------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> dict[str, Any]:
        factor = self._get("checkpoint_factor")
        extra = [int(step) for step in self._get("extra_save_iters") or []]
        scale = self._get("checkpoint_scale")
        if scale not in ("linear", "log"):
            raise self._error("checkpoint_scale", f"{scale!r} is neither 'linear' nor 'log'")
        every = None
        if scale == "linear":
            if factor is not None and factor != int(factor):
                raise self._error("checkpoint_factor", f"{factor!r} is no whole number, which 'linear' needs")
            every = int(factor) if factor else None
        elif factor is None or factor <= 1:
            raise self._error("checkpoint_scale", "'log' needs a checkpoint_factor above 1")
        else:
            step = 1.0
            while step < self._iterations:
                if len(extra) > 10_000:
                    raise self._error("checkpoint_factor", f"{factor!r} asks for more than 10,000 checkpoints; make it larger")
                extra.append(int(step))
                step *= factor
        keep_last = self._get("keep_last_n_checkpoints")
        if keep_last is not None and keep_last < 1:
            raise self._error("keep_last_n_checkpoints", f"{keep_last} leaves no checkpoint; keep at least 1")
        if keep_last is not None and extra:
            self._notes.append("the checkpoints of extra_save_iters stay, beside the newest keep_last_n_checkpoints")
        return {
            "every": every,
            "keep_last": keep_last or 1,
            "keep_every": every if keep_last is None else None,  # GPT-NeoX removes none unless it is told to
            "extra_steps": sorted({step for step in extra if step <= self._iterations}),
        }

    def _logging(self) -> dict[str, Any]:
        logging: dict[str, Any] = {
            "every": self._get("log_interval"),
            "tensorboard": self._get("tensorboard_dir") is not None,
        }
        if self._get("use_wandb"):
            logging["wandb"] = {"project": self._get("wandb_project"), "entity": self._get("wandb_team")}
        return logging

    def _parallel(self, tensor: int, pipeline: int) -> dict[str, Any]:
        stage = self._get("zero_optimization.stage")
        if stage not in (0, 1, 2, 3):
            raise self._error("zero_optimization.stage", f"stage {stage!r} is none of 0, 1, 2, 3")
        sharding = ("none", "zero2", "zero2", "zero3")[stage] if self._data_ranks > 1 else "none"
        return {
            "tensor": tensor,
            "sequence": self._get("sequence_parallel") and tensor > 1,
            "pipeline": pipeline,
            "sharding": sharding,
        }
