"""An experiment's folder as it is read, its arms' measures against numbers computed by hand, and what seeds can tell."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.errors import UserError
from megarewarm.record.run import Curve, read_run
from megarewarm.report.numbers.arms import arm_rows, chain_ends, chain_stages, comparisons, whole_runs
from megarewarm.report.numbers.experiment import joined_run, mean_run, read_experiment
from megarewarm.report.numbers.runs import tokens_to_reach
from megarewarm.report.numbers.seeds import paired, spread_of, t_quantile
from tests.support.experiment_runs import STEPS, TOKENS, entry, write_grid, write_record, write_run
from tests.support.report_runs import eval_line, train_line, write

SPAN = STEPS * TOKENS


def small(folder: Path, ends: dict[str, list[tuple[float, float]]]) -> Path:
    """Arms with the given (upstream, downstream) final losses, one for each seed; all start from (2, 3)."""
    entries = []
    for arm, losses in ends.items():
        for seed, (up, down) in enumerate(losses, start=1):
            plan = entry(arm, seed, after=[] if arm == "scratch" else ["base"])
            entries.append(plan)
            write_run(folder, plan, [2.0, 2.5, up], [3.0, 2.9, down])
    entries += [entry("base", seed) for seed in range(1, len(next(iter(ends.values()))) + 1)]
    return write_record(folder, entries)


def test_measures_by_hand(tmp_path: Path) -> None:
    """Two seeds; the scratch arm falls in a straight line from 3 to 2.6 downstream in its last half."""
    folder = small(tmp_path / "e", {"arm": [(2.2, 2.5), (1.9, 2.1)], "scratch": [(4.0, 2.6), (4.0, 2.0)]})
    row = next(row for row in arm_rows(read_experiment(folder)) if row.name == "arm")
    assert row.values["forgetting"] == pytest.approx({1: 0.2, 2: -0.1})
    assert row.values["adaptation"] == pytest.approx({1: 0.5, 2: 0.9})
    assert row.values["average_after"] == pytest.approx({1: 2.35, 2: 2.0})
    assert row.values["upstream_rise"] == {1: 0.5, 2: 0.5} and row.values["upstream_rise_tokens"] == {1: SPAN / 2, 2: SPAN / 2}
    assert row.values["upstream_recovered_tokens"] == {1: math.inf, 2: SPAN}
    assert row.values["downstream_rise"] == {1: 0.0, 2: 0.0} and "downstream_recovered_tokens" not in row.values
    # Seed 1: 2.6 lies three quarters of the way from 2.9 to 2.5, so at 0.875 of the tokens. Seed 2 never comes to 2.0.
    assert row.values["tokens_saved"] == {1: pytest.approx(SPAN * 0.125), 2: -math.inf} and row.scratch == "scratch"
    assert row.spread("tokens_saved").others == 1 and row.seeds == (2, 2)
    assert row.flat()["forgetting_mean"] == pytest.approx(0.05) and row.flat()["tokens_saved_infinite"] == 1


def test_only_complete_runs_count_and_states_are_told(tmp_path: Path) -> None:
    plans = [entry("a", seed, after=["base"]) for seed in (1, 2, 3, 4, 5)]
    folder = write_record(tmp_path / "e", plans)
    write_run(folder, plans[0], [2.0, 2.1], [3.0, 2.5])
    write_run(folder, plans[1], [2.0, 2.1, 9.0, 9.0, 9.0], [3.0, 2.5, 9.0, 9.0, 9.0], done=0.5)
    write(folder / plans[2]["folder"], [{"event": "start", "name": "a.s3"}])
    ended = {"event": "stop", "step": 25, "reason": "diverged"}
    write_run(folder, plans[4], [2.0, 2.1, 9.0, 9.0, 9.0], [3.0, 2.5, 9.0, 9.0, 9.0], done=0.5, more=[ended])
    (arm,) = (experiment := read_experiment(folder)).arms
    assert [trial.state for trial in arm.trials] == ["complete", "under way", "not begun", "not begun", "diverged"]
    assert [trial.share for trial in arm.trials] == [1.0, 0.5, 0.0, 0.0, 0.5]
    (row,) = arm_rows(experiment)
    assert row.values["upstream_after"] == {1: 2.1} and len(arm.runs) == 1


def test_diverged_seed_is_counted_not_averaged(tmp_path: Path) -> None:
    folder = small(tmp_path / "e", {"arm": [(2.2, 2.5), (math.nan, 2.4)]})
    row = arm_rows(read_experiment(folder))[0]
    spread = row.spread("upstream_after")
    assert spread.values == (2.2,) and spread.others == 1 and row.values["forgetting"] == pytest.approx({1: 0.2})


def test_tokens_saved_only_against_the_same_validation_sets(tmp_path: Path) -> None:
    plans = [entry("arm", 1, after=["base"]), entry("scratch", 1)]
    folder = write_record(tmp_path / "e", plans)
    write_run(folder, plans[0], [2.0, 2.1], [3.0, 2.5], sets=("prose", "mixture"))
    write_run(folder, plans[1], [9.0, 4.0], [9.0, 2.6])
    assert "tokens_saved" not in arm_rows(read_experiment(folder))[0].values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "damaged"), ('{"format": 2, "runs": []}', "format 2"), ('{"format": 1, "runs": [{}]}', "'steps'"),
        ('{"format": 1, "experiment": "e", "runs": []}', "lists no runs"), ("[]", "damaged"),
    ],
)  # fmt: skip
def test_bad_record_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_experiment(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match=r"no experiment\.json"):
        read_experiment(tmp_path / "nowhere")


def test_grid(tmp_path: Path) -> None:
    """Kinds, the main arm, chains and what they compare with, in an experiment with everything in it."""
    experiment = read_experiment(write_grid(tmp_path / "grid", seeds=(1, 2)))
    kinds = {arm.name: arm.kind for arm in experiment.arms}
    assert [name for name, kind in kinds.items() if kind == "pretraining"] == [
        "upstream",
        "rewarmed-first",
        "infinite_cosine-first",
    ]
    assert [name for name, kind in kinds.items() if kind == "scratch"] == ["from_scratch", "one_cosine"]
    assert experiment.main is not None and experiment.main.name == "rewarm" and experiment.seeds == [1, 2]
    assert experiment.groups == ["max_lr", "warmup", "replay", "early"]
    ends = chain_ends(experiment)
    assert [arm.name for arm in ends] == ["rewarmed-third", "infinite_cosine-third"]
    assert [arm.name for arm in chain_stages(experiment, ends[0])] == ["rewarmed-first", "rewarmed-second", "rewarmed-third"]
    assert [arm.name for arm in whole_runs(experiment)] == ["one_cosine"]
    early = experiment.arm("early_7pct_0")
    assert early is not None and early.start == "upstream at step 7pct"
    trial = early.complete[0]
    assert trial.run is not None
    exported = replace(trial.run, start=trial.run.start | {"from": "runs/grid/seed_1/upstream/huggingface"})
    assert replace(early, trials=[replace(trial, run=exported)]).start == "upstream/huggingface"
    grown = replace(trial.run, start=trial.run.start | {"from": f"grown/runs/grid/seed_{trial.seed}/wide"})
    assert replace(early, after=(), trials=[replace(trial, run=grown)]).start == "grown/runs/grid/seed_*/wide"
    compared = {(c.group, c.arm, c.reference) for c in comparisons(experiment, arm_rows(experiment))}
    assert ("warmup", "warmup_8pct", "rewarm") in compared and ("early", "early_7pct_1pct", "early_7pct_0") in compared
    assert ("chains of stages", "one_cosine", "rewarmed-third") in compared and ("", "constant", "rewarm") in compared
    assert not any(arm == "upstream" or arm == reference for _, arm, reference in compared)


def test_means_and_joints_of_runs(tmp_path: Path) -> None:
    runs = []
    for number, offset in enumerate((0.0, 0.4)):
        events = [eval_line(0, "a", "upstream", 2.0 + offset), train_line(1, 1e-3, 3.0 + offset), train_line(2, 1e-3, 3.0)]
        events += [eval_line(2, "a", "upstream", 1.0 + offset)] + ([eval_line(1, "a", "upstream", 9.0)] if number else [])
        runs.append(read_run(write(tmp_path / str(number), events)))
    mean = mean_run(runs, "arm")
    assert mean.name == "arm" and mean.train["loss"].tolist() == pytest.approx([3.2, 3.0])
    assert mean.curve("upstream").losses.tolist() == pytest.approx([2.2, 1.2])
    joined = joined_run(runs, "chain")
    assert joined.steps == 4 and joined.train["step"].tolist() == [1, 2, 3, 4]
    curve = joined.curve("upstream")
    assert curve.losses.tolist() == pytest.approx([2.0, 2.4, 9.0, 1.4])  # where they meet, the later one's evaluation
    assert curve.tokens.tolist() == pytest.approx((np.array([0, 2, 3, 4]) * runs[0].tokens / 2).tolist())


def test_quantiles_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in [*range(1, 40), 100, 1000]:
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-4)


def test_interval_against_a_worked_example() -> None:
    """Of 0.1, 0.2, 0.3: mean 0.2, s = 0.1, t(2) = 4.3027, so 0.2 +- 0.2484, which holds 0; of 0.16, 0.2, 0.24 it does not."""
    loose = paired({1: 1.1, 2: 2.2, 3: 3.3, 4: 9.0}, {1: 1.0, 2: 2.0, 3: 3.0, 5: 9.0})
    assert loose is not None and loose.mean == pytest.approx(0.2) and loose.margin == pytest.approx(0.24841, rel=1e-4)
    assert not loose.established
    tight = paired({1: 1.16, 2: 2.2, 3: 3.24}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert tight is not None and tight.established
    single = paired({1: 5.0}, {1: 1.0})
    assert single is not None and single.margin is None and not single.established
    assert paired({1: math.inf}, {1: 1.0}) is None and paired({1: 1.0}, {2: 1.0}) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.floats(-3, 3), st.integers(0, 10_000))
def test_interval_moves_with_the_data(count: int, shift: float, key: int) -> None:
    """A shift moves the mean and leaves the margin; swapping the arms turns the sign and nothing else."""
    rng = np.random.default_rng(key)
    a, b = (dict[int | None, float](enumerate(rng.normal(0, 1, count).tolist())) for _ in range(2))
    plain, swapped = paired(a, b), paired(b, a)
    moved = paired({seed: value + shift for seed, value in a.items()}, b)
    assert plain and swapped and moved and plain.margin is not None
    assert moved.mean == pytest.approx(plain.mean + shift, abs=1e-9) and moved.margin == pytest.approx(plain.margin)
    assert swapped.mean == pytest.approx(-plain.mean) and swapped.established == plain.established


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of 2000 experiments of three seeds without any difference, about 5 % are said to show one."""
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(2000):
        a, b = rng.normal(0, 1, (2, 3)).tolist()
        difference = paired(dict(enumerate(a)), dict(enumerate(b)))
        found += difference is not None and difference.established
    assert 0.035 < found / 2000 < 0.065


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_spread(values: list[float]) -> None:
    spread = spread_of([*values, math.inf, math.nan])
    assert spread.others == 2 and spread.mean is not None and spread.low == min(values) and spread.high == max(values)
    assert spread.low - 1e-6 <= spread.mean <= spread.high + 1e-6
    if len(values) > 1:
        assert spread.deviation == pytest.approx(statistics.stdev(values))


@settings(max_examples=60)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0, 10))
def test_tokens_to_reach(losses: list[float], target: float) -> None:
    """Where it is reached, the interpolated loss there is the target, and no evaluation before was at or below it."""
    curve = Curve(np.arange(len(losses), dtype=float) * 7, np.array(losses))
    tokens = tokens_to_reach(curve, target)
    if math.isinf(tokens):
        assert min(losses) > target
        return
    assert (curve.losses[curve.tokens < tokens] > target).all()
    at = np.interp(tokens, curve.tokens, curve.losses)
    assert at == pytest.approx(target, abs=1e-6) or (tokens == 0 and at <= target)
