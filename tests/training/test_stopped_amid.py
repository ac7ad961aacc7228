"""A run that is stopped between two micro-batches, or amid an evaluation, and continued, is the undisturbed one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.own.state import read_state
from megarewarm.config.schema import RunConfig
from megarewarm.lab.dry_run import is_trained
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import read_run
from megarewarm.training import trainer
from megarewarm.training.after_step import signals
from megarewarm.training.after_step.signals import Lookout, StopAgreed, StopRequest
from megarewarm.training.start.plan import make_plan
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, printed, quiet
from tests.training.test_stopped import told

ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS = 8


def settings(place: Path, folder: str, layers: int = 1, **changes: Any) -> RunConfig:
    """Evaluations after 0, 2, 4, 6 and 8 steps, saves after 4 and 8; four micro-batches on one rank, two portions a set."""
    sets = [
        {"name": name, "role": role, "tokens": 64, "sources": [{"path": str(place / name)}]}
        for name, role in (("old", "upstream"), ("new", "downstream"))
    ]
    return config(
        place,
        folder=str(place / folder),
        model={"num_layers": layers},
        data={"validation": sets},
        training={"budget": STEPS, "micro_batch": 2},
        evaluation={"every": 2},
        checkpoint={"every": 4, "keep_last": 1, "keep_best": "old", "asynchronous": False},
        logging={"dynamics": 2, "start_distance": False},
        **changes,
    )


class Watched(Lookout):
    """Counts the places at which a run could be broken off; this rank is asked to stop at the one of number ``at``."""

    count, at = 0, -1

    def __call__(self, done: int, portions: int) -> None:
        if Watched.count == Watched.at:
            self._stop.received = signal.SIGTERM
        Watched.count += 1
        super().__call__(done, portions)


def one_run(run: RunConfig, ranks: Ranks, at: int = -1) -> trainer.Outcome:
    Watched.count, Watched.at = 0, at
    return trainer.train(run, ranks, quiet())


def stand(folder: Path) -> tuple[Any, ...]:
    """Weights and moments, counters, the lines that count, the evaluations that were told of at all, and the checkpoints."""
    checkpoint = folder / f"checkpoints/step_{STEPS}"
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.stored_tensors(checkpoint).items()}
    store.load(checkpoint, found, alone=True)
    state = read_state(checkpoint).model_dump_json()
    evaluated = [(line["step"], line["name"], line["loss"]) for line in events(folder, "eval")]
    tensors = {name: tensor.numpy().tobytes() for name, tensor in found.items()}
    return tensors, state, sorted(told(folder)), evaluated, [step for step, _ in checkpoints_in(folder / "checkpoints")]


PLACES = 1 * 4 + STEPS * 3 + 4 * 4
"""The evaluation at the start; between the micro-batches of each step; before each portion of the other evaluations."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "Lookout", Watched)


# amid the start's evaluation; the first step, the first evaluation, the next step; one that a save follows; the last one
@pytest.mark.parametrize("stopped", [(2, 5), (11, 14), (24, 42), pytest.param(range(PLACES), marks=pytest.mark.slow)])
def test_stopped_anywhere_it_is_the_undisturbed_run(tmp_path: Path, stopped: Sequence[int], watched: None) -> None:
    one_run(settings(tmp_path, "whole"), ALONE)
    assert Watched.count == PLACES
    expected = stand(tmp_path / "whole")
    for at in stopped:
        broken = settings(tmp_path, f"broken_{at}")
        outcome = one_run(broken, ALONE, at)
        assert outcome.exit_code == 128 + signal.SIGTERM, at
        assert not is_trained(make_plan(broken)), at
        if at % 2:  # and once more, at the very next place
            assert one_run(broken, ALONE, 0).exit_code == 128 + signal.SIGTERM, at
        assert one_run(broken, ALONE).exit_code == 0
        assert stand(Path(broken.run_folder)) == expected, at


def test_nothing_is_saved_of_half_a_step(tmp_path: Path, watched: None) -> None:
    run = settings(tmp_path, "run")
    console = quiet()
    Watched.count, Watched.at = 0, 4 + 3 * 1 + 1  # between the micro-batches of the second step
    outcome = trainer.train(run, ALONE, console)
    assert (outcome.step, [step for step, _ in checkpoints_in(outcome.folder / "checkpoints")]) == (1, [1])
    assert read_state(outcome.folder / "checkpoints/step_1").interim
    assert "stopped after step 1 of 8 (signal 15), saved; the same" in printed(console)
    first = settings(tmp_path, "first")
    Watched.count, Watched.at = 0, 2
    assert trainer.train(first, ALONE, console).step == 0
    assert "nothing to save yet; the same command starts over" in printed(console)
    assert not events(tmp_path / "first", "eval") and not checkpoints_in(tmp_path / "first/checkpoints")


def test_a_run_whose_last_evaluation_is_missing_is_not_complete(tmp_path: Path, watched: None) -> None:
    run = settings(tmp_path, "run")
    assert one_run(run, ALONE, PLACES - 1).step == STEPS
    assert read_run(tmp_path / "run").events[-1]["evaluated"] is False
    assert len(events(tmp_path / "run", "eval")) == 8
    assert one_run(run, ALONE).losses.keys() == {"old", "new"}
    assert len(events(tmp_path / "run", "eval")) == 10 and is_trained(make_plan(run))


def _stopped_on_one_rank(ranks: Ranks, place: str, parallel: dict[str, Any], share: float) -> list[int]:
    """The exit codes of a run that rank 1 alone is asked to stop at a place, ``share`` of all it has behind it."""
    trainer.Lookout, signals._ASK_EVERY = Watched, 0.0  # type: ignore[misc]
    layers = parallel.get("pipeline", 1)
    codes = [one_run(settings(Path(place), "whole", layers, parallel=parallel), ranks).exit_code]
    at = int(share * Watched.count) if ranks.rank == 1 else -1
    broken = settings(Path(place), "broken", layers, parallel=parallel)
    return [*codes, one_run(broken, ranks, at).exit_code, one_run(broken, ranks).exit_code]


LAYOUTS = {
    "data": {},
    "tensor": {"tensor": 2, "sequence": True},
    "zero3": {"sharding": "zero3"},
    "zero2": {"sharding": "zero2"},
    "pipeline": {"pipeline": 2},
}


def _cases() -> Iterator[Any]:
    for name in LAYOUTS:
        for share in (0.45, 0.99):  # amid a step, or an evaluation; amid the last evaluation
            often = share == 0.45 and name in ("data", "tensor", "pipeline")
            yield pytest.param(name, share, marks=[] if often else pytest.mark.slow)


@pytest.mark.parametrize(("layout", "share"), list(_cases()))
def test_ranks_stop_together(tmp_path: Path, layout: str, share: float) -> None:
    settings(tmp_path, "none")  # token files
    stopped = 128 + signal.SIGTERM
    assert run_ranks(_stopped_on_one_rank, 2, str(tmp_path), LAYOUTS[layout], share) == [[0, stopped, 0]] * 2
    assert stand(tmp_path / "broken") == stand(tmp_path / "whole")


def _looks(ranks: Ranks) -> tuple[int, float]:
    """After how many portions a rank stops that takes 1 ms for each (rank 0) or 4; how often it has asked a portion."""
    signals._ASK_EVERY = 0.05
    stop, asked = StopRequest(quiet()), [0]
    original = signals.all_reduce_maxima

    def counted(values: Sequence[float]) -> list[float]:
        asked[0] += 1
        return original(values)

    signals.all_reduce_maxima = counted
    look = Lookout(stop, ranks.world_size)
    for portion in range(1000):
        time.sleep(0.004 if ranks.rank else 0.001)
        if ranks.rank == 0 and portion == 100:
            stop.received = signal.SIGINT
        try:
            look(portion, 1000)
        except StopAgreed:
            return portion, asked[0] / portion
    return -1, 0.0


def test_ranks_of_other_speeds_ask_after_the_same_portion_and_seldom() -> None:
    (one, often), (two, _) = run_ranks(_looks, 2)
    assert one == two >= 100
    assert often < 0.7


def test_stopped_between_start_and_end_it_is_made_up_for(tmp_path: Path, watched: None) -> None:
    one_run(settings(tmp_path, "up"), ALONE)
    between: dict[str, Any] = {"start": {"from": str(tmp_path / "up")}, "interpolate": {"alphas": [0.25, 0.5]}}
    one_run(settings(tmp_path, "whole", **between), ALONE)
    assert Watched.count == PLACES + 2 * 4
    broken = settings(tmp_path, "broken", **between)
    assert one_run(broken, ALONE, PLACES + 6).exit_code == 128 + signal.SIGTERM  # the second set of the second one
    assert is_trained(make_plan(broken)) and len(events(tmp_path / "broken", "interpolation")) == 2
    assert one_run(broken, ALONE).exit_code == 0
    lines = [
        [(line["alpha"], line["name"], line["loss"]) for line in events(tmp_path / name, "interpolation")]
        for name in ("whole", "broken")
    ]
    assert lines[0] == lines[1] and stand(tmp_path / "broken")[0] == stand(tmp_path / "whole")[0]
