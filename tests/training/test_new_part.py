"""A part that follows each step, added from outside: one class and one line, as CONTRIBUTING says."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.checkpoint.own.state import read_state
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.after_step import order
from megarewarm.training.after_step.evaluate import Evaluate
from megarewarm.training.after_step.part import Context, Moment
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.stopping import stop_amid
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


class Worst:
    """Remembers the sequence with the highest loss of all steps, and writes it down at the evaluations."""

    def __init__(self, context: Context) -> None:
        self.context = context
        context.run.wants_row_losses = True
        self.worst, self.place = float("-inf"), ""

    def after(self, moment: Moment) -> None:
        if moment.result is None:
            return
        run = self.context.run
        rows = moment.result.row_losses
        assert rows is not None and len(rows) == run.plan.config.training.global_batch
        targets = len(rows) * run.plan.config.data.sequence_length
        assert sum(rows) / targets == pytest.approx(moment.result.loss, rel=1e-6)
        if max(rows) > self.worst:
            self.worst = max(rows)
            place = run.data.places(run.plan.samples(run.step - 1), len(rows))[rows.index(self.worst)]
            self.place = f"{place.source} sample {place.sample}"
        self.context.metrics.event("worst", step=run.step, loss=self.worst, place=self.place)

    def state(self) -> dict[str, Any]:
        return {"worst": {"loss": self.worst, "place": self.place}}

    def restore(self, state: Mapping[str, Any]) -> None:
        if "worst" in state:  # the checkpoint may be older than the part
            self.worst, self.place = state["worst"]["loss"], state["worst"]["place"]


@pytest.fixture
def with_worst() -> Any:
    held = list(order.PARTS)
    order.PARTS.insert(order.PARTS.index(Evaluate), Worst)
    yield
    order.PARTS[:] = held


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in ("step", "loss", "place")} for line in events(folder, "worst")]


def test_a_new_part_sees_every_step_and_is_resumed(tmp_path: Path, with_worst: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config(tmp_path, folder=str(tmp_path / "whole")), ALONE, quiet())
    expected = lines(whole.folder)
    assert [line["step"] for line in expected] == list(range(1, whole.step + 1))

    stop_amid(monkeypatch, 8, 13)
    stopped = config(tmp_path, folder=str(tmp_path / "stopped"))
    assert [train(stopped, ALONE, quiet()).exit_code for _ in range(2)] == [128 + signal.SIGTERM] * 2
    monkeypatch.undo()
    outcome = train(stopped, ALONE, quiet())
    assert outcome.exit_code == 0 and lines(outcome.folder) == expected
    recent = read_state(outcome.folder / f"checkpoints/step_{outcome.step}").recent_steps.model_dump()
    assert recent["worst"] == {key: expected[-1][key] for key in ("loss", "place")}
    assert {"losses", "norms", "unchanged", "due", "unevaluated"} <= recent.keys()


def test_a_run_may_get_a_part_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path, training={"budget": 9})
    stop_amid(monkeypatch, 7)
    stopped = train(run, ALONE, quiet())
    monkeypatch.undo()
    order.PARTS.insert(order.PARTS.index(Evaluate), Worst)
    try:
        outcome = train(run, ALONE, quiet())
    finally:
        order.PARTS.remove(Worst)
    assert outcome.exit_code == 0 and [line["step"] for line in lines(outcome.folder)] == list(range(stopped.step + 1, 10))


def _worst_of(ranks: Ranks, place: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    order.PARTS.insert(order.PARTS.index(Evaluate), Worst)
    try:
        return lines(train(config(Path(place), parallel=parallel), ranks, quiet()).folder)
    finally:
        order.PARTS.remove(Worst)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}, {"sharding": "zero2"}], ids=str)
def test_rows_have_the_same_losses_in_every_layout(tmp_path: Path, parallel: dict[str, Any], with_worst: None) -> None:
    config(tmp_path)
    alone = lines(train(config(tmp_path, folder=str(tmp_path / "alone")), ALONE, quiet()).folder)
    together = run_ranks(_worst_of, 2, str(tmp_path), parallel)[0]
    assert [line["place"] for line in together] == [line["place"] for line in alone]
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
