"""What people write in a configuration and what they mean by it: paths, times, numbers, amounts, intervals, and plain words
about what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from megarewarm.config.budget import Budget, Epochs, Interval, Row, Sequences, Share, Step, Steps, TokenAmount, Tokens
from megarewarm.config.experiment import ExperimentConfig, load_experiment
from megarewarm.config.load import dump, read_configs, validate
from megarewarm.config.paths import PathMark, expanded
from megarewarm.config.reliability import Duration
from megarewarm.config.schema import RunConfig
from megarewarm.config.section import OneOf
from megarewarm.config.yaml_text import parse_yaml, write_yaml
from megarewarm.errors import UserError
from tests.config.test_schema import MINIMAL, ROOT, load, refusal

# ---- scalars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("23:30:00", "23:30:00"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("1-00:00:00", "1-00:00:00"), ("0100", "0100"),
        ("010", "010"), ("08", "08"), ("yes", "yes"), ("no", "no"), ("On", "On"), ("off", "off"), ("y", "y"), ("n", "n"),
        ("2026-11-28", "2026-11-28"), ("2026-11-28T10:00:00Z", "2026-11-28T10:00:00Z"), ("=", "="), ("969,30,1", "969,30,1"),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("0x10", 16), ("0b1", 1), ("0o17", 15),
        ("1_000", 1000), ("+1", 1), ("-0", 0), (".5", 0.5), ("+.5", 0.5), ("1.", 1.0), ("1e5", 1e5), ("1.e3", 1000.0),
        ("'0100'", "0100"), ('"true"', "true"),
    ],
)  # fmt: skip
def test_scalars_are_what_people_mean(tmp_path: Path, text: str, value: Any) -> None:
    read = parse_yaml(f"x: {text}", "f")[0]["x"]
    assert read == value and type(read) is type(value)


@settings(deadline=None)
@given(st.text(max_size=12) | st.from_regex(r"\A[-+0-9.:_eExobTtZ~=<]{1,10}\Z") | st.sampled_from(["no", "On", "null", "<<"]))
def test_text_stays_text_when_it_is_written_and_read(text: str) -> None:
    """Whatever number, date or switch it looks like, to us and to a reader of YAML 1.1."""
    written = write_yaml({"x": text, "y": [text]})
    assert parse_yaml(written, "f")[0] == {"x": text, "y": [text]} == yaml.safe_load(written)


def test_words_for_switches_and_names(tmp_path: Path) -> None:
    words = ["checkpoint.asynchronous=no", "evaluation.at_start=off", "logging.tensorboard=yes", "name=no"]
    run = load(tmp_path, MINIMAL, *words)
    assert (run.checkpoint.asynchronous, run.evaluation.at_start, run.logging.tensorboard) == (False, False, True)
    for name in ("no", "2026-11-28", "010", "1e5", "y"):
        text = MINIMAL.replace("name: small", f"name: {name}" if name != "1e5" else "name: '1e5'")
        assert load(tmp_path, text).name == name
        assert validate(RunConfig, *parse_yaml(dump(load(tmp_path, text)), "config.yaml")) == load(tmp_path, text)
    assert "run.yml:1: name: expected text (given: 410); put it in quotes: '410'" in refusal(
        tmp_path, MINIMAL.replace("small", "410")
    )
    assert load(tmp_path, MINIMAL.replace("budget: 40", "budget: 0100")).training.budget.amount == 100
    assert load(tmp_path, MINIMAL, "training.global_batch=010").training.global_batch == 10
    assert load(tmp_path, MINIMAL.replace("global_batch: 4", "global_batch: 0x10")).training.global_batch == 16
    assert "is not a number of sequences" in refusal(tmp_path, MINIMAL, "training.global_batch=1:30")
    assert "expected true or false" in refusal(tmp_path, MINIMAL, "evaluation.at_start=perhaps")


@pytest.mark.parametrize("text", ["23:30:00", "0:30:00", "1-00:00:00", "90m", "23h30m", "2d"])
def test_times_as_slurm_and_people_write_them(tmp_path: Path, text: str) -> None:
    quoted = load(tmp_path, MINIMAL + f"reliability: {{max_wall_time: '{text}'}}\n").reliability
    assert load(tmp_path, MINIMAL + f"reliability: {{max_wall_time: {text}}}\n").reliability == quoted
    assert load(tmp_path, MINIMAL, f"reliability.max_wall_time={text}").reliability == quoted
    assert isinstance(quoted.max_wall_time, Duration)


def test_labels_of_an_axis_may_look_like_switches_dates_and_numbers() -> None:
    text = MINIMAL.replace("name: small\n", "").replace("\n", "\n  ")
    docs = "{on: {data: {seed: 1}}, off: {data: {seed: 2}}, 2026-11-28: {data: {seed: 3}}}"
    axes = f"{{docs: {docs}, training.seed: {{'1': 1, 010: 2}}}}"
    mapping, origins = parse_yaml(f"experiment: e\nbase:\n  {text}\nsweeps: [{{name: s, axes: {axes}}}]\n", "e.yml")
    names = [arm.name for arm in load_experiment(mapping, origins).arms]
    assert names == [f"s_{docs}_{seed}" for docs in ("on", "off", "2026-11-28") for seed in ("1", "010")]


# ---- paths ---------------------------------------------------------------------------------------------------------------

PATHS = {
    "ByScore.by",
    "EvaluationConfig.tasks",
    "Source.documents",
    "Source.scores",
    "RunConfig.folder", "StartConfig.from_", "Source.path", "DataConfig.tokenizer", "DistillConfig.from_",
    "ReplayConfig.paths",
    "ExperimentConfig.folder", "PrepareConfig.folder", "CorpusConfig.from_",
}  # fmt: skip
NO_PATHS = {
    "RunConfig.name", "Source.name", "Source.split", "ValidationSet.name", "CheckpointConfig.keep_best", "WandbConfig.project",
    "WandbConfig.entity", "ExperimentConfig.experiment", "ExperimentConfig.title", "TokenizerConfig.train_on",
    "CorpusConfig.from_", "PrepareConfig.corpora", "ReplayConfig.paths", "ExperimentConfig.base", "ExperimentConfig.runs",
    "ExperimentConfig.sweeps", "ExperimentConfig.quick", "ValuationConfig.against", "TrainConfig.only", "TaskFileConfig.from_",
    "PrepareConfig.tasks",
}  # fmt: skip


def texts(model: type[BaseModel], seen: set[type]) -> Iterator[tuple[str, bool]]:
    """(section.key, whether it is a path) of every key of the schema that may hold text."""
    if model in seen or model in (Budget, Duration):
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        parts, marked = [field.annotation, *field.metadata], False
        text = chosen = False
        while parts:
            part = parts.pop()
            if isinstance(part, PathMark):
                marked = True
            elif isinstance(part, OneOf):
                chosen = True
            elif part is str:
                text = True
            elif isinstance(part, type) and issubclass(part, BaseModel):
                yield from texts(part, seen)
            parts += [arg for arg in get_args(part) if not isinstance(arg, str)]
        if text and not chosen:
            yield f"{model.__name__}.{name}", marked


def test_every_text_of_the_schema_is_a_path_or_is_none() -> None:
    found = dict([*texts(RunConfig, set()), *texts(ExperimentConfig, set())])
    assert {key for key, marked in found.items() if marked} == PATHS
    assert {key for key, marked in found.items() if not marked} <= NO_PATHS


def test_paths_are_expanded_in_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "base.yml").write_text(MINIMAL)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    (tmp_path / "run.yml").write_text("extends: ~/base.yml\nfolder: $SCRATCH/runs/x\n")
    words = ["data.train.0.path=~/a", "start.from=${SCRATCH}/hf", "data.tokenizer=$HOME/t.json"]
    run = validate(RunConfig, *read_configs([str(tmp_path / "run.yml"), *words]))
    assert (run.run_folder, run.data.train[0].path) == ("/scratch/me/runs/x", f"{home}/a")
    assert (run.start.from_, run.data.tokenizer) == ("/scratch/me/hf", f"{home}/t.json")
    assert validate(RunConfig, *parse_yaml(dump(run), "config.yaml")) == run  # once is enough
    assert validate(RunConfig, *read_configs(["~/base.yml"])).name == "small"
    message = refusal(tmp_path, MINIMAL, "folder=$NOT_SET_HERE/x")
    assert "command line (folder=$NOT_SET_HERE/x)" in message and "variable 'NOT_SET_HERE', which is not set" in message
    assert "home folder that isn't known" in refusal(tmp_path, MINIMAL, "folder=~nobody_of_that_name/x")
    replay = {"of": "lineage", "fraction": 0.1, "paths": {"a": "~/b"}}
    found = load(tmp_path, MINIMAL + f"replay: {replay}\nstart: {{from: x}}\n").replay
    assert found is not None and found.paths == {"a": f"{home}/b"}


def test_paths_of_experiments_are_expanded_beside_their_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    run = yaml.safe_load(MINIMAL.replace("name: small\n", "")) | {
        "data": {"sequence_length": 64, "train": [{"path": "${SCRATCH}/a"}]}
    }
    corpora = {"a": {"from": ["~/a.txt"]}}
    prepare = {"folder": "${folder}/$SCRATCH", "tokenizer": {"vocab_size": 9, "train_on": "a"}, "corpora": corpora}
    mapping = {"experiment": "e", "folder": "$SCRATCH/e", "base": run, "runs": [{"name": "r"}], "prepare": prepare}
    experiment = load_experiment(mapping, {})
    assert experiment.folder == "/scratch/me/e" and experiment.arms[0].config.run_folder == "/scratch/me/e/r"
    assert experiment.arms[0].config.data.train[0].path == "/scratch/me/a"
    assert experiment.config.data_folder == "/scratch/me/e//scratch/me"
    assert experiment.config.prepare is not None and str(experiment.config.prepare.corpora["a"].from_[0]).startswith("/")


@settings(deadline=None)
@given(st.text("ab~/$.{}", max_size=10))
def test_what_is_expanded_once_stays_as_it_is(text: str) -> None:
    try:
        once = expanded(text)
    except ValueError:
        return
    assert expanded(once) == once and not once.startswith("~")


def test_tools_expand_what_a_shell_leaves(tmp_path: Path) -> None:
    """``--output=~/x`` reaches a program as it is."""
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    command = [sys.executable, str(ROOT / "tools/merge_data.py"), "~/a", "--output=~/b"]
    ran = subprocess.run(command, env=home, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and f"{tmp_path}/a" in ran.stderr and not (tmp_path / "~").exists()
    for tool in sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "megarewarm/cli").glob("*.py")]):
        # its Parser expands what has the type Path; megarewarm.arguments.path_text does so for text
        assert "ArgumentParser(" not in tool.read_text(), f"{tool.name}: command lines are read by megarewarm.arguments.Parser"


# ---- intervals and amounts -----------------------------------------------------------------------------------------------

NEVER = ("evaluation.every", "evaluation.every_in_warmup", "evaluation.tasks_every", "checkpoint.every",
         "checkpoint.keep_every", "logging.dynamics", "reliability.check_replicas")  # fmt: skip
COUNTS = ("logging.every", "checkpoint.keep_last", "reliability.roll_back_steps", "reliability.give_up_after",
          "reliability.spike_window", "training.global_batch", "training.micro_batch", "data.sequence_length")  # fmt: skip


@pytest.mark.parametrize("key", NEVER)
def test_an_interval_of_nothing_is_refused_and_null_is_never(tmp_path: Path, key: str) -> None:
    for nothing in ("0", "0 steps", "0%", "0 tokens", "0.0"):
        message = refusal(tmp_path, MINIMAL, f"{key}={nothing}")
        assert message.startswith(f"command line ({key}={nothing}): {key}: 0 is no interval: write null for never")
    assert "is not a length of training" in refusal(tmp_path, MINIMAL, f"{key}=-5")
    section, name = key.split(".")
    assert getattr(getattr(load(tmp_path, MINIMAL, f"{key}=null"), section), name) is None
    assert getattr(getattr(load(tmp_path, MINIMAL, f"{key}=5"), section), name).amount == 5


def test_every_interval_of_the_schema_is_tried() -> None:
    found = set()
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for key, inner in field.annotation.model_fields.items():
                if "nterval" in (inner.description or "") or Interval in get_args(inner.annotation):
                    found.add(f"{name}.{key}")
    assert found <= set(NEVER)


@pytest.mark.parametrize("key", COUNTS)
def test_counts_are_above_nothing(tmp_path: Path, key: str) -> None:
    for nothing in ("0", "-1"):
        assert f"({key}={nothing}): {key}: must be " in refusal(tmp_path, MINIMAL, f"{key}={nothing}")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Budget, "10M", "10M tokens"), (Budget, "1B", "1B tokens"), (Budget, "1,000", 1000), (Budget, "1e3", 1000),
        (Budget, "2k steps", 2000), (Budget, "1.5%", "1.5%"), (Budget, "1.5", None), (Budget, "10k", None),
        (Budget, "-1", None), (Budget, "2.5 epochs", "2.5 epochs"), (Budget, "1 epoch", "1 epoch"), (Budget, "5e9", None),
        (Budget, 5e9, None), (Budget, "5e9 steps", "5000000000 steps"), (Budget, "5e9 tokens", "5B tokens"),
        (Budget, 99_999_999, 99_999_999), (Budget, {"a": 1}, None), (Budget, "2 samples", None),
        (Sequences, "512 sequences", 512), (Sequences, "512 samples", 512), (Sequences, "1_024", 1024),
        (Sequences, "1e3", 1000), (Sequences, "2 tokens", None),
        (Step, 0, 0), (Step, "2k steps", 2000), (Step, -1, None), (Row, "1.5M", 1_500_000),
        (Epochs, "2.5 epochs", 2.5), (Epochs, 0.5, 0.5), (Epochs, "2 steps", None), (Epochs, 0, None),
        (Tokens, "10M", 10_000_000), (Tokens, "10M tokens", 10_000_000), (Tokens, 5, 5), (Tokens, "2,000", 2000),
        (Tokens, "10k", 10_000), (Tokens, "1%", None), (Tokens, "3 steps", None), (Tokens, "0", None), (Tokens, "1.5", None),
        (Tokens, "2_000", 2000), (Steps, "50 steps", 50), (Steps, "50", 50), (Steps, "2k", 2000), (Steps, "5 tokens", None),
        (Steps, 0, None), (TokenAmount, "2B", "2B tokens"), (TokenAmount, 2_000_000, "2M tokens"),
        (TokenAmount, "2B tokens", "2B tokens"), (Share, "5%", 0.05), (Share, 0.05, 0.05), (Share, "0.05", 0.05),
        (Share, "2.5 %", 0.025), (Share, "5 steps", None), (Share, "five", None),
    ],
)  # fmt: skip
def test_one_grammar_for_amounts(kind: Any, text: Any, value: Any) -> None:
    if value is None:
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python(text)
    else:
        adapter = TypeAdapter(kind)
        assert adapter.dump_python(adapter.validate_python(text), mode="json") == value


def test_amounts_where_they_stand(tmp_path: Path) -> None:
    text = MINIMAL.replace("train: [{path: a}]", "train: [{path: a, tokens: 2B}, {path: b, tokens: 10M}]").replace(
        "budget: 40", "budget: 1M"
    )
    sources = "validation: [{name: v, tokens: 10M, sources: [{path: a}]}]"
    run = load(
        tmp_path, text.replace("\nschedule", f"\n  {sources}\nschedule") + "replay: {fraction: 5%, sources: [{path: c}]}\n"
    )
    assert run.data.validation[0].tokens == 10_000_000 and run.data.train[0].weight == 2e9
    assert run.replay is not None and run.replay.fraction == 0.05 and run.training.budget.unit == "tokens"


def test_a_replay_of_nothing_is_none(tmp_path: Path) -> None:
    """So that an axis of replay fractions may begin at 0."""
    for nothing in ("0", "0.0", "0%"):
        assert load(tmp_path, MINIMAL + f"replay: {{fraction: {nothing}, sources: [{{path: c}}]}}\n").replay is None
    base = yaml.safe_load(MINIMAL.replace("name: small\n", "")) | {"replay": {"sources": [{"path": "c"}]}}
    mapping = {"experiment": "e", "base": base, "sweeps": [{"name": "s", "axes": {"replay.fraction": [0, 0.05]}}]}
    arms = load_experiment(mapping, {}).arms
    assert [(arm.name, arm.axes["replay.fraction"], arm.config.replay is None) for arm in arms] == [
        ("s_0", 0, True), ("s_0.05", 0.05, False),
    ]  # fmt: skip


# ---- words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "trainig.micro_batch=3",
            r"^command line \(trainig.micro_batch=3\): unknown key 'trainig', did you mean 'training'\?$",
        ),
        ("max_lr=1e-3", r"unknown key 'max_lr', did you mean 'schedule\.max_lr'\?"),
        ("export=true", r"^command line \(export=true\): export: expected keys below it, such as \{huggingface: \.\.\.\}"),
        ("evaluation=null", r"evaluation: expected keys below it, such as \{every: \.\.\.\} \(given: null\)"),
        ("data.train=mydata/en", r"data\.train: expected a list, such as \[\{path: \.\.\.\}\] \(given: 'mydata/en'\)"),
        ("data.train=[]", r"data\.train: expected at least 1 in the list, found 0"),
        ("name=a b", r"name: expected a name of letters, digits, '_', '-' and '\.', such as run_1 \(given: 'a b'\)"),
        ("schedule.max_lr=big", r"max_lr: expected a number, such as 0\.1 or 3e-4 \(given: 'big'\)"),
        ("schedule.max_lr=.nan", r"max_lr: expected a finite number"),
        ("training.precision=fp8", r"precision: expected 'auto', 'fp32', 'bf16' or 'fp16' \(given: 'fp8'\)"),
        ("optimizer.betas=[1]", r"optimizer\.betas\.1.*missing|optimizer\.betas: expected"),
        ("training.budget=10k", r"'10k' may be steps or tokens: write '10k steps' or '10k tokens'"),
    ],
)
def test_problems_are_told_in_the_words_of_the_file(tmp_path: Path, word: str, says: str) -> None:
    message = refusal(tmp_path, MINIMAL, word)
    assert re.search(says, message, re.MULTILINE), message
    assert "Input should" not in message and "valid dictionary" not in message


def test_the_unknown_key_is_the_cause_of_the_missing_one(tmp_path: Path) -> None:
    assert refusal(tmp_path, MINIMAL.replace("max_lr", "max_Ir")) == (
        f"{tmp_path}/run.yml:6: unknown key 'max_Ir' in schedule, did you mean 'max_lr'?"
    )
    both = refusal(tmp_path, MINIMAL.replace("max_lr: 3e-3", "colour: 1")).splitlines()
    assert "unknown key 'colour'" in both[0] and "'schedule.max_lr' is missing" in both[1]


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder, expected a config file"):
        read_configs([str(tmp_path)])
