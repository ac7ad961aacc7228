"""The judge of the chaos runs sees what differs: a step, an evaluation, a tensor, a counter, a damaged file."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.state import read_state
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.chaos.faults import KINDS, Fault
from tests.chaos.ledger import MetricsTail, Outcome, Row, difference, steps_lost, table
from tests.support.tiny import config, quiet


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ledger")
    run = config(place, folder=str(place / "run"), training={"budget": 6}, checkpoint={"every": 3}, evaluation={"every": 3})
    return train(run, Ranks(0, 1, torch.device("cpu")), quiet()).folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def edit(metrics: Path, event: str, step: int, **values: float) -> None:
    """Change one line."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [line for line in lines if line["event"] == event and line.get("step") == step]
    found[0] |= values
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_equal_run_is_equal(finished: Path, copy: Path) -> None:
    assert difference(copy, finished) is None and steps_lost(copy, finished) == 0


def test_the_last_bit_of_a_loss_is_seen(finished: Path, copy: Path) -> None:
    loss = next(json.loads(line)["loss"] for line in (copy / "metrics.jsonl").read_text().splitlines() if '"train"' in line)
    edit(copy / "metrics.jsonl", "train", 1, loss=math.nextafter(loss, math.inf))
    assert steps_lost(copy, finished) == 1 and difference(copy, finished) == "1 steps differ in metrics.jsonl"


def test_a_step_that_is_lacking_is_seen(finished: Path, copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if not ('"train"' in line and '"step":4,' in line)))
    assert steps_lost(copy, finished) == 1 and difference(copy, finished) == "1 steps differ in metrics.jsonl"


def test_an_evaluation_a_tensor_a_counter_and_a_damaged_file_are_seen(finished: Path, copy: Path) -> None:
    edit(copy / "metrics.jsonl", "eval", 3, loss=1.0)
    assert str(difference(copy, finished)).startswith("evaluations differ")
    shutil.copy(finished / "metrics.jsonl", copy / "metrics.jsonl")

    last = copy / "checkpoints" / "step_6"
    state = read_state(last)
    held = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.stored_tensors(last).items()}
    store.load(last, held, alone=True)
    held["model.final_norm.bias" if "model.final_norm.bias" in held else sorted(held)[0]].view(-1)[0] += 1
    store.write(last, state, held)
    assert "is another" in str(difference(copy, finished))

    shutil.rmtree(last)
    shutil.copytree(finished / "checkpoints" / "step_6", last)
    store.load(last, held, alone=True)
    store.write(last, state.model_copy(update={"samples": 1}), held)
    assert "samples is 1" in str(difference(copy, finished))

    (last / "state.json").write_text("{}")
    assert "state.json is damaged" in str(difference(copy, finished))


def test_steps_computed_again_are_counted_as_resumes_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    tail.update()
    path.write_bytes(b"".join(b'{"event":"train","step":%d}\n' % step for step in range(1, 8)) + b'{"event":"tra')
    tail.update()
    assert (tail.step, tail.recomputed) == (7, [])
    with open(path, "ab") as file:
        file.write(b'\n{"event":"resume","step":4}\n{"event":"train","step":5}\n{"event":"resume","step":-1}\n')
    tail.update()
    assert (tail.step, tail.recomputed) == (0, [3, 5])


def test_the_table_says_how_each_kind_went() -> None:
    fault = Fault(0, "kill_rank", 9, 1, 0.0)
    outcomes = [Outcome(fault, restarts=1, recomputed=3), Outcome(fault), Outcome(fault, restarts=1, recomputed=5, named="why")]
    *_, kind, everything = table([Row(KINDS["kill_rank"].title, outcomes), Row("another", [])]).splitlines()
    assert kind == "| SIGKILL of a rank, in any step | 3 | 1 | 1 | 1 | 3 | 5 | 0 |"
    assert everything == "| **all** | 3 | 1 | 1 | 1 | 3 | 5 | 0 |"
