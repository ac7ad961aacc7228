"""A run stopped anywhere and started again is the undisturbed run: loss for loss, weight for weight; and it re-warms once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from megarewarm.checkpoint.own import state, store
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import trainer
from megarewarm.training.step import TrainingDiverged
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, mapping, printed, quiet

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.stored_tensors(checkpoint).items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in events(folder, "train")}


class Killed(Exception):
    """Stands for a kill: nothing of the process runs after it."""


@pytest.mark.parametrize("killed_after", [3, 7, 12, 19])
def test_killed_and_started_again_is_the_undisturbed_run(
    tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(tmp_path, folder=str(tmp_path / "whole")), ALONE, quiet())
    broken = config(tmp_path, folder=str(tmp_path / "broken"))
    original = trainer.training_step

    def step_or_die(run, lr):
        if run.step == killed_after:
            raise Killed
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(Killed):
        train(broken, ALONE, quiet())
    monkeypatch.setattr(trainer, "training_step", original)
    again = train(broken, ALONE, quiet())

    assert losses(whole.folder) == losses(again.folder) and len(losses(whole.folder)) == 20
    one, two = tensors_of(whole.folder / "checkpoints/step_20"), tensors_of(again.folder / "checkpoints/step_20")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    resumed_at = [line["step"] for line in events(again.folder, "resume")]
    assert resumed_at == [killed_after // 5 * 5 if killed_after >= 5 else -1]
    assert whole.losses == again.losses


def test_half_and_half_is_the_whole_from_another_run(tmp_path: Path) -> None:
    """intent 'resume' from a checkpoint in the middle of another run continues it bit for bit."""
    whole = train(config(tmp_path, folder=str(tmp_path / "whole")), ALONE, quiet())
    for step in (15, 20):
        shutil.copytree(whole.folder / f"checkpoints/step_{step}", tmp_path / f"kept_{step}")
    second = config(
        tmp_path, name="second", folder=str(tmp_path / "second"), start={"from": str(tmp_path / "kept_15"), "intent": "resume"}
    )
    outcome = train(second, ALONE, quiet())
    assert losses(outcome.folder) == {step: loss for step, loss in losses(whole.folder).items() if step > 15}
    one, two = tensors_of(whole.folder / "checkpoints/step_20"), tensors_of(outcome.folder / "checkpoints/step_20")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_rewarms_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = config(
        tmp_path, name="up", folder=str(tmp_path / "up"), data={"train": [{"path": str(tmp_path / "old"), "max_epochs": 9}]}
    )
    train(upstream, ALONE, quiet())
    rewarm = config(tmp_path, start={"from": str(tmp_path / "up")}, schedule={"max_lr": 5e-3})
    original = trainer.training_step

    def step_or_die(run, lr):
        if run.step == 8:
            raise Killed
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(Killed):
        train(rewarm, ALONE, quiet())
    monkeypatch.setattr(trainer, "training_step", original)
    shutil.rmtree(tmp_path / "up")  # what was re-warmed from is not needed any more
    console = quiet()
    outcome = train(rewarm, ALONE, console)
    assert "resumes at step 5" in printed(console)
    rates = {line["step"]: line["lr"] for line in events(outcome.folder, "train")}
    assert max(rates.values()) == 5e-3 and next(step for step, lr in rates.items() if lr == 5e-3) <= 3
    assert all(rates[step] > rates[step + 1] for step in range(3, 20))
    assert len(events(outcome.folder, "start")) == 1
    finished = train(rewarm, ALONE, console)
    assert "already complete" in printed(console) and finished.losses == outcome.losses
    assert len(losses(outcome.folder)) == 20


def test_lineage_names_every_stage(tmp_path: Path) -> None:
    old = {"train": [{"name": "prose", "path": str(tmp_path / "old"), "max_epochs": 9}]}
    train(config(tmp_path, name="up", folder=str(tmp_path / "up"), data=old), ALONE, quiet())
    replay = {"fraction": 0.25, "sources": [{"path": str(tmp_path / "old")}]}
    validation = [{"name": "new", "role": "downstream", "tokens": 256, "sources": [{"path": str(tmp_path / "new")}]}]
    rewarm = config(tmp_path, start={"from": str(tmp_path / "up")}, replay=replay, data={"validation": validation})
    outcome = train(rewarm, ALONE, quiet())
    up, tiny = state.read_state(outcome.folder / "checkpoints/step_20").lineage.stages
    assert (up.run, up.intent, up.tokens) == ("up", "scratch", 20 * 8 * 16)
    assert (tiny.run, tiny.intent, tiny.started_from) == ("tiny", "rewarm", str(tmp_path / "up"))
    assert {seen.name: seen.samples for seen in tiny.data} == {"new": 120, "old": 40}
    assert up.data[0].fingerprint == tiny.data[1].fingerprint != tiny.data[0].fingerprint
    assert up.max_lr == 1e-2 and tiny.losses == outcome.losses


def test_moments_are_kept_or_reset_as_the_table_says(tmp_path: Path) -> None:
    train(config(tmp_path, name="up", folder=str(tmp_path / "up")), ALONE, quiet())
    source = open_checkpoint(str(tmp_path / "up"))
    assert source.training is not None
    old = tensors_of(tmp_path / "up/checkpoints/step_20")
    # a run of one step at learning rate 0 shows the moments after a single update: beta * old + (1 - beta) * gradient
    flat = {"curve": "constant", "max_lr": 0.0, "min_lr": None, "warmup": 0}
    seen = {}
    for name, start in {
        "kept": {"moments": "keep"},
        "second": {"moments": "keep_second"},
        "reset": {},
        "branch": {"intent": "branch"},
    }.items():
        run = config(
            tmp_path,
            name=name,
            folder=str(tmp_path / name),
            start={"from": str(tmp_path / "up"), **start},
            schedule=flat,
            training={"budget": 1},
            data={"train": [{"path": str(tmp_path / "new"), "max_epochs": 9}]},
        )
        outcome = train(run, ALONE, quiet())
        seen[name] = tensors_of(outcome.folder / "checkpoints/step_1")
        assert state.read_state(outcome.folder / "checkpoints/step_1").optimizer_step == {"reset": 1}.get(name, 21)
    key = "final_layer_norm.weight"
    fresh = seen["reset"][f"optimizer.exp_avg.{key}"]
    kept = seen["kept"][f"optimizer.exp_avg.{key}"]
    torch.testing.assert_close(kept - fresh, 0.9 * old[f"optimizer.exp_avg.{key}"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen["second"][f"optimizer.exp_avg.{key}"], fresh)
    torch.testing.assert_close(
        seen["second"][f"optimizer.exp_avg_sq.{key}"] - seen["reset"][f"optimizer.exp_avg_sq.{key}"],
        0.95 * old[f"optimizer.exp_avg_sq.{key}"],
        rtol=1e-4,
        atol=1e-9,
    )
    assert torch.equal(seen["kept"][f"model.{key}"], old[f"model.{key}"]), "at learning rate 0 nothing moves"
    assert state.read_state(tmp_path / "branch/checkpoints/step_1").samples == 20 * 8 + 8


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path, training={"budget": 2}), ALONE, quiet())
    before = sorted(path.name for path in (tmp_path / "tiny").rglob("*"))
    with pytest.raises(UserError, match=r"schedule\.max_lr was 0\.01, now it is 0\.02"):
        train(config(tmp_path, training={"budget": 2}, schedule={"max_lr": 2e-2}), ALONE, quiet())
    assert before == sorted(path.name for path in (tmp_path / "tiny").rglob("*"))
    train(config(tmp_path, training={"budget": 2, "micro_batch": 8}, logging={"every": 1}), ALONE, quiet())


def test_changed_data_is_noticed_on_resume(tmp_path: Path) -> None:
    train(config(tmp_path, training={"budget": 6}), ALONE, quiet())
    shutil.rmtree(tmp_path / "tiny/checkpoints/step_6")
    for suffix in ("bin", "idx"):
        (tmp_path / f"new.{suffix}").unlink()
    from tests.support.tiny import write_tokens

    write_tokens(tmp_path / "new", seed=5)
    with pytest.raises(UserError, match=r"position in the data .* restore the old files"):
        train(config(tmp_path, training={"budget": 6}), ALONE, quiet())


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_continued(tmp_path: Path) -> None:
    six = config(tmp_path, training={"budget": 6})
    whole = train(config(tmp_path, training={"budget": 6}, folder=str(tmp_path / "whole")), ALONE, quiet())
    train(six, ALONE, quiet())
    (tmp_path / "tiny/checkpoints/step_6/state.json").write_text("{")
    console = quiet()
    again = train(six, ALONE, console)
    assert "step_6/state.json is damaged" in (said := " ".join(printed(console).split()))
    assert "the checkpoint of step 5 is used" in said
    assert again.step == 6 and again.losses == whole.losses
    one, two = (tensors_of(folder / "checkpoints/step_6") for folder in (whole.folder, again.folder))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for step in (5, 6):
        (tmp_path / f"tiny/checkpoints/step_{step}/.metadata").unlink()
    with pytest.raises(UserError, match=r"step_6/.metadata is missing, and no older checkpoint .* remove the folder"):
        train(six, ALONE, quiet())


def test_divergence_stops_with_the_checkpoint_untouched(tmp_path: Path) -> None:
    run = config(tmp_path, schedule={"max_lr": 1e30, "min_lr": 1.0, "warmup": 0}, optimizer={"clip_norm": None})
    with pytest.raises(TrainingDiverged, match="not finite"):
        train(run, ALONE, quiet())
    assert not list((tmp_path / "tiny").glob("checkpoints/step_*"))


def start_process(tmp_path: Path, **changes: object) -> subprocess.Popen[str]:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(mapping(tmp_path, **changes)))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.sh"), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and any(f'"step":{step},' in line for line in metrics.read_text().splitlines() if "train" in line):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in a minute")


@pytest.mark.launch
def test_ctrl_c_and_kill_9_lose_nothing(tmp_path: Path) -> None:
    changes = {"training": {"budget": 120}, "evaluation": {"every": 60}, "checkpoint": {"every": 30}}
    metrics = tmp_path / "tiny/metrics.jsonl"
    process = start_process(tmp_path, **changes)
    wait_for_step(metrics, 20)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)  # what a batch system gives a job to save
    assert process.returncode == 128 + signal.SIGINT, output
    assert "the same command continues from here" in output
    process = start_process(tmp_path, **changes)
    wait_for_step(metrics, 70)
    process.kill()
    process.communicate()
    process = start_process(tmp_path, **changes)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resumes at step" in output
    whole = train(config(tmp_path, folder=str(tmp_path / "whole"), **changes), ALONE, quiet())
    interrupted = losses(tmp_path / "tiny")  # later lines of a step supersede earlier ones
    assert interrupted == losses(whole.folder) and len(interrupted) == 120
    assert len({json.dumps(line["schedule"]) for line in events(tmp_path / "tiny", "start")}) == 1


def test_waiting_for_data_is_measured_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes 0.3 s for each global batch, against one that keeps up."""
    from megarewarm.data.mixture.blended_rows import BlendedRows

    read = BlendedRows.read

    def slowly(self, first, count):
        time.sleep(0.3)
        return read(self, first, count)

    fast = quiet()
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_NOTICEABLE_WAIT", 0.4)  # busy machines keep the reading thread waiting too
        train(config(tmp_path, name="fast", folder=str(tmp_path / "fast")), ALONE, fast)
    assert "waiting for data" not in printed(fast)
    monkeypatch.setattr(BlendedRows, "read", slowly)
    slow = quiet()
    settings = config(tmp_path, name="slow", folder=str(tmp_path / "slow"), data={"validation": []}, training={"budget": 8})
    outcome = train(settings, ALONE, slow)
    assert "of the time went into waiting for data" in printed(slow)
    waits = [line["data_wait"] for line in events(outcome.folder, "train")]
    assert len(waits) == 8 and sum(waits) > 0.5
