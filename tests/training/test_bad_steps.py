"""Steps that go wrong: computed once more, left out, gone back from, or the end; and a run that was cut off judges as the
whole."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.state import read_state
from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from megarewarm.parallel.batch_losses import BatchLosses
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import trainer
from megarewarm.training.spikes import SpikeDetector
from megarewarm.training.step import TrainingDiverged
from megarewarm.training.trainer import train
from tests.support.stopping import send_and_wait
from tests.support.tiny import config, events, faults, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


class Faults:
    """Damages what chosen calls of ``forward_backward`` compute. ``calls``: call number, from 1 -> what is done to the
    model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: dict[int, str]) -> None:
        self.count = 0
        original = ParallelModel.forward_backward

        def damaged(model: ParallelModel, rows: Any, **options: Any) -> BatchLosses:
            self.count += 1
            losses = original(model, rows, **options)
            match calls.get(self.count):
                case "gradient":
                    parameter = next(iter(model.parameters.values()))
                    assert parameter.grad is not None
                    parameter.grad.view(-1)[7] = math.nan
                case "loss":
                    return replace(losses, totals=torch.full_like(losses.totals, math.inf))
                case "leap":
                    return replace(losses, totals=losses.totals + 50.0 * losses.targets)
            return losses

        monkeypatch.setattr(ParallelModel, "forward_backward", damaged)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / f"checkpoints/step_{step}"
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.stored_tensors(checkpoint).items()}
    store.load(checkpoint, tensors)
    return tensors


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_fault_that_does_not_come_again_leaves_no_trace(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config(tmp_path, folder=str(tmp_path / "whole")), ALONE, quiet())
    Faults(monkeypatch, {7: what})
    console = quiet()
    hit = train(config(tmp_path), ALONE, console)
    assert hit.losses == whole.losses
    assert same(weights(whole.folder, 20), weights(hit.folder, 20))
    (alarm,) = faults(hit.folder)
    assert (alarm["step"], alarm["kind"]) == (7, "transient")
    assert "recomputed" in " ".join(printed(console).split())
    assert [line["loss"] for line in events(hit.folder, "train")] == [line["loss"] for line in events(whole.folder, "train")]


def test_a_step_that_stays_bad_is_left_out_and_its_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faults(monkeypatch, {7: "gradient", 8: "gradient"})  # both attempts of step 7
    run = config(tmp_path)
    outcome = train(run, ALONE, quiet())
    lines = {line["step"]: line for line in events(outcome.folder, "train")}
    assert len(lines) == 20 and lines[7]["changed"] is False and "changed" not in lines[8]
    assert lines[7]["grad_norm"] is None and math.isfinite(lines[7]["loss"])
    state = read_state(outcome.folder / "checkpoints/step_20")
    assert (state.step, state.optimizer_step, state.samples) == (20, 19, 160)
    assert state.lineage.stages[-1].left_out == [(7, 7)]
    assert "1 steps left out" in state.lineage.lines()[-1]
    record = json.loads((outcome.folder / "batches/step_7.json").read_text())
    assert [row["position"] for row in record["rows"]] == list(range(48, 56))
    tokens = open_tokens(record["rows"][0]["path"])
    part = record["rows"][0]["parts"][0]
    assert part["tokens"] <= len(tokens.document(part["document"]))
    assert not list((outcome.folder / "batches").glob("step_[!7]*"))


def test_weights_that_are_left_out_are_those_of_a_run_without_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An independent way to the same weights: the update of the step undone by hand."""
    Faults(monkeypatch, {7: "loss", 8: "loss"})
    left_out = train(config(tmp_path), ALONE, quiet())
    monkeypatch.undo()
    original = trainer.training_step

    def without_seven(run: Any, lr: float) -> Any:
        if run.step != 6:
            return original(run, lr)
        before = {name: tensor.detach().clone() for name, tensor in run.model.parameters.items()}
        moments = {key: tensor.clone() for key, tensor in run.optimizer.state().items()}
        result = original(run, lr)
        for name, tensor in before.items():
            run.model.parameters[name].data.copy_(tensor)
        for key, tensor in moments.items():
            run.optimizer.state()[key].copy_(tensor)
        run.optimizer.set_completed_steps(6)
        return result

    monkeypatch.setattr(trainer, "training_step", without_seven)
    undone = train(config(tmp_path, folder=str(tmp_path / "undone")), ALONE, quiet())
    assert same(weights(left_out.folder, 20), weights(undone.folder, 20))


def test_too_many_in_a_row_end_the_run_and_no_checkpoint_takes_the_place_of_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Faults(monkeypatch, dict.fromkeys(range(9, 99), "loss"))
    run = config(tmp_path, reliability={"give_up_after": 4})
    with pytest.raises(TrainingDiverged, match=r"step 12: the loss is not finite .*as were the 3 before it.*step_12\.json"):
        train(run, ALONE, quiet())
    folder = Path(run.run_folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_5"]
    assert events(folder, "stop")[-1]["reason"] == "diverged"
    assert sorted(path.name for path in (folder / "batches").iterdir()) == [f"step_{n}.json" for n in (10, 11, 12, 9)]


@pytest.mark.parametrize("damaged", [False, True], ids=["good_weights", "weights_not_finite"])
def test_a_stop_amid_bad_steps_saves_if_the_weights_are_good(
    tmp_path: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Faults(monkeypatch, dict.fromkeys(range(9, 99), "loss"))
    original = trainer.training_step

    def stopped(run: Any, lr: float) -> Any:
        result = original(run, lr)
        if run.step == 11:
            send_and_wait(signal.SIGUSR1)
            if damaged:
                next(iter(run.model.parameters.values())).data.view(-1)[3] = math.inf
        return result

    monkeypatch.setattr(trainer, "training_step", stopped)
    console = quiet()
    outcome = train(config(tmp_path, reliability={"give_up_after": 5}), ALONE, console)
    assert (outcome.step, outcome.exit_code) == (11, 128 + signal.SIGUSR1)
    saved = sorted(path.name for path in (outcome.folder / "checkpoints").iterdir())
    assert saved == (["step_5"] if damaged else ["step_11", "step_5"])
    said = " ".join(printed(console).split())
    assert (
        "not saved, because the weights are not finite" if damaged else "saved; the same command continues from here"
    ) in said


def test_stop_ends_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faults(monkeypatch, {7: "loss", 8: "loss"})
    with pytest.raises(TrainingDiverged, match=r"step 7: the loss is not finite"):
        train(config(tmp_path, reliability={"non_finite": "stop"}), ALONE, quiet())


SPIKES = {"spike_window": 8}


@pytest.mark.parametrize("answer", ["off", "warn"])
def test_spikes_are_told_of_or_not_and_change_nothing(tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config(tmp_path, folder=str(tmp_path / "whole")), ALONE, quiet())
    Faults(monkeypatch, {12: "leap"})
    hit = train(config(tmp_path, reliability={"spikes": answer, **SPIKES}), ALONE, quiet())
    alarms = faults(hit.folder)
    assert [(alarm["step"], alarm["kind"]) for alarm in alarms] == ([] if answer == "off" else [(12, "spike")])
    assert same(weights(whole.folder, 20), weights(hit.folder, 20))


def test_a_spike_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faults(monkeypatch, {12: "leap"})
    hit = train(config(tmp_path, reliability={"spikes": "skip", **SPIKES}), ALONE, quiet())
    state = read_state(hit.folder / "checkpoints/step_20")
    assert (state.step, state.optimizer_step) == (20, 19) and state.lineage.stages[-1].left_out == [(12, 12)]
    assert (hit.folder / "batches/step_12.json").is_file()


def test_going_back_gives_the_old_weights_new_data_and_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faults(monkeypatch, {12: "leap"})
    settings = {"spikes": "roll_back", "roll_back_steps": 5, **SPIKES}
    run = config(tmp_path, reliability=settings)
    hit = train(run, ALONE, quiet())
    at_5, at_12 = weights(hit.folder, 5), weights(hit.folder, 12)
    assert same(at_5, at_12)
    state = read_state(hit.folder / "checkpoints/step_12")
    assert (state.step, state.optimizer_step, state.samples) == (12, 5, 96)
    final = read_state(hit.folder / "checkpoints/step_20")
    assert (final.optimizer_step, final.lineage.stages[-1].left_out) == (13, [(6, 12)])
    back = faults(hit.folder)[-1]
    assert (back["kind"], back["step"], back["to"]) == ("roll_back", 12, 5)
    # killed afterwards: it goes on behind the spike, and ends with the same weights
    for later in ("15", "20"):
        (hit.folder / f"checkpoints/step_{later}").rename(tmp_path / later)
    monkeypatch.undo()
    again = train(run, ALONE, quiet())
    assert again.losses == hit.losses
    final_weights = weights(hit.folder, 20)
    (hit.folder / "checkpoints/step_20").rename(tmp_path / "again")
    (tmp_path / "20").rename(hit.folder / "checkpoints/step_20")
    assert same(final_weights, weights(hit.folder, 20))


def test_going_back_needs_checkpoints_to_go_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"spikes": "roll_back", "roll_back_steps": 5, **SPIKES}
    with pytest.raises(UserError, match=r"roll_back_steps: 5 .*keep_last to 3"):
        train(config(tmp_path, reliability=settings, checkpoint={"every": 3, "keep_last": 2}), ALONE, quiet())
    with pytest.raises(UserError, match=r"set checkpoint\.every"):
        train(config(tmp_path, reliability=settings, checkpoint={"every": None}), ALONE, quiet())
    Faults(monkeypatch, {8: "leap"})  # before a checkpoint is old enough
    hit = train(config(tmp_path, reliability=settings), ALONE, quiet())
    assert read_state(hit.folder / "checkpoints/step_20").lineage.stages[-1].left_out == [(8, 8)]


def test_a_run_cut_off_judges_as_the_whole_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"reliability": {"spikes": "skip", **SPIKES}}
    Faults(monkeypatch, {12: "leap"})
    whole = train(config(tmp_path, folder=str(tmp_path / "whole"), **settings), ALONE, quiet())
    monkeypatch.undo()
    run = config(tmp_path, **settings)
    original = trainer.training_step

    def killed(run: Any, lr: float) -> Any:
        if run.step == 11:
            raise KeyboardInterrupt
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(run, ALONE, quiet())
    monkeypatch.undo()
    Faults(monkeypatch, {2: "leap"})  # step 12 is the second after step 10's checkpoint
    again = train(run, ALONE, quiet())
    assert same(weights(whole.folder, 20), weights(again.folder, 20))
    assert [alarm["message"] for alarm in faults(again.folder)] == [alarm["message"] for alarm in faults(whole.folder)]


def test_the_detector_against_plain_arithmetic() -> None:
    random = np.random.default_rng(5)
    losses, norms = 3 + 0.1 * random.standard_normal(400), np.exp(0.2 * random.standard_normal(400))
    losses[250], norms[300] = 9.0, 60.0
    detector, found = SpikeDetector(64, 6.0), []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if detector.judge(float(loss), float(norm)):
            found.append(step)
        detector.add(float(loss), float(norm))
    expected = []
    for step in range(32, 400):
        before = slice(max(0, step - 64), step)
        high = losses[step] > losses[before].mean() + 6 * losses[before].std()
        logs = np.log(norms)
        strong = logs[step] > logs[before].mean() + max(6 * logs[before].std(), math.log(2))
        if high or strong:
            expected.append(step)
    assert found == expected == [250, 300]


def test_a_new_level_is_a_spike_for_some_steps_only() -> None:
    random = np.random.default_rng(6)
    detector, found = SpikeDetector(128, 6.0), []
    for step in range(400):
        loss = float((2.0 if step < 200 else 4.0) + 0.05 * random.standard_normal())
        if detector.judge(loss, 1.0):
            found.append(step)
        detector.add(loss, 1.0)
    assert found and found[0] == 200 and len(found) <= 5 and found[-1] < 206
