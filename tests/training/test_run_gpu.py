"""Runs of the trainer on a device in bf16: stopped and started again, and repeated, bit for bit; near plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.config.schema import RunConfig
from megarewarm.parallel import graph
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import trainer
from megarewarm.training.trainer import train
from tests.support.on_device import NEEDS_GPU
from tests.support.tiny import config, quiet
from tests.training.test_resume import Killed, losses, tensors_of

pytestmark = NEEDS_GPU

NEOX: dict[str, Any] = {"num_layers": 3, "hidden_size": 128, "num_heads": 2}
LLAMA = NEOX | {"family": "llama", "num_kv_heads": 1, "ffn_size": 344}
KERNELS: dict[str, dict[str, Any]] = {
    "deterministic": {"deterministic": True, "graph": False},
    "triton": {"use": "triton", "attention": "triton", "graph": False},
    "graph": {"deterministic": True, "graph": True},
}


def run_of(place: Path, folder: str, kernels: dict[str, Any], model: dict[str, Any]) -> RunConfig:
    more = {"model": model, "kernels": kernels, "training": {"device": "cuda", "precision": "bf16", "budget": 12}}
    # at a rate of 1e-2 roundings of bf16 grow to half a nat within these steps, at this one to some thousandths
    return config(place, folder=str(place / folder), schedule={"max_lr": 2e-3, "min_lr": 2e-4}, **more)


def trained(run: RunConfig) -> Path:
    return train(run, Ranks(0, 1, torch.device("cuda")), quiet()).folder


def assert_the_same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other) and len(losses(one)) == 12
    mine, wanted = (tensors_of(folder / "checkpoints/step_12") for folder in (one, other))
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in mine)


@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_repeated_and_stopped_amid_it_is_the_same_run(
    kernels: dict[str, Any], model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(run_of(tmp_path, "first", kernels, model))
    assert_the_same(trained(run_of(tmp_path, "repeated", kernels, model)), first)
    stopped, original = run_of(tmp_path, "stopped", kernels, model), trainer.training_step

    def step_or_die(run: Any, lr: float) -> Any:
        if run.step == 7:
            raise Killed
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(Killed):
        trained(stopped)
    monkeypatch.setattr(trainer, "training_step", original)
    assert_the_same(trained(stopped), first)


@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
def test_fused_kernels_follow_plain_pytorch(model: dict[str, Any], tmp_path: Path) -> None:
    plain, fused = (list(losses(trained(run_of(tmp_path, use, {"use": use}, model))).values()) for use in ("reference", "auto"))
    assert max(abs(a - b) for a, b in zip(plain, fused, strict=True)) < 0.02
    assert fused[-1] < fused[0] - 0.1


@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["neox", "llama"])
def test_graphs_of_the_micro_batch_follow_its_launches(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures, original = [0], graph.captured

    def counted(*given: Any) -> Any:
        captures[0] += 1
        return original(*given)

    monkeypatch.setattr(graph, "captured", counted)
    found = []
    for used in (True, False):
        kernels = {"use": "triton", "attention": "triton", "graph": used}
        found.append(list(losses(trained(run_of(tmp_path, f"graph_{used}", kernels, model))).values()))
    assert captures == [1]
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < 2e-3, "weights' gradients may come from another algorithm"
