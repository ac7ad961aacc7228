"""The live view: what it makes of files that grow, what it says of runs, and how its frames fit a terminal."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.errors import UserError
from megarewarm.record.follow import Follower
from megarewarm.record.lines import Lines
from megarewarm.record.run import read_run
from megarewarm.report.live.frame import frame, sparkline
from megarewarm.report.live.watch import Losses, RunView, Watch
from megarewarm.spelling import duration_text
from tests.support.report_runs import TOKENS_PER_STEP, eval_line, lines, task_line, train_line, write

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
STEP_SECONDS = 4.0


def start_line(total: int = 400, origin: str | None = "runs/base/checkpoints/step_9") -> dict[str, Any]:
    return {
        "event": "start",
        "name": "arm",
        "from": origin,
        "step": 0,
        "total_steps": total,
        "tokens_per_step": TOKENS_PER_STEP,
    }


def timed(events: list[dict[str, Any]], newest: float = NOW) -> list[dict[str, Any]]:
    """The events with times, ``STEP_SECONDS`` a step, of which the last is ``newest``."""
    last = events[-1].get("step", 0)
    return [event | {"time": newest - (last - event.get("step", 0)) * STEP_SECONDS} for event in events]


def simulated(steps: int, total: int = 400, name: str = "rewarm") -> list[dict[str, Any]]:
    """A made-up run up to ``steps`` of ``total``; it has stopped only where it is complete."""
    events = [event for event in lines(name, total) if event["event"] != "stop" and event.get("step", 0) <= steps]
    events[0] |= {"step": 0, "tokens_per_step": TOKENS_PER_STEP}
    return [*events, {"event": "stop", "step": total, "reason": "complete"}] if steps == total else events


def arm(root: Path, events: list[dict[str, Any]], newest: float = NOW) -> Path:
    folder = write(root, timed(events, newest))
    os.utime(folder / "metrics.jsonl", (newest, newest))
    return folder


def look(folder: Path, now: float = NOW + 1.0, rise: float = 0.5) -> RunView:
    (view,) = Watch(folder, rise=rise, clock=lambda: now).look().runs
    return view


def experiment(root: Path, runs: dict[str, tuple[list[dict[str, Any]] | None, list[str]]], steps: int = 400) -> Path:
    """An experiment's folder: for each run its events, ``None`` for one that waits, and the runs that it comes after."""
    told = []
    for name, (events, after) in runs.items():
        told.append({"name": name, "folder": name, "after": after, "steps": steps, "tokens_per_step": TOKENS_PER_STEP})
        if events is not None:
            arm(root / name, events)
    root.mkdir(exist_ok=True)
    (root / "experiment.json").write_text(json.dumps({"format": 1, "experiment": "trial", "title": None, "runs": told}))
    return root


# Following files


def same(follower: Follower, folder: Path) -> None:
    """What the follower holds is what ``read_run`` reads from the same bytes."""
    run = read_run(folder)
    steps = [int(step) for step in run.train["step"]]
    assert list(follower.evaluations.values()) == run.evaluations
    assert follower.alarms == [event for event in run.events if event["event"] == "alarm"]
    assert follower.start == run.start
    assert follower.step == (steps[-1] if steps else None)
    assert follower.first_step == (steps[0] - 1 if steps else None)
    told = [(line.step, line.loss) for line in follower.recent]
    assert told == list(zip(steps, run.train["loss"], strict=True))[len(steps) - len(told) :]


attempts = st.lists(
    st.tuples(
        st.integers(1, 30),  # steps
        st.floats(0, 1),  # how far the next attempt goes back
        st.sampled_from(["", "\n", '{"event": "train", "step": 3, "lo', '{"event": "eval", "st\n']),  # what a kill tore
        st.sampled_from(["resume", "anew"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(attempts, st.lists(st.integers(1, 400), max_size=25), st.sampled_from([4, 1024]), st.sampled_from([3, 11]))
def test_a_file_followed_in_any_pieces_is_the_file_read_whole(
    tmp_path_factory: pytest.TempPathFactory,
    history: list[tuple[int, float, str, str]],
    pieces: list[int],
    window: int,
    every: int,
) -> None:
    text, last = "", 0
    for attempt, (count, share, torn, restart) in enumerate(history):
        if attempt:
            last = int(share * last) if restart == "resume" else 0
            text += json.dumps({"event": "resume", "step": last if restart == "resume" else -1}) + "\n"
        if not attempt or restart == "anew":
            text += json.dumps(start_line() | {"parameters": attempt}) + "\n"
            text += json.dumps(eval_line(0, "a", "upstream", float(attempt))) + "\n"
        for step in range(last + 1, last + 1 + count):
            text += json.dumps(train_line(step, 1e-3, float(attempt))) + "\n"
            if step % every == 0:
                text += json.dumps(eval_line(step, "a", "upstream", float(attempt))) + "\n"
            if step % (every + 1) == 0:
                text += json.dumps({"event": "alarm", "step": step, "message": str(attempt)}) + "\n"
        last += count
        text += torn if attempt + 1 < len(history) else ""
    folder = tmp_path_factory.mktemp("run")
    path, data, written = folder / "metrics.jsonl", text.encode(), 0
    follower = Follower(path, window=window)
    assert not follower.poll()
    for piece in [*pieces, len(data)]:
        with open(path, "ab") as file:
            file.write(data[written : written + piece])
        written += piece
        follower.poll()
    assert not follower.poll()
    assert follower.damage is None
    if window < 10:  # a resume farther back than the window leaves only the steps
        run = read_run(folder)
        assert follower.step == run.first_step + run.steps and list(follower.evaluations.values()) == run.evaluations
    else:
        same(follower, folder)


def test_only_new_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "run", simulated(300))
    follower = Follower(folder / "metrics.jsonl")
    follower.poll()
    taken: list[bytes] = []
    take = Lines.take
    monkeypatch.setattr(Lines, "take", lambda lines, line, record: (taken.append(line), take(lines, line, record)))
    with open(follower.path, "a") as file:
        file.write(json.dumps(train_line(301, 1e-3, 2.5)) + "\n" + '{"event": "train", "step": 302')
    assert follower.poll() and len(taken) == 1 and follower.step == 301
    assert not follower.poll() and len(taken) == 1
    with open(follower.path, "a") as file:
        file.write(', "loss": 2.25, "tokens": 5}\n')
    assert follower.poll() and len(taken) == 2
    assert follower.step == 302 and follower.recent[-1].loss == 2.25 and math.isnan(follower.recent[-1].lr)


@pytest.mark.parametrize("twice", [None, 31])
def test_a_long_row_of_train_lines(tmp_path: Path, twice: int | None) -> None:
    """Most of its lines needn't be parsed; one that begins anew in the middle is found all the same."""
    steps = [*range(1, 51)] if twice is None else [*range(1, 41), *range(twice, 41)]
    events = [start_line(), *(train_line(step, 1e-3, float(place)) for place, step in enumerate(steps))]
    folder = write(tmp_path / "run", [*events, eval_line(steps[-1], "a", "upstream", 2.0)])
    follower = Follower(folder / "metrics.jsonl", window=4)
    follower.poll()
    same(follower, folder)
    assert follower.lines.number == len(events) + 1 and len(follower.recent) == 4


@pytest.mark.parametrize("how", ["shorter", "longer", "replaced", "gone"])
def test_a_file_that_is_not_what_was_read_is_read_anew(tmp_path: Path, how: str) -> None:
    folder = write(tmp_path / "run", simulated(60))
    follower = Follower(folder / "metrics.jsonl")
    follower.poll()
    if how == "gone":
        follower.path.unlink()
        assert follower.poll() and follower.lines.number == 0 and follower.step is None
        write(folder, simulated(90, name="no_warmup"))
    elif how == "replaced":
        text = follower.path.read_text()
        follower.path.unlink()
        follower.path.write_text(text.replace('"loss": ', '"loss": 1'))
    else:
        write(folder, simulated(20 if how == "shorter" else 90, name="no_warmup"))
    assert follower.poll()
    same(follower, folder)


def test_damage_is_told_and_passed_over(tmp_path: Path) -> None:
    tail = "rubbish\n" + json.dumps(train_line(2, 1e-3, 3.0)) + '\n{"event": "eval", "step": 2}\n'
    follower = Follower(write(tmp_path / "run", [train_line(1, 1e-3, 3.0)], tail=tail) / "metrics.jsonl")
    follower.poll()
    assert follower.step == 2
    assert follower.damage == "line 2 of metrics.jsonl is not a JSON object: the file was damaged or edited"


# States and alarms


def test_states(tmp_path: Path) -> None:
    assert look(arm(tmp_path / "a", simulated(100))).state == "running"
    assert look(arm(tmp_path / "b", simulated(400))).state == "done"
    stopped = [*simulated(100), {"event": "stop", "step": 100, "reason": "signal 15"}]
    assert look(arm(tmp_path / "c", stopped)).state == "stopped"
    assert look(arm(tmp_path / "d", [*stopped, {"event": "resume", "step": 100}])).state == "running"
    broken = [*simulated(100), train_line(101, 1e-3, 3.0) | {"loss": None}]
    view = look(arm(tmp_path / "e", broken))
    assert view.state == "diverged" and view.alarms == ("the training loss is not finite at step 101",)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.yaml").write_text("name: f\n")
    assert look(tmp_path / "f").state == "waiting"


def test_stalled_is_measured_by_the_run_s_own_pace(tmp_path: Path) -> None:
    folder = arm(tmp_path / "a", simulated(100))
    assert look(folder, NOW + 19 * STEP_SECONDS).state == "running"
    view = look(folder, NOW + 100 * STEP_SECONDS)
    assert view.state == "stalled"
    assert view.alarms == ("no new line for 6m40s, 100 step times: killed or hanging",)
    # a run whose evaluations take five minutes is not called stalled during the next one
    slow = timed(simulated(99), NOW - 300)
    slow = [event | {"time": event["time"] - 300} if event.get("step", 0) < 50 else event for event in slow]
    write(tmp_path / "b", [*slow, eval_line(99, "prose", "upstream", 2.0) | {"time": NOW}])
    os.utime(tmp_path / "b" / "metrics.jsonl", (NOW, NOW))
    assert look(tmp_path / "b", NOW + 400).state == "running"
    # before its first step a run loads, compiles and evaluates
    assert look(arm(tmp_path / "c", [start_line()]), NOW + 600).state == "running"
    assert look(arm(tmp_path / "c", [start_line()]), NOW + 1000).state == "stalled"


def test_a_clock_that_differs_from_the_writer_s_makes_nothing_stalled(tmp_path: Path) -> None:
    folder = arm(tmp_path / "a", simulated(100), newest=NOW - 5000)
    os.utime(folder / "metrics.jsonl", (NOW, NOW))
    now = [NOW]
    watch = Watch(folder, clock=lambda: now[0])
    assert watch.look().runs[0].state == "running"
    now[0] += 70
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(train_line(101, 1e-3, 2.0) | {"time": NOW - 4996}) + "\n")
    assert watch.look().runs[0].state == "running"
    now[0] += 100
    assert watch.look().runs[0].state == "stalled"


def test_alarms_in_words(tmp_path: Path) -> None:
    def alarms(extra: list[dict[str, Any]], **keys: Any) -> tuple[str, ...]:
        return look(arm(tmp_path / "run", [*simulated(100), *extra]), **keys).alarms

    assert alarms([]) == ()
    (rise,) = alarms([eval_line(100, "prose", "upstream", 2.99)])
    assert rise == "upstream loss rose by more than 0.5: 2.440 to 2.990"
    assert alarms([eval_line(100, "prose", "upstream", 2.99)], rise=0.7) == ()
    assert alarms([train_line(101, 1e-3, 3.0) | {"grad_norm": 4.9}]) == ()
    assert alarms([train_line(101, 1e-3, 3.0) | {"grad_norm": 6.0}]) == ("gradient norm 6e0 at step 101, 12 times its median",)
    assert alarms([{"event": "alarm", "step": 90, "message": "loss spike."}]) == ("step 90: loss spike",)
    per_step = TOKENS_PER_STEP / 1.2e5
    waiting = [train_line(step, 1e-3, 3.0) | {"data_wait": 0.2 * per_step} for step in range(101, 131)]
    assert alarms(waiting) == ("20% of the time is spent waiting for data",)
    assert alarms([line | {"data_wait": 0.04 * per_step} for line in waiting]) == ()


def test_the_norms_of_a_young_run_fall_and_are_no_spike(tmp_path: Path) -> None:
    events = [start_line(origin=None)]
    events += [train_line(step, 1e-3, 3.0) | {"grad_norm": 0.5 + 40 * math.exp(-step / 10)} for step in range(1, 300)]
    assert look(arm(tmp_path / "run", events)).alarms == ()


def test_time_left(tmp_path: Path) -> None:
    folder = experiment(
        tmp_path / "trial",
        {
            "up": (simulated(400), []), "a": (simulated(100), ["up"]), "b": (simulated(300), ["up"]), "c": (None, ["up"]),
            "d": (None, ["b"]),
        },
    )  # fmt: skip
    overview = Watch(folder, clock=lambda: NOW + 1).look()
    left = {run.name: run.left for run in overview.runs}
    assert left["a"] == pytest.approx(300 * STEP_SECONDS) and left["b"] == pytest.approx(100 * STEP_SECONDS)
    assert left["c"] == left["d"] == pytest.approx(400 * STEP_SECONDS) and left["up"] is None
    assert overview.left == pytest.approx((300 + 100 + 400 + 400) / 2 * STEP_SECONDS)  # two at once
    assert overview.share == pytest.approx((400 + 100 + 300) / 2000)
    chained = experiment(tmp_path / "chain", {"a": (simulated(100), []), "b": (simulated(390), []), "c": (None, ["a"])})
    assert Watch(chained, clock=lambda: NOW + 1).look().left == pytest.approx((300 + 400) * STEP_SECONDS)


def test_runs_that_are_not_meant_are_left_out(tmp_path: Path) -> None:
    chosen = ["a", "c"]
    folder = experiment(
        tmp_path / "trial", {"up": (None, []), "a": (simulated(400), []), "b": (None, []), "c": (None, ["up", "a"])}
    )
    overview = Watch(folder, clock=lambda: NOW + 1, only=chosen).look()
    assert [(run.name, run.state, run.after) for run in overview.runs] == [("a", "done", ()), ("c", "waiting", ("a",))]
    assert overview.share == pytest.approx(0.5)


def test_runs_of_no_experiment(tmp_path: Path) -> None:
    arm(tmp_path / "x" / "late", simulated(10), NOW)
    arm(tmp_path / "x" / "early", simulated(10), NOW - 500)
    overview = Watch(tmp_path / "x", clock=lambda: NOW).look()
    assert [run.name for run in overview.runs] == ["early", "late"]
    with pytest.raises(UserError, match="no such folder: give"):
        Watch(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither experiment\.json nor metrics\.jsonl"):
        Watch(tmp_path / "empty")
    (tmp_path / "empty" / "experiment.json").write_text('{"experiment": "e", "runs": [{"name": "a"}]}')
    with pytest.raises(UserError, match=r"experiment\.json: damaged \(KeyError: 'folder'\)"):
        Watch(tmp_path / "empty")


# Frames


def mixed(root: Path, waiting: int = 3, done: int = 2) -> Path:
    runs: dict[str, tuple[list[dict[str, Any]] | None, list[str]]] = {"upstream": (simulated(400, name="prose_pretrain"), [])}
    runs |= {f"done_{i}": (simulated(400), []) for i in range(done)}
    runs |= {"max_lr_2e-3.s2": (simulated(130, name="rewarm_double"), []), "scratch": (simulated(57, name="scratch"), [])}
    runs["spiky"] = ([*simulated(100), {"event": "alarm", "step": 100, "message": "loss spike: 3.2 to 7.9"}], [])
    runs |= {f"waiting_{i}": (None, ["upstream"]) for i in range(waiting)}
    return experiment(root, runs)


def text(folder: Path, width: int, height: int | None = None, unicode: bool = True) -> list[str]:
    return [line.plain for line in frame(Watch(folder, clock=lambda: NOW + 1).look(), width, height, unicode=unicode)]


def test_frame_at_80_columns(tmp_path: Path) -> None:
    shown = text(mixed(tmp_path / "trial"), 80)
    assert all(len(line) <= 80 for line in shown)
    assert shown[0].startswith("trial  3 running  3 waiting  3 done  ") and shown[0].endswith("left")
    (row,) = [line for line in shown if line.startswith("max_lr_2e-3.s2")]
    numbers = shown[shown.index(row) + 1]
    assert row.split()[1:3] == ["running", "32%"] and row.split()[-1] == duration_text(270 * STEP_SECONDS)
    view = Watch(tmp_path / "trial", clock=lambda: NOW + 1).look().runs[3]
    assert f"+{view.upstream.difference:.3f}" in row
    assert f"−{-(view.downstream.difference or 0):.3f}" in row
    assert f"step 130/400 · loss {view.loss:.3f} · lr " in numbers and f"up {view.upstream.newest:.3f}" in numbers
    assert "! spiky: step 100: loss spike: 3.2 to 7.9" in shown
    order = [line.split()[0] for line in shown[2:] if line[0] not in " !"]
    assert order == ["max_lr_2e-3.s2", "scratch", "spiky", *(f"waiting_{i}" for i in range(3)), "upstream", "done_0", "done_1"]


@pytest.mark.parametrize("width", [80, 140])
def test_a_row_with_a_short_name_is_whole(tmp_path: Path, width: int) -> None:
    header, row = text(arm(tmp_path / "b", simulated(130)), width)[1:3]
    assert header.endswith("left") and row.endswith(duration_text(270 * STEP_SECONDS)) and len(header) == len(row) <= width


def test_all_tasks_are_shown_at_80_columns(tmp_path: Path) -> None:
    names = ["piqa_rc_0shot", "hellaswag_rc_5shot", "arc_easy_test_rc_5shot", "words"]
    shown = text(arm(tmp_path / "run", [*simulated(130), *(task_line(130, name, "10") for name in names)]), 80)
    told = [line for line in shown if "lost 0, won 0" in line]
    assert len(told) < len(names)
    assert all(any(f"{name} 50.0 %, lost 0, won 0" in line for line in told) for name in names)
    assert all(len(line) <= 80 for line in shown)


def test_wide_frame_has_all_numbers_in_a_row(tmp_path: Path) -> None:
    shown = text(mixed(tmp_path / "trial"), 140)
    assert all(len(line) <= 140 for line in shown)
    view = Watch(tmp_path / "trial", clock=lambda: NOW + 1).look().runs[3]
    (row,) = [line for line in shown if line.startswith("max_lr_2e-3.s2")]
    for number in (
        "130/400",
        f"{view.upstream.newest:.3f}",
        f"{view.downstream.newest:.3f}",
        f"{view.loss:.3f}",
        "120k",
        "18m00s",
    ):
        assert number in row.split()
    header = shown[1]
    assert row.index("running") == header.index("state") and len(row) == len(header)


def test_what_is_said_of_runs_at_rest_fits_80_columns(tmp_path: Path) -> None:
    runs: dict[str, tuple[list[dict[str, Any]] | None, list[str]]] = {
        f"rewarmed_replay-third_{i}.s3": (simulated(130), []) for i in range(3)
    }
    folder = experiment(tmp_path / "trial", runs | {f"waiting_{i}": (None, []) for i in range(12)})
    record = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps(record | {"title": "How much replay, and which schedules?"}))
    arm(folder / "rewarmed_replay-third_0.s3", simulated(130), NOW - 4000 * STEP_SECONDS)
    headline, *rest = text(folder, 80)
    assert headline.startswith("How much") and headline.endswith(" left") and "1 stalled  2 running  12 waiting" in headline
    (alarm,) = [line for line in rest if line.startswith("!")]
    assert alarm == "! rewarmed_replay-third_0.s3: no new line for 4h26m: killed or hanging"


def test_many_runs_fold(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "trial", waiting=40, done=17)
    for height in (12, 24):
        shown = text(folder, 80, height)
        assert len(shown) <= height
        (waiting,) = [line for line in shown if line.startswith("40 waiting")]
        assert "waiting_0, waiting_1" in waiting and waiting.endswith(" more")
        assert any(line.startswith("18 done · lowest up") for line in shown)
        assert any(line.startswith("max_lr_2e-3.s2 ") for line in shown)
        assert any(line.startswith("! spiky") for line in shown)
    assert len(text(folder, 80)) < 20


@settings(max_examples=40, deadline=None)
@given(st.integers(40, 200), st.integers(6, 60), st.booleans())
def test_frames_fit(tmp_path_factory: pytest.TempPathFactory, width: int, height: int, unicode: bool) -> None:
    folder = tmp_path_factory.getbasetemp() / "fits"
    if not folder.exists():
        mixed(folder, waiting=8, done=6)
    shown = text(folder, width, height, unicode)
    assert len(shown) <= height and max(map(len, shown)) <= width
    assert unicode or all(line.isascii() for line in shown)


def test_sparkline_against_the_start() -> None:
    up_and_down = Losses([(0, 2.0), (1, 2.1), (2, 2.7), (3, 2.1), (4, 1.9), (100, 1.3)], start=2.0)
    line = sparkline(up_and_down, 10)
    assert line.plain[0] == "█" and line.plain[-1] == "▁"  # the short rise is not lost
    colours = {line.plain[span.start : span.end]: span.style for span in line.spans}
    assert colours["█"] == "red" and colours["▁"] == "green"
    flat = sparkline(Losses([(0, 2.0), (9, 2.0)], start=2.0), 8)
    assert flat.plain == "▁" * 8 and not any(span.style for span in flat.spans)
    assert sparkline(Losses([], None), 5).plain == " " * 5
    assert sparkline(up_and_down, 10, unicode=False).plain.isascii()


def test_the_command(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "trial")
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "tools" / "watch.py"), str(folder)]
    environment = os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.isascii() and "max_lr_2e-3.s2" in done.stdout, done.stderr
    assert time.perf_counter() - began < 20
    missing = subprocess.run([*command[:2], str(tmp_path / "nothing")], capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "give a run's folder" in missing.stderr
    code = f"import sys; from megarewarm.cli import watch; watch.main([{str(folder)!r}]); "
    code += "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0
