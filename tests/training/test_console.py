"""What a run says of itself while it lasts, what evaluation costs it, and how long it will take."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from megarewarm.config.load import merge
from megarewarm.main import main
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.after_step import progress
from megarewarm.training.after_step.progress import RunProgress, loss_line
from megarewarm.training.start import memory
from megarewarm.training.start.evaluation_cost import EvaluationCost, evaluation_cost, evaluation_note, tokens_asked
from megarewarm.training.start.memory import memory_note
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, mapping, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
NOWHERE = Launch(0, 1, 0, 1, "127.0.0.1", 0, "none")
GIB = 2**30


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    small = {"model": {"num_layers": 1}, "training": {"budget": 6}, "checkpoint": {"every": 4, "asynchronous": False}}
    return mapping(place, **merge(small, changes))


def only_at_the_end(place: Path) -> list[dict[str, Any]]:
    sets = mapping(place)["data"]["validation"]
    return [sets[0], {**sets[1], "when": "end", "tokens": 128}]


@pytest.mark.parametrize("case", ["fixed", "moving", "end"])
def test_the_cost_is_what_a_run_evaluates(tmp_path: Path, case: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "fixed": {
            "evaluation": {"every": 4, "every_in_warmup": 1},
            "schedule": {"warmup": 2},
            "checkpoint": {"keep_best": "old"},
        },
        "moving": {"evaluation": {"every": 3, "windows": "moving", "at_start": False}},
        "end": {"evaluation": {"every": 2}, "data": {"validation": only_at_the_end(tmp_path)}},
    }
    run = config(tmp_path, **settings(tmp_path, **changes[case]))
    plan = make_plan(run)
    cost = evaluation_cost(plan, tokens_asked(run))
    assert cost is not None
    console = quiet()
    train(run, ALONE, console)
    evaluated: dict[int, int] = {}
    for line in events(tmp_path / "tiny", "eval"):
        evaluated[line["step"]] = evaluated.get(line["step"], 0) + line["over"]
    assert dict(zip(cost.steps, cost.tokens, strict=True)) == evaluated
    assert [cost.after(step) for step in range(7)] == [sum(n for at, n in evaluated.items() if at > step) for step in range(7)]
    forward, step = sum(evaluated.values()), run.tokens_per_step
    assert cost.share == pytest.approx(forward / (forward + 3 * 6 * step))
    said = printed(console)
    assert f"evaluation: {cost}" in said and "% of the compute" in str(cost)


def test_what_is_evaluated_and_saved_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY", -1.0)  # as if each portion took a minute
    console = Console(file=io.StringIO(), width=80)
    train(config(tmp_path, **settings(tmp_path, evaluation={"every": 3})), ALONE, console)
    said = printed(console)
    losses = {(line["step"], line["name"]): line["loss"] for line in events(tmp_path / "tiny", "eval")}
    for step in (3, 6):
        shown = ", ".join(f"{n} {losses[step, n]:.4f} ({losses[step, n] - losses[0, n]:+.4f})" for n in ("old", "new"))
        assert (
            f"tiny: step {step}: {shown}\n" in said
            and f"tiny: step {step}: {shown}\n" in (tmp_path / "tiny/log.txt").read_text()
        )
    assert "tiny: saved step 4 (" in said and "tiny: saved step 6 (" in said
    assert "tiny: evaluates old 75 %" in said


def _run(name: str, steps: int) -> Any:
    """What the progress needs to know of a run."""
    return SimpleNamespace(name=name, total_steps=steps, tokens_per_step=100, logging=SimpleNamespace(every=100))


def test_a_long_evaluation_is_heard_of_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 short sets of 12 s each: a line a minute, however short the sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = quiet()
    shown = RunProgress(console, _run("run", 10), 0, None)
    for name in range(20):
        for done in range(3):
            shown.evaluating(f"set_{name}", done, 3)
            now[0] += 4.0
    said = printed(console).splitlines()
    assert said[0] == "run: evaluates set_5 33 %" and len(said) == 3


def test_losses_fit_the_line() -> None:
    losses, start = {"english": 4.0312, "german": 3.2210}, {"english": 4.1234}
    assert loss_line("step 20", losses, start, 60) == "step 20: english 4.0312 (-0.0922), german 3.2210"
    assert loss_line("step 20", losses, start, 40) == "step 20: english 4.0312, german 3.2210"


def test_the_time_left_counts_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 steps of 100 tokens, 1 s each; evaluations of 300 tokens after 4 and 10, of which one takes 9 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    cost = EvaluationCost((4, 10), (300, 300), 0, 0.0)
    shown = RunProgress(quiet(), _run("run", 10), 0, cost)
    now[0] = 2.0
    assert shown._left(2) == pytest.approx(8 + 2)  # not measured yet: a third of training on 300 tokens, each
    now[0] = 4.0
    assert shown._left(4) == pytest.approx(6 + 2)
    now[0] += 9.0
    shown.evaluated(300, 9.0)
    now[0] += 1.0
    assert shown._left(5) == pytest.approx(5 + 9)
    assert RunProgress(quiet(), _run("run", 10), 0, None)._left(0) == 0


@pytest.mark.parametrize("name", ["de", "rewarm_2308_04014_mini_seed3_lr3e-4"])
def test_no_number_of_the_bar_is_cut_off(name: str) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with RunProgress(console, _run(name, 131296), 0, None) as shown:
        shown.step(123456, 4.12345, 2.285e-7, 1756e3)
        shown.evaluating("german_validation", 55, 100)
    said = printed(console)
    shown.step(123457, 4.12345, 2.285e-7, 1756e3)
    assert shown._bar is not None
    with console.capture() as frame:
        console.print(shown._bar.get_renderable())
    assert "123457/131296 loss 4.1235 lr 2.28e-07 1756.0k tok/s left 0s" in frame.get()
    assert "123456/131296 evaluates german_validation 55 %" in said


def test_the_note_on_costly_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(config(tmp_path, **settings(tmp_path)))
    for share, noted in ((0.19, False), (0.21, True)):
        note = evaluation_note(plan, EvaluationCost((1,), (1,), 0, share))
        assert bool(note) == noted and all("a longer evaluation.every (now 5 steps)" in line for line in note)
    (tmp_path / "run.yml").write_text(
        yaml.safe_dump(settings(tmp_path, evaluation={"every": 3}, training={"recompute": "full"}))
    )
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    share = 3 * 512 / (3 * 512 + 4 * 6 * 8 * 16)  # recomputing is a forward pass more
    assert f"3 x 512 tokens, {100 * share:.0f} % of the compute" in said and "note: evaluation takes" in said
    long = ["training.budget=10000", "data.train.0.max_epochs=null"]
    assert main([str(tmp_path / "run.yml"), *long, "evaluation.every=null", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 x 512 tokens, below 1 %" in said and "evaluation takes" not in said


def test_memory_is_compared_with_the_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, **settings(tmp_path))
    monkeypatch.setattr(memory, "machine_memory", lambda: 10 * GIB)
    assert memory_note(run, [9 * GIB], NOWHERE, on_gpu=False) == []
    (note,) = memory_note(run, [6 * GIB, 4 * GIB], NOWHERE, on_gpu=False)
    assert "2 ranks would need 10.0 GiB, this machine has 10.0 GiB; lower training.micro_batch (now 4), or set" in note
    second_host = Launch(2, 4, 0, 2, "127.0.0.1", 0, "torchrun")
    assert memory_note(run, [9 * GIB, 9 * GIB, 4 * GIB, 5 * GIB], second_host, on_gpu=False) == []
    assert memory_note(run, [1 * GIB, 1 * GIB, 5 * GIB, 5 * GIB], second_host, on_gpu=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert memory_note(run, [99 * GIB], NOWHERE, on_gpu=True) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("P", (), {"total_memory": (8 + i) * GIB}))
    assert memory_note(run, [7 * GIB, 7 * GIB], NOWHERE, on_gpu=True) == []
    assert "a rank would need 8.0 GiB, a GPU of this machine has 8.0" in memory_note(run, [8 * GIB], NOWHERE, on_gpu=True)[0]
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings(tmp_path)))
    words = [str(tmp_path / "run.yml"), "--dry-run", "training.device=cpu"]
    assert main(words) == 0 and "note: memory: " not in capsys.readouterr().out
    assert main([*words, "training.global_batch=4194304", "training.micro_batch=4194304", "data.train.0.max_epochs=null"]) == 0
    assert "note: memory: the run would need" in capsys.readouterr().out


def test_an_unusual_peak_is_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings(tmp_path)))
    for peak, noted in (("0.01", False), ("10", True)):
        assert main([str(tmp_path / "run.yml"), f"schedule.max_lr={peak}", "--dry-run"]) == 0
        assert ("note: schedule.max_lr 10 is above 0.01" in capsys.readouterr().out) == noted
