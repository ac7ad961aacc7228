"""The average that a run keeps of its last weights, against a merge of the checkpoints that it saved at the same steps."""

from __future__ import annotations

import itertools
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarewarm.checkpoint.convert import ConvertOptions
from megarewarm.checkpoint.merge import decay_like, merge
from megarewarm.checkpoint.own.store import stored_tensors
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.config.budget import Budget
from megarewarm.errors import UserError
from megarewarm.lab.plan_ahead import plan_ahead
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import read_run
from megarewarm.report.numbers.measure import MEASURES
from megarewarm.report.numbers.runs import rows
from megarewarm.training import averaged, trainer
from megarewarm.training.run import Run
from megarewarm.training.start.averaging import about_average, averaging
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.stopping import send_and_wait, stop_amid
from tests.support.tiny import config, events, printed, quiet
from tests.training.test_resume import ALONE

FLAT = {"curve": "constant", "max_lr": 1e-2, "min_lr": None, "warmup": "10%"}
AVERAGE = {"like": "minus_sqrt", "window": "50%"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero2": {"sharding": "zero2"},
    "zero3": {"sharding": "zero3"},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
}


def settings(place: Path, name: str, **changes: Any) -> Any:
    saves = {"every": 3, "keep_last": 9, "average": AVERAGE}
    return config(place, name=name, folder=str(place / name), **{"schedule": FLAT, "checkpoint": saves} | changes)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return OwnCheckpoint(checkpoint).whole_model().state_dict()


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored_tensors(checkpoint).items()}
    OwnCheckpoint(checkpoint).load_tensors(dict(found))
    return found


def losses(folder: Path) -> dict[str, float]:
    return {line["name"]: line["loss"] for line in events(folder, "average")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    train(settings(folder, "run"), ALONE, quiet())
    return folder


def test_it_is_the_merge_of_the_saved_checkpoints(place: Path) -> None:
    """Saved after 3, 6, ..., 18 and 20: of the last 10 steps those of 12, 15, 18, 20."""
    merged = decay_like("minus_sqrt", [str(place / "run")], Budget.model_validate("50%"))
    assert [Path(name).name for name in merged.names] == ["step_12", "step_15", "step_18", "step_20"]
    merge(merged, place / "merged", ConvertOptions("megarewarm"))
    one, two = weights(place / "run" / "average"), weights(place / "merged")
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(one["embed_in.weight"], weights(place / "run/checkpoints/step_20")["embed_in.weight"])
    # it begins within the window, and no earlier
    assert "average.embed_in.weight" not in stored_tensors(place / "run/checkpoints/step_9")
    assert torch.equal(tensors(place / "run/checkpoints/step_12")["average.embed_in.weight"],
                       weights(place / "run/checkpoints/step_12")["embed_in.weight"])  # fmt: skip


def test_it_is_evaluated_as_a_run_from_it_evaluates_its_start(place: Path) -> None:
    found = losses(place / "run")
    again = config(place, name="again", folder=str(place / "again"), start={"from": str(place / "run/average")})
    train(again.model_copy(update={"training": again.training.model_copy(update={"budget": Budget.model_validate(1)})}), ALONE,
          quiet())  # fmt: skip
    for line in events(place / "again", "eval")[:2]:
        assert line["step"] == 0 and line["loss"] == found[line["name"]]
    source = open_checkpoint(str(place / "run/average"))
    run, average = source.lineage.stages
    assert (run.run, run.steps) == ("run", 20) and average.losses == found and source.training is None
    assert average.intent == "merged: minus_sqrt decay over steps 12 to 20 by merging 4 of the run's weights"
    (row,) = rows([read_run(place / "run")])
    merged = {measure.key: measure.of(row) for measure in MEASURES if measure.key.endswith("_merged") and measure.of}
    assert merged == {"upstream_merged": found["old"], "downstream_merged": found["new"]}


def test_the_run_itself_is_the_same_without_it(place: Path) -> None:
    train(settings(place, "without", checkpoint={"every": 3}), ALONE, quiet())
    one, two = (tensors(place / name / "checkpoints/step_20") for name in ("run", "without"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert set(one) - set(two) == {f"average.{name.removeprefix('model.')}" for name in two if name.startswith("model.")}
    assert not (place / "without/average").exists() and not events(place / "without", "average")


def test_a_run_that_is_stopped_within_the_window_goes_on_bit_for_bit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_amid(monkeypatch, 12, 13, 17, 20)
    codes = [train(settings(place, "stopped"), ALONE, quiet()).exit_code for _ in range(5)]
    assert codes == [128 + signal.SIGTERM] * 4 + [0]
    for folder in ("average", "checkpoints/step_20"):
        one, two = tensors(place / "run" / folder), tensors(place / "stopped" / folder)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert losses(place / "stopped") == losses(place / "run")


def test_what_was_broken_off_after_the_last_step_is_made_up_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(averaged, "weights_only_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings(place, "broken"), ALONE, quiet())
    assert not (place / "broken/average").exists()
    console = quiet()
    assert train(settings(place, "broken"), ALONE, console).exit_code == 0
    assert "already complete" in printed(console) and "the average is in" in printed(console)
    one, two = tensors(place / "run/average"), tensors(place / "broken/average")
    assert all(torch.equal(one[name], two[name]) for name in one) and losses(place / "broken") == losses(place / "run")
    lines = (place / "broken/metrics.jsonl").read_text()
    train(settings(place, "broken"), ALONE, quiet())
    assert (place / "broken/metrics.jsonl").read_text() == lines


def test_other_settings_within_the_window_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_amid(monkeypatch, 17)
    train(settings(place, "changed"), ALONE, quiet())
    monkeypatch.undo()
    before = sorted(path.name for path in (place / "changed").rglob("*"))
    refused: list[dict[str, Any]] = [
        {"average": AVERAGE | {"like": "linear"}},
        {"average": AVERAGE | {"window": "60%"}},
        {"average": AVERAGE | {"every": 1}},
        {"average": AVERAGE, "every": 4},
    ]
    for other in refused:
        again = settings(place, "changed", checkpoint={"every": 3, "keep_last": 9} | other)
        with pytest.raises(UserError, match=r"checkpoint\.average: .* is at step 16, within the window .*restore them"):
            train(again, ALONE, quiet())
    with pytest.raises(UserError, match=r"training\.budget was 20, now it is 30"):
        train(settings(place, "changed", training={"budget": 30}), ALONE, quiet())
    assert before == sorted(path.name for path in (place / "changed").rglob("*"))
    # a window that has not begun yet may still be chosen, and its average is the merge's
    later = {"every": 3, "keep_last": 9, "average": {"like": "linear", "window": "10%"}}
    train(settings(place, "changed", checkpoint=later), ALONE, quiet())
    merge(
        decay_like("linear", [str(place / "run")], Budget.model_validate("10%")), place / "short", ConvertOptions("megarewarm")
    )
    one, two = weights(place / "changed/average"), weights(place / "short")
    assert all(torch.allclose(one[name], two[name], rtol=1e-6, atol=1e-7) for name in two)
    train(settings(place, "none", checkpoint={"every": 3}), ALONE, quiet())
    with pytest.raises(UserError, match=r"is at step 20, within the window .*megarewarm merge --like"):
        train(settings(place, "none"), ALONE, quiet())


@pytest.mark.parametrize(
    ("average", "message"),
    [
        ({"like": "linear", "window": "200%"}, r"window 200%: is 40 steps, the run has 20"),
        ({"like": "linear", "window": 1}, r"only the end would be averaged; .*shorter checkpoint\.every"),
        ({"like": "linear", "window": 1, "every": 5}, r"shorter checkpoint\.average\.every"),
    ],
)
def test_windows_without_an_average_are_refused_before_training(place: Path, average: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(settings(place, "no", checkpoint={"every": 5, "average": average}), ALONE, quiet())
    assert not (place / "no").exists()


def test_the_steps_are_those_that_are_saved_or_those_of_its_own_interval(place: Path) -> None:
    def steps(**checkpoint: Any) -> tuple[int, ...]:
        wanted = averaging(settings(place, "steps", checkpoint=checkpoint), 0)
        assert wanted is not None
        return wanted.steps

    assert steps(average=AVERAGE | {"every": "10%"}) == (10, 12, 14, 16, 18, 20)
    assert steps(every=None, average=AVERAGE | {"every": 4}) == (12, 16, 20)
    assert steps(every=None, extra_steps=[11, 19, 99], average=AVERAGE) == (11, 19, 20)
    assert steps(every=5, extra_steps=[0], average=AVERAGE | {"window": "100%"}) == (0, 5, 10, 15, 20)


def test_a_rate_that_is_not_constant_in_the_window_is_noted(place: Path) -> None:
    flat, falling = (make_plan(settings(place, "noted", schedule=changed)) for changed in (FLAT, {}))
    assert about_average(flat) == []
    (note,) = about_average(falling)
    assert re.search(r"checkpoint\.average: the learning rate goes from .* adds its decay to that", note)


def test_an_experiment_may_plan_to_start_from_it(place: Path) -> None:
    run = settings(place, "planned", export={"huggingface": True})
    plan, _ = plan_ahead(run)
    for name, stages in (("average", ["planned"]), ("huggingface", [])):
        after, missing = plan_ahead(settings(place, "next", start={"from": str(place / "planned" / name)}), [plan])
        assert not missing and after.source is not None and after.source.training is None and after.policy.moments == "reset"
        assert [stage.run for stage in after.source.lineage.stages] == stages


def _train(ranks: Ranks, place: str, layouts: list[str], resumed: list[str]) -> None:
    for name in layouts:
        original = trainer.training_step

        def step_and_stop(run: Run, lr: float, name: str = name, original: Any = original) -> Any:
            if run.step == 15 and name in resumed and ranks.is_main:
                send_and_wait()
            return original(run, lr)

        trainer.training_step = step_and_stop
        run = settings(Path(place), f"{name}_{ranks.world_size}", parallel=LAYOUTS[name])
        first = train(run, ranks, quiet())
        trainer.training_step = original
        assert first.exit_code == (128 + signal.SIGTERM if name in resumed else 0)
        if name in resumed:
            assert train(run, ranks, quiet()).exit_code == 0


@pytest.mark.parametrize(
    ("ranks", "layouts", "resumed"),
    [
        (2, ["zero3"], ["zero3"]),
        pytest.param(2, list(LAYOUTS), ["zero2", "tensor"], marks=pytest.mark.slow),
        pytest.param(4, ["data", "zero2", "tensor", "pipeline"], ["pipeline"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_averages_what_one_process_does(place: Path, ranks: int, layouts: list[str], resumed: list[str]) -> None:
    for name in layouts:
        shutil.rmtree(place / f"{name}_{ranks}", ignore_errors=True)
    run_ranks(_train, ranks, str(place), layouts, resumed, timeout=400)
    for name in layouts:
        folder = place / f"{name}_{ranks}"
        found = weights(folder / "average")
        assert losses(folder) == pytest.approx(losses(place / "run"), rel=1e-4)
        saved = [weights(folder / f"checkpoints/step_{step}") for step in (12, 15, 18, 20)]
        merged = decay_like("minus_sqrt", [str(folder)], Budget.model_validate("50%"))
        for key in found:
            total = sum(share * each[key].double() for share, each in zip(merged.shares, saved, strict=True))
            assert isinstance(total, Tensor)
            torch.testing.assert_close(found[key], total.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_an_average_of_one_layout_goes_on_in_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped on one rank, resumed on two: only rounding of the steps differs, the sums so far are read back."""
    stop_amid(monkeypatch, 18)
    run = settings(place, "moved")
    train(run, ALONE, quiet())
    monkeypatch.undo()
    run_ranks(_resume, 2, str(place), timeout=200)
    for one, two in itertools.zip_longest(weights(place / "moved/average").values(), weights(place / "run/average").values()):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-5)


def _resume(ranks: Ranks, place: str) -> None:
    train(settings(Path(place), "moved", parallel={"sharding": "zero2"}), ranks, quiet())
