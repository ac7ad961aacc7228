"""Runs of an experiment on this machine: order, failures, interruptions, with a stand-in for launch.sh; once the real thing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from megarewarm.config.arms import Arm
from megarewarm.config.experiment import Experiment, load_experiment
from megarewarm.errors import UserError
from megarewarm.lab import local
from megarewarm.lab import sweep as lab_sweep
from megarewarm.lab.experiment import check_folders, chosen_arms
from megarewarm.lab.local import run_locally
from megarewarm.lab.outlook import longest_chain, prospects
from megarewarm.lab.slurm import command_of, waves
from megarewarm.model.size import training_flops_per_token
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.tiny import events, mapping, printed, quiet

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """\
import os, signal, sys, time
name = sys.argv[sys.argv.index("--only") + 1]
where = open(os.path.join(os.environ["PLACE"], "calls"), "a", buffering=1)
where.write(f"begin {name} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
def stop(number, frame):
    where.write(f"saved {name}\\n")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
time.sleep(30 if name.startswith("long") else 0.6)
where.write(f"end {name}\\n")
print("the reason of", name)
sys.exit(2 if name.startswith("bad") else 0)
"""


def experiment(place: Path, runs: list[dict[str, Any]]) -> Experiment:
    base = mapping(place)
    del base["name"], base["folder"]
    whole = {"experiment": "e", "folder": str(place / "e"), "base": base, "runs": runs}
    (place / "e.yml").write_text(yaml.safe_dump(whole))
    return load_experiment(whole, {})


def runs(**starts: str | None) -> list[dict[str, Any]]:
    """Runs by what each starts from, told apart by their seeds."""
    return [
        {"name": name, "training": {"seed": i}, "start": {"from": None if start is None else f"${{runs}}/{start}"}}
        for i, (name, start) in enumerate(starts.items())
    ]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(local, "LAUNCHER", [str(tmp_path / "stand_in.py")])
    monkeypatch.setattr(local, "devices", lambda: [])
    monkeypatch.setenv("PLACE", str(tmp_path))
    return tmp_path / "calls"


def test_each_run_begins_when_its_start_is_done_and_the_machine_is_shared(tmp_path: Path, calls: Path, monkeypatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 8)
    arms = experiment(tmp_path, runs(a=None, b="a", c=None, d="b")).arms
    result = run_locally(arms, ["e.yml"], tmp_path / "e", jobs=2, every=0.02)
    assert sorted(result.done) == ["a", "b", "c", "d"] and not result.failed and not result.skipped
    lines = calls.read_text().split("\n")
    order = [" ".join(line.split()[:2]) for line in lines]
    for before, after in (("end a", "begin b"), ("end b", "begin d")):
        assert order.index(before) < order.index(after)
    assert {line.split()[2] for line in lines if line.startswith("begin")} == {"4"}
    most, now = 0, 0
    for line in order:
        now += line.startswith("begin") - line.startswith("end")
        most = max(most, now)
    assert most == 2


def test_a_run_that_fails_takes_its_followers_with_it_and_nothing_else(tmp_path: Path, calls: Path) -> None:
    arms = experiment(tmp_path, runs(bad=None, next="bad", last="next", other=None)).arms
    result = run_locally(arms, [], tmp_path / "e", jobs=1, every=0.02)
    assert result.done == ["other"] and sorted(result.skipped) == ["last", "next"]
    assert list(result.failed) == ["bad"] and "exit code 2: the reason of bad" in result.failed["bad"]
    assert "begin next" not in calls.read_text()


def test_a_signal_lets_every_run_save_and_begins_no_other(tmp_path: Path, calls: Path) -> None:
    arms = experiment(tmp_path, runs(long_1=None, long_2=None, more=None)).arms

    def interrupt() -> None:
        while not calls.exists() or calls.read_text().count("begin") < 2:
            time.sleep(0.02)
        time.sleep(0.3)  # until both can be signalled
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    result = run_locally(arms, [], tmp_path / "e", jobs=2, every=0.02)
    thread.join()
    assert result.stopped_by == signal.SIGINT and not result.failed and not result.done
    assert sorted(line for line in calls.read_text().splitlines() if "saved" in line) == ["saved long_1", "saved long_2"]
    assert signal.getsignal(signal.SIGINT) is before


def test_gpus_are_handed_out_one_group_a_run(tmp_path: Path, calls: Path, monkeypatch) -> None:
    monkeypatch.setattr(local, "devices", lambda: [0, 1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    arms = experiment(tmp_path, runs(a=None, b=None, c=None)).arms
    run_locally(arms, [], tmp_path / "e", jobs=2, every=0.02)
    used = [line.split()[3] for line in calls.read_text().splitlines() if line.startswith("begin")]
    assert sorted(used[:2]) == ["5", "7"] and set(used) == {"5", "7"} and len(used) == 3  # which speaks first is chance


def test_a_sweep_of_some_runs_shows_those_alone(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = experiment(tmp_path, runs(first=None, second="first", third=None))
    monkeypatch.setattr(lab_sweep, "_LOOK_EVERY", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    options: dict[str, Any] = {"launcher": "local", "jobs": 2, "ranks": 1, "options": [], "dry_run": False, "environment": {}}
    assert lab_sweep.sweep(whole, [], console, only=["second", "third"], **options) == 0
    screen = printed(console).partition("started")[2]
    assert "2 waiting" in screen and "first" not in screen and "3 waiting" not in screen


def test_waves_go_by_what_lies_before_a_run(tmp_path: Path) -> None:
    arms = experiment(tmp_path, runs(a=None, b="a", c=None, d="b")).arms
    found = waves(arms, tmp_path / "e")
    assert [[arm.name for arm in wave.arms] for wave in found] == [["a", "c"], ["b"], ["d"]]
    command = command_of(found[1], ["e.yml", "--quick"], 4, ["--gpus-per-node=1"], "17")
    assert command[:3] == ["sbatch", "--parsable", "--array=1-1%4"] and "--dependency=afterok:17" in command
    assert command[-4:] == [str(ROOT / "tools/slurm/experiment.sbatch"), str(found[1].list_file), "e.yml", "--quick"]
    only = [arm for arm in arms if arm.name == "d"]  # what is not to be run is taken to be there
    assert [[arm.name for arm in wave.arms] for wave in waves(only, tmp_path)] == [["d"]]


def test_what_cannot_start_is_told_before_anything_does(tmp_path: Path) -> None:
    lost = experiment(tmp_path, [{"name": "a", "start": {"from": str(tmp_path / "nowhere")}, "model": None}])
    with pytest.raises(UserError, match=r"a: .*nowhere"):
        prospects(lost, lost.arms)
    by_hand = [*runs(first=None), {"name": "a", "start": {"from": "${runs}/first/extended"}, "model": None}]
    made_later = experiment(tmp_path, by_hand)  # with --only first, whose result it is made of
    assert [each.arm.name for each in prospects(made_later, made_later.arms[:1])] == ["first"]
    missing = experiment(tmp_path, [{"name": "a", "data": {"train": [{"path": str(tmp_path / "none")}]}}])
    (prospect,) = prospects(missing, missing.arms)
    assert prospect.state == "waiting" and "none: no such token file" in prospect.missing[0]
    uneven = experiment(tmp_path, [{"name": "a", "training": {"global_batch": 3}, "parallel": {"data": 2}}])
    with pytest.raises(UserError, match=r"a: training.global_batch: 3 sequences can't be shared evenly by 2"):
        prospects(uneven, uneven.arms)
    unsaved = [{"name": "a", "checkpoint": {"every": None}}, *runs(b="a/checkpoints/step_7")]
    whole = experiment(tmp_path, unsaved)
    with pytest.raises(UserError, match="run 'a' saves no checkpoint of that name"):
        prospects(whole, whole.arms)
    other = experiment(tmp_path, runs(a=None))
    folder = Path(other.arms[0].config.run_folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(mapping(tmp_path, name="a", schedule={"max_lr": 0.5})))
    with pytest.raises(UserError, match=r"holds a run in which schedule\.max_lr was 0\.5, now it is 0\.01; ") as told:
        check_folders(other)
    _, _, remedy = str(told.value).partition("; ")
    assert (
        remedy == f"set the experiment's 'folder' (now {tmp_path / 'e'}) to another place, or remove {folder} to train it again"
    )
    (folder / "config.yaml").unlink()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"without config\.yaml; set the experiment's 'folder'"):
        check_folders(other)


def test_costs_follow_from_the_steps_left(tmp_path: Path) -> None:
    whole = experiment(tmp_path, runs(a=None, b="a", c=None))
    found = prospects(whole, whole.arms)
    assert [p.tokens for p in found] == [20 * 8 * 16] * 3 and len({p.flops for p in found}) == 1
    model = whole.arms[0].config.model
    assert model is not None
    per_token = training_flops_per_token(model, 16)
    evaluated = 5 * 2 * 256  # at the start and after every fifth step, both sets
    assert found[0].flops == pytest.approx((20 * 8 * 16 + evaluated / 3) * per_token)
    assert longest_chain(found, found[0].flops) == pytest.approx(2.0)  # a, then b; c at the same time
    assert chosen_arms(whole, ["b"]) == [whole.arms[1]]
    with pytest.raises(UserError, match="--only d: no run of experiment 'e'"):
        chosen_arms(whole, ["d"])


def test_a_run_that_lacks_its_export_is_not_done(tmp_path: Path) -> None:
    (arm,) = experiment(tmp_path, [{"name": "a", "training": {"budget": 1}}]).arms
    train(arm.config, Ranks(0, 1, torch.device("cpu")), quiet())
    for export, state in ((False, "done"), (True, "begun")):
        wanted = experiment(tmp_path, [{"name": "a", "training": {"budget": 1}, "export": {"huggingface": export}}])
        (prospect,) = prospects(wanted, wanted.arms)
        assert (prospect.state, prospect.tokens) == (state, 0)


def said(whole: Experiment, **options: Any) -> str:
    """What a sweep prints that has nothing to start."""
    console = Console(file=io.StringIO(), width=200)
    usual: dict[str, Any] = {"launcher": "local", "jobs": None, "ranks": 1, "options": [], "only": [], "environment": {}}
    assert lab_sweep.sweep(whole, [], console, **usual | options) == 0
    return printed(console)


def sweep(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/sweep.py", str(place / "e.yml"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.launch
def test_a_sweep_runs_reports_and_has_nothing_to_do_the_second_time(tmp_path: Path) -> None:
    chosen = [*runs(a=None, b="a@50%"), {"name": "bad", "schedule": {"max_lr": 1e30}, "reliability": {"non_finite": "stop"}}]
    whole = experiment(tmp_path, chosen)
    arms: list[Arm] = whole.arms
    assert "0 of 3 runs are done" in said(whole, dry_run=True) and not (tmp_path / "e").exists()
    first = sweep(tmp_path, "--jobs", "2")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "bad: exit code 3: " in first.stdout and "\n1 run failed, " in first.stdout
    assert (tmp_path / "e" / "report" / "report.html").is_file()
    record = json.loads((tmp_path / "e" / "experiment.json").read_text())
    assert [run["name"] for run in record["runs"]] == ["a", "b", "bad"]
    assert events(Path(arms[1].config.run_folder), "start")[0]["from"].endswith("/a/checkpoints/step_10")
    lines = (tmp_path / "e" / "a" / "metrics.jsonl").read_text()
    assert "2 of 2 runs are done" in said(whole, only=["a", "b"], dry_run=False)
    assert (tmp_path / "e" / "a" / "metrics.jsonl").read_text() == lines
    refused = sweep(tmp_path, "experiment=f")
    assert refused.returncode == 2 and "holds the experiment 'e', this one is 'f'" in refused.stderr


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rewarm_2308_04014_mini", "replay_2403_08763_mini"])
def test_the_mini_experiments_run_in_their_quick_form(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every arm, stage and figure, on the real text, in a folder of their own that both share, also from two test processes."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mini"
    place.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "launch.sh"), str(ROOT / "configs" / "experiments" / f"{name}.yml"), "--quick"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = place / "runs" / f"{name}_quick"
    record = json.loads((folder / "experiment.json").read_text())
    for run in record["runs"]:
        assert events(folder / run["folder"], "stop")[-1]["reason"] == "complete"
    assert (folder / "report" / "report.html").is_file()
