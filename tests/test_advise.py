"""tools/advise.py on whole experiments: what it reads, what it recommends, and what it refuses to."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_laws_fits as made
from matplotlib.text import Text
from report_runs import write

from megarewarm.errors import UserError
from megarewarm.laws.advice import Advice, advise, as_json
from megarewarm.laws.arms import read_trained, replay_families, schedule_families
from megarewarm.laws.show import advice_figure

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 2048


def add_run(
    root: Path,
    name: str,
    rates: np.ndarray,
    losses: dict[str, tuple[np.ndarray, np.ndarray]],
    origin: str | None,
    config: dict[str, Any],
    *,
    complete: bool = True,
) -> dict[str, Any]:
    """A run's folder with these losses after these steps; its entry in experiment.json."""
    place = f"seed_1/{name}"
    spec = {"curve": "cosine", "max_lr": float(rates.max()), "warmup_steps": 2.0, "length": float(len(rates))}
    spec["min_lr"] = float(rates.max()) / 10
    events: list[dict[str, Any]] = [{"event": "start", "name": name, "from": origin, "step": 0, "schedule": spec}]
    for step in range(len(rates) + 1):
        if step:
            numbers = {"loss": 3.0, "lr": float(rates[step - 1]), "grad_norm": 1.0, "tokens_per_second": 1e4}
            events.append({"event": "train", "step": step, "tokens": step * TOKENS, **numbers})
        for role, (steps, values) in losses.items():
            if len(found := values[steps == step]):
                told = {"name": f"{role}_set", "role": role, "loss": float(found[0])}
                events.append({"event": "eval", "step": step, "tokens": step * TOKENS, **told})
    if complete:
        events.append({"event": "stop", "step": len(rates), "reason": "complete"})
    config = {"name": name, "folder": str(root / place), "start": {"from": origin}, **config}
    write(root / place, events, config)
    return {"name": name, "arm": name, "seed": 1, "folder": place, "after": [], "steps": len(rates)}


def schedules(root: Path, arms: dict[str, np.ndarray], roles: tuple[str, ...] = ("upstream", "downstream")) -> Path:
    """An experiment whose runs differ in the schedule, after a run from scratch that they start from."""
    before = np.concatenate([np.full(299, made.SUM_BEFORE / 299 - made.BEFORE / 299), [made.BEFORE]])
    first = {"upstream": (np.array([0, 300]), np.array([9.0, 3.0]))}
    entries = [add_run(root, "base", before, first, None, {"schedule": {}})]
    for arm, rates in arms.items():
        losses = {}
        for role, shift in (("upstream", 0.9), ("downstream", -0.9)):
            if role in roles:
                losses[role] = made.trained(arm, rates, shift, 0.002).losses["upstream"]
        config = {"schedule": {"max_lr": float(rates.max())}}
        entries.append(add_run(root, arm, rates, losses, f"{root}/seed_1/base/checkpoints/step_300", config))
    record = {"format": 1, "experiment": root.name, "title": None, "runs": entries}
    (root / "experiment.json").write_text(json.dumps(record))
    return root


def replays(root: Path, fractions: list[float]) -> Path:
    entries = []
    for fraction in fractions:
        losses = {role: made.replayed(fraction, role, 0.001).losses[role] for role in ("upstream", "downstream")}
        config = {"schedule": {"max_lr": 1e-3}, "replay": {"fraction": fraction, "of": "lineage"} if fraction else None}
        entries.append(add_run(root, f"r{fraction}", np.full(made.STEPS, 1e-3), losses, "elsewhere/step_9", config))
    (root / "experiment.json").write_text(json.dumps({"format": 1, "experiment": root.name, "runs": entries}))
    return root


def test_what_is_read(tmp_path: Path) -> None:
    root = schedules(tmp_path / "trial", made.ARMS)
    record = json.loads((root / "experiment.json").read_text())
    losses = made.trained("low", made.ARMS["low"], 0.9, 0.0).losses
    other = {"schedule": {"max_lr": 5e-4}, "optimizer": {"kind": "other"}}
    record["runs"].append(add_run(root, "other", made.ARMS["low"], losses, f"{root}/seed_1/base", other))
    record["runs"].append(add_run(root, "half", made.ARMS["low"], losses, f"{root}/seed_1/base", {}, complete=False))
    record["runs"].append({"name": "later", "arm": "later", "seed": 1, "folder": "seed_1/later"})
    (root / "experiment.json").write_text(json.dumps(record))
    title, runs, notes = read_trained(root)
    assert title == "trial" and [run.name for run in runs] == [*made.ARMS, "other"]
    assert notes[0] == "2 of 9 runs are not finished and left out" and notes[1].startswith("1 trained from scratch")
    assert runs[0].rate_before == pytest.approx(made.BEFORE) and runs[0].sum_before == pytest.approx(made.SUM_BEFORE)
    (family,) = schedule_families(runs)
    assert family.arms == list(made.ARMS) and replay_families(runs) == []
    assert family.mean_start("upstream") == pytest.approx(3.01)


def test_advice_on_schedules(tmp_path: Path) -> None:
    root = schedules(tmp_path / "trial", made.ARMS)
    output = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "tools" / "advise.py"),
        str(root),
        "--output",
        str(output),
        "--upstream-within",
        "900%",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    advice = json.loads((output / "advice.json").read_text())
    assert (output / "advice.png").stat().st_size > 10_000
    (section,) = advice["sections"]
    assert section["kind"] == "schedule" and section["arms"] == list(made.ARMS)
    assert "one replay fraction only (0)" in " ".join(advice["notes"])
    down = section["laws"]["downstream"]
    assert down["lambda"] == 0.9 and down["rate_before"] == "checkpoint" and len(down["held_out"]) == 5
    assert {one["keys"]["schedule"]["curve"] for one in section["predictions"]} == {"cosine", "linear", "wsd", "constant"}
    # a constant rate, of which none but the lowest was tried, against the truth
    for one in section["predictions"]:
        keys = one["keys"]["schedule"]
        if keys["curve"] == "constant":
            rates = np.full(made.STEPS, keys["max_lr"])
            warmup = float(keys["warmup"].rstrip("%")) / 100 * made.STEPS
            if warmup <= 1:
                truth = 3.01 + made.true_change(rates, -0.9)[-1]
                assert abs(one["losses"]["downstream"] - truth) < max(0.05, down["band"]), keys
    # with no limit to speak of, the best is what lowers the downstream loss most
    best = min(section["predictions"], key=lambda one: one["losses"]["downstream"])["keys"]["schedule"]
    assert f"{best['curve']}, peak " in " ".join(section["sentences"])
    assert "left out, then predicted" in done.stdout and "2505.07796, second-hand" in " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Advice:
    """Advice where the upstream loss may not rise at all."""
    return advise(schedules(tmp_path_factory.mktemp("strict"), made.ARMS), 0.0)


@pytest.mark.parametrize("before", ["", "rewarmed_from_the_middle_of_", "its_own_"])
def test_names_stay_inside_their_frames_and_off_each_other(strict: Advice, before: str) -> None:
    advice = copy.deepcopy(strict)
    for law in advice.sections[0].laws.values():
        law.trial.arms[:] = [
            dataclasses.replace(arm, arm=f"{before}{arm.arm}_with_{number}_warm_ups_{arm.arm}" if before else arm.arm)
            for number, arm in enumerate(law.trial.arms)
        ]
    figure = advice_figure(advice)
    assert figure is not None
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
        assert len(boxes) == len(made.ARMS)
        frame = axes.get_window_extent()
        for told, box in boxes.items():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, told
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes.values(), 2))


def test_a_limit_that_no_schedule_keeps(strict: Advice) -> None:
    section = strict.sections[0]
    text = " ".join(section.sentences)
    assert "No schedule here keeps the upstream loss within 0.0% of its start (3.010)" in text
    assert "Lowest predicted mean of both losses" in text


def test_advice_on_replay(tmp_path: Path) -> None:
    advice = advise(replays(tmp_path / "trial", [0.0, 0.01, 0.05, 0.1, 0.25, 0.5]), 0.12)
    (section,) = advice.sections
    limit = 2.6 * 1.12
    fractions = np.linspace(0, 0.5, 5001)
    truth = 1 - float(fractions[made.true_loss(1.0, fractions) <= limit].min())
    (sentence,) = [text for text in section.sentences if text.startswith("Largest share of new data")]
    told = float(sentence.split("): ")[1].split("%")[0]) / 100
    assert told == pytest.approx(truth, abs=0.03)
    assert "Its cost downstream against replay 0%" in sentence
    (refused,) = [
        text for text in advise(tmp_path / "trial", 0.0).sections[0].sentences if text.startswith("No fraction up to")
    ]
    assert "at 0.5 it is predicted at" in refused
    json.dumps(as_json(advice), allow_nan=False)


def test_too_little_is_said_plainly(tmp_path: Path) -> None:
    few = advise(schedules(tmp_path / "few", dict(list(made.ARMS.items())[:3])))
    assert not few.sections[0].laws and "3 schedules: at least 4 are needed" in few.sections[0].sentences[0]
    assert "a run with schedule.max_lr 3.16e-4" in few.sections[0].sentences[0]
    fractions = advise(replays(tmp_path / "fractions", [0.0, 0.05, 0.5]))
    assert "3 replay fractions (0, 0.05, 0.5): at least 5 are needed; try 0.28" in fractions.sections[0].sentences[0]
    one = advise(schedules(tmp_path / "one", {"low": made.ARMS["low"]}))
    assert one.sections == [] and any("no two finished runs differ in the schedule" in note for note in one.notes)
    lone = advise(schedules(tmp_path / "lone", made.ARMS, roles=("upstream",)))
    assert "No downstream validation set in all of these runs: nothing is said of that loss." in lone.sections[0].sentences


def test_noise_is_not_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Final losses without any relation to the schedules: no law holds, and it says which run would help."""
    real = made.trained

    def noisy(arm: str, rates: np.ndarray, shift: float, noise: float) -> Any:
        run = real(arm, made.ARMS["low"], shift, 0.0)
        _, losses = run.losses["upstream"]
        losses[1:] += np.random.default_rng([7, *arm.encode()]).normal(0, 0.3)
        return run

    monkeypatch.setattr(made, "trained", noisy)
    section = advise(schedules(tmp_path / "trial", made.ARMS)).sections[0]
    text = " ".join(section.sentences)
    assert "the law doesn't predict here" in text and "nothing is recommended: the data don't suffice" in text
    assert "Recommended" not in text and "What would help most: a run with schedule.max_lr" in text


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no experiment\.json: give the folder of an experiment"):
        advise(tmp_path)
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(UserError, match=r"experiment\.json: can't be understood"):
        advise(tmp_path)
    (tmp_path / "experiment.json").write_text('{"experiment": "e", "runs": []}')
    with pytest.raises(UserError, match="no finished run that started from a checkpoint"):
        advise(tmp_path)
    with pytest.raises(UserError, match=r"--upstream-within -1: give a share such as 2%"):
        advise(tmp_path, -1.0)
