"""Learning-rate curves against published values, against other formulations, and against what must hold for all."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megarewarm.config.schedule import ScheduleConfig, build_schedule
from megarewarm.errors import UserError
from megarewarm.schedules.curves import WSD_DECAYS
from megarewarm.schedules.schedule import CURVES, Schedule

TOKENS_PER_STEP = 1104 * 2048


def build(total_steps: int, tokens_per_step: int = TOKENS_PER_STEP, **keys: Any) -> Schedule:
    return build_schedule(ScheduleConfig(**keys), lambda budget: budget.in_steps(tokens_per_step, total_steps), total_steps)


# Tokens: cosine_clipped, cosine. arXiv 2308.04014's peak, horizon and warmup.
PAPER = {
    10e9: (2.9958e-4, 2.9962e-4),
    50e9: (2.8180e-4, 2.8330e-4),
    100e9: (2.2763e-4, 2.3366e-4),
    150e9: (1.5222e-4, 1.6487e-4),
    200e9: (7.6205e-5, 9.6124e-5),
    239e9: (3.0020e-5, 5.5008e-5),
}


@pytest.mark.parametrize(("tokens", "values"), list(PAPER.items()))
@pytest.mark.parametrize(("column", "curve"), [(0, "cosine_clipped"), (1, "cosine")])
def test_values_of_the_rewarming_paper(tokens: float, values: tuple[float, float], column: int, curve: str) -> None:
    schedule = build(131_296, curve=curve, max_lr=3e-4, min_lr=3e-5, warmup="1%")
    # The figures have five digits, one of them cut off instead of rounded.
    assert schedule.lr(tokens / TOKENS_PER_STEP) == pytest.approx(values[column], rel=5e-5)


@pytest.mark.parametrize(("total", "floor", "crossing"), [(131_296, 105_716, 105_715), (143_000, 115_139, 115_139)])
def test_step_at_which_the_clipped_cosine_meets_its_floor(total: int, floor: int, crossing: int) -> None:
    """131,296 steps: the paper's "minimum at 240B tokens" (crossed at 105,715.2); 143,000: Pythia itself."""
    rates = build(total, curve="cosine_clipped", max_lr=3e-4, min_lr=3e-5, warmup="1%").values(np.arange(total + 1))
    assert rates[floor] == 3e-5 < rates[floor - 1]
    assert (rates[floor:] == 3e-5).all()
    # Where the cosine, which aims at 0, has fallen to a tenth: cos(x) = -0.8.
    assert round(0.01 * total + total * math.acos(-0.8) / math.pi) == crossing
    assert rates[crossing] == pytest.approx(3e-5, rel=2e-5)


def test_pythia_at_step_100k() -> None:
    keys: dict[str, Any] = {"max_lr": 3e-4, "min_lr": 3e-5, "warmup": "1%"}
    assert build(143_000, curve="cosine_clipped", **keys).lr(100_000) == pytest.approx(6.596e-5, rel=1e-4)
    assert build(143_000, curve="cosine", **keys).lr(100_000) == pytest.approx(8.694e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("share", "cosine", "inverse_sqrt"),
    [
        (0.10, 2.9264e-4, 2.2896e-4),
        (0.31, 2.3250e-4, 1.8563e-4),
        (0.61, 1.65e-4, 1.65e-4),
        (0.75, 1.65e-4, 1.65e-4),
        (0.86, 1.65e-4, 1.65e-4),
        (0.90, 1.0138e-4, 1.0138e-4),
        (0.93, 7.0356e-5, 7.0356e-5),
        (1.00, 3e-5, 3e-5),
    ],
)
def test_values_of_the_infinite_schedules(share: float, cosine: float, inverse_sqrt: float) -> None:
    keys: dict[str, Any] = {"max_lr": 3e-4, "min_lr": 3e-5, "constant_lr": 1.65e-4}
    keys |= {"warmup": "1%", "cooldown": "60%", "constant": "25%"}
    for curve, value in (("infinite_cosine", cosine), ("infinite_inverse_sqrt", inverse_sqrt)):
        assert build(132_366, curve=curve, **keys).lr(share * 132_366) == pytest.approx(value, rel=3e-5)


def test_warmup_lengths_of_the_paper_in_steps_and_tokens() -> None:
    for percent, steps, billions in ((0, 0, 0.0), (0.5, 656, 1.48), (1, 1313, 2.97), (2, 2626, 5.94)):
        schedule = build(131_296, curve="cosine", max_lr=3e-4, min_lr=3e-5, warmup=f"{percent}%")
        assert round(schedule.warmup_steps) == steps
        assert schedule.warmup_steps * TOKENS_PER_STEP / 1e9 == pytest.approx(billions, abs=0.005)


def neox_annealing(n: int, style: str, peak: float, floor: float, warm: float, end: float) -> float:
    """The rule of GPT-NeoX's scheduler, written down from its description, valid up to n = end."""
    if warm > 0 and n <= warm:
        return peak * max(1, n) / warm
    x, e = n - warm, end - warm
    rate = {
        "linear_clipped": peak * (e - x) / e,
        "cosine": floor + (peak - floor) / 2 * (math.cos(math.pi * x / e) + 1),
        "exponential": peak * math.exp(-0.693 * x / e),
        "constant": peak,
    }[style]
    return max(rate, floor)


@pytest.mark.parametrize("style", ["linear_clipped", "cosine", "exponential", "constant"])
@pytest.mark.parametrize("percent", [0, 0.55, 12])
def test_neox_rule(style: str, percent: float) -> None:
    keys: dict[str, Any] = {"curve": style, "max_lr": 3e-4, "warmup": f"{percent}%"}
    floor = 0.0 if style == "constant" else 2e-4
    if floor:
        keys["min_lr"] = floor
    schedule = build(1000, **keys)
    expected = [neox_annealing(n, style, 3e-4, floor, percent * 10, 1000) for n in range(1001)]
    np.testing.assert_allclose([schedule.lr(n) for n in range(1001)], expected, rtol=1e-12)


def megatron_coefficient(shape: str, q: float) -> float:
    return {
        "linear": 1 - q,
        "cosine": 0.5 * (math.cos(math.pi * q) + 1),
        "exponential": 2 * math.pow(0.5, q) - 1,
        "minus_sqrt": 1 - math.sqrt(q),
    }[shape]


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_wsd_is_stable_then_decays_as_megatron(shape: str) -> None:
    schedule = build(500, curve="wsd", max_lr=1.0, min_lr=0.1, warmup=20, decay=100, decay_shape=shape)
    for n in range(20, 500):
        expected = 1.0 if n <= 400 else 0.1 + 0.9 * megatron_coefficient(shape, (n - 400) / 100)
        assert schedule.lr(n) == pytest.approx(expected, rel=1e-12)


def test_wsd_decays_by_one_minus_sqrt_unless_told() -> None:
    keys: dict[str, Any] = {"curve": "wsd", "max_lr": 1.0, "min_lr": 0.0, "decay": 64, "warmup": 0}
    assert build(100, **keys).spec() == build(100, **keys, decay_shape="minus_sqrt").spec()
    assert build(100, **keys).lr(36 + 16) == pytest.approx(0.5)


def test_inverse_sqrt() -> None:
    schedule = build(10_000, curve="inverse_sqrt", max_lr=1e-3, min_lr=2e-4, warmup=100)
    assert schedule.lr(400) == pytest.approx(5e-4)
    assert schedule.lr(1600) == pytest.approx(2.5e-4)
    assert schedule.lr(5000) == 2e-4
    no_warmup = build(100, curve="inverse_sqrt", max_lr=1e-3, min_lr=0.0, warmup=0)
    assert [no_warmup.lr(n) for n in (0, 1, 4)] == pytest.approx([1e-3, 1e-3, 5e-4])


def test_first_steps_of_the_warmup() -> None:
    schedule = build(1000, curve="cosine", max_lr=3e-4, min_lr=3e-5, warmup=10)
    assert [schedule.lr(n) for n in range(11)] == pytest.approx([3e-5, *(3e-5 * n for n in range(1, 11))])


@pytest.mark.parametrize("warmup", ["0%", "0.05%", "1 steps"])
def test_warmup_of_at_most_one_step_starts_at_the_peak(warmup: str) -> None:
    schedule = build(1000, curve="cosine", max_lr=3e-4, min_lr=3e-5, warmup=warmup)
    assert schedule.lr(0) == pytest.approx(3e-4, rel=1e-12)
    assert schedule.values(np.arange(1001)).max() <= 3e-4 * (1 + 1e-12)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(20, 5000))
    max_lr = draw(st.floats(1e-6, 1.0))
    min_lr = max_lr * draw(st.floats(0.001, 1.0))
    curve = draw(st.sampled_from(sorted(CURVES)))
    keys: dict[str, Any] = {"curve": curve, "max_lr": max_lr, "warmup": f"{draw(st.floats(0, 30)):.4f}%"}
    if curve != "constant":
        keys["min_lr"] = min_lr
    if curve not in ("constant", "inverse_sqrt") and draw(st.booleans()):
        keys["length"] = f"{draw(st.floats(95, 120)):.4f}%"
    if curve == "wsd":
        keys |= {"decay": f"{draw(st.floats(0.1, 60)):.4f}%", "decay_shape": draw(st.sampled_from(SHAPES))}
    if curve.startswith("infinite"):
        keys["constant_lr"] = min_lr + (max_lr - min_lr) * draw(st.floats(0, 1))
        keys |= {"cooldown": f"{draw(st.floats(0.5, 30)):.4f}%", "constant": f"{draw(st.floats(0, 30)):.4f}%"}
    return build(total, **keys)


SHAPES = list(WSD_DECAYS)


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_bounds_and_direction(schedule: Schedule) -> None:
    """Rises in the warmup, then only falls, between the floor and the peak."""
    warm = np.linspace(0, schedule.warmup_steps, 200)
    rest = np.linspace(schedule.warmup_steps, schedule.length * 1.2, 1000)
    rising, falling = schedule.values(warm), schedule.values(rest)
    slack = schedule.max_lr * 1e-12
    assert (rising > 0).all() and (np.diff(rising) >= -slack).all()
    assert (np.diff(falling) <= slack).all()
    assert falling.min() >= (schedule.min_lr or 0) - slack
    assert max(rising.max(), falling.max()) <= schedule.max_lr + slack


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_continuous_at_every_joint(schedule: Schedule) -> None:
    """The jump shrinks with the distance. 1-sqrt falls as the root of the distance, hence the generous bound."""
    for _, joint, _ in schedule.phases():
        if joint >= 2:
            gap = 1e-10 * schedule.length
            before, after = schedule.lr(joint - gap), schedule.lr(joint + gap)
            assert abs(before - after) <= 1e-3 * schedule.max_lr


@settings(max_examples=100, deadline=None)
@given(schedules(), st.floats(1, 50))
def test_clamped_past_the_end(schedule: Schedule, factor: float) -> None:
    last = schedule.lr(schedule.length)
    assert schedule.lr(schedule.length * factor) == last
    if schedule.curve not in ("constant", "inverse_sqrt", "exponential", "cosine_clipped"):
        assert last == pytest.approx(schedule.min_lr, rel=1e-9)
    if schedule.curve != "constant":
        assert schedule.phase(schedule.length * factor) == "after"


def test_inverse_sqrt_holds_its_last_value_past_the_budget() -> None:
    schedule = build(400, curve="inverse_sqrt", max_lr=1e-3, min_lr=0.0, warmup=100)
    assert schedule.lr(400) == schedule.lr(1600) == pytest.approx(5e-4)


@settings(max_examples=100, deadline=None)
@given(schedules(), st.integers(0, 6000))
def test_spec_survives_json_and_arrays_agree_with_numbers(schedule: Schedule, n: int) -> None:
    again = Schedule.from_spec(json.loads(json.dumps(schedule.spec())))
    assert again == schedule
    assert again.lr(n) == schedule.values(np.array([[0, n]]))[0, 1]
    assert isinstance(again.lr(n), float)


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_phases_tile_all_positions(schedule: Schedule) -> None:
    phases = schedule.phases()
    assert phases[0][1] == 0 and phases[-1][2] == math.inf
    for (_, _, stop), (_, start, _) in itertools.pairwise(phases):
        assert stop == pytest.approx(start, abs=1e-6)
    for name, start, stop in phases:
        assert schedule.phase(start if stop == math.inf else (start + stop) / 2) == name


def test_names_of_the_phases() -> None:
    infinite: dict[str, Any] = {"max_lr": 1e-3, "min_lr": 1e-4, "constant_lr": 5e-4, "warmup": 10, "cooldown": 20}
    schedule = build(100, curve="infinite_cosine", **infinite, constant=30)
    positions = (0, 9, 10, 29, 30, 59, 60, 99, 100)
    names = ["warmup"] * 2 + ["cooldown"] * 2 + ["constant"] * 2 + ["anneal"] * 2 + ["after"]
    assert [schedule.phase(n) for n in positions] == names
    wsd = build(100, curve="wsd", max_lr=1e-3, min_lr=0.0, warmup=10, decay=20)
    assert [wsd.phase(n) for n in (0, 10, 79, 80, 100)] == ["warmup", "stable", "stable", "decay", "after"]
    assert build(100, curve="constant", max_lr=1e-3, warmup=0).phase(10**6) == "constant"
    assert build(100, curve="cosine", max_lr=1e-3, min_lr=0.0, warmup=0).phase(0) == "decay"


def test_infinite_schedule_without_an_anneal_stays_constant() -> None:
    """Percentages that fill the whole leave no anneal, whatever the rounding of their sum."""
    keys: dict[str, Any] = {"curve": "infinite_cosine", "max_lr": 3e-4, "min_lr": 3e-5, "constant_lr": 1.65e-4}
    sums = set()
    for tenth in range(1, 200):
        parts: dict[str, Any] = {"warmup": "1%", "cooldown": f"{tenth / 10}%", "constant": f"{99 - tenth / 10:.1f}%"}
        schedule = build(1000, **keys, **parts)
        assert schedule.lr(1000) == schedule.lr(10**7) == 1.65e-4
        assert schedule.phase(10**7) == "constant"
        sums.add(schedule.warmup_steps + (schedule.cooldown or 0) + (schedule.constant or 0) - 1000)
    assert min(sums) < 0 < max(sums)  # rounding did go both ways


def test_length_may_differ_from_the_budget() -> None:
    short = build(1000, curve="cosine", max_lr=1e-3, min_lr=1e-4, warmup=0, length="80%")
    assert short.length == 800 and short.lr(800) == short.lr(999) == pytest.approx(1e-4)
    long = build(1000, curve="cosine", max_lr=1e-3, min_lr=1e-4, warmup=0, length=2000)
    assert long.lr(1000) == pytest.approx(5.5e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"curve": "cosine", "min_lr": 0.0, "warmup": 101}, ["schedule.warmup (101 steps)", "schedule.length"]),
        ({"curve": "cosine", "min_lr": 0.0, "warmup": 50, "length": 40}, ["schedule.warmup", "40 steps"]),
        ({"curve": "constant", "warmup": 101}, ["schedule.warmup", "100 steps"]),
        ({"curve": "cosine_clipped", "min_lr": 0.0, "warmup": 51}, ["schedule.warmup", "half", "cosine_clipped"]),
        ({"curve": "wsd", "min_lr": 0.0, "warmup": 30, "decay": 71}, ["schedule.warmup", "schedule.decay (71 steps)"]),
        ({"curve": "wsd", "min_lr": 0.0, "warmup": 30, "decay": 0}, ["schedule.decay is 0"]),
        (
            {"curve": "infinite_cosine", "min_lr": 1e-5, "constant_lr": 1e-4,
             "warmup": 1, "cooldown": 60, "constant": 40},
            ["schedule.warmup (1 steps)", "schedule.cooldown (60 steps)", "schedule.constant (40 steps)"],
        ),
        ({"curve": "cosine", "min_lr": 0.0, "length": 0, "warmup": 0}, ["schedule.length is 0"]),
    ],
)  # fmt: skip
def test_lengths_that_do_not_fit(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(100, max_lr=1e-3, **keys)
    assert all(word in str(caught.value) for word in words)


def test_broken_spec() -> None:
    spec = build(100, curve="cosine", max_lr=1e-3, min_lr=0.0).spec()
    with pytest.raises(UserError, match="unknown key 'colour'"):
        Schedule.from_spec(spec | {"colour": 1})
    with pytest.raises(UserError, match="'length' is missing"):
        Schedule.from_spec({key: value for key, value in spec.items() if key != "length"})
    with pytest.raises(UserError, match=r"min_lr is missing"):
        Schedule.from_spec({key: value for key, value in spec.items() if key != "min_lr"})
    with pytest.raises(UserError, match="'sine' is unknown"):
        Schedule.from_spec(spec | {"curve": "sine"})


def test_negative_position_is_refused() -> None:
    schedule = build(100, curve="cosine", max_lr=1e-3, min_lr=0.0)
    with pytest.raises(ValueError, match="first step"):
        schedule.lr(-1)
    with pytest.raises(ValueError, match="first step"):
        schedule.phase(-1)


def test_config_refuses_keys_of_another_curve() -> None:
    with pytest.raises(ValidationError, match="no use for 'decay'"):
        ScheduleConfig.model_validate({"curve": "cosine", "max_lr": 1e-3, "min_lr": 0.0, "decay": 10})
