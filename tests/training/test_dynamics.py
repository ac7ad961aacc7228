"""What is said of how the weights move, against the weights themselves, in every layout, before and after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.config.execution import OptimizerConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import EMBEDDING, cards
from megarewarm.optimizers import sums
from megarewarm.optimizers.adamw import AdamW
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import trainer
from megarewarm.training.after_step.dynamics import dynamics_steps, measure
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.step import training_step
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
# an odd vocabulary: padded rows under tensor parallelism, unequal shards. No attention biases: the keys' have no gradient but
# rounding noise, and Adam makes effective learning rates of it
MODEL = {"num_layers": 2, "vocab_size": 67, "attention_bias": False}
GROUPS = ["embed_in", "layers.0", "layers.1", "final_layer_norm", "embed_out", "all"]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().double() for name, parameter in run.model.parameters.items()}


@pytest.mark.parametrize("kind", ["torch", "triton"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_numbers_are_those_of_the_weights(
    tmp_path: Path, kind: str, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_CACHED", 2 * sums.ROW)
    settings = config(tmp_path, optimizer={"weight_decay": weight_decay}, kernels={"optimizer": kind})
    run = build(make_plan(settings), ALONE)
    begun = weights_of(run)
    eps, beta2 = settings.optimizer.eps, settings.optimizer.betas[1]
    for step in (1, 2, 3):
        before, lr = weights_of(run), run.plan.lr(step)
        training_step(run, lr)
        after, moments = weights_of(run), run.optimizer.state()
        found = measure(run.model, run.optimizer, run.start_weights)
        assert list(found) == GROUPS
        for group, numbers in found.items():
            names = [name for name in after if group in (run.model.cards[name].group, "all")]

            def flat(tensors: dict[str, torch.Tensor], names: list[str] = names) -> torch.Tensor:
                return torch.cat([tensors[name].flatten().double() for name in names])

            first, second = (flat({n: moments[m, n] for n in names}) for m in ("exp_avg", "exp_avg_sq"))
            rates = lr / ((second / (1 - beta2**step)).sqrt() + eps)
            assert numbers["weight_norm"] == pytest.approx(float(flat(after).norm()), rel=1e-6)
            assert numbers["first_moment_norm"] == pytest.approx(float(first.norm()), rel=1e-6)
            assert numbers["second_moment_norm"] == pytest.approx(float(second.norm()), rel=1e-6)
            assert numbers["effective_lr"] == pytest.approx(float(rates.mean()), rel=1e-5)
            assert numbers["distance"] == pytest.approx(float((flat(after) - flat(begun)).norm()), rel=1e-5)
            change = float((flat(after) - flat(before)).norm())
            assert numbers["update_ratio"] == pytest.approx(change / float(flat(after).norm()), rel=1e-4)
    run.batches.close()


def test_moments_of_tiny_gradients_are_no_zeros() -> None:
    """Squares of second moments under 1e-19 are under fp32's smallest numbers."""
    weights = torch.nn.Parameter(torch.ones(1000))
    every = cards(ModelConfig(num_layers=1, hidden_size=4, num_heads=1, vocab_size=5, rotary_fraction=0.5))
    optimizer = AdamW({EMBEDDING: weights}, every, OptimizerConfig())
    moments = optimizer.state()
    moments["exp_avg_sq", EMBEDDING].fill_(1e-24)
    optimizer.set_completed_steps(5)
    sums = optimizer.sums(EMBEDDING, weights.detach(), {what: tensor for (what, _), tensor in moments.items()}, None)
    assert float(sums[4].sqrt()) == pytest.approx(1e-24 * 1000**0.5, rel=1e-6)


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data": ({}, {}),
    "tensor": ({"tensor": 2}, {}),
    "tensor_sequence_tied": ({"tensor": 2, "sequence": True}, {"tie_embeddings": True}),
    "pipeline": ({"pipeline": 2}, {}),
    "pipeline_tied": ({"pipeline": 2}, {"tie_embeddings": True}),
    "zero3": ({"sharding": "zero3"}, {}),
}


def _settings(place: Path, name: str, parallel: dict[str, Any], model: dict[str, Any]) -> Any:
    return config(
        place,
        name=name,
        folder=str(place / name),
        model=MODEL | model,
        training={"budget": 6},
        logging={"dynamics": "2 steps"},
        parallel=parallel,
    )


def _train_all(ranks: Ranks, place: str) -> None:
    for name, (parallel, model) in LAYOUTS.items():
        train(_settings(Path(place), name, parallel, model), ranks, quiet())


def test_every_layout_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    alone = {
        tied: train(_settings(tmp_path, f"alone_{tied}", {}, {"tie_embeddings": tied}), ALONE, quiet()).folder
        for tied in (False, True)
    }
    run_ranks(_train_all, 2, str(tmp_path), timeout=300)
    for name, (_, model) in LAYOUTS.items():
        wanted, found = (events(folder, "dynamics") for folder in (alone["tie_embeddings" in model], tmp_path / name))
        assert [line["step"] for line in found] == [2, 4, 6]
        for one, other in zip(wanted, found, strict=True):
            assert list(one["groups"]) == list(other["groups"])
            assert ("embed_out" in one["groups"]) == ("tie_embeddings" not in model)
            for group, numbers in one["groups"].items():
                assert other["groups"][group] == pytest.approx(numbers, rel=1e-3), f"{name}, {group}"
                for exact in ("weight_norm", "distance"):
                    assert other["groups"][group][exact] == pytest.approx(numbers[exact], rel=2e-5), f"{name}, {group}"


def _distances(folder: Path) -> dict[int, dict[str, float]]:
    """Of every step, by group; later lines supersede earlier ones."""
    return {
        line["step"]: {group: numbers["distance"] for group, numbers in line["groups"].items() if "distance" in numbers}
        for line in events(folder, "dynamics")
    }


def _killed_and_again(settings: Any, after: int, monkeypatch: pytest.MonkeyPatch, meanwhile: Any = None) -> tuple[Path, str]:
    """The run's folder, and what the second start printed."""
    original = trainer.training_step

    def step_or_die(run: Run, lr: float) -> Any:
        if run.step == after:
            raise KeyboardInterrupt
        return original(run, lr)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "training_step", step_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(settings, ALONE, quiet())
    if meanwhile is not None:
        meanwhile()
    console = quiet()
    folder = train(settings, ALONE, console).folder
    return folder, printed(console)


def test_a_resumed_run_measures_from_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = {"logging": {"dynamics": 3}}
    whole = train(config(tmp_path, folder=str(tmp_path / "whole"), **scratch), ALONE, quiet()).folder
    assert list(_distances(whole)) == [3, 6, 9, 12, 15, 18, 20]
    broken, _ = _killed_and_again(config(tmp_path, folder=str(tmp_path / "broken"), **scratch), 12, monkeypatch)
    assert _distances(broken) == _distances(whole)
    # and from a checkpoint of the first run
    second = {"start": {"from": str(whole / "checkpoints/step_10")}, "logging": {"dynamics": 5}}
    straight = train(config(tmp_path, name="straight", folder=str(tmp_path / "straight"), **second), ALONE, quiet()).folder
    again, _ = _killed_and_again(config(tmp_path, name="again", folder=str(tmp_path / "again"), **second), 12, monkeypatch)
    assert _distances(again) == _distances(straight) and all(set(found) == set(GROUPS) for found in _distances(again).values())


@pytest.mark.parametrize("lost", ["gone", "trained on"])
def test_without_the_start_checkpoint_there_is_no_distance(tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = config(tmp_path, name="first", folder=str(tmp_path / "first"), training={"budget": 10})
    folder = train(first, ALONE, quiet()).folder
    second = config(
        tmp_path, name="second", folder=str(tmp_path / "second"), start={"from": str(folder)}, logging={"dynamics": 5}
    )

    def lose() -> None:
        shutil.rmtree(folder)
        if lost == "trained on":
            train(config(tmp_path, name="first", folder=str(folder), training={"budget": 20}), ALONE, quiet())

    run, said = _killed_and_again(second, 12, monkeypatch, lose)
    assert {step: bool(found) for step, found in _distances(run).items()} == {5: True, 10: True, 15: False, 20: False}
    reason = f"{folder} has another history" if lost == "trained on" else str(folder)
    assert said.count("'dynamics' has no 'distance'") == 1 and reason in said.replace("\n", " ")


def test_when_it_is_measured(tmp_path: Path) -> None:
    assert dynamics_steps(config(tmp_path, training={"budget": 200}), 0) == set(range(4, 201, 4))
    assert dynamics_steps(config(tmp_path, training={"budget": 7}, logging={"dynamics": "5 steps"}), 1) == {6, 7}
    never = config(tmp_path, logging={"dynamics": None})
    assert dynamics_steps(never, 0) == set()
    run = build(make_plan(never), ALONE)
    run.batches.close()
    assert run.start_weights is None and not events(train(never, ALONE, quiet()).folder, "dynamics")


def test_the_copy_of_the_start_can_be_done_without(tmp_path: Path) -> None:
    folder = train(config(tmp_path, logging={"start_distance": False}), ALONE, quiet()).folder
    groups = events(folder, "dynamics")[-1]["groups"]
    assert "distance" not in groups["all"] and groups["all"]["weight_norm"] > 0
