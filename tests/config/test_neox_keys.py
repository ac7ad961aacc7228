"""The fates of GPT-NeoX's keys are true: what is honoured has its effect, what is listed has none, at every depth."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarewarm.config import neox_blocks
from megarewarm.config.neox_keys import FUNCTION, HONOURED, NOT_APPLICABLE, ONLY, OVERWRITTEN, is_known, other_function
from megarewarm.config.neox_read import NeoxFile, check_keys, read_neox
from megarewarm.config.neox_translate import translate
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.main import main
from megarewarm.rewarm.neox_start import load_neox
from tests.config.test_neox_config import SMALL

BASE = SMALL | {"eval_iters": 3, "train_iters": 40}


def run_of(folder: Path, values: dict[str, Any], ranks: int = 1) -> tuple[RunConfig, Any]:
    file = folder / "f.yml"
    file.write_text(yaml.safe_dump(values))
    return load_neox([file], [], ranks)


def mapping(folder: Path, values: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    return run_of(folder, values, ranks)[0].model_dump(mode="json", by_alias=True)


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """As above, without a file and the schema."""
    file = NeoxFile(values, {}, {}, "f.yml")
    check_keys(file)
    return translate(file, 1).mapping


def refusal(folder: Path, values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        run_of(folder, values)
    return str(caught.value)


def at(content: Any, path: str) -> Any:
    for part in path.split("."):
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content


# ---- the recorded list of GPT-NeoX's arguments ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    file = Path(os.environ.get("MEGAREWARM_TEST_DATA", "")) / "neox_real" / "neox_fields.json"
    if not file.is_file():
        pytest.skip("set MEGAREWARM_TEST_DATA to the folder that holds neox_real/")
    return dict(json.loads(file.read_text()))


def test_every_argument_of_gpt_neox_is_known_and_harmless_at_its_default(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert len(fields) == 318 and [key for key in fields if not is_known(key)] == []
    plain = mapping(tmp_path, BASE)
    same = translated(BASE)
    for key, default in fields.items():
        if key == "pos_emb":
            assert "'learned' can't be honoured" in refusal(tmp_path, BASE | {key: default})
        elif key not in BASE:
            assert translated(BASE | {key: default}) == same, key
    everything = {key.replace("_", "-"): default for key, default in fields.items()}
    for key, value in BASE.items():
        everything[key.replace("_", "-")] = value
    assert mapping(tmp_path, everything) == plain


def test_the_defaults_are_those_that_gpt_neox_has(fields: dict[str, Any]) -> None:
    today = set(HONOURED) - {"mlp_type"}  # of older versions
    assert {key: HONOURED[key].default for key in today} == {key: fields[key] for key in today}
    assert {key: default for key, (default, _) in OVERWRITTEN.items() if key != "gas"} == {
        key: fields[key] for key in OVERWRITTEN if key != "gas"
    }
    for key, (values, _) in ONLY.items():
        assert key == "pos_emb" or fields[key] in values, key


# ---- honoured: two values, and what differs ---------------------------------------------------------------------------

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "rotary_pct": 1, "intermediate_size": 96}
NO_BIASES = {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
CHARACTERS = {"padded_vocab_size": None, "tokenizer_type": "CharLevelTokenizer"}
PAIRS: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    # key: (another value than the default's, where it is seen, as what, what else the file says)
    "pipe_parallel_size": (2, "parallel.pipeline", 2, {}),
    "model_parallel_size": (2, "parallel.tensor", 2, {}),
    "sequence_parallel": (True, "parallel.sequence", True, {"model_parallel_size": 2}),
    "num_layers": (3, "model.num_layers", 3, {}),
    "hidden_size": (64, "model.hidden_size", 64, {}),
    "num_attention_heads": (2, "model.num_heads", 2, {}),
    "intermediate_size": (48, "model.ffn_size", 48, {}),
    "mlp_multiple_of": (20, "model.ffn_size", 40, LLAMA),
    "num_kv_heads": (2, "model.num_kv_heads", 2, LLAMA),
    "sliding_window_width": (6, "model.sliding_window", 7, LLAMA | NO_BIASES),
    "rms_norm_epsilon": (1e-6, "model.layernorm_eps", 1e-6, LLAMA),
    "use_bias_in_mlp": (False, "model.mlp_bias", False, LLAMA),
    "expansion_factor": (1.5, "model.ffn_size", 48, {}),
    "seq_length": (8, "data.sequence_length", 8, {}),
    "max_position_embeddings": (128, "model.max_positions", 128, {}),
    "layernorm_epsilon": (1e-6, "model.layernorm_eps", 1e-6, {}),
    "no_weight_tying": (True, "model.tie_embeddings", False, {}),
    "make_vocab_size_divisible_by": (
        96,
        "model.vocab_size",
        576,
        {"padded_vocab_size": None, "tokenizer_type": "CharLevelTokenizer"},
    ),
    "padded_vocab_size": (96, "model.vocab_size", 96, {}),
    "bias_gelu_fusion": (True, "model.activation", "gelu_tanh", {}),
    "rotary_pct": (0.5, "model.rotary_fraction", 0.5, {}),
    "rotary_emb_base": (500, "model.rotary_base", 500.0, {}),
    "init_method": ("small_init", "model.init", "small", {}),
    "output_layer_init_method": ("wang_init", "model.output_init", "wang", {}),
    "init_method_std": (0.1, "model.init_std", 0.1, {}),
    "gpt_j_residual": (True, "model.residual", "parallel", {}),
    "use_bias_in_attn_linear": (False, "model.attention_bias", False, {}),
    "optimizer": ({"params": {"lr": 0.02}}, "schedule.max_lr", 0.02, {}),
    "weight_decay": (0.3, "optimizer.weight_decay", 0.3, {}),
    "gradient_clipping": (0, "optimizer.clip_norm", None, {}),
    "lr_decay_style": ("cosine", "schedule.curve", "cosine", {}),
    "lr_decay_iters": (30, "schedule.length", 30, {}),
    "lr_decay_fraction": (0.5, "schedule.length", 20, {}),
    "min_lr": (0.001, "schedule.min_lr", 0.001, {}),
    "warmup": (0.5, "schedule.warmup", 20, {}),
    "train_iters": (50, "training.budget", 50, {}),
    "train_batch_size": (4, "training.global_batch", 4, {}),
    "train_micro_batch_size_per_gpu": (3, "training.micro_batch", 3, {}),
    "gradient_accumulation_steps": (2, "training.global_batch", 4, {}),
    "precision": ("bfloat16", "training.precision", "bf16", {}),
    "fp16": ({"enabled": True}, "training.precision", "fp16", {}),
    "bf16": ({"enabled": True}, "training.precision", "bf16", {}),
    "checkpoint_activations": (True, "training.recompute", "full", {}),
    "zero_optimization": ({"stage": 3}, "parallel.sharding", "zero3", {"ranks": 2}),
    "seed": (7, "data.seed", 7, {}),
    "data_path": ("elsewhere", "data.train.0.path", "elsewhere", {}),
    "train_data_paths": (["x", "y"], "data.train.1.path", "y", {"data_path": None}),
    "valid_data_paths": (["v"], "data.validation.0.sources.0.path", "v", {"data_path": None, "train_data_paths": ["x"]}),
    "test_data_paths": (["z"], "data.validation.0.name", "test", {"data_path": None, "train_data_paths": ["x"]}),
    "train_data_weights": ([3.0], "data.train.0.weight", 3.0, {"data_path": None, "train_data_paths": ["x"]}),
    "valid_data_weights": (
        [3.0],
        "data.validation.0.sources.0.weight",
        3.0,
        {"data_path": None, "train_data_paths": ["x"], "valid_data_paths": ["v"]},
    ),
    "test_data_weights": (
        [3.0],
        "data.validation.0.sources.0.weight",
        3.0,
        {"data_path": None, "train_data_paths": ["x"], "test_data_paths": ["v"]},
    ),
    "split": ("90,5,5", "data.train.0.split", "90,5,5", {}),
    "eval_interval": (0, "evaluation.every", None, {}),
    "eval_iters": (5, "data.validation.0.tokens", 160, {}),
    "checkpoint_factor": (10, "checkpoint.every", 10, {}),
    "checkpoint_scale": ("log", "checkpoint.extra_steps", [1, 2, 4, 8, 16, 32], {"checkpoint_factor": 2}),
    "extra_save_iters": ([1, 5], "checkpoint.extra_steps", [1, 5], {}),
    "keep_last_n_checkpoints": (4, "checkpoint.keep_last", 4, {}),
    "save": ("out", "folder", "out", {}),
    "load": ("out", "start.from", None, {"save": "out"}),  # the same folder: from scratch, which stays so
    "log_interval": (10, "logging.every", 10, {}),
    "tensorboard_dir": ("t", "logging.tensorboard", True, {}),
    "use_wandb": (True, "logging.wandb.project", "neox", {}),
    "wandb_project": ("p", "logging.wandb.project", "p", {"use_wandb": True}),
    "wandb_team": ("t", "logging.wandb.entity", "t", {"use_wandb": True}),
    "fp16.enabled": (True, "training.precision", "fp16", {}),
    "fp16.type": ("bfloat16", "training.precision", "bf16", {"fp16": {"enabled": True}}),
    "fp16.loss_scale": (128, "training.loss_scale.fixed", 128.0, {"fp16": {"enabled": True}}),
    "fp16.initial_scale_power": (12, "training.loss_scale.initial", 4096.0, {"fp16": {"enabled": True}}),
    "fp16.loss_scale_window": (500, "training.loss_scale.window", 500, {"fp16": {"enabled": True}}),
    "fp16.min_loss_scale": (4, "training.loss_scale.smallest", 4.0, {"fp16": {"enabled": True}}),
    "fp16.hysteresis": (5, "training.loss_scale.hysteresis", 5, {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}),
    "fp16.consecutive_hysteresis": (
        True,
        "training.loss_scale.refill",
        True,
        {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    ),
    "bf16.enabled": (True, "training.precision", "bf16", {}),
    "optimizer.params": ({"lr": 0.02}, "schedule.max_lr", 0.02, {}),
    "optimizer.params.lr": (0.02, "schedule.max_lr", 0.02, {}),
    "optimizer.params.betas": ([0.8, 0.9], "optimizer.betas", [0.8, 0.9], {}),
    "optimizer.params.eps": (1e-6, "optimizer.eps", 1e-6, {}),
    "zero_optimization.stage": (1, "parallel.sharding", "zero2", {"ranks": 2}),
}
ELSEWHERE = {  # followed in test_neox_config.py, or refused there but for one value
    "attention_config", "optimizer.type", "eod_mask_loss", "vocab_file", "merge_file", "tokenizer_type", "finetune",
    "no_load_rng", "override_lr_scheduler", "norm", "activation", "mlp_type",
}  # fmt: skip


def put(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return values | {first: put(dict(values.get(first) or {}), rest, value) if rest else value}


def test_every_honoured_key_is_tried() -> None:
    assert set(PAIRS) | ELSEWHERE == {*HONOURED, *neox_blocks.HONOURED}


@pytest.mark.parametrize("key", PAIRS)
def test_an_honoured_key_has_its_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    value, where, wanted, besides = PAIRS[key]
    values, ranks = BASE | {k: v for k, v in besides.items() if k != "ranks"}, besides.get("ranks", 1)
    ranks *= (2 if key == "model_parallel_size" or "model_parallel_size" in besides else 1) * (
        2 if key.startswith("pipe") else 1
    )
    changed = mapping(tmp_path, put(values, key, value), ranks)
    assert at(changed, where) == wanted
    if key not in (
        "load",
        "train_data_paths",
        "valid_data_paths",
        "test_data_paths",
        "use_wandb",
        "wandb_project",
        "wandb_team",
    ):
        before = {**values, "model_parallel_size": 1} if key == "sequence_parallel" else values
        if key == "model_parallel_size" or key.startswith("pipe"):
            ranks = 1
        assert at(mapping(tmp_path, before, 1 if key == "sequence_parallel" else ranks), where) != wanted


IDLE = [*NOT_APPLICABLE, *neox_blocks.NOT_APPLICABLE]


@pytest.mark.parametrize("block", sorted({key.rpartition(".")[0] for key in IDLE}))
def test_keys_without_effect_change_nothing_and_are_listed_with_their_lines(tmp_path: Path, block: str) -> None:
    values, top = BASE, block.partition(".")[0]
    if top in ("compression_training", *ONLY):  # a block that may only be switched off
        values = put(values, f"{top}.{'layer_reduction.' if top.startswith('compression') else ''}enabled", False)
    if top == "fp16":
        values = put(values, "fp16.enabled", False)
    keys = [key for key in IDLE if key.rpartition(".")[0] == block]
    for key in keys:
        if not key.endswith((".enabled", ".layer_reduction")):
            values = put(values, key, {} if key.removeprefix("deepspeed_extra_args.") in neox_blocks.BLOCKS else 7)
    run, account = run_of(tmp_path, values)
    assert run.model_dump(mode="json", by_alias=True) == mapping(tmp_path, BASE)
    (tmp_path / "f.yml").write_text(yaml.safe_dump(values))
    file, lines = read_neox([tmp_path / "f.yml"]), (tmp_path / "f.yml").read_text().splitlines()
    for key in keys:
        assert {key, block, top} & {*account.not_applicable} or top in ONLY, key
        if not key.endswith((".enabled", ".layer_reduction")):
            assert key.rpartition(".")[2] in lines[int(file.place(key).split(":")[1]) - 1]


@pytest.mark.parametrize("key", [*ONLY, *neox_blocks.ONLY])
def test_other_values_are_refused_by_key_line_and_reason(tmp_path: Path, key: str) -> None:
    reason = (neox_blocks.ONLY if "." in key else ONLY)[key][1]
    values = BASE | ({"gpt_j_residual": True} if key == "gpt_j_tied" else {})
    values = put(values, f"{key.partition('.')[0]}.enabled", True) if key.startswith(("fp16.", "bf16.")) else values
    message = refusal(tmp_path, put(values, key, 12345))
    assert "\n" not in message and message.startswith(f"{tmp_path}/f.yml:") and f"{key}: 12345" in message
    assert reason in message or key in neox_blocks.BLOCKS


@pytest.mark.parametrize("block", sorted(neox_blocks.BLOCKS))
def test_a_misspelt_key_inside_of_a_block_is_refused(tmp_path: Path, block: str) -> None:
    tables = (neox_blocks.HONOURED, neox_blocks.NOT_APPLICABLE, neox_blocks.ONLY)
    inside = [key.rpartition(".")[2] for table in tables for key in table if key.rpartition(".")[0] == block]
    misspelt = inside[0] + "z"
    message = refusal(tmp_path, put(BASE, f"{block}.{misspelt}", 1))
    assert f"{block}.{misspelt}: not a key of GPT-NeoX's block '{block}', did you mean" in message
    for value in (True, "x", [1]):
        assert "expected" in refusal(tmp_path, put(BASE, block, value)) or block in ONLY
    assert refusal(tmp_path, BASE | {"deepspeed_extra_args": {"comms_logger": {"enabeld": True}}})


@pytest.mark.parametrize(
    ("module", "model", "block"),
    [
        ("runtime.zero.config", "DeepSpeedZeroConfig", "zero_optimization"),
        ("runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig", "zero_optimization.offload_param"),
        ("runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig", "zero_optimization.offload_optimizer"),
        ("runtime.precision_config", "DeepSpeedFP16Config", "fp16"),
        ("runtime.precision_config", "DeepSpeedBF16Config", "bf16"),
        ("comm.config", "CommsLoggerConfig", "comms_logger"),
        ("monitor.config", "TensorBoardConfig", "tensorboard"),
        ("monitor.config", "WandbConfig", "wandb"),
        ("monitor.config", "CSVConfig", "csv_monitor"),
    ],
)
def test_the_blocks_hold_what_deepspeed_reads(module: str, model: str, block: str) -> None:
    pytest.importorskip("deepspeed")
    fields = getattr(importlib.import_module(f"deepspeed.{module}"), model).model_fields
    names = {name for key, field in fields.items() for name in (key, field.alias) if name}
    known = {*neox_blocks.HONOURED, *neox_blocks.NOT_APPLICABLE, *neox_blocks.ONLY}
    assert [name for name in sorted(names) if f"{block}.{name}" not in known] == []


# ---- what several keys say together ------------------------------------------------------------------------------------

ON = {"enabled": True}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, "fp32"),
        ({"fp16": {"type": "bfloat16"}}, "bf16"),
        ({"fp16": ON | {"type": "bfloat16"}}, "bf16"),
        ({"fp16": ON | {"type": "fp16"}}, "fp16"),
        ({"fp16": ON, "precision": "fp16"}, "fp16"),
        ({"bf16": ON, "precision": "bfloat16"}, "bf16"),
        ({"fp16": {"enabled": False}, "bf16": ON}, "bf16"),
        ({"fp16": {"enabled": False}, "precision": "fp32"}, "fp32"),
        ({"fp16": {}, "bf16": {}}, "fp32"),
        ({"fp16": None, "precision": None}, "fp32"),
        ({"precision": "fp16"}, "fp16"),
        ({"fp16": ON, "bf16": ON}, None),
        ({"fp16": ON, "precision": "bfloat16"}, None),
        ({"fp16": ON | {"type": "bfloat16"}, "precision": "fp16"}, None),
        ({"fp16": ON, "precision": "fp32"}, None),
        ({"bf16": ON, "precision": "fp16"}, None),
        ({"fp16": {"enabled": False, "type": "bfloat16"}}, None),
        ({"fp16": {"enabled": False}, "precision": "fp16"}, None),
        ({"bf16": {"enabled": False}, "precision": "bfloat16"}, None),
        ({"fp16": {"loss_scale": 0}}, None),
        ({"fp16": ON | {"type": "fp8"}}, None),
        ({"fp16": {"enabled": "yes please"}}, None),
    ],
)
def test_the_precision_is_what_all_three_say_together(tmp_path: Path, said: dict[str, Any], wanted: str | None) -> None:
    if wanted is not None:
        run, account = run_of(tmp_path, BASE | said)
        assert run.training.precision == wanted
        assert ("bfloat16: bf16" in " ".join(account.notes)) == ("type" in (said.get("fp16") or {}) and wanted == "bf16")
    else:
        assert any(word in refusal(tmp_path, BASE | said) for word in ("fp16", "bf16", "precision"))


def test_what_is_idle_beside_other_keys_is_listed(tmp_path: Path) -> None:
    _, account = run_of(tmp_path, BASE | {"fp16": ON | {"hysteresis": 3, "loss_scale_window": 10}})
    assert "ZeRO" in account.not_applicable["fp16.hysteresis"] and "fp16.loss_scale_window" in account.honoured
    _, account = run_of(tmp_path, BASE | {"fp16": ON | {"loss_scale": 8, "loss_scale_window": 10}})
    assert "fixed" in account.not_applicable["fp16.loss_scale_window"] and "fp16.loss_scale_window" not in account.honoured
    _, account = run_of(tmp_path, BASE | {"fp16": {"type": "bfloat16", "loss_scale_window": 10}})
    assert "bf16 has no loss scale" in account.not_applicable["fp16.loss_scale_window"]


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [("lr", 0.01, 0.02), ("clip_grad", 1.0, 0.5), ("optimizer_type", "Adam", "lion"), ("zero_stage", 0, 3),
     ("batch_size", 2, 4), ("gas", 1, 2), ("is_pipe_parallel", False, True)],
)  # fmt: skip
def test_a_key_that_gpt_neox_overwrites_may_only_repeat(tmp_path: Path, key: str, same: Any, other: Any) -> None:
    assert mapping(tmp_path, BASE | {key: same}) == mapping(tmp_path, BASE)
    assert f"{key}: {other!r} has no effect in GPT-NeoX, where {OVERWRITTEN[key][1]} counts" in refusal(
        tmp_path, BASE | {key: other}
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num-layer": 2}, r"num-layer: not a key of GPT-NeoX, did you mean 'num-layers'"),
        ({"num_layer": 2}, r"num_layer: not a key of GPT-NeoX, did you mean 'num_layers'"),
        ({"weight_decay": None}, r"weight_decay: null says nothing; leave it out for GPT-NeoX's default, 0.1"),
        ({"weight_decay": "0.1"}, r"weight_decay: '0.1' is of type str, expected int or float"),
        ({"intermediate_size": 64, "expansion_factor": 2}, r"expansion_factor: given beside intermediate_size"),
        ({"checkpoint_factor": 2.5}, r"checkpoint_factor: 2.5 is no whole number"),
        ({"keep_last_n_checkpoints": 0}, r"keep_last_n_checkpoints: 0 leaves no checkpoint"),
        ({"deepspeed_extra_args": {"gradient_clipping": 0.1}}, r"extra_args.gradient_clipping: 0.1 can't be honoured"),
        ({"compression_training": {"layer_reduction": {"enabled": True}}}, r"compression_training: .*nothing is quantized"),
        ({"checkpoint": {"load_universal": True}}, r"checkpoint.load_universal: True can't be honoured"),
        ({"num_layers": -1}, r"f.yml:\d+: num_layers: .*must be above 0"),
    ],
)  # fmt: skip
def test_what_the_file_can_not_mean(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert re.search(says, refusal(tmp_path, BASE | changes))


def test_switches_of_yaml_1_1_and_false_for_null(tmp_path: Path) -> None:
    file = tmp_path / "f.yml"
    text = yaml.safe_dump(BASE) + "no_weight_tying: yes\nuse_bias_in_attn_linear: null\nfinetune: off\n"
    file.write_text(text)
    run, _ = load_neox([file], [], 1)
    assert run.model is not None and not run.model.tie_embeddings and not run.model.attention_bias


# ---- a checkpoint's own configuration ------------------------------------------------------------------------------------


def test_keys_of_the_models_function() -> None:
    assert {*HONOURED, *ONLY} >= FUNCTION
    alike = {
        "gpt_j_tied": True,
        "gpt_j_residual": False,
        "num_kv_heads": 4,
        "num_attention_heads": 4,
        "attention_config": ["flash"],
    }
    assert other_function(alike | {"pos_emb": "rotary", "hidden_dropout": 0.1, "dpo_beta": 3, "sparsity_config": {}}) == {}
    assert set(other_function({"gpt_j_tied": True, "gpt_j_residual": True})) == {"gpt_j_tied"}
    for key, value in (("norm", "rmsnorm"), ("pos_emb", "alibi"), ("use_mup", True), ("num_kv_heads", 2), ("te_mha", True)):
        assert set(other_function({"num_attention_heads": 4, key: value})) == {key}
    assert set(other_function({"attention_config": [[["local", "flash"], 2]]})) == {"attention_config"}
    llama = {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "num_attention_heads": 4, "rotary_pct": 1}
    assert other_function(llama) == {}
    assert set(other_function(llama | {"gpt_j_residual": True, "rotary_pct": 0.5})) == {"gpt_j_residual", "rotary_pct"}
    assert set(other_function(llama | {"norm": "layernorm"})) == {"activation"}
    assert other_function({"mlp_multiple_of": 8, "hidden_size": 32}) == {}
    assert set(other_function({"mlp_multiple_of": 256, "hidden_size": 32})) == {"mlp_multiple_of"}


# ---- ranks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"model_parallel_size": 2}, 2),
        ({"model_parallel_size": 2, "pipe_parallel_size": 2}, 4),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 2}, 3),
        ({"global_num_gpus": 6, "model_parallel_size": 2}, 6),
    ],
)
def test_a_dry_run_from_one_process_shows_the_run_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], ranks: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yml").write_text(yaml.safe_dump(BASE | changes))
    assert main(["f.yml", "--dry-run", "--allow-missing"]) == 0
    assert f"for {ranks} ranks" in " ".join(capfd.readouterr().out.split())
