"""Steps whose update is queued before the host knows loss and norm, as on a GPU, here on a CPU with the operators' definitions:
the same run, bit for bit, as one whose host decides first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarewarm.optimizers.adamw import AdamW
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import step
from megarewarm.training.start import inputs
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, faults, quiet
from tests.training.test_bad_steps import Faults, same, weights

ALONE = Ranks(0, 1, torch.device("cpu"))
THAWS = {"optimizer": {"train": {"only": ["head", "layers 1"], "for": "8 steps"}}}
CLIPPED = {"optimizer": {"clip_norm": 0.2}}
CASES: dict[str, tuple[dict[str, Any], dict[int, str]]] = {
    "clipped": (CLIPPED, {}),
    "not clipped": ({"optimizer": {"clip_norm": None}}, {}),
    "bf16": ({"training": {"precision": "bf16"}}, {}),
    "once bad": (CLIPPED, {7: "loss"}),
    "bad gradient once": ({}, {7: "gradient"}),
    "twice bad": ({}, {7: "gradient", 8: "gradient"}),
    "thaws, bad after it": (THAWS, {11: "loss", 12: "loss"}),
}


@pytest.fixture
def guarding(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Lets a CPU guard; the scales that updates were queued with."""
    scales: list[Tensor] = []
    update = AdamW.step

    def seen(self: AdamW, lr: float, gradients: Any = None, scale: float | Tensor = 1.0) -> None:
        if isinstance(scale, Tensor):
            scales.append(scale)
        update(self, lr, gradients, scale)

    monkeypatch.setattr(AdamW, "step", seen)
    monkeypatch.setattr(inputs, "choose_optimizer", lambda *_: ("triton", []))
    monkeypatch.setattr(step, "GUARDING", ("cpu",))
    return scales


def _lines(folder: Path) -> list[tuple[Any, ...]]:
    kept = ("step", "loss", "grad_norm", "lr", "changed")
    return [tuple(line.get(key) for key in kept) for line in events(folder, "train")]


@pytest.mark.parametrize("case", list(CASES))
def test_a_guarded_run_is_the_run(tmp_path: Path, case: str, guarding: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    changes, calls = CASES[case]
    found = []
    for name, devices in (("guarded", ("cpu",)), ("waiting", ())):
        monkeypatch.setattr(step, "GUARDING", devices)
        with monkeypatch.context() as damaged:
            Faults(damaged, calls)
            made = config(tmp_path, folder=str(tmp_path / name), evaluation={"every": 20}, checkpoint={"every": 20}, **changes)
            found.append(train(made, ALONE, quiet()))
        parts = 2 if case.startswith("thaws") else 1
        if devices:
            assert len(guarding) >= 20 and sum(math.isnan(scale) for scale in guarding) == (parts if calls else 0)
            guarding.clear()
        else:
            assert not guarding
    guarded, waiting = found
    assert _lines(guarded.folder) == _lines(waiting.folder)
    assert same(weights(guarded.folder, 20), weights(waiting.folder, 20))
    assert guarded.losses == waiting.losses
    alarms = [[line["message"] for line in faults(each.folder)] for each in found]
    assert alarms[0] == alarms[1] and bool(alarms[0]) == bool(calls)


@pytest.mark.parametrize(
    "changes",
    [
        {"reliability": {"spikes": "skip"}},
        {"training": {"precision": "fp16"}},
        {"optimizer": {"kind": "muon"}},
        {"valuation": {"against": ["old"], "every": "1 steps"}},
    ],
    ids=["spikes", "fp16", "muon", "values"],
)
def test_what_may_stop_or_look_at_an_update_waits(tmp_path: Path, changes: dict[str, Any], guarding: list[Tensor]) -> None:
    changes = {**changes, "training": {"budget": 2, **changes.get("training", {})}}
    train(config(tmp_path, **changes), ALONE, quiet())
    assert not guarding
