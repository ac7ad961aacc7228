"""Bad input: one clear line that names the place and the remedy, exit code 2, and not a byte on the disk touched."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megarewarm.config.load import merge
from megarewarm.errors import UserError
from megarewarm.main import main
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.mesh import choose_layout
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.tiny import config, mapping, quiet, write_tokens

Change = Callable[[Path], Any]
"""Damages the folder and returns changes of the configuration, a text to write in its place, or None."""


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def truncated(place: Path) -> None:
    path = place / "new.bin"
    path.write_bytes(path.read_bytes()[:-50])


def wrong_magic(place: Path) -> None:
    path = place / "new.idx"
    path.write_bytes(b"WHATISIT!" + path.read_bytes()[9:])


def large_ids(place: Path) -> dict[str, Any]:
    write_tokens(place / "large", 3, vocabulary=200)
    return {"data": {"train": [{"path": str(place / "large"), "max_epochs": 9}]}}


def odd_bytes(place: Path) -> dict[str, Any]:
    (place / "odd.bin").write_bytes(bytes(1001))
    return {"data": {"train": [{"path": str(place / "odd.bin")}]}}


def other_run(place: Path) -> dict[str, Any]:
    from tests.training.test_resume import ALONE

    train(config(place, training={"budget": 2}), ALONE, quiet())
    return {"training": {"budget": 2}, "schedule": {"max_lr": 5e-3}}


def another_shape(place: Path) -> dict[str, Any]:
    from tests.training.test_resume import ALONE

    train(config(place, folder=str(place / "up"), training={"budget": 2}), ALONE, quiet())
    return {"start": {"from": str(place / "up")}, "model": {"hidden_size": 64}}


def teacher(model: dict[str, Any], **distill: Any) -> Change:
    """A teacher of another shape."""

    def change(place: Path) -> dict[str, Any]:
        from tests.training.test_resume import ALONE

        shape = {"model": model, "data": {"sequence_length": min(16, model.get("max_positions", 16))}}
        train(config(place, folder=str(place / "teacher"), training={"budget": 2}, **shape), ALONE, quiet())
        return {"distill": {"from": str(place / "teacher"), **distill}}

    return change


def unfinished_teacher(place: Path) -> dict[str, Any]:
    from tests.training.test_resume import ALONE

    train(config(place, folder=str(place / "teacher")), ALONE, quiet())
    shutil.rmtree(place / "teacher/checkpoints/step_20")
    return {"distill": {"from": str(place / "teacher")}}


def unwritable(place: Path) -> dict[str, Any]:
    (place / "file").write_text("in the way")
    return {"folder": str(place / "file" / "run")}


def no_checkpoint(place: Path) -> dict[str, Any]:
    (place / "empty").mkdir()
    return {"start": {"from": str(place / "empty")}}


def no_index(place: Path) -> dict[str, Any]:
    shutil.copy(place / "new.bin", place / "alone.bin")
    return {"data": {"train": [{"path": str(place / "alone"), "max_epochs": 9}]}}


def no_config(place: Path) -> None:
    (place / "tiny").mkdir()
    (place / "tiny" / "metrics.jsonl").write_text("")


def changed_data(place: Path) -> dict[str, Any]:
    from tests.training.test_resume import ALONE

    settings = {"checkpoint": {"every": 2}, "training": {"budget": 4}}
    train(config(place, **settings), ALONE, quiet())
    shutil.rmtree(place / "tiny" / "checkpoints" / "step_4")
    for suffix in ("bin", "idx"):
        (place / f"new.{suffix}").unlink()
    write_tokens(place / "new", 5)
    return settings


def few_to_replay(place: Path) -> dict[str, Any]:
    write_tokens(place / "few", 1, documents=1)
    return {"replay": {"fraction": 0.5, "sources": [{"path": str(place / "few")}]}}


def narrow_weights(place: Path) -> dict[str, Any]:
    """A Hugging Face folder whose tensors are not those of its config."""
    from safetensors.torch import load_file, save_file

    from tests.training.test_resume import ALONE

    train(config(place, folder=str(place / "up"), training={"budget": 1}, export={"huggingface": True}), ALONE, quiet())
    file = place / "up" / "huggingface" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "final_layer_norm" not in name}, file, {"format": "pt"})
    return {"start": {"from": str(place / "up" / "huggingface")}}


CASES: dict[str, tuple[Change | dict[str, Any] | str, str]] = {
    "missing token file": ({"data": {"train": [{"path": "nowhere/data"}]}}, r"nowhere/data.*"),
    "truncated bin": (truncated, r"new\.bin"),
    "wrong magic": (wrong_magic, r"new\.idx"),
    "ids beyond the vocabulary": (large_ids, r"large.*(vocab|64)"),
    "half a token": (odd_bytes, r"odd\.bin.*1001"),
    "wrong dtype": ({"data": {"train": [{"path": "PLACE/new", "dtype": "uint32"}]}}, r"new.*uint"),
    "more than there is": ({"training": {"budget": 100_000}}, r"new.*max_epochs"),
    "unknown key": ({"schedule": {"max_lrr": 1}}, r"run\.yml:\d+: unknown key 'max_lrr' in schedule.*max_lr"),
    "unknown section": ({"trainin": {}}, r"run\.yml:\d+: unknown key 'trainin'.*training"),
    "heads do not divide": ({"model": {"num_heads": 5}}, r"run\.yml:\d+: .*num_heads 5"),
    "min above max": ({"schedule": {"min_lr": 1.0}}, r"min_lr 1 is above max_lr"),
    "warmup longer than the run": ({"schedule": {"warmup": "21 steps"}}, r"warmup"),
    "a word for a number": ({"training": {"micro_batch": "four"}}, r"run\.yml:\d+: training\.micro_batch: .*'four'"),
    "sequence too long": ({"data": {"sequence_length": 99}}, r"sequence_length 99 is above model\.max_positions 16"),
    "no such checkpoint": ({"start": {"from": "PLACE/absent"}}, r"absent: no such folder"),
    "a folder without a checkpoint": (no_checkpoint, r"empty is neither a run or checkpoint folder"),
    "another shape": (another_shape, r"model\.hidden_size: 64 in the config, 32 in the checkpoint"),
    "another run's folder": (other_run, r"schedule\.max_lr was 0\.01, now it is 0\.005; give this run another 'folder', or"),
    "unwritable folder": (unwritable, r"file"),
    "moments from scratch": ({"start": {"moments": "keep"}}, r"start\.moments: nothing to keep in a run from scratch"),
    "validation set without data": (
        {"data": {"validation": [{"name": "x", "tokens": 5, "sources": [{"path": "PLACE/new"}]}]}},
        r"'x' comes to no whole window of 16 tokens",
    ),
    "ranks that are not there": ({"parallel": {"tensor": 2}}, r"parallel: pipeline 1 x tensor 2 = 2 ranks.*started 1"),
    "sequence without tensor": ({"parallel": {"sequence": True}}, r"sequence: true needs tensor ranks"),
    "no index": (no_index, r"alone"),
    "a folder of a run without its config": (no_config, r"tiny: holds a run without config\.yaml"),
    "another file in the place of the data": (changed_data, r"position in the data.*restore the old files"),
    "too few to replay": (few_to_replay, r"source 'few' gives \d+ samples"),
    "replay of what is held out": (
        {"replay": {"fraction": 0.5, "sources": [{"path": "PLACE/old", "max_epochs": 9}]}},
        r"validation set 'old' \(upstream\) and .*, which is replayed, both read",
    ),
    "tensors that are not the config's": (narrow_weights, r"missing tensor .*final"),
    "best of a set that is not there": ({"checkpoint": {"keep_best": "x"}}, r"keep_best: there is no validation set 'x'"),
    "best that can't be": ({"checkpoint": {"keep_best": "new", "every": None}}, r"keep_best"),
    "kept that is not saved": ({"checkpoint": {"keep_every": 7}}, r"keep_every: 7 steps is no multiple"),
    "roll back to nowhere": (
        {"reliability": {"spikes": "roll_back", "roll_back_steps": 90}},
        r"roll_back_steps: 90 steps before a spike there may be no checkpoint",
    ),
    "no such tokenizer": ({"data": {"mask_eod_loss": True, "tokenizer": "PLACE/no.json"}}, r"no\.json"),
    "an end of documents outside": ({"data": {"mask_eod_loss": True, "eod": 64}}, r"data\.eod: 64 is outside"),
    "no such logger": ({"logging": {"wandb": {"project": "x"}}}, r"wandb package is not installed"),
    "no teacher": ({"distill": {"kind": "logits", "weight": 0.5}}, r"distill needs a teacher"),
    "a teacher that is not there": ({"distill": {"from": "PLACE/absent"}}, r"distill\.from: .*absent: no such folder"),
    "a teacher that is this run": ({"distill": {"from": "PLACE/tiny"}}, r"distill\.from: .*tiny is this run itself"),
    "a teacher in progress": (unfinished_teacher, r"distill\.from: .*teacher is a run in progress, at step 15 of 20"),
    "a teacher of another vocabulary": (
        teacher({"vocab_size": 67}),
        r"distill\.from: .*teacher.* has a vocabulary of 67 ids, the model one of 64, and it has no tokenizer",
    ),
    "a teacher of another width": (
        teacher({"hidden_size": 64}, kind="hidden"),
        r"distill\.kind: 'hidden' compares states of one width, and .*teacher.* has hidden_size 64, the model 32",
    ),
    "a teacher with fewer positions": (
        teacher({"max_positions": 8}),
        r"distill\.from: .*teacher.* has 8 positions, data\.sequence_length is 16",
    ),
    "a seed that numpy doesn't take": ({"data": {"order": "neox", "seed": 2**32}}, r"data\.seed"),
    "a switch to what is not there": (
        {"data": {"switches": [{"at": "50%", "train": [{"path": "PLACE/absent"}]}]}},
        r"absent",
    ),
    "invalid YAML": ("training: [unclosed\n", r"run\.yml:\d+"),
    "not a mapping": ("- a\n- b\n", r"run\.yml.*"),
    "an empty file": ("", r"run\.yml.*"),
    "a key twice": ("name: a\nname: b\n", r"run\.yml:2: .*name"),
    "tabs": ("training:\n\tbudget: 3\n", r"run\.yml:2"),
    "unknown parent": ("extends: nothing.yml\n", r"run\.yml:1: 'extends' names .*nothing\.yml"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_code_2_nothing_touched(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    change, message = CASES[case]
    settings = mapping(tmp_path)
    made = change(tmp_path) if callable(change) else change
    if isinstance(made, dict):
        settings = merge(settings, yaml.safe_load(yaml.safe_dump(made).replace("PLACE", str(tmp_path))))
    (tmp_path / "run.yml").write_text(made if isinstance(made, str) else yaml.safe_dump(settings))
    capfd.readouterr()
    if "cuda" in case and torch.cuda.is_available():
        pytest.skip("there is one")
    before = snapshot(tmp_path)
    assert main([str(tmp_path / "run.yml")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert re.search(message, err), err
    assert snapshot(tmp_path) == before
    if case == "ranks that are not there":
        return  # a dry run of one process shows the run on as many ranks as it needs
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 2
    assert capfd.readouterr().err == err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"parallel": {"tensor": 3}, "model": {"num_heads": 4}}, 3, "parallel.tensor: 3 ranks can't share model.num_heads 4"),
        ({"parallel": {"pipeline": 3}}, 3, "parallel.pipeline: 3 stages for 2 layers"),
        (
            {"parallel": {"pipeline": 3}, "model": {"num_layers": 3}, "distill": {"from": "shallow"}},
            3,
            "distill: the teacher is laid out as the model is: parallel.pipeline: 3 stages for 2 layers",
        ),
        ({"parallel": {"data": 3}}, 3, "training.global_batch: 8 sequences can't be shared evenly by 3"),
        ({"training": {"device": "cuda"}}, 1, "training.device: rank 0 needs GPU 0"),
    ],
)
def test_what_the_ranks_would_refuse(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], ranks: int, message: str
) -> None:
    """The start asks the same function once its ranks have met; the layouts' own tests start them."""
    if "device" in message and torch.cuda.is_available():
        pytest.skip("there is one")
    if "distill" in changes:
        from tests.training.test_resume import ALONE

        train(config(tmp_path, folder=str(tmp_path / "shallow"), training={"budget": 2}), ALONE, quiet())
        changes = changes | {"distill": {"from": str(tmp_path / "shallow")}}
        capfd.readouterr()
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, **changes)))
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 2
    told = capfd.readouterr().err
    assert told.startswith(message) and told.count("\n") == 1
    if ranks == 1:
        assert main([str(tmp_path / "run.yml")]) == 2
        assert capfd.readouterr().err == told
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            run = config(tmp_path, **changes)
            plan = make_plan(run)
            check_fit(run, plan.model, choose_layout(run.parallel, ranks), plan.taught_by)


def without_notes(shown: str) -> str:
    """Notes come from checks, of which a refused dry run makes no more than its start does."""
    return "".join(line for line in shown.splitlines(keepends=True) if not line.startswith("note: "))


def test_missing_files_are_refused_unless_they_may_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All are listed; what is here is checked all the same."""
    settings = mapping(tmp_path)
    settings["data"]["train"].append({"path": "absent"})
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    words = [str(tmp_path / "run.yml"), "data.validation.1.sources.0.path=gone", "--dry-run"]
    assert main(words) == 2
    refused = capfd.readouterr()
    assert main([*words, "--allow-missing"]) == 0
    allowed = capfd.readouterr()
    assert without_notes(refused.out) == without_notes(allowed.out) and allowed.err == ""
    for name in ("absent", "gone"):
        assert f"missing, needed to train: {Path(name).absolute()}: no such token file (.bin) here" in allowed.out
    assert refused.err.count("\n") == 1 and str(Path("absent").absolute()) in refused.err
    truncated(tmp_path)
    assert main([*words, "--allow-missing"]) == 2
    assert "new.bin" in capfd.readouterr().err
    assert main([str(tmp_path / "run.yml"), "--allow-missing"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.yml"], r"absent\.yml"),
        (["RUN", "training.budget"], r"training\.budget"),
        (["RUN", "training.bugdet=3"], r"unknown key 'bugdet' in training.*budget"),
        (["RUN", "data.train.7.weight=3"], r"data\.train\.7"),
        (["RUN", "=3"], r"=3"),
        (["RUN", "training.budget=1e400"], r"training\.budget.*inf"),
        (["RUN", "evaluation.every=.inf"], r"evaluation\.every.*inf"),
        (["RUN", "schedule.warmup=1e400"], r"schedule\.warmup.*inf"),
        (["RUN", "training.micro_batch=true"], r"training\.micro_batch: expected a number, not a switch"),
        (["RUN", "optimizer.weight_decay=false"], r"optimizer\.weight_decay: expected a number, not a switch"),
        (["RUN", "reliability.max_wall_time=25:61:00"], r"more than 59 minutes"),
    ],
)
def test_words_of_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path)))
    before = snapshot(tmp_path)
    assert main([word.replace("RUN", str(tmp_path / "run.yml")) for word in words]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start.intent=resume", "training.budget=9"], r"start\.intent: 'resume' continues the checkpoint's schedule"),
        (["start.intent=resume"], r"has done 4"),
        (["start.moments=keep", "model.num_heads=1"], r"num_heads: 1 in the config, \d+ in the checkpoint"),
        (["start.from=FIRST/huggingface", "start.intent=resume"], r"\(huggingface\) holds weights only"),
        (["folder=/proc/x"], r"/proc/x: can't be written"),
    ],
)
def test_a_dry_run_refuses_with_the_words_of_the_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """Of a checkpoint that is here, though the configuration has a model of its own: it isn't taken for a missing one."""
    first = mapping(
        tmp_path, name="first", folder=str(tmp_path / "first"), training={"budget": 4}, export={"huggingface": True}
    )
    (tmp_path / "first.yml").write_text(yaml.safe_dump(first))
    second = mapping(tmp_path, start={"from": str(tmp_path / "first")}, training={"budget": 4})
    (tmp_path / "run.yml").write_text(yaml.safe_dump(second))
    assert main([str(tmp_path / "first.yml")]) == 0
    words = [str(tmp_path / "run.yml"), *(word.replace("FIRST", str(tmp_path / "first")) for word in words)]
    said = []
    for more in ([], ["--dry-run"], ["--dry-run", "--allow-missing"]):
        capfd.readouterr()
        assert main([*words, *more]) == 2, more
        said.append(capfd.readouterr().err)
    assert re.search(message, said[0]) and len(set(said)) == 1, said


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(mapping(tmp_path, training={"budget": 1})) + "optimizer: {eps: 1e-08, weight_decay: 1e-1}\n"
    (tmp_path / "run.yml").write_text(text)
    assert main([str(tmp_path / "run.yml"), "schedule.max_lr=3e-4", "schedule.min_lr=0"]) == 0
    resolved = yaml.safe_load((tmp_path / "tiny" / "config.yaml").read_text())
    assert resolved["optimizer"]["eps"] == 1e-8 and resolved["schedule"]["max_lr"] == 3e-4


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path)))
    assert main([str(tmp_path / "run.yml")]) == 0
    newest = tmp_path / "tiny" / "checkpoints" / "step_20"
    shutil.rmtree(newest)
    checkpoints = [tmp_path / "tiny" / "checkpoints" / f"step_{step}" for step in (5, 10, 15)]
    for checkpoint in checkpoints:
        for file in checkpoint.glob("*.distcp"):
            os.truncate(file, 100)
    before = snapshot(tmp_path)
    capfd.readouterr()
    assert main([str(tmp_path / "run.yml")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "step_15/__0_0.distcp is damaged" in err and "remove the folder to start over" in err
    assert snapshot(tmp_path) == before
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
    assert main([str(tmp_path / "run.yml")]) == 0
