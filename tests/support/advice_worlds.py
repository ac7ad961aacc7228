"""Experiments whose truth is known: by the annealing law with other numbers, or by something no law here describes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megarewarm.schedules.annealing import learning_rate_sums
from megarewarm.schedules.schedule import Schedule
from tests.support.report_runs import write

STEPS, TOKENS = 80, 2048
START = {"upstream": 4.0, "downstream": 6.0}
ROLES = ("upstream", "downstream")

Truth = Callable[["ArmSpec", str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ArmSpec:
    """An arm of a world. ``fate``: 'complete', 'stopped' in the middle, or 'diverged' (the loss is not finite)."""

    peak: float
    warmup: float = 0.05
    replay: float = 0.0
    curve: str = "cosine"
    steps: int = STEPS
    start: str = "elsewhere/step_9"
    seed: int | None = None
    fate: str = "complete"

    @property
    def arm(self) -> str:
        return f"{self.curve}_{self.peak:.5g}_{self.warmup:g}_{self.replay:g}_{self.steps}_{self.start[:3]}"

    @property
    def schedule(self) -> Schedule:
        low = None if self.curve == "constant" else self.peak / 10
        return Schedule(self.curve, self.peak, self.warmup * self.steps, float(self.steps), low)


def annealing(arm: ArmSpec, role: str) -> np.ndarray:
    """Loss after every step (steps,) by the annealing law; replay takes from the shift."""
    sums = learning_rate_sums(arm.schedule.values(np.arange(arm.steps)), 0.95)
    share = arm.replay if role == "upstream" else 1 - arm.replay
    shift = 0.9 * (1 - math.sqrt(share)) if role == "upstream" else -1.6 * share**0.3
    learned = 0.5 * ((0.3 + sums.total) ** -0.5 - 0.3**-0.5)
    return START[role] + 0.3 * learned - 12 * sums.area + shift * (1 - (1 + 90 * sums.total) ** -0.6)


def odd(arm: ArmSpec, role: str) -> np.ndarray:
    """Ends that no law here describes: a kink in the peak, a bump in the warmup, and an interaction with replay."""
    x = math.log2(arm.peak / 1e-3)
    bump = 0.8 * math.exp(-((arm.warmup / 0.03) ** 2)) if arm.peak > 1e-3 else 0.1 * arm.warmup
    if role == "upstream":
        end = START[role] + 0.1 + (0.25 * abs(x) + bump) * (1 - arm.replay) ** 2
    else:
        end = START[role] - 1.2 + 0.3 * (x - 0.7) ** 2 + bump + 0.5 * arm.replay**2
    steps = np.arange(1, arm.steps + 1)
    return START[role] + (end - START[role]) * (1 - np.exp(-6 * steps / arm.steps)) / (1 - math.exp(-6))


WORLDS: dict[str, Truth] = {"annealing": annealing, "odd": odd}


def grid(
    peaks: Sequence[float], warmups: Sequence[float] = (0.05,), replays: Sequence[float] = (0.0,), **rest: Any
) -> list[ArmSpec]:
    """All combinations."""
    return [ArmSpec(p, w, r, **rest) for p, w, r in itertools.product(peaks, warmups, replays)]


def end(truth: Truth, arm: ArmSpec) -> dict[str, float]:
    """The arm's true final losses."""
    return {role: float(truth(arm, role)[-1]) for role in ROLES}


def experiment(root: Path, arms: Sequence[ArmSpec], truth: Truth, noise: float = 0.0) -> Path:
    """An experiment's folder with a run for every one of ``arms``. ``noise``: deviation of a run's level, in nats."""
    entries: list[dict[str, Any]] = []
    for arm in arms:
        name = arm.arm if arm.seed is None else f"{arm.arm}.s{arm.seed}"
        rng = np.random.default_rng([*name.encode()])
        done = arm.steps if arm.fate == "complete" else arm.steps // 2
        rates = arm.schedule.values(np.arange(arm.steps))
        curves = {role: truth(arm, role) for role in ROLES}
        level = {role: rng.normal(0, noise) for role in ROLES}
        begun = {"event": "start", "name": name, "from": arm.start, "step": 0, "total_steps": arm.steps}
        events: list[dict[str, Any]] = [begun | {"schedule": arm.schedule.spec()}]
        for step in range(done + 1):
            if step:
                numbers = {"loss": 3.0, "lr": float(rates[step - 1]), "grad_norm": 1.0, "tokens_per_second": 1e4}
                events.append({"event": "train", "step": step, "tokens": step * TOKENS, **numbers})
            if step in (0, 2, 5, done) or step % 10 == 0:
                for role in ROLES:
                    loss = START[role]
                    if step:
                        loss = float(curves[role][step - 1]) + level[role] + rng.normal(0, noise / 4)
                    bad = arm.fate == "diverged" and step == done
                    events.append(
                        {"event": "eval", "step": step, "tokens": step * TOKENS, "name": f"{role}_set", "role": role,
                         "loss": None if bad else loss}
                    )  # fmt: skip
        reason = {"complete": "complete", "stopped": "signal 15", "diverged": "diverged"}[arm.fate]
        events.append({"event": "stop", "step": done, "reason": reason})
        spec = arm.schedule.spec()
        config = {
            "name": name,
            "folder": str(root / name),
            "start": {"from": arm.start},
            "schedule": {"curve": arm.curve, "max_lr": arm.peak, "warmup": spec["warmup_steps"], "min_lr": spec.get("min_lr")},
            "training": {"budget": arm.steps, "seed": arm.seed},
            "replay": {"fraction": arm.replay, "of": "lineage"} if arm.replay else None,
        }
        write(root / name, events, config)
        entries.append({"name": name, "arm": arm.arm, "seed": arm.seed, "folder": name, "after": [], "steps": arm.steps})
    (root / "experiment.json").write_text(json.dumps({"format": 1, "experiment": root.name, "runs": entries}))
    return root
