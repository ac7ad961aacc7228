"""Reading run folders: what a resume supersedes, torn lines, missing files."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarewarm.errors import UserError
from megarewarm.record import run as reading
from megarewarm.record.lines import parse
from megarewarm.record.run import RecordedRun, read_run, read_runs
from tests.support.report_runs import TOKENS_PER_STEP, config, eval_line, lines, train_line, write

START = {
    "event": "start",
    "name": "arm",
    "folder": "runs/arm",
    "from": "runs/base",
    "reset": ["moments"],
    "parameters": 7,
}


def read(folder: Path, events: list[dict[str, Any]], **keys: Any) -> RecordedRun:
    return read_run(write(folder, events, **keys))


def steps_of(run: RecordedRun) -> list[int]:
    return [int(step) for step in run.train["step"]]


def test_lines_past_the_checkpoint_are_superseded(tmp_path: Path) -> None:
    first = [train_line(step, 1e-3, 9.0) for step in range(1, 8)]
    again = [train_line(step, 1e-3, 2.0) for step in range(5, 11)]
    evaluations = [
        eval_line(0, "a", "upstream", 1.0),
        eval_line(4, "a", "upstream", 1.1),
        eval_line(6, "a", "upstream", 9.9),
    ]
    events = [
        START, evaluations[0], *first[:4], evaluations[1], {"event": "save", "step": 4}, *first[4:6], evaluations[2],
        {"event": "save", "step": 6}, {"event": "alarm", "step": 7, "message": "spike"}, first[6],
        {"event": "resume", "step": 4}, *again, eval_line(8, "a", "upstream", 1.2),
    ]  # fmt: skip
    run = read(tmp_path / "run", events)
    assert steps_of(run) == list(range(1, 11))
    assert run.train["loss"].tolist() == [9.0] * 4 + [2.0] * 6
    assert [(e.step, e.loss) for e in run.evaluations] == [(0, 1.0), (4, 1.1), (8, 1.2)]
    assert [(e["event"], e["step"]) for e in run.events] == [("save", 4), ("resume", 4)]
    assert run.steps == 10 and run.tokens == 10 * TOKENS_PER_STEP


def test_evaluation_of_the_checkpoint_is_replaced_not_added(tmp_path: Path) -> None:
    events = [
        train_line(1, 1e-3, 3.0), eval_line(1, "a", "upstream", 5.0), {"event": "resume", "step": 1},
        eval_line(1, "a", "upstream", 6.0), train_line(2, 1e-3, 3.0),
    ]  # fmt: skip
    assert [e.loss for e in read(tmp_path / "run", events).evaluations] == [6.0]


def test_beginning_anew_without_a_checkpoint(tmp_path: Path) -> None:
    """A crash before the first checkpoint: the same command starts again at step 1, with no resume event."""
    lost = [START, eval_line(0, "a", "upstream", 1.0), *(train_line(step, 1e-3, 9.0) for step in range(1, 6))]
    lost += [eval_line(5, "a", "upstream", 9.0)]
    kept = [START, eval_line(0, "a", "upstream", 1.5), *(train_line(step, 1e-3, 2.0) for step in range(1, 4))]
    run = read(tmp_path / "run", lost + kept)
    assert steps_of(run) == [1, 2, 3] and set(run.train["loss"]) == {2.0}
    assert [(e.step, e.loss) for e in run.evaluations] == [(0, 1.5)]


def test_beginning_anew_as_the_trainer_tells_it(tmp_path: Path) -> None:
    """A resume at step -1 supersedes the evaluation of the start and the start event as well."""
    lost = [START, eval_line(0, "a", "upstream", 1.0), train_line(1, 1e-3, 9.0)]
    kept = [{"event": "resume", "step": -1}, START | {"parameters": 8}, train_line(1, 1e-3, 2.0)]
    run = read(tmp_path / "run", lost + kept)
    assert run.evaluations == [] and run.events == [] and run.train["loss"].tolist() == [2.0]
    assert run.start["parameters"] == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=6))
def test_any_history_of_resumes(tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, float]]) -> None:
    """Against a plain replay: keep a list of (step, attempt), cut it at each resume."""
    events: list[dict[str, Any]] = []
    expected: list[tuple[int, float]] = []
    for attempt, (count, share) in enumerate(history):
        if attempt:
            checkpoint = round(share * expected[-1][0])
            events.append({"event": "resume", "step": checkpoint})
            expected = [(step, loss) for step, loss in expected if step <= checkpoint]
        last = expected[-1][0] if expected else 0
        for step in range(last + 1, last + 1 + count):
            events.append(train_line(step, 1e-3, float(attempt)))
            expected.append((step, float(attempt)))
    run = read(tmp_path_factory.mktemp("run"), events)
    assert list(zip(steps_of(run), run.train["loss"].tolist(), strict=True)) == expected


@pytest.mark.parametrize("cut", [1, 12, 40])
def test_torn_last_line(tmp_path: Path, cut: int) -> None:
    torn = json.dumps(train_line(3, 1e-3, 3.0))[:cut]
    run = read(tmp_path / "run", [train_line(1, 1e-3, 3.0), train_line(2, 1e-3, 3.0)], tail=torn)
    assert steps_of(run) == [1, 2]


@pytest.mark.parametrize("between", ["", "\n"])
@pytest.mark.parametrize("restart", [{"event": "resume", "step": 1}, START])
def test_line_torn_by_a_crash_in_front_of_the_next_process(tmp_path: Path, between: str, restart: dict[str, Any]) -> None:
    tail = '{"event": "train", "step": 3, "los' + between + json.dumps(restart) + "\n"
    tail += json.dumps(train_line(2, 1e-3, 5.0)) + "\n"
    run = read(tmp_path / "run", [train_line(1, 1e-3, 3.0), train_line(2, 1e-3, 3.0)], tail=tail)
    assert steps_of(run) == [1, 2] and run.train["loss"][1] == 5.0


def test_damage_anywhere_else_is_an_error(tmp_path: Path) -> None:
    tail = "rubbish\n" + json.dumps(train_line(2, 1e-3, 3.0)) + "\n"
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read(tmp_path / "run", [train_line(1, 1e-3, 3.0)], tail=tail)


def test_line_without_its_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: a 'eval' line with a missing or wrong 'tokens'"):
        read(tmp_path / "run", [{"event": "eval", "step": 0, "name": "a", "loss": 1.0}])


def test_folder_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl: give the folder"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="ended before its first step"):
        read(tmp_path / "run", [START])
    with pytest.raises(UserError, match="at least one"):
        read_runs([])
    folder = write(tmp_path / "run", [train_line(1, 1e-3, 3.0)])
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, tmp_path / "." / "run"])


def test_config_and_start(tmp_path: Path) -> None:
    run = read(tmp_path / "run", lines("rewarm", 40), settings=config("rewarm", 40))
    assert run.name == "rewarm" and run.origin == "runs/prose_pretrain/checkpoints/step_2000"
    assert run.config["schedule"]["max_lr"] == 1e-3 and run.start["parameters"] == 30_000_000
    assert read(tmp_path / "bare", [train_line(1, 1e-3, 3.0)]).name == "bare"
    (tmp_path / "run" / "config.yaml").write_text("a: [1,")
    with pytest.raises(UserError, match=r"config\.yaml: not YAML"):
        read_run(tmp_path / "run")


def test_losses_that_are_no_numbers(tmp_path: Path) -> None:
    events = [eval_line(0, "a", "upstream", 1.0), train_line(1, 1e-3, 3.0), eval_line(1, "a", "upstream", math.nan)]
    events += [train_line(2, 1e-3, 3.0) | {"loss": None}, eval_line(2, "a", "upstream", 2.0) | {"loss": None}]
    run = read(tmp_path / "run", events)
    assert np.isnan(run.curve("upstream").losses).tolist() == [False, True, True]
    assert np.isnan(run.train["loss"]).tolist() == [False, True]


def test_several_sets_of_a_role_are_averaged_where_all_are_there(tmp_path: Path) -> None:
    events = [
        eval_line(0, "a", "upstream", 1.0), eval_line(0, "b", "upstream", 3.0), train_line(1, 1e-3, 3.0),
        eval_line(1, "a", "upstream", 7.0), train_line(2, 1e-3, 3.0),
        eval_line(2, "b", "upstream", 4.0), eval_line(2, "a", "upstream", 2.0),
    ]  # fmt: skip
    run = read(tmp_path / "run", events)
    assert run.curve("upstream").losses.tolist() == [2.0, 3.0]
    assert run.curve("upstream").tokens.tolist() == [0.0, 2 * TOKENS_PER_STEP]
    assert run.curve("upstream", "a").losses.tolist() == [1.0, 7.0, 2.0]
    assert run.start_loss("upstream") == 2.0 and run.start_loss("downstream") is None
    assert len(run.curve("downstream")) == 0


def test_counters_carried_on_from_the_start_checkpoint(tmp_path: Path) -> None:
    """start.iteration: continue. Tokens and steps are those of this stage, with and without a first evaluation."""
    train = [train_line(step, 1e-3, 3.0) for step in range(101, 111)]
    ends = [eval_line(100, "a", "upstream", 1.0), eval_line(110, "a", "upstream", 2.0)]
    for number, events in enumerate(([ends[0], *train, ends[1]], [*train, ends[1]])):
        run = read(tmp_path / str(number), events)
        assert run.steps == 10 and run.tokens == 10 * TOKENS_PER_STEP
        assert run.curve("upstream").tokens[-1] == 10 * TOKENS_PER_STEP
        assert run.start_loss("upstream") == (1.0 if number == 0 else None)


def test_a_long_file_takes_columns_not_dictionaries(tmp_path: Path) -> None:
    """Read line by line: the memory at its highest is a small multiple of the columns'."""
    count = 60_000
    folder = write(tmp_path / "run", [train_line(step, 1e-3, 2.0) | {"lr_sum": step * 1e-3} for step in range(1, count + 1)])
    tracemalloc.start()
    run = read_run(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(run.train) * 8 * count  # a dictionary a line would take three times as much
    assert run.train["lr_sum"][-1] == pytest.approx(60.0) and np.isnan(run.train["annealing_area"]).all()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_train_lines_are_read_as_they_are_one_by_one(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the lines: the same numbers, bit for bit, or the same refusal."""
    odd = st.sampled_from([None, True, "x", "3", 2**60 + 1, 2.5, float("nan"), -1, 1e300])
    written = []
    step = 0
    for _ in range(data.draw(st.integers(1, 12))):
        step += data.draw(st.sampled_from([1, 1, 1, 1, 5, 0, -2]))
        for _ in range(data.draw(st.sampled_from([1, 3, 40]))):
            step += 1
            line = {"event": "train", "step": step, "tokens": step * 8, "loss": abs(step) ** 0.5, "lr": 1 / (abs(step) + 50)}
            if data.draw(st.integers(0, 30)) == 0:
                line[data.draw(st.sampled_from(["step", "loss", "tokens", "lr_sum", "event"]))] = data.draw(odd)
            text = json.dumps(line, separators=data.draw(st.sampled_from([(",", ":"), (", ", ": ")])))
            cut = data.draw(st.integers(0, 60)) == 0
            written.append(text[: len(text) // 2] if cut else text)
        if data.draw(st.booleans()):
            written.append(json.dumps({"event": data.draw(st.sampled_from(["resume", "start", "save"])), "step": step}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(written) + "\n" * data.draw(st.integers(0, 1)))

    def told() -> object:
        try:
            run = read_run(tmp_path)
        except UserError as error:
            return str(error)
        return {name: column.tobytes() for name, column in run.train.items()}, run.events, run.start, run.evaluations

    answers = []
    for row, chunk in ((2, 1 << 22), (2, 200), (10**9, 1 << 22)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "_ROW", row)
            patch.setattr(reading, "_CHUNK", chunk)
            answers.append(told())
    assert answers[0] == answers[1] == answers[2]


def test_a_number_of_thousands_of_digits_is_a_damaged_line(tmp_path: Path) -> None:
    """Found by the property test of hostile files: Python's JSON reader ends at 4,300 digits with an error of another kind."""
    assert parse(b"1" * 5000) is None and parse(b'{"event": "x", "step": ' + b"1" * 5000 + b"}") is None
