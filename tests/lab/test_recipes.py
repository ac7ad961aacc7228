"""Every published recipe is drawn by a dry run, and has the figures that its comment states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megarewarm.config.load import read_configs, validate
from megarewarm.config.schema import RunConfig
from megarewarm.lab.plan_ahead import plan_ahead
from megarewarm.main import main
from megarewarm.rewarm.switches import training_phases
from megarewarm.training.start.plan import Plan

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
TOKENS = {  # of a step, and of the run
    "olmo3_midtraining": (2**21, 100e9),
    "olmo3_long_context": (2**22, 50e9),
    "nvidia_reuse": (1152 * 4096, 300e9),
    "deepseekmath": (10e6, 500e9),
    "llemma": (4 * 2**20, 42_000 * 2**22),
    "chipnemo": (2**20, 23_200 * 2**20),
}


def plan_of(name: str) -> Plan:
    return plan_ahead(validate(RunConfig, *read_configs([str(RECIPES / f"{name}.yml")])))[0]


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == TOKENS.keys()


@pytest.mark.parametrize("name", TOKENS)
def test_it_is_drawn_and_names_its_source(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = RECIPES / f"{name}.yml"
    assert main([str(path), "--dry-run", "--allow-missing"]) == 0
    shown = capsys.readouterr().out
    assert "learning rate" in shown and "reset table" in shown and "missing, needed to train" in shown
    text = path.read_text()
    assert "arXiv" in text or "official script" in text
    assert f"configs/recipes/{name}.yml --dry-run --allow-missing" in text
    config = plan_of(name).config
    step, run = TOKENS[name]
    assert config.tokens_per_step == pytest.approx(step, rel=2e-3)
    assert config.total_steps * config.tokens_per_step == pytest.approx(run, rel=2e-3)


def test_rates() -> None:
    plans = {name: plan_of(name) for name in TOKENS}
    ends = {name: (plan.lr(1), plan.lr(plan.config.total_steps)) for name, plan in plans.items()}
    peaks = {name: max(plan.lr(n) for n in range(1, 3000)) for name, plan in plans.items()}
    assert ends["olmo3_midtraining"] == pytest.approx((2.0712e-4, 0), rel=1e-4, abs=1e-8)
    assert peaks["olmo3_long_context"] == plans["olmo3_long_context"].lr(201) == pytest.approx(2.0712e-4, rel=1e-4)
    assert ends["nvidia_reuse"] == pytest.approx((4.5e-5, 4.5e-7), rel=1e-3)
    assert peaks["deepseekmath"] == plans["deepseekmath"].lr(2001) == 4.2e-4
    assert ends["deepseekmath"][1] == pytest.approx(4.2e-5, rel=1e-3)
    assert peaks["llemma"] == plans["llemma"].lr(501) == 1e-4
    assert plans["llemma"].schedule.lr(48_000) == pytest.approx(1e-4 / 30) and ends["llemma"][1] > 1e-4 / 30
    assert ends["chipnemo"] == (5e-6, 5e-6) == (peaks["chipnemo"], 5e-6)


def test_what_is_kept_and_where_the_blend_changes() -> None:
    for name in TOKENS:
        policy = plan_of(name).policy
        kept = "keep" if name.startswith("olmo3") else "reset"
        assert (policy.moments, policy.optimizer_step) == (kept, kept) and policy.schedule == policy.data == "restart"
    plan = plan_of("nvidia_reuse")
    first, second = training_phases(plan.config, plan.schedule, plan.origin, [])
    at = second.first // plan.config.training.global_batch
    assert plan.schedule.lr(at) < 4.5e-5 / 5 <= plan.schedule.lr(at - 1)
    assert [source.name for source in second.sources] == ["web", "other", "questions"] and len(first.sources) == 2
    shares = np.array([source.weight for source in plan_of("deepseekmath").config.data.train])
    assert shares.tolist() == [56, 4, 10, 20, 10]
