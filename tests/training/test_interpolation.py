"""Weights between start and end after a run, against those that a merge writes; layer-wise learning rates."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from megarewarm.checkpoint.convert import ConvertOptions
from megarewarm.checkpoint.merge import Merge, interpolation_shares, merge
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.execution import OptimizerConfig
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import cards
from megarewarm.optimizers.adamw import AdamW, rate_factor
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import interpolation
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.stopping import stop_amid
from tests.support.tiny import config, events, printed, quiet
from tests.training.test_resume import ALONE

ALPHAS = [0.25, 0.5, 1.5]
LAYOUTS = {"data": {}, "zero3": {"sharding": "zero3"}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}


def settings(place: Path, name: str, **changes: Any) -> Any:
    usual = {"start": {"from": str(place / "up")}, "interpolate": {"alphas": ALPHAS}, "training": {"budget": 8}}
    return config(place, name=name, folder=str(place / name), **usual | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("between")
    data = {"train": [{"path": str(folder / "old"), "max_epochs": 9}]}
    train(config(folder, name="up", folder=str(folder / "up"), data=data), ALONE, quiet())
    train(settings(folder, "run"), ALONE, quiet())
    return folder


def between(folder: Path) -> dict[tuple[float, str], float]:
    return {(line["alpha"], line["name"]): line["loss"] for line in events(folder, "interpolation")}


def test_losses_are_those_of_the_merged_checkpoints(place: Path) -> None:
    found = between(place / "run")
    assert set(found) == {(alpha, name) for alpha in ALPHAS for name in ("old", "new")}
    for alpha in (0.25, 1.5):
        names = [str(place / "up"), str(place / "run")]
        merge(Merge(names, interpolation_shares(alpha), "between"), place / f"merged_{alpha}", ConvertOptions("megarewarm"))
        again = config(
            place,
            name="again",
            folder=str(place / f"again_{alpha}"),
            start={"from": str(place / f"merged_{alpha}")},
            training={"budget": 1},
        )
        train(again, ALONE, quiet())
        for line in events(place / f"again_{alpha}", "eval")[:2]:
            assert line["step"] == 0 and line["loss"] == pytest.approx(found[alpha, line["name"]], rel=1e-5)


def test_the_end_weights_stand_again_and_a_finished_run_is_not_evaluated_twice(place: Path) -> None:
    plain = settings(place, "plain", interpolate=None)
    train(plain, ALONE, quiet())
    one, two = (OwnCheckpoint(place / name / "checkpoints" / "step_8").whole_model().state_dict() for name in ("run", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = (place / "run" / "metrics.jsonl").read_text()
    train(settings(place, "run"), ALONE, quiet())
    assert (place / "run" / "metrics.jsonl").read_text() == lines


def test_a_complete_run_makes_up_for_alphas_that_are_asked_for_later(place: Path) -> None:
    plain = settings(place, "later", interpolate=None)
    train(plain, ALONE, quiet())
    alphas = [0.25, 0.5]
    later = settings(place, "later", interpolate={"alphas": alphas}, export={"huggingface": True})
    console = quiet()
    assert train(later, ALONE, console).exit_code == 0
    assert between(place / "later") == {key: loss for key, loss in between(place / "run").items() if key[0] in alphas}
    assert "(1 - alpha) start" in printed(console)
    assert (place / "later" / "huggingface" / "model.safetensors").is_file()
    train(settings(place, "later"), ALONE, quiet())  # one more alpha
    assert between(place / "later") == between(place / "run")
    assert len(events(place / "later", "interpolation")) == len(between(place / "run"))
    one, two = (OwnCheckpoint(place / name / "checkpoints" / "step_8").whole_model().state_dict() for name in ("run", "later"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("broken_off", ["by a signal", "between two sets"])
def test_what_was_lost_after_the_last_step_is_made_up_for(
    place: Path, broken_off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = broken_off.replace(" ", "_")
    wanted = settings(place, name, export={"huggingface": True})
    with monkeypatch.context() as patched:
        if broken_off == "by a signal":
            stop_amid(patched, 8)
            assert train(wanted, ALONE, quiet()).exit_code == 128 + signal.SIGTERM
        else:
            measured, measurements = interpolation.evaluate_set, list[Any]()

            def evaluate_or_die(*words: Any) -> Any:
                measurements.append(words)
                if len(measurements) == 4:
                    raise KeyboardInterrupt
                return measured(*words)

            patched.setattr(interpolation, "evaluate_set", evaluate_or_die)
            with pytest.raises(KeyboardInterrupt):
                train(wanted, ALONE, quiet())
    assert set(between(place / name)) < set(between(place / "run")) and not (place / name / "huggingface").exists()
    assert train(wanted, ALONE, quiet()).exit_code == 0
    assert between(place / name) == between(place / "run") and (place / name / "huggingface").is_dir()
    assert events(place / name, "stop")[-1]["reason"] == "complete"


def test_what_is_owed_and_cannot_be_had_is_told(place: Path) -> None:
    train(settings(place, "up_2", interpolate=None), ALONE, quiet())
    start = {"from": str(place / "up_2")}
    train(settings(place, "orphan", start=start, interpolate=None), ALONE, quiet())
    shutil.rmtree(place / "up_2")
    lines = (place / "orphan" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"interpolate: the run is trained and saved, .*up_2.*set interpolate to null"):
        train(settings(place, "orphan", start=start), ALONE, quiet())
    assert (place / "orphan" / "metrics.jsonl").read_text() == lines


def _train(ranks: Ranks, place: str) -> None:
    for name, parallel in LAYOUTS.items():
        train(settings(Path(place), name, parallel=parallel), ranks, quiet())


def test_every_layout_finds_what_one_process_finds(place: Path) -> None:
    run_ranks(_train, 2, str(place), timeout=300)
    for name in LAYOUTS:
        assert between(place / name) == pytest.approx(between(place / "run"), rel=1e-4), name


def test_interpolating_from_scratch_is_refused(place: Path) -> None:
    with pytest.raises((UserError, ValidationError), match=r"needs 'start\.from'"):
        settings(place, "no", start={"from": None})


def test_layer_decay_is_a_group_with_its_own_rate(place: Path) -> None:
    """Against PyTorch's AdamW with a group for each parameter, three steps with a changing rate."""
    torch.manual_seed(0)
    names = [
        "embed_in.weight",
        "layers.0.mlp.dense_h_to_4h.weight",
        "layers.0.input_layernorm.bias",
        "layers.1.mlp.dense_h_to_4h.weight",
        "embed_out.weight",
    ]
    every = cards(ModelConfig(num_layers=2, hidden_size=4, num_heads=1, vocab_size=3, rotary_fraction=0.5))
    mine = {name: nn.Parameter(torch.randn(4, 3)) for name in names}
    theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in mine.items()}
    settings = OptimizerConfig(layer_decay=0.5)
    factors = dict(zip(names, (0.125, 0.25, 0.25, 0.5, 1.0), strict=True))
    assert {name: rate_factor(every[name], 2, 0.5) for name in names} == factors
    ours = AdamW(mine, every, settings)
    peer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.0 if name.endswith("bias") else 0.1, "name": name} for name, p in theirs.items()],
        betas=settings.betas,
        eps=settings.eps,
    )
    for step in range(3):
        for one, other in zip(mine.values(), theirs.values(), strict=True):
            one.grad = torch.randn(4, 3)
            other.grad = one.grad.clone()
        for group in peer.param_groups:
            group["lr"] = 0.1 / (step + 1) * factors[group["name"]]
        ours.step(0.1 / (step + 1))
        peer.step()
        assert ours.lrs == pytest.approx([0.1 / (step + 1)] * len(ours.lrs))
    for name in names:
        torch.testing.assert_close(mine[name], theirs[name])


def test_with_layer_decay_the_early_layers_move_least(place: Path) -> None:
    train(settings(place, "decayed", optimizer={"layer_decay": 0.3}, interpolate=None), ALONE, quiet())
    groups = events(place / "decayed", "dynamics")[-1]["groups"]
    ratios = [groups[name]["update_ratio"] for name in ("layers.0", "layers.1", "embed_out")]
    plain = events(place / "run", "dynamics")[-1]["groups"]
    assert ratios[0] < ratios[1] and ratios[0] < 0.3 * plain["layers.0"]["update_ratio"]
    assert groups["embed_in"]["distance"] < 0.3 * plain["embed_in"]["distance"]
