"""The greedy blend against the rule written out in exact fractions and in float64."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig
from megarewarm.data.mixture import blend
from megarewarm.data.mixture.blend import Blend, greedy_blend
from megarewarm.errors import UserError
from megarewarm.rewarm.replay import with_replay


def rule(weights, size):
    """The rule as the trainers state it, in the arithmetic of the weights."""
    counts, picks = [0] * len(weights), []
    for p in range(size):
        deficits = [w * max(p, 1) - c for w, c in zip(weights, counts, strict=True)]
        best = deficits.index(max(deficits))
        picks.append((best, counts[best]))
        counts[best] += 1
    return picks


def pairs(located):
    return list(zip(*(part.tolist() for part in located), strict=True))


def test_golden_vector_of_both_trainers():
    source, index = greedy_blend([0.5, 0.3, 0.2], 10)
    assert source.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert index.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]


decimal_weights = st.lists(st.integers(1, 40).map(lambda n: n / 8), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(decimal_weights)
def test_seekable_blend_is_the_rule_in_exact_fractions(weights):
    total = sum(Fraction(w) for w in weights)
    shares = [Fraction(w) / total for w in weights]
    made = Blend(weights)
    assert [Fraction(int(n), made.period) for n in made.numerators] == shares
    size = 3 * made.period + 7
    expected = rule(shares, size)
    assert pairs(made.locate(np.arange(size))) == expected
    for n in {0, 1, made.period - 1, made.period, made.period + 1, size}:
        assert made.counts(n).tolist() == [sum(s == i for s, _ in expected[:n]) for i in range(len(weights))]


@settings(max_examples=50, deadline=None)
@given(decimal_weights, st.lists(st.integers(0, 2**55), max_size=20))
def test_any_position_agrees_with_its_neighbours_and_its_period(weights, positions):
    made = Blend(weights)
    for p in positions:
        source, index = (int(part[0]) for part in made.locate([p]))
        assert index == made.counts(p)[source]
        step = np.zeros(len(weights), np.int64)
        step[source] = 1
        assert np.array_equal(made.counts(p + 1) - made.counts(p), step)
        later = made.locate([p + 5 * made.period])
        if p >= made.period:
            assert later[0][0] == source and later[1][0] == index + 5 * made.numerators[source]
        # The rule never lets a source run ahead by a whole sample.
        assert (made.counts(p) * made.period < made.numerators.astype(object) * p + made.period).all()


def test_decimal_weights_are_exact_and_others_are_rounded():
    assert (Blend([0.95, 0.05]).numerators.tolist(), Blend([0.95, 0.05]).period) == ([19, 1], 20)
    assert Blend([0.1, 0.2, 0.7]).period == 10
    assert Blend([1, 1, 1]).numerators.tolist() == [1, 1, 1]
    weights = np.random.default_rng(0).random(7)
    made = Blend(weights.tolist())
    assert made.period <= 2**20
    assert np.abs(made.numerators / made.period - weights / weights.sum()).max() <= 2**-20
    with pytest.raises(UserError, match="weight 1e-09 is less than one sample in 1048576"):
        Blend([1.0, 1e-9])
    for bad in ([], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match="must be above 0"):
            Blend(bad)


@pytest.mark.parametrize(
    "weights",
    [
        [0.5, 0.3, 0.2],
        [0.95, 0.05],
        [1 / 3, 1 / 3, 1 / 3],
        [0.1] * 10,
        [0.999, 0.0005, 0.0005],
        [0.0001] * 30 + [0.5],
        np.random.default_rng(1).random(22).tolist(),
    ],
)
def test_long_float_blends_are_bit_for_bit_the_rule(weights):
    size = 60_000
    normalised = np.array(weights)
    normalised = (normalised / normalised.sum()).tolist()
    assert pairs(greedy_blend(weights, size)) == rule(normalised, size)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=12))
def test_blocks_side_by_side_never_show(weights):
    normalised = np.array(weights)
    normalised = (normalised / normalised.sum()).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "_SERIAL", 200)
        patch.setattr(blend, "_WARMUP", 3)  # far too short, so that blocks do have to be corrected
        patch.setattr(blend, "_LANES", 16)
        found = greedy_blend(weights, 8000)
    assert pairs(found) == rule(normalised, 8000)


def test_correction_of_blocks_is_exercised(monkeypatch):
    corrected = []
    original = blend._rejoin
    monkeypatch.setattr(blend, "_rejoin", lambda *arguments: (corrected.append(1), original(*arguments)))
    monkeypatch.setattr(blend, "_SERIAL", 200)
    monkeypatch.setattr(blend, "_WARMUP", 1)
    weights = np.random.default_rng(5).random(12).tolist()
    greedy_blend(weights, 8000)
    assert corrected


def test_no_negative_positions():
    with pytest.raises(IndexError):
        Blend([1, 2]).locate([-1])


def sources(*parts: dict[str, object]) -> DataConfig:
    return DataConfig.model_validate(
        {"sequence_length": 8, "train": [{"path": f"{i}", **part} for i, part in enumerate(parts)]}
    )


def test_shares_as_numbers_of_tokens() -> None:
    data = sources({"tokens": "2B tokens"}, {"tokens": "500M tokens"})
    assert [source.weight for source in with_replay(data.train, [], 0)] == [0.8, 0.2]
    again = DataConfig.model_validate(data.model_dump(mode="json"))
    assert again == data, "a resolved config says the same"
    final: list[Any] = with_replay(data.train, [], 0)
    assert DataConfig.model_validate(data.model_dump() | {"train": [source.model_dump() for source in final]}).train == final


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (({"tokens": "2B tokens"}, {"weight": 1.0}), "some sources give 'tokens' and some 'weight'"),
        (({"tokens": "2B tokens", "weight": 3.0},), "'weight' and 'tokens' both say"),
        (({"tokens": "10%"},), "expected a number of tokens above 0"),
        (({"tokens": "0 tokens"},), "expected a number of tokens above 0"),
    ],
)
def test_shares_that_say_nothing_clear_are_refused(parts: tuple[dict[str, object], ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sources(*parts)
