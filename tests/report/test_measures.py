"""The table's numbers against a recomputation from the raw lines, and what the sentences claim."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megarewarm.record.run import RecordedRun, read_run, read_runs
from megarewarm.report.figures import tradeoff
from megarewarm.report.figures.curves import describe_curves
from megarewarm.report.figures.lines import lines_of
from megarewarm.report.numbers.runs import differences, flatten, kinds, labels, rows
from megarewarm.report.pages.run_page import report
from megarewarm.report.pages.words import summarise
from megarewarm.spelling import loss_text, rate_text, signed_text, tokens_text
from tests.support.report_runs import ARMS, TOKENS_PER_STEP, config, eval_line, lines, train_line, write, write_arms


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_arms(tmp_path_factory.mktemp("runs"), steps=200)


def test_every_number_of_the_table(arms: list[Path], tmp_path: Path) -> None:
    report(arms, tmp_path)
    told = {row["run"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    with open(tmp_path / "table.csv", newline="") as file:
        in_csv = {row["run"]: row for row in csv.DictReader(file)}
    assert list(told) == list(in_csv) == list(ARMS)
    for folder in arms:
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        row = told[folder.name]
        train = [event for event in events if event["event"] == "train"]
        assert row["peak_lr"] == max(event["lr"] for event in train)
        assert row["steps"] == len(train) == 200
        assert row["tokens"] == 200 * TOKENS_PER_STEP
        for role, sign, measure in (("upstream", 1, "forgetting"), ("downstream", -1, "adaptation")):
            evaluations = [(e["loss"], e["tokens"]) for e in events if e["event"] == "eval" and e["role"] == role]
            assert row[f"{role}_after"] == evaluations[-1][0]
            assert row[f"{role}_perplexity_after"] == pytest.approx(math.exp(evaluations[-1][0]))
            if ARMS[folder.name][4] is None:
                assert row[measure] is None and row[f"{role}_before"] is None and row[f"{role}_peak_rise"] is None
                continue
            before = evaluations[0][0]
            assert row[f"{role}_before"] == before
            assert row[measure] == pytest.approx(sign * (evaluations[-1][0] - before))
            highest = max(evaluations)
            assert row[f"{role}_peak_rise"] == pytest.approx(highest[0] - before)
            assert row[f"{role}_peak_rise_tokens"] == highest[1]
            assert float(in_csv[folder.name][measure]) == row[measure]
    assert not any(row["diverged"] for row in told.values())


def test_kinds(arms: list[Path], tmp_path: Path) -> None:
    found = dict(zip(ARMS, kinds(read_runs(arms)), strict=True))
    assert found.pop("prose_pretrain") == "pretraining" and found.pop("scratch") == "scratch"
    assert set(found.values()) == {"continued"}
    assert kinds([read_run(arms[0])]) == ["pretraining"]


def test_same_names_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / name, lines("rewarm", 10))) for name in ("one", "two")]
    assert labels(runs) == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_differences_are_exactly_the_keys_that_differ(arms: list[Path]) -> None:
    runs = [read_run(arms[list(ARMS).index(name)]) for name in ("rewarm", "no_warmup")]
    assert differences(runs) == {"schedule.warmup": [10, 0]}
    runs = [read_run(arms[list(ARMS).index(name)]) for name in ("rewarm", "prose_again")]
    assert differences(runs) == {"data.train.0.path": ["data/code_text_document", "data/prose_text_document"]}


def test_flatten() -> None:
    nested = {"a": {"b": [1, 2], "c": [{"d": 3}, {"d": 4}]}, "e": {}, "f": []}
    assert flatten(nested) == {"a.b": [1, 2], "a.c.0.d": 3, "a.c.1.d": 4, "e": {}, "f": []}


def test_diverged_run(tmp_path: Path) -> None:
    events = [eval_line(0, "a", "upstream", 2.0), train_line(1, 1e-2, 3.0), eval_line(1, "a", "upstream", math.nan)]
    folder = write(tmp_path / "run", [{"event": "start", "name": "hot", "from": "x"}, *events])
    row = rows([read_run(folder)])[0]
    assert row.diverged and row.forgetting is None and row.upstream.after == math.inf
    report([folder], tmp_path / "out")
    told = json.loads((tmp_path / "out" / "table.json").read_text())[0]
    assert told["diverged"] is True and told["upstream_after"] is None
    assert "hot diverged: its last loss is not finite." in summarise([read_run(folder)])


def test_what_the_sentences_claim(arms: list[Path]) -> None:
    text = "\n".join(summarise(read_runs(arms)))
    table = {row.label: row for row in rows(read_runs(arms))}
    double, half = table["rewarm_double"], table["rewarm_half"]
    assert max(table.values(), key=lambda row: row.forgetting or -1) is double
    assert "The highest peak LR, 2e-3 in rewarm_double, forgot most (" + signed_text(double.forgetting) in text
    assert (
        "Runs that differ only in peak LR, rewarm_half (5e-4) → rewarm_double (2e-3): forgetting "
        f"{signed_text(half.forgetting)} → {signed_text(double.forgetting)} (rising throughout)."
    ) in text
    assert "Runs that differ only in warmup, no_warmup (0) → rewarm (10)" in text
    assert "Runs that differ only in training data" in text
    assert "constant_min" not in "".join(line for line in text.split("\n") if "differ only in" in line)


def test_bullets_have_at_most_five_numbers_and_the_signs_of_the_table(arms: list[Path]) -> None:
    for folders in (arms, arms[2:5], arms[3:4]):
        table = {row.label: row for row in rows(read_runs(folders))}
        for bullet in summarise(read_runs(folders)):
            said = bullet
            for name in sorted(table, key=len, reverse=True):
                said = said.replace(name, "RUN")
            assert len(re.findall(r"(?<![\w.])[+−]?\d[\d.e-]*", said.replace("checkpoints/step_2000", ""))) <= 5, bullet
            for word, number in re.findall(r"(forgetting|adaptation) ([+−][\d.]+)", bullet):
                assert number in {signed_text(getattr(row, word)) for row in table.values()}, bullet


def made(folder: Path, name: str, peak: float, up: float, down: float, **keys: Any) -> RecordedRun:
    """A run of one step with the given last losses; it starts from 2.0 on both sets."""
    events = [{"event": "start", "name": name, "from": "base"}]
    events += [eval_line(0, "u", "upstream", 2.0), eval_line(0, "d", "downstream", 2.0), train_line(1, peak, 3.0)]
    events += [eval_line(1, "u", "upstream", up), eval_line(1, "d", "downstream", down)]
    return read_run(write(folder / name, events, {"name": name, "schedule": {"max_lr": peak}} | keys))


def test_no_claim_that_the_data_contradict(tmp_path: Path) -> None:
    """The highest peak neither forgot nor learned most; the trend is not steady; a tie has no first."""
    runs = [
        made(tmp_path, "a", 1e-4, 2.5, 1.5),
        made(tmp_path, "b", 2e-4, 2.1, 1.9),
        made(tmp_path, "c", 3e-4, 2.3, 1.7),
    ]
    text = "\n".join(summarise(runs))
    assert "The highest peak" not in text
    assert "a forgot most (+0.500 upstream)." in text and "a learned most (adaptation +0.500 downstream)." in text
    assert "no steady trend" in text and "throughout" not in text
    tied = [made(tmp_path, "d", 1e-4, 2.5, 1.5), made(tmp_path, "e", 2e-4, 2.502, 1.499)]
    text = "\n".join(summarise(tied))
    assert "most" not in text and "least" not in text and "equal within 0.005" in text


def test_nobody_is_said_to_have_learned_who_got_worse(tmp_path: Path) -> None:
    text = "\n".join(summarise([made(tmp_path, "a", 1e-4, 1.9, 2.5), made(tmp_path, "b", 2e-4, 1.8, 2.7)]))
    assert "learned most" not in text and "forgot most" not in text


def test_equal_configs_are_not_said_to_differ(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "a", 1e-4, 2.5, 1.5),
        made(tmp_path, "b", 1e-4, 2.6, 1.4),
        made(tmp_path, "c", 2e-4, 2.7, 1.3),
    ]
    compared = [line for line in summarise([*runs[:2], made(tmp_path, "d", 2e-4, 2.7, 1.3, seed=5)]) if "differ only" in line]
    assert compared == []
    assert len([line for line in summarise(runs) if "only in peak LR" in line]) == 2  # forgetting, downstream


def test_incidents_are_told(tmp_path: Path) -> None:
    events = [*lines("rewarm", 20), {"event": "resume", "step": 10}, train_line(11, 1e-3, 3.0)]
    events.append({"event": "alarm", "step": 11, "message": "gradient norm 80 is 12 times the usual"})
    text = "\n".join(summarise([read_run(write(tmp_path / "run", events, config("rewarm", 20)))]))
    assert "rewarm was resumed 1 time; repeated steps are counted once." in text
    assert "rewarm is not complete: 11 of 20 steps." in text
    assert "rewarm, step 11: gradient norm 80 is 12 times the usual." in text


def test_unequal_lengths_are_told(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / name, lines(name, steps), config(name, steps)))
            for name, steps in (("rewarm", 20), ("rewarm_half", 40))]  # fmt: skip
    assert "so their final losses are only partly comparable" in summarise(runs)[0]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (tokens_text, 2.5e9, "2.5B"), (tokens_text, 999_950, "1M"), (tokens_text, 12, "12"), (tokens_text, 3e12, "3T"),
        (rate_text, 3e-4, "3e-4"), (rate_text, 1.65e-4, "1.65e-4"), (rate_text, 0.0, "0"), (rate_text, None, "–"),
        (signed_text, 0.1234, "+0.123"), (signed_text, -0.5, "−0.500"), (signed_text, -1e-5, "0.000"),
        (loss_text, 2.0, "2.000"), (loss_text, math.inf, "diverged"),
    ],
)  # fmt: skip
def test_spelling(function: Any, value: float | None, text: str) -> None:
    assert function(value) == text


def test_a_tie_in_the_peak_by_rounding_is_no_highest(tmp_path: Path) -> None:
    """0.0019999997 is 2e-3: neither is the highest, and the trend over both is none."""
    runs = [made(tmp_path, "a", 0.0019999997, 2.1, 1.9), made(tmp_path, "b", 2e-3, 2.5, 1.5)]
    text = "\n".join(summarise(runs))
    assert "The highest peak LR" not in text and "b forgot most (+0.500 upstream)." in text
    assert "differ in peak LR" not in text and differences(runs) == {}
    runs.append(made(tmp_path, "c", 4e-3, 2.7, 1.3))
    text = "\n".join(summarise(runs))
    assert "The highest peak LR, 4e-3 in c" in text and "throughout" not in text and "steady" not in text


def test_runs_of_different_lengths_are_not_ranked_together(tmp_path: Path) -> None:
    def longer(name: str, up: float, down: float) -> RecordedRun:
        events = [{"event": "start", "name": name, "from": "base"}]
        events += [eval_line(0, "u", "upstream", 2.0), eval_line(0, "d", "downstream", 2.0)]
        events += [train_line(step, 1e-3, 3.0) for step in (1, 2, 3)]
        events += [eval_line(3, "u", "upstream", up), eval_line(3, "d", "downstream", down)]
        return read_run(write(tmp_path / name, events, {"name": name, "schedule": {"max_lr": 1e-3}}))

    runs = [
        made(tmp_path, "a", 1e-3, 2.1, 1.9),
        made(tmp_path, "b", 1e-3, 2.2, 1.8),
        longer("c", 2.9, 1.1),
        longer("d", 2.5, 1.5),
    ]
    text = "\n".join(summarise(runs))
    assert "Of the 2 runs over 524k tokens on u, d: b forgot most (+0.200 upstream)." in text
    assert "Of the 2 runs over 1.57M tokens on u, d: c learned most (adaptation +0.900 downstream)." in text
    alone = "\n".join(summarise([runs[0], runs[2]]))
    assert "most" not in alone and "least" not in alone and "c: its upstream loss went from 2.000 to 2.900" in alone


def test_who_diverged_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "a", 1e-3, 2.1, 1.9),
        made(tmp_path, "b", 2e-3, 2.5, 1.5),
        made(tmp_path, "c", 4e-3, math.nan, math.nan),
    ]
    text = "\n".join(summarise(runs))
    assert "Without c, which diverged: b forgot most (+0.500 upstream)." in text and "The highest peak" not in text
    assert "nan" not in text and "inf" not in text and "nan" not in describe_curves(lines_of(runs, rows(runs)))


@pytest.mark.parametrize("unlike", [(), ("length",), ("start",), ("sets",), ("length", "start", "sets")])
def test_the_picture_of_forgetting_says_which_points_compare(tmp_path: Path, unlike: tuple[str, ...]) -> None:
    runs = []
    for number in range(3):
        odd = number == 2
        events = [event | {"name": f"code_{odd}"} if odd and "sets" in unlike and event.get("name") == "code" else event
                  for event in lines("rewarm", 100 if odd and "length" in unlike else 200)]  # fmt: skip
        events[0]["name"] = f"run_{number}"
        if odd and "start" in unlike:
            events[0]["from"] = "elsewhere/checkpoints/step_9"
        runs.append(read_run(write(tmp_path / f"run_{number}", events, config("rewarm") | {"name": f"run_{number}"})))
    caption = tradeoff.caption_tradeoff(rows(runs))
    for what, words in (("length", "numbers of tokens"), ("start", "starts"), ("sets", "validation sets")):
        assert (words in caption.partition("compare")[0]) == (what in unlike)
    figure = tradeoff.draw_tradeoff(lines_of(runs, rows(runs)))
    assert figure is not None
    named = sorted(text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("run_"))
    assert len(named) == 3 and all(" · " in text for text in named) == ("length" in unlike)
    assert [text.endswith(" · 52.4M") for text in named] == [False, False, "length" in unlike]
