"""Plausible made-up run folders: losses from a simple model of annealing, learning and forgetting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

STEPS = 1000
TOKENS_PER_STEP = 524_288
START = "runs/prose_pretrain/checkpoints/step_2000"

# name: peak LR, warmup steps, decays, train on, starts from
ARMS: dict[str, tuple[float, int, bool, str, str | None]] = {
    "prose_pretrain": (1e-3, 20, True, "prose", None),
    "constant_min": (1e-4, 0, False, "code", START),
    "rewarm_half": (5e-4, 10, True, "code", START),
    "rewarm": (1e-3, 10, True, "code", START),
    "rewarm_double": (2e-3, 10, True, "code", START),
    "no_warmup": (1e-3, 0, True, "code", START),
    "prose_again": (1e-3, 10, True, "prose", START),
    "scratch": (1e-3, 10, True, "code", None),
}


def learning_rates(peak: float, warmup: int, decays: bool, steps: int = STEPS) -> np.ndarray:
    n = np.arange(steps)
    u = np.clip((n - warmup) / max(steps - warmup, 1), 0, 1)
    floor = peak / 10
    rates = floor + (peak - floor) / 2 * (1 + np.cos(np.pi * u)) if decays else np.full(steps, peak)
    return np.where((warmup > 0) & (n <= warmup), peak * np.maximum(1, n) / max(warmup, 1), rates)


def simulate(name: str, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Rates (steps,), and upstream and downstream losses (steps + 1,) of which the first is the start's."""
    peak, warmup, decays, data, origin = ARMS[name]
    rates = learning_rates(peak, warmup, decays, steps)
    work = np.concatenate([[0.0], np.cumsum(rates)]) / (1e-3 * STEPS)
    heat = np.zeros(steps + 1)
    for step in range(steps):
        heat[step + 1] = heat[step] + 0.08 * (rates[step] / 1e-3 - heat[step])
    if origin:
        heat = np.maximum(heat, 0.1)
    shock = 0.0 if warmup else (peak / 1e-3) * 0.5 * np.exp(-np.arange(steps + 1) / 6) * (np.arange(steps + 1) > 0)
    if origin is None:
        own = 2.28 + 6.9 * (1 + 60 * work) ** -0.75 + 0.16 * heat
        other = 3.1 + 6.1 * (1 + 60 * work) ** -0.75 + 0.16 * heat
        up, down = (own, other) if data == "prose" else (other + 0.6, own + 0.1)
        up[0] = down[0] = math.log(50304)
    elif data == "prose":
        up, down = 2.418 + 0.22 * heat - 0.03 * work + 0.6 * shock, 3.418 + 0.26 * heat - 0.02 * work
    else:
        up = 2.42 + 0.20 * heat + 1.05 * (1 - np.exp(-1.6 * work)) + 0.8 * shock
        down = 3.43 + 0.14 * heat - 1.42 * (1 - (1 + 9 * work) ** -0.55) + shock
    return {"lr": rates, "upstream": np.asarray(up), "downstream": np.asarray(down)}


def config(name: str, steps: int = STEPS) -> dict[str, Any]:
    peak, warmup, decays, data, origin = ARMS[name]
    schedule: dict[str, Any] = {"curve": "cosine" if decays else "constant", "max_lr": peak, "warmup": warmup}
    schedule["min_lr"] = peak / 10 if decays else None
    return {
        "name": name,
        "folder": f"runs/{name}",
        "start": {"from": origin, "intent": "rewarm" if origin else "scratch"},
        "data": {"sequence_length": 2048, "train": [{"path": f"data/{data}_text_document", "weight": 1.0}]},
        "schedule": schedule,
        "training": {"budget": steps, "global_batch": 256, "micro_batch": 8},
    }


def train_line(step: int, lr: float, loss: float) -> dict[str, Any]:
    return {
        "event": "train", "step": step, "tokens": step * TOKENS_PER_STEP, "loss": loss, "lr": lr,
        "grad_norm": 0.5, "tokens_per_second": 1.2e5,
    }  # fmt: skip


def eval_line(step: int, name: str, role: str, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": step, "tokens": step * TOKENS_PER_STEP, "name": name, "role": role, "loss": loss}


def task_line(step: int, name: str, right: str, digest: str = "a") -> dict[str, Any]:
    """A test on items of two choices, none of them lost or won."""
    accuracy = right.count("1") / len(right)
    return {
        "event": "task", "step": step, "tokens": step * TOKENS_PER_STEP, "name": name, "items": len(right), "digest": digest,
        "accuracy": accuracy, "accuracy_bytes": accuracy, "chance": 0.5, "bits_per_byte": 2.0, "right": right,
        "right_bytes": right, "lost": 0.0, "won": 0.0, "lost_beyond": 0.0, "won_beyond": 0.0,
    }  # fmt: skip


def lines(name: str, steps: int = STEPS) -> list[dict[str, Any]]:
    """The events of one arm, in the order in which a run writes them."""
    rng = np.random.default_rng(sum(map(ord, name)))
    simulated = simulate(name, steps)
    origin = ARMS[name][4]
    choices = {"weights": "load", "moments": "reset", "optimizer_step": "reset", "schedule": "restart"}
    if origin is None:
        choices |= {"weights": "initialise"}
    events: list[dict[str, Any]] = [
        {
            "event": "start", "name": name, "folder": f"runs/{name}", "from": origin, "parameters": 30_000_000,
            "reset": [{"line": line, "choice": choice} for line, choice in choices.items()], "total_steps": steps,
        }
    ]  # fmt: skip
    for step in range(steps + 1):
        if step:
            loss = float(simulated["downstream"][step] + rng.normal(0, 0.03))
            events.append(train_line(step, float(simulated["lr"][step - 1]), loss))
        if step % 20 == 0 or (step <= 60 and step % 4 == 0) or step == steps:
            noise = rng.normal(0, 0.002) * (step > 0)  # every arm evaluates the same start checkpoint
            for role, dataset in (("upstream", "prose"), ("downstream", "code")):
                events.append(eval_line(step, dataset, role, float(simulated[role][step] + noise)))
        if step and step % 250 == 0:
            events.append({"event": "save", "step": step, "path": f"checkpoints/step_{step}"})
    return [*events, {"event": "stop", "step": steps, "reason": "budget reached"}]


def write(folder: Path, events: list[dict[str, Any]], settings: dict[str, Any] | None = None, tail: str = "") -> Path:
    """A run folder with these events; ``tail`` is appended as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(text + tail)
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def write_arms(root: Path, names: list[str] | None = None, steps: int = STEPS) -> list[Path]:
    return [write(root / name, lines(name, steps), config(name, steps)) for name in names or ARMS]
