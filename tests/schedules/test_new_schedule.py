"""A curve that is registered from outside: one entry in CURVES, seen by schema, schedule, training, gallery and docs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pydantic import ValidationError

from megarewarm.config.document import json_schema, markdown
from megarewarm.config.schedule import ScheduleConfig, build_schedule
from megarewarm.parallel.ranks import Ranks
from megarewarm.report.figures.schedules import draw_gallery
from megarewarm.schedules.curves import Values
from megarewarm.schedules.schedule import CURVES, Schedule, decay
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, quiet

ROOT = Path(__file__).resolve().parents[2]


def quadratic(u: Values, max_lr: float, min_lr: float) -> Values:
    """min_lr + (max_lr - min_lr)(1 - u)^2."""
    return min_lr + (max_lr - min_lr) * (1.0 - u) ** 2


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    CURVES["quadratic"] = decay(quadratic)
    yield
    del CURVES["quadratic"]


def test_the_schema_knows_it() -> None:
    keys: dict[str, object] = {"curve": "quadratic", "max_lr": 1.0}
    assert ScheduleConfig.model_validate(keys | {"min_lr": "10%"}).min_lr == 0.1
    with pytest.raises(ValidationError, match="'quadratic' needs 'min_lr'"):
        ScheduleConfig.model_validate(keys)
    with pytest.raises(ValidationError, match="'quadratic' has no use for 'unclamped'"):
        ScheduleConfig.model_validate(keys | {"min_lr": 0, "unclamped": True})
    with pytest.raises(ValidationError, match="'infinite_inverse_sqrt' or 'quadratic'"):
        ScheduleConfig.model_validate(keys | {"curve": "cubic"})
    assert "| `quadratic` |" in markdown() and '"quadratic"' in json_schema()


def test_it_is_computed_and_stored() -> None:
    keys = ScheduleConfig.model_validate({"curve": "quadratic", "max_lr": 1.0, "min_lr": 0.2, "warmup": 10, "length": 90})
    schedule = build_schedule(keys, lambda budget: budget.in_steps(1, 100), 100)
    assert schedule.lr(4) == 0.4 and schedule.lr(50) == 0.2 + 0.8 * 0.25 and schedule.lr(99) == 0.2
    assert [name for name, _, _ in schedule.phases()] == ["warmup", "decay", "after"]
    assert Schedule.from_spec(schedule.spec()) == schedule


def test_it_trains(tmp_path: Path) -> None:
    keys = {"curve": "quadratic", "max_lr": 1e-3, "min_lr": 1e-4, "warmup": 2}
    outcome = train(config(tmp_path, schedule=keys, training={"budget": 6}), Ranks(0, 1, torch.device("cpu")), quiet())
    rates = [line["lr"] for line in events(outcome.folder, "train")]
    assert np.allclose(rates, [5e-4, 5e-4, *(1e-4 + 9e-4 * (1 - k / 4) ** 2 for k in range(4))])


def test_the_gallery_has_a_panel_for_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three curves more are in a sixth row, and no two are drawn over each other."""
    for name in ("second", "third"):
        monkeypatch.setitem(CURVES, name, decay(quadratic))
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_gallery(tmp_path / "all.png")
    shown = [axes.get_title(loc="left") for axes in figures[0].axes if axes.axison]
    assert shown[:-2] == list(CURVES) and len(CURVES) == 13 and len(set(shown)) == len(shown) == 15
    assert [bool(axes.lines) for axes in figures[0].axes] == [axes.axison for axes in figures[0].axes]


def test_the_page_of_schedules_has_a_row_for_every_curve() -> None:
    """With its own keys; those that many curves share are in the table above it."""
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([^|]*)\| [^|]+ \|$", (ROOT / "docs/schedules.md").read_text(), re.MULTILINE)
    keys = {name: set(re.findall(r"`(\w+)`", own)) for name, own in rows}
    for name, curve in CURVES.items():
        own = {*curve.needs, *curve.may} - {"min_lr", "length", "unclamped"}
        assert name == "quadratic" or keys[name] == own or "the same" in dict(rows)[name], name
