"""The advisor against worlds whose truth is known: what it predicts, what it recommends, and what it keeps silent about."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from megarewarm.errors import UserError
from megarewarm.laws import annealing, replay
from megarewarm.laws.advice import Advice, advise
from megarewarm.laws.arms import Family, Trained, questions, read_trained, replay_families
from megarewarm.laws.fitting import Bounds, HeldOut, Trial, at_bounds, pooled, standard_error
from megarewarm.laws.sections import Prediction, possible
from megarewarm.laws.support import Point, Space
from tests.support import advice_worlds as worlds
from tests.support.advice_worlds import ArmSpec, grid

P4 = (5e-4, 1e-3, 2e-3, 4e-3)
R5 = (0.0, 0.05, 0.1, 0.25, 0.5)

GRIDS: dict[str, list[ArmSpec]] = {
    "one arm": grid(P4[:1]),
    "one level of everything but the peak": grid(P4),
    "two peaks": grid(P4[:2]),
    "replay only 0 and 50 %": grid(P4, replays=(0.0, 0.5)),
    "one peak": grid((1e-3,), replays=R5),
    "a small grid": grid(P4[:3], replays=(0.0, 0.1, 0.5)),
    "holes": [arm for number, arm in enumerate(grid(P4, (0.0, 0.05, 0.1))) if number not in (4, 7)],
    "budgets": [*grid(P4), *grid(P4, steps=120)],
    "starts": [*grid(P4), *grid(P4, start="another/step_9")],
    "curves": [*grid(P4), *grid((1e-3, 2e-3), curve="constant")],
    "diverged": [*grid((*P4, 8e-3)), *grid((16e-3,), fate="diverged")],
    "stopped": [*grid(P4), *grid((8e-3,), fate="stopped")],
    "two levels of each": grid(P4[:2], (0.0, 0.1), (0.0, 0.5)),
    "tokens only": [arm for steps in (40, 60, 80, 100, 120) for arm in grid(P4[:1], steps=steps)],
    "tokens with replay": [ArmSpec(1e-3, replay=r, steps=s) for r, s in zip(R5, (40, 60, 80, 100, 120), strict=True)],
    "peak with replay": [ArmSpec(p, replay=r) for p, r in zip((*P4, 8e-3), R5, strict=True)],
    "peak with warmup": [ArmSpec(p, w) for p, w in zip((*P4, 8e-3), (0.0, 0.02, 0.05, 0.1, 0.2), strict=True)],
    "a chain": [ArmSpec(1e-3, start=start) for start in ("elsewhere/step_9", "seed_1/one", "seed_1/two/checkpoints/step_80")],
    "only seeds": [dataclasses.replace(arm, seed=seed) for arm in grid(P4[:1]) for seed in (1, 2, 3, 4)],
    "seeds": [dataclasses.replace(arm, seed=seed) for arm in grid(P4) for seed in (1, 2)],
}
NOISE = {"seeds": 0.03, "only seeds": 0.03}
SILENT = (
    "two peaks",
    "one arm",
    "a small grid",
    "two levels of each",
    "tokens only",
    "tokens with replay",
    "peak with replay",
    "peak with warmup",
    "a chain",
    "only seeds",
)  # what tells nothing of runs that weren't made


@pytest.fixture(autouse=True)
def one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lambda is tried instead of five, which is all that a test has time for. It is not the world's."""
    monkeypatch.setattr(annealing, "MEMORIES", (0.97,))
    monkeypatch.setattr(replay, "_STARTS", replay._STARTS[:2])


def spec_of(keys: dict[str, Any], like: ArmSpec) -> ArmSpec:
    schedule, replay = keys["schedule"], keys["replay"]
    warmup = float(schedule["warmup"].rstrip("%")) / 100
    fraction = replay["fraction"] if replay else 0.0
    return dataclasses.replace(like, peak=schedule["max_lr"], warmup=warmup, replay=fraction, curve=schedule["curve"])


def inside(one: ArmSpec, arms: list[ArmSpec]) -> bool:
    """Whether arms of the same curve, budget and start lie on both sides in every direction, at three levels or more, and
    around it in all of them together."""
    same = [a for a in arms if (a.curve, a.steps, a.start, a.fate) == (one.curve, one.steps, one.start, "complete")]
    for name in ("peak", "warmup", "replay"):
        levels = sorted({getattr(arm, name) for arm in same})
        value = getattr(one, name)
        tried = any(abs(value - level) <= 1e-4 * max(abs(level), 1e-2) for level in levels)
        if not tried and not (len(levels) >= 3 and levels[0] < value < levels[-1]):
            return False
    if not same:
        return False
    corners = np.array([[np.log(arm.peak), arm.warmup, arm.replay, 1.0] for arm in same])
    place = np.array([np.log(one.peak), one.warmup, one.replay, 1.0])
    found = linprog(np.zeros(len(same)), A_ub=np.vstack([corners.T, -corners.T]),
                           b_ub=np.concatenate([place + 1e-3, 1e-3 - place]))  # fmt: skip
    return bool(found.status == 0)


def predictions(advice: Advice, arms: list[ArmSpec]) -> list[tuple[Prediction, ArmSpec, list[str]]]:
    """What was predicted of runs that weren't made, as arms of the world, and the arms of the question."""
    found = []
    for answer in advice.answers:
        like = next(arm for arm in arms if arm.arm == answer.question.arms[0])
        made = [one for section in answer.sections for one in section.predictions if one.arm is None]
        found += [(one, spec_of(one.keys, like), answer.question.arms) for one in made]
    return found


@pytest.mark.parametrize("world", worlds.WORLDS)
@pytest.mark.parametrize("name", GRIDS)
def test_promises(tmp_path: Path, name: str, world: str) -> None:
    """Inside of what was tried, possible, covered by the band; no recommendation is worse than the best arm by more."""
    arms, truth = GRIDS[name], worlds.WORLDS[world]
    advice = advise(worlds.experiment(tmp_path / "e", arms, truth, NOISE.get(name, 0.0)), 0.03)
    missed, losses = 0, 0
    for one, spec, _ in predictions(advice, arms):
        assert inside(spec, arms), one.what
        assert not any(arm.fate != "complete" and arm.peak == spec.peak for arm in arms), one.what
        for role, loss in one.losses.items():
            losses += 1
            missed += abs(loss - worlds.end(truth, spec)[role]) > one.bands[role]
            if role == "upstream" and all(
                answer.measured[a][role] >= 4.0 for answer in advice.answers for a in answer.measured
            ):
                assert loss >= 4.0, one.what
    assert missed <= 0.1 * losses
    for answer in advice.answers:
        best = next(arm for arm in arms if arm.arm == answer.best)
        assert best.fate == "complete" and best.arm in answer.question.arms
        if answer.next is not None:
            roles = worlds.ROLES if answer.aim.startswith("mean") else [answer.aim]
            recommended = worlds.end(truth, spec_of(answer.next.keys, best))
            loss, of_best = (float(np.mean([ends[role] for role in roles])) for ends in (recommended, worlds.end(truth, best)))
            assert loss <= of_best + max(answer.next.bands.values())
    if name in SILENT:
        assert not predictions(advice, arms) and all(answer.next is None for answer in advice.answers)
        assert all("The data are insufficient" in " ".join(answer.sentences) for answer in advice.answers)
    if name in ("tokens only", "tokens with replay", "a chain"):
        assert all(len(answer.measured) == 1 for answer in advice.answers)
        assert {answer.best for answer in advice.answers} == {arm.arm for arm in arms}
    if name in ("budgets", "starts"):
        assert len(advice.answers) == 2 and "losses are compared only within a group" in " ".join(advice.notes)


def test_something_is_predicted_where_it_can_be(tmp_path: Path) -> None:
    advice = advise(worlds.experiment(tmp_path / "e", GRIDS["holes"], worlds.annealing))
    specs = [spec for _, spec, _ in predictions(advice, GRIDS["holes"])]
    assert len(specs) >= 8
    hole = GRIDS["holes"][0].arm.replace("0.0005_0", "0.001_0.05")
    assert hole in {spec.arm for spec in specs} and hole not in {arm.arm for arm in GRIDS["holes"]}


def test_the_seed_that_diverged_takes_its_arm_with_it(tmp_path: Path) -> None:
    arms = [dataclasses.replace(arm, seed=seed) for arm in grid(P4) for seed in (1, 2)]
    arms[-1] = dataclasses.replace(arms[-1], fate="diverged")
    advice = advise(worlds.experiment(tmp_path / "e", arms, worlds.annealing))
    (answer,) = advice.answers
    assert answer.best != arms[-1].arm and arms[-1].arm not in answer.measured
    assert "1 diverged" in " ".join(advice.notes)


LOST = "diverged or have a loss that is not finite"
# what of a run is wrong, as a change of the loss (role, step) or of the line, and what is said of it
BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any] | None]]] = {
    "last": (LOST, lambda line: line | {"loss": None} if line["event"] == "eval" and line["step"] == worlds.STEPS else line),
    "middle": (LOST, lambda line: line | {"loss": None} if line["event"] == "eval" and line["step"] == 30 else line),
    "one role": (LOST, lambda line: line | {"loss": math.inf} if line.get("role") == "downstream" and line["step"] else line),
    "start": ("the start loss is", lambda line: line | {"loss": math.nan} if line.get("role") and not line["step"] else line),
    "no start": ("no evaluation of the start", lambda line: None if line.get("role") and not line["step"] else line),
    "only the start": ("no evaluation of the start", lambda line: None if line.get("role") and line["step"] else line),
    "rates": ("learning rates", lambda line: line | {"lr": None} if line["event"] == "train" and line["step"] == 7 else line),
    "a step": ("steps or learning rates", lambda line: None if line["event"] == "train" and line["step"] == 7 else line),
    "no end": ("not finished", lambda line: None if line["event"] == "stop" else line),
    "stopped": ("not finished", lambda line: line | {"reason": "signal 15"} if line["event"] == "stop" else line),
    "diverged": (LOST, lambda line: line | {"reason": "diverged"} if line["event"] == "stop" else line),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("every", [False, True])
def test_no_run_with_broken_numbers_is_fitted_and_each_is_named(tmp_path: Path, what: str, every: bool) -> None:
    why, change = BROKEN[what]
    arms = grid((*P4, 8e-3))
    root = worlds.experiment(tmp_path / "e", arms, worlds.annealing)
    rewrite(root, arms if every else arms[-1:], lambda lines: [new for line in lines if (new := change(line)) is not None])
    if every:
        with pytest.raises(UserError, match=f"no finished run .*{why}.*{arms[0].arm}.*and 1 more"):
            advise(root)
        return
    advice = advise(root)
    (answer,) = advice.answers
    assert [*answer.measured] == [arm.arm for arm in arms[:-1]]
    told = [note for note in advice.notes if arms[-1].arm in note]
    assert len(told) == 1 and why in told[0] and told[0].startswith("1 ")
    whole = advise(worlds.experiment(tmp_path / "w", arms[:-1], worlds.annealing)).answers[0]
    made = [{p.what: p.losses for section in one.sections for p in section.predictions} for one in (answer, whole)]
    gone = {} if why != LOST else {what: losses for what, losses in made[1].items() if what not in made[0]}
    assert made[0] and made[0] | gone == made[1]  # as if it were not there, but for what lies next to an arm that diverged


def rewrite(root: Path, arms: list[ArmSpec], change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """The metrics of every arm's run, changed."""
    for arm in arms:
        path = root / arm.arm / "metrics.jsonl"
        lines = change([json.loads(line) for line in path.read_text().splitlines()])
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_loss_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    """Of one role only: the other is compared, and that the runs lack this one is said."""
    arms = grid(P4)
    root = worlds.experiment(tmp_path / "e", arms, worlds.annealing)
    rewrite(root, arms, lambda lines: [x for x in lines if x.get("role") != "downstream" or x["step"] == worlds.STEPS])
    advice = advise(root)
    assert advice.answers[0].question.roles == ["upstream"]
    assert any(note.startswith(f"The downstream loss of {arms[0].arm}") and " is not used: " in note for note in advice.notes)


def test_sets_that_are_evaluated_less_often_leave_the_steps_where_all_were(tmp_path: Path) -> None:
    arms = grid(P4)
    root = worlds.experiment(tmp_path / "e", arms, worlds.annealing)

    def with_another(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rare = [line | {"name": "rare"} for line in lines if line.get("role") == "upstream" and line["step"] % 20 == 0]
        return [*lines[:-1], *rare, lines[-1]]

    rewrite(root, arms, with_another)
    _, runs, notes = read_trained(root)
    assert notes == [] and runs[0].losses["upstream"][0].tolist() == [0, 20, 40, 60, 80]


def test_arms_that_lack_a_seed_are_compared_by_their_change() -> None:
    def run(arm: str, seed: int, start: float, end: float) -> Trained:
        losses = {"upstream": (np.array([0.0, 2.0]), np.array([start, end]))}
        return Trained(f"{arm}.s{seed}", arm, seed, {}, {}, np.full(2, 1e-3), 8.0, losses)

    family = Family([run("a", 1, 3.0, 3.2), run("a", 2, 4.0, 4.2), run("b", 1, 3.0, 3.3)])
    assert family.mean_final("a", "upstream") == pytest.approx(3.7)
    assert family.mean_final("b", "upstream") == pytest.approx(3.8)  # and not 3.3, which is its only seed's


def test_levels_that_differ_by_rounding_are_one(tmp_path: Path) -> None:
    arms = [*grid((1e-3,), replays=(0.1,)), *grid((1e-3 * (1 - 1e-9),), replays=(0.2,)), *grid((1e-3,), replays=(0.1 + 1e-12,))]
    arms = [dataclasses.replace(arm, seed=number) for number, arm in enumerate(arms)]
    _, runs, _ = read_trained(worlds.experiment(tmp_path / "e", arms, worlds.annealing))
    (family,) = replay_families(runs)
    assert len(family.runs) == 3
    assert Space.of_replay(family).levels(("fraction",), "fraction") == pytest.approx([0.1, 0.2])


def test_a_start_that_was_trained_further_is_another(tmp_path: Path) -> None:
    """The same path holds another checkpoint later: the losses of the start say so."""
    root = worlds.experiment(tmp_path / "e", grid(P4), worlds.annealing)
    path = root / grid(P4)[0].arm / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 4.0', '"loss": 3.9', 1))
    _, runs, _ = read_trained(root)
    assert sorted(len(question.runs) for question in questions(runs)) == [1, 3]


def family_of(ends: list[float]) -> Family:
    curves = [(np.array([0.0, 2.0]), np.array([4.0, end])) for end in ends]
    losses = [{"upstream": curve, "downstream": curve} for curve in curves]
    runs = [Trained(f"r{i}", f"r{i}", 1, {}, {}, np.full(2, 1e-3), 8.0, loss) for i, loss in enumerate(losses)]
    return Family(runs)


def test_what_is_possible() -> None:
    worse = family_of([4.5, 5.0])
    assert possible(worse, "upstream", 4.45, 0.1) and possible(worse, "upstream", 5.05, 0.1)
    assert not possible(worse, "upstream", 4.3, 0.1) and not possible(worse, "upstream", 5.2, 0.1)
    assert not possible(worse, "upstream", 3.9, 2.0)  # below the start, which no arm was
    assert possible(family_of([3.5, 4.5]), "upstream", 3.45, 0.1)
    assert not possible(worse, "downstream", -0.1, 9.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(range(5)), st.sampled_from(range(4))), min_size=1, max_size=12, unique=True),
    st.tuples(st.floats(-0.5, 4.5), st.floats(-0.5, 3.5)),
)
def test_inside_is_the_convex_hull(places: list[tuple[int, int]], place: tuple[float, float]) -> None:
    """Against the definition: no straight line has the point on one side and all arms on the other."""
    space = Space({str(at): Point(("k",), {"x": float(at[0]), "y": float(at[1])}) for at in places})
    told = space.inside(Point(("k",), {"x": place[0], "y": place[1]}))
    angles = np.linspace(0, 2 * np.pi, 3601)
    normals = np.stack([np.cos(angles), np.sin(angles)])
    gaps = (np.array([place]) @ normals)[0] - (np.array(places, dtype=float) @ normals).max(axis=0)
    if abs(gaps.max()) > 0.01:  # nearer to the edge than the tolerance nothing is asserted
        assert told == bool(gaps.max() < 0)


def test_nothing_is_predicted_in_a_gap_wider_than_any_that_was_tested() -> None:
    space = Space({str(x): Point(("k",), {"x": x}) for x in (0.0, 0.01, 0.02, 0.03, 0.5)})
    assert space.between(("k",), "x") == [(0.0, 0.01), (0.01, 0.02), (0.02, 0.03)]
    assert Space({str(x): Point(("k",), {"x": x}) for x in (0.0, 0.5)}).between(("k",), "x") == []


def test_bands_cover_every_error_that_was_seen() -> None:
    def arm(level: str, error: float, along: str = "max_lr") -> HeldOut:
        return HeldOut(f"{level}{error}", 3.0, 3.0 + error, 9.0, True, along, level)

    many = [arm(str(number), 0.01) for number in range(20)]
    assert Trial([*many, arm("odd", 0.5)]).band >= 0.5
    assert Trial(many, fitted=(0.7,)).band >= 0.7
    one_level = Trial([arm("a", 0.1), arm("a", -0.1)])  # two arms, but one level: one degree of freedom
    assert one_level.band == pytest.approx(0.1 * 6.313752, rel=1e-5)
    two_ways = Trial([*many, arm("w1", 0.1, "warmup_steps"), arm("w2", 0.1, "warmup_steps")])
    assert two_ways.band == pytest.approx(0.1 * 2.919986, rel=1e-5)
    lucky, other = pooled([Trial([arm("a", 0.001), arm("b", 0.001)]), Trial([arm("a", 0.2), arm("b", 0.2)])])
    assert lucky.band > 0.2 and other.band > 0.2


def test_parameters_at_bounds_and_open_predictions() -> None:
    bounds = Bounds.of(A=(0, 20), a=(0.05, 3), B=(-20, 20))
    assert at_bounds(np.array([1.0, 0.05, 20.0]), bounds, {"a": "A"}) == ("a", "B")
    assert at_bounds(np.array([0.0, 0.05, 0.0]), bounds, {"a": "A"}) == ()  # a term that isn't there
    held = [HeldOut("a", 2.0, 2.01, 5.0), HeldOut("b", 3.0, 3.01, 5.0)]
    assert Trial(held).holds and not Trial(held, stuck=("a",)).holds
    x = np.linspace(0, 1, 20)
    noise = np.random.default_rng(1).normal(0, 0.005, 20)
    both = Bounds.of(p=(-9, 9), q=(-9, 9))
    # only p + q is known: so is its double, but not p alone
    sure, open_one = (
        standard_error(lambda v: (v[0] + v[1]) * x - 2 * x + noise, one, np.array([1.0, 1.0]), both, 20)
        for one in (lambda v: float(2 * (v[0] + v[1])), lambda v: float(v[0]))
    )
    assert 0 < sure < 0.02 and open_one == np.inf
