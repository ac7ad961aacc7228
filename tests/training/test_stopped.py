"""A run that is stopped after any of its steps, and continued, is the undisturbed one: weights, metrics, what is judged a spike
and where it goes back to, and which of the planned checkpoints lie there after every step."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.state import read_state
from megarewarm.config.grid import Grid
from megarewarm.config.schema import RunConfig
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import read_run
from megarewarm.training import trainer
from tests.support.tiny import VOCABULARY, config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS, BATCH, LENGTH = 32, 4, 16
SPIKES = (13, 20, 21, 28)  # their batches hold ids that no other has; a save is due after step 20


class Stops:
    """Stands for the signals: asks for a stop after step ``after``. ``there``: the planned checkpoints after each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after: int | None = None
        self.step = 0
        self.there: dict[int, list[int]] = {}
        original = trainer.training_step

        def step(run: Any, lr: float) -> Any:
            self.look(run.step, Path(run.plan.config.run_folder))
            self.step = run.step + 1
            return original(run, lr)

        monkeypatch.setattr(trainer, "training_step", step)
        monkeypatch.setattr(trainer, "StopRequest", lambda console: self)

    def look(self, step: int, folder: Path) -> None:
        found = checkpoints_in(folder / "checkpoints")
        self.there[step] = [number for number, path in found if not read_state(path).interim]

    @property
    def received(self) -> int | None:
        return signal.SIGTERM if self.step == self.after else None

    by_callback = False

    @property
    def is_asked(self) -> bool:
        return self.received is not None

    def __enter__(self) -> Stops:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.after = None


def spiky(place: Path, folder: str, **reliability: Any) -> RunConfig:
    random = np.random.RandomState(0)
    rows = np.cumsum(random.randint(0, 2, (STEPS * BATCH, LENGTH + 1)), 1) % 32
    for step in SPIKES:
        rows[(step - 1) * BATCH : step * BATCH] = random.randint(32, VOCABULARY, (BATCH, LENGTH + 1))
    rows.astype(np.uint16).tofile(place / "rows.bin")
    return config(
        place,
        folder=str(place / folder),
        model={"num_layers": 1},
        data={"train": [{"path": str(place / "rows.bin"), "layout": "rows", "dtype": "uint16", "max_epochs": 1}]},
        schedule={"curve": "constant", "min_lr": None, "warmup": 2},
        training={"budget": STEPS, "global_batch": BATCH},
        evaluation={"every": 8, "at_start": False},
        checkpoint={"every": 5, "keep_last": 2, "keep_best": "old", "extra_steps": [1, 2, 8], "asynchronous": False},
        logging={"dynamics": 11, "start_distance": False},
        reliability={"spike_window": 8, "roll_back_steps": 4, **reliability},
    )


def told(folder: Path) -> list[tuple[Any, ...]]:
    """What the metrics say in the end, without times and without what tells of the stop."""
    lines = read_run(folder).events
    timed = {"time", "tokens_per_second", "data_wait", "seconds", "stall", "path"}
    kinds = ("train", "eval", "dynamics", "alarm")
    kept = [line for line in lines if line["event"] in kinds and "slow" not in str(line.get("kind"))]
    return [tuple(sorted((key, str(value)) for key, value in line.items() if key not in timed)) for line in kept]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = folder / f"checkpoints/step_{STEPS}"
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.stored_tensors(checkpoint).items()}
    store.load(checkpoint, found)
    return found


EVERYWHERE = pytest.param("roll_back", range(1, STEPS), marks=pytest.mark.slow)


@pytest.mark.parametrize(("spikes", "stopped"), [("roll_back", (12, 20)), EVERYWHERE])
def test_stopped_after_any_step_it_is_the_undisturbed_run(
    tmp_path: Path, spikes: str, stopped: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = Stops(monkeypatch)
    whole = spiky(tmp_path, "whole", spikes=spikes)
    trainer.train(whole, ALONE, quiet())
    there, stops.there = stops.there, {}
    expected, weights = told(Path(whole.run_folder)), tensors(Path(whole.run_folder))
    state = read_state(Path(whole.run_folder) / f"checkpoints/step_{STEPS}")
    assert state.lineage.stages[-1].left_out
    kinds = {line["kind"] for line in events(Path(whole.run_folder), "alarm")}
    assert "spike" in kinds and ("roll_back" in kinds) == (spikes == "roll_back")
    for after in stopped:
        broken = spiky(tmp_path, f"broken_{after}", spikes=spikes)
        stops.after = after
        outcome = trainer.train(broken, ALONE, quiet())
        assert (outcome.step, outcome.exit_code) == (after, 128 + signal.SIGTERM)
        if after + 2 < STEPS:  # and once more, soon
            stops.after = after + 2
            trainer.train(broken, ALONE, quiet())
        trainer.train(broken, ALONE, quiet())
        folder = Path(broken.run_folder)
        found = tensors(folder)
        assert all(torch.equal(weights[name], found[name]) for name in weights), after
        assert sorted(told(folder)) == sorted(expected), after
        assert stops.there == there, after
        last = read_state(folder / f"checkpoints/step_{STEPS}")
        assert last.model_copy(update={"run": state.run}).model_dump_json() == state.model_dump_json()
        stops.there = {}


def test_a_course_that_was_given_up_is_not_gone_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After going back in step 13 the checkpoint of step 10 holds weights that the run does not have: never to come back."""
    Stops(monkeypatch)
    run = spiky(tmp_path, "run", spikes="roll_back")
    trainer.train(run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"keep_last": 9})}), ALONE, quiet())
    backs = [(line["step"], line["to"]) for line in events(Path(run.run_folder), "alarm") if line["kind"] == "roll_back"]
    assert len(backs) > 1
    given_up: set[int] = set()
    for step, to in backs:
        assert to not in given_up
        given_up |= set(range(to + 1, step))
    left_out = read_state(Path(run.run_folder) / f"checkpoints/step_{STEPS}").lineage.stages[-1].left_out
    assert {n for first, last in left_out for n in range(first, last + 1)} >= given_up


def test_checkpoints_of_a_stop_take_nobodys_place() -> None:
    keep = Retention(2, keep_every=Grid(20), best_on="old")
    losses: dict[int, float | None] = {5: 1.0, 10: 3.0, 15: 2.0, 18: 0.5, 20: 4.0, 25: math.nan, 27: None}
    assert keep.staying(losses, frozenset({18, 27})) == {5, 20, 25, 27}
    assert keep.staying({**losses, 30: None}, frozenset({18, 27})) == {5, 20, 25, 30}
    assert keep.staying({20: None, 40: math.inf}, frozenset({20, 40})) == {40}
