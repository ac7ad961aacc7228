"""``start.moments: measure``: against Adam's formulas in float64, the same in every layout, once, and at no other cost."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megarewarm.checkpoint.own.state import read_state
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.errors import UserError
from megarewarm.lab import dry_run
from megarewarm.lab.replay_step import replay_step
from megarewarm.main import main
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import measuring, trainer
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.stopping import send_and_wait
from tests.support.tiny import config, events, printed, quiet, write_tokens
from tests.training.test_average import tensors
from tests.training.test_resume import ALONE, Killed

BATCHES = 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero2": {"sharding": "zero2"},
    "zero3": {"sharding": "zero3"},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
}


def settings(place: Path, name: str, **changes: Any) -> Any:
    start = {"from": str(place / "up/huggingface"), "moments": "measure", "measure_batches": BATCHES}
    usual: dict[str, Any] = {"training": {"budget": 8}, "checkpoint": {"every": 4, "keep_last": 9, "extra_steps": [0]}}
    replay = {"fraction": 0.25, "sources": [{"path": str(place / "older"), "max_epochs": 9}]}
    return config(place, name=name, folder=str(place / name), start=start, replay=replay, **(usual | changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    write_tokens(folder / "older", 5)
    data = {"train": [{"path": str(folder / "old"), "max_epochs": 9}]}
    train(config(folder, name="up", folder=str(folder / "up"), data=data, export={"huggingface": True}), ALONE, quiet())
    train(settings(folder, "run"), ALONE, quiet())
    return folder


def test_they_are_adam_s_after_steps_at_rate_0_in_float64(place: Path) -> None:
    """m, v and t by their formulas, of the clipped gradients of the batches of steps 1 to 5, which the run then trains on."""
    run = build(make_plan(settings(place, "never")), ALONE)
    run.batches.close()
    optimizer = run.plan.config.optimizer
    model: Transformer = OwnCheckpoint(place / "up/checkpoints/step_20").whole_model().double()
    (beta1, beta2), clip = optimizer.betas, optimizer.clip_norm
    head = model.get_parameter("embed_out.weight")
    named = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in named.items()}
    second = {name: torch.zeros_like(p) for name, p in named.items()}
    norms = []
    for k in range(BATCHES):
        rows = torch.from_numpy(run.data.rows(8 * k, 8))
        model.zero_grad()
        logits = model(rows[:, :-1]) @ head.T
        cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())))
        factor = min(1.0, clip / (norms[-1] + 1e-6)) if clip is not None else 1.0
        for name, gradient in gradients.items():
            first[name] = beta1 * first[name] + (1 - beta1) * factor * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * (factor * gradient) ** 2
    assert max(norms) > 1, "nothing was clipped"
    saved = tensors(place / "run/checkpoints/step_0")
    for name in named:
        torch.testing.assert_close(saved[f"optimizer.exp_avg.{name}"].double(), first[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(saved[f"optimizer.exp_avg_sq.{name}"].double(), second[name], rtol=1e-4, atol=1e-10)
    assert read_state(place / "run/checkpoints/step_0").optimizer_step == BATCHES
    assert read_state(place / "run/checkpoints/step_8").optimizer_step == BATCHES + 8


def test_weights_and_data_are_those_of_a_run_without(place: Path) -> None:
    start = {"from": str(place / "up/huggingface")}
    train(settings(place, "reset").model_copy(update={"start": config(place, start=start).start}), ALONE, quiet())
    states = [read_state(place / name / "checkpoints/step_8") for name in ("run", "reset")]
    assert states[0].samples == states[1].samples == 64 and states[0].data_fingerprint == states[1].data_fingerprint
    assert states[0].lineage.stages[-1].data == states[1].lineage.stages[-1].data
    one, two = (tensors(place / name / "checkpoints/step_0") for name in ("run", "reset"))
    assert all(torch.equal(one[name], two[name]) for name in one if not name.startswith("optimizer."))
    assert not any(two[name].any() for name in two if name.startswith("optimizer."))
    first = [events(place / name, "train")[0] for name in ("run", "reset")]
    assert first[0]["loss"] == first[1]["loss"] and first[0]["grad_norm"] == first[1]["grad_norm"]
    second = [events(place / name, "train")[1]["loss"] for name in ("run", "reset")]
    assert second[0] != second[1]
    (told,) = events(place / "run", "moments")
    assert (told["step"], told["batches"]) == (0, BATCHES) and not events(place / "reset", "moments")
    table = {row["line"]: row for row in events(place / "run", "start")[0]["reset"]}
    assert table["moments"]["run_has"] == "measured at rate 0 over the 5 batches of the first steps"
    assert (table["optimizer_step"]["choice"], table["optimizer_step"]["run_has"]) == ("measure", "5")
    assert (states[0].lineage.stages[-1].reset or {})["moments"] == "measure"


def test_they_are_measured_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, measured = trainer.training_step, list[int]()

    def step_or_die(run: Run, lr: float) -> Any:
        if run.step == 5 and len(measured) == 1:
            raise Killed
        return original(run, lr)

    counted = trainer.measure_moments
    monkeypatch.setattr(trainer, "measure_moments", lambda *given: (measured.append(1), counted(*given)))
    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(Killed):
        train(settings(place, "killed"), ALONE, quiet())
    measured.append(0)
    train(settings(place, "killed"), ALONE, quiet())
    assert measured == [1, 0]
    one, two = (tensors(place / name / "checkpoints/step_8") for name in ("run", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    shutil.rmtree(place / "killed/checkpoints/step_0")  # so that the step's moments are measured again
    assert replay_step(place / "killed", 3, ALONE).loss == events(place / "run", "train")[2]["loss"]


def test_a_stop_meanwhile_saves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = measuring.compute_gradients, list[int]()

    def stopped(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            send_and_wait()
        return original(*given)

    monkeypatch.setattr(measuring, "compute_gradients", stopped)
    console = quiet()
    assert train(settings(place, "stopped"), ALONE, console).exit_code == 128 + signal.SIGTERM
    assert "nothing to save yet; the same command starts over" in " ".join(printed(console).split())
    assert not (place / "stopped/checkpoints").exists()
    assert train(settings(place, "stopped"), ALONE, quiet()).exit_code == 0 and len(calls) == 3 + BATCHES
    one, two = (tensors(place / name / "checkpoints/step_8") for name in ("run", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def _train(ranks: Ranks, place: str, layouts: list[str]) -> None:
    for name in layouts:
        train(settings(Path(place), f"{name}_{ranks.world_size}", parallel=LAYOUTS[name]), ranks, quiet())


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, ["zero2"]),
        pytest.param(2, ["data", "zero3", "tensor", "pipeline"], marks=pytest.mark.slow),
        pytest.param(4, ["zero2", "tensor", "pipeline"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_measures_what_one_process_does(place: Path, ranks: int, layouts: list[str]) -> None:
    run_ranks(_train, ranks, str(place), layouts, timeout=400)
    one = tensors(place / "run/checkpoints/step_0")
    for layout in layouts:
        two = tensors(place / f"{layout}_{ranks}" / "checkpoints/step_0")
        assert one.keys() == two.keys()
        for name in one:
            if name.startswith("optimizer."):
                scale = float(one[name].abs().max())
                torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5 * scale)
        assert read_state(place / f"{layout}_{ranks}" / "checkpoints/step_8").optimizer_step == BATCHES + 8


def test_an_fp16_scale_adapts_until_every_batch_counts(place: Path) -> None:
    scale = {"initial": 2.0**24, "window": 1000}
    run = settings(place, "fp16", training={"budget": 8, "precision": "fp16", "loss_scale": scale})
    train(run, ALONE, quiet())
    state = read_state(place / "fp16/checkpoints/step_0")
    assert state.loss_scale is not None and state.loss_scale["scale"] < 2.0**24 and state.optimizer_step == BATCHES
    one, two = (tensors(place / name / "checkpoints/step_0") for name in ("run", "fp16"))
    key = "optimizer.exp_avg.layers.0.mlp.dense_h_to_4h.weight"
    assert float((one[key] - two[key]).norm() / one[key].norm()) < 0.02


def test_muon_s_momentum_is_measured_alike(place: Path) -> None:
    train(settings(place, "muon", optimizer={"kind": "muon"}), ALONE, quiet())
    saved = tensors(place / "muon/checkpoints/step_0")
    key = "layers.0.mlp.dense_h_to_4h.weight"
    assert saved[f"optimizer.momentum.{key}"].any() and saved["optimizer.exp_avg_sq.embed_in.weight"].any()
    assert torch.equal(saved[f"model.{key}"], tensors(place / "run/checkpoints/step_0")[f"model.{key}"])


def test_a_gradient_that_is_not_finite_ends_it_before_anything_is_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = measuring.compute_gradients

    def broken(*given: Any) -> Any:
        result = original(*given)
        return type(result)(result.loss, math.inf)

    monkeypatch.setattr(measuring, "compute_gradients", broken)
    with pytest.raises(UserError, match=r"start\.moments: 'measure' found .* in samples 0 to 7 .*huggingface"):
        train(settings(place, "bad"), ALONE, quiet())
    assert not (place / "bad/checkpoints").exists()


def test_a_dry_run_says_what_they_cost(place: Path) -> None:
    console = quiet()
    dry_run.show_run(settings(place, "dry"), console, Launch(0, 1, 0, 1, "localhost", 0, "none"))
    text = printed(console)
    assert "5 batches at rate 0 before the first step, 640 tokens, 38.5 % of the steps' compute" in text
    assert "measured at rate 0 over the 5 batches" in text


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"from": "up"}, "has those of 20 steps; set it to 'keep', 'keep_second' or 'reset', or start from an export"),
        ({"from": None}, "start.moments: 'measure' is for a checkpoint without moments; a run from scratch has 'reset'"),
        ({"optimizer_step": "reset"}, "start.optimizer_step: 'reset' contradicts moments 'measure'"),
        ({"measure_batches": 9}, "start.measure_batches: 9 batches are those of as many steps, and the run has 8"),
        ({"measure_batches": 0}, "start.measure_batches"),
    ],
)
def test_what_can_t_be_measured_is_refused_in_one_line(
    place: Path, start: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(place, "refused").model_dump(mode="json", by_alias=True)
    run["start"] |= start | ({"from": str(place / "up")} if start.get("from") == "up" else {})
    if run["start"]["from"] is None:
        run["model"] = config(place).model_dump(mode="json")["model"]
    (place / "refused.yml").write_text(json.dumps(run))
    assert main([str(place / "refused.yml")]) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.out + said.err).split()) and not (place / "refused").exists()
