"""Made-up experiments: an experiment.json and run folders whose losses follow from a few numbers, the same every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.report_runs import learning_rates, write

TOKENS = 2048
STEPS = 200


def entry(arm: str, seed: int | None = None, **keys: Any) -> dict[str, Any]:
    """A run of experiment.json."""
    group = keys.get("group")
    made: dict[str, Any] = {
        "name": arm if seed is None else f"{arm}.s{seed}",
        "arm": arm,
        "seed": seed,
        "group": group,
        "groups": {group: keys.get("axes", {})} if group else {},
        "axes": {},
        "chain": None,
        "stage": None,
        "folder": arm if seed is None else f"seed_{seed}/{arm}",
        "after": [],
        "steps": STEPS,
        "tokens_per_step": TOKENS,
    } | keys
    return made | {"after": [name if seed is None else f"{name}.s{seed}" for name in made["after"]]}


def write_record(folder: Path, entries: Sequence[dict[str, Any]], title: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"format": 1, "experiment": folder.name, "title": title, "runs": list(entries)}
    (folder / "experiment.json").write_text(json.dumps(record))
    return folder


def write_run(
    folder: Path,
    entry: dict[str, Any],
    up: Sequence[float],
    down: Sequence[float],
    *,
    peak: float = 1e-3,
    config: dict[str, Any] | None = None,
    sets: tuple[str, str] = ("prose", "code"),
    done: float = 1.0,
    start: str | None = None,
    more: Sequence[dict[str, Any]] = (),
) -> Path:
    """The folder of a run with evaluations at equal distances from step 0 to its last, and a cosine as learning rate.

    ``done`` below 1: it is still under way. ``more``: further events before the stop.
    """
    steps = entry["steps"]
    origin = entry["after"][0] if entry["after"] else None
    start = f"runs/seed_{entry['seed']}/{start or origin.rpartition('.s')[0] or origin}" if origin else None
    rates = learning_rates(peak, max(1, steps // 100), True, steps)
    when = np.linspace(0, steps, len(up)).round().astype(int)
    events: list[dict[str, Any]] = [{"event": "start", "name": entry["name"], "from": start, "total_steps": steps}]
    position = 0
    for step in range(int(steps * done) + 1):
        tokens = step * TOKENS
        if step:
            events.append({
                "event": "train", "step": step, "tokens": tokens, "loss": 3.0, "lr": float(rates[step - 1]),
                "grad_norm": 0.5 + 0.3 * np.exp(-step / 20),
            })  # fmt: skip
        if position < len(when) and step == when[position]:
            for name, role, losses in ((sets[0], "upstream", up), (sets[1], "downstream", down)):
                loss = float(losses[position])
                events.append({"event": "eval", "step": step, "tokens": tokens, "name": name, "role": role, "loss": loss})
            position += 1
    events += more
    if done == 1:
        events.append({"event": "stop", "step": steps, "reason": "complete"})
    settings: dict[str, Any] = {"name": entry["name"], "start": {"from": start}, "schedule": {"max_lr": peak}}
    settings |= {"training": {"seed": entry["seed"]}, "data": {"seed": entry["seed"]}}
    return write(folder / entry["folder"], events, settings | (config or {}))


def _curves(heat: float, pull: float, seed: int, replay: float, points: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Upstream and downstream losses, (points,), as in the papers: an early rise that grows with the peak, then its decay."""
    t = np.linspace(0, 1, points) ** 2  # dense in the beginning
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 0.012)
    early = heat * (1 - np.exp(-t / 0.01)) * np.exp(-t / 0.25)
    keep = 1 / (1 + 14 * replay**0.7)
    up = 2.17 + shift + 0.18 * early + 0.36 * pull * keep * (1 - np.exp(-4 * t))
    down = 2.87 + shift + 0.1 * early - 0.42 * pull * (1 - 0.12 * replay) * (1 - (1 + 9 * t) ** -0.5)
    noise = np.random.default_rng([seed, round(1000 * heat), round(1000 * replay), round(1000 * pull)])
    wiggle = noise.normal(0, 0.003, (2, points)) * (t > 0)
    return up + wiggle[0], down + wiggle[1]


def write_grid(folder: Path, seeds: Sequence[int] = (1, 2, 3), started: float = 1.0) -> Path:
    """An experiment of some twenty arms such as the papers' together: peaks, warmups, replay, starts, chains, from scratch.

    ``started``: the share of the runs that have begun; the last of these is under way.
    """
    made: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for seed in seeds:

        def add(arm: str, up: Any, down: Any, seed: int = seed, **keys: Any) -> None:
            run = {k: keys.pop(k) for k in ("peak", "config", "sets", "more", "start") if k in keys}
            made.append((entry(arm, seed, **keys), run | {"up": up, "down": down}))

        fall = lambda high, low, n=41: low + (high - low) * (1 + 40 * np.linspace(0, 1, n)) ** -0.9  # noqa: E731
        add("upstream", fall(10, 2.17), fall(10, 2.87), steps=400)
        up, down = _curves(1.0, 1.0, seed, 0.0)
        groups = {"max_lr": {"schedule.max_lr": 1e-3}, "warmup": {"schedule.warmup": "1%"}, "replay": {"replay.fraction": None}}
        more = [
            {"event": "interpolation", "step": STEPS,
             "alpha": a, "name": name, "role": role, "loss": base + k * a - 0.2 * a * (1 - a)}
            for a in np.linspace(0, 1, 11).round(2).tolist()
            for name, role, base, k in (("prose", "upstream", 2.17, 0.3), ("code", "downstream", 2.87, -0.3))
        ]  # fmt: skip
        more += [
            {"event": "dynamics", "step": s, "tokens": s * TOKENS, "groups": {
                "all": {"weight_norm": 90.0, "update_ratio": 1e-3 * (1 + s) ** -0.3, "distance": 0.2 * s**0.5},
                "layers.0": {"weight_norm": 30.0, "update_ratio": 2e-3 * (1 + s) ** -0.3, "distance": 0.1 * s**0.5},
            }} for s in range(0, STEPS + 1, 20)
        ]  # fmt: skip
        add("rewarm", up, down, after=["upstream"], groups=groups, more=more)
        up, down = _curves(0.1, 0.6, seed, 0.0)
        add("constant", up, down, after=["upstream"], peak=1e-4)
        add("from_scratch", fall(10, 3.1), fall(10, 2.69))
        add("same_data", *_curves(0.8, 0.05, seed, 0.0), after=["upstream"])
        for lr in (2.5e-4, 5e-4, 2e-3, 4e-3):
            up, down = _curves(lr / 1e-3, (lr / 1e-3) ** 0.25, seed, 0.0)
            axes: dict[str, Any] = {"schedule.max_lr": lr}
            config = {"schedule": {"max_lr": lr}}
            add(f"max_lr_{lr:g}", up, down, after=["upstream"], group="max_lr", axes=axes, peak=lr, config=config)
        for warmup in (0, "2%", "8%"):
            up, down = _curves(1.2 if warmup == 0 else 0.98, 1.0, seed, 0.0)
            label = str(warmup).replace("%", "pct")
            add(f"warmup_{label}", up, down, after=["upstream"], group="warmup", axes={"schedule.warmup": warmup},
                config={"schedule": {"max_lr": 1e-3, "warmup": warmup}})  # fmt: skip
        for fraction in (0.005, 0.01, 0.05, 0.1, 0.25, 0.5):
            up, down = _curves(1.0, 1.0, seed, fraction)
            add(f"replay_{fraction:g}", up, down, after=["upstream"], group="replay", axes={"replay.fraction": fraction},
                config={"replay": {"fraction": fraction}})  # fmt: skip
        for start, worse in (("7pct", 0.9), ("19pct", 0.4)):
            for warmup in (0, "1%"):
                up, down = _curves(1.0 + 0.2 * (warmup == 0), 1.0, seed, 0.0)
                gone = worse * np.exp(-3 * np.linspace(0, 1, 41))
                axes = {"from": start, "schedule.warmup": warmup}
                add(f"early_{start}_{str(warmup).replace('%', 'pct')}", up + gone, down + gone, after=["upstream"],
                    group="early", axes=axes, start=f"upstream/checkpoints/step_{start}")  # fmt: skip
        for chain, gain in (("rewarmed", 0.0), ("infinite_cosine", 0.03)):
            level = 10.0
            for stage, name in enumerate(("first", "second", "third")):
                low = 2.9 - 0.25 * stage - gain + np.random.default_rng(seed).normal(0, 0.01)
                bump: Any = 0.0 if stage == 0 else (0.15 if not gain else 0.03) * np.exp(-np.linspace(0, 6, 41))
                bump = bump * (np.arange(41) > 0)
                curve = fall(level, low) + bump
                curve[0] = level
                add(f"{chain}-{name}", curve, curve + 0.4, chain=chain, stage=stage,
                    after=[f"{chain}-{('first', 'second')[stage - 1]}"] if stage else [])  # fmt: skip
                level = float(curve[-1])
        add("one_cosine", fall(10, 2.3, 121), fall(10, 2.7, 121), steps=3 * STEPS)
    write_record(folder, [entry for entry, _ in made], "How to re-warm, in a made-up experiment")
    begun = int(len(made) * started)
    for number, (plan, run) in enumerate(made[:begun]):
        write_run(folder, plan, done=0.6 if started < 1 and number == begun - 1 else 1.0, **run)
    return folder
