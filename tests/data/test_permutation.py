"""The keyed permutation: a bijection for every size, well mixed, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.data.order.permutation import Permutation, derive_key


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_bijection(n, key):
    images = Permutation(n, key)(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))


@settings(deadline=None, max_examples=30)
@given(st.integers(2**31, 2**60), st.integers(0, 2**64 - 1))
def test_large_sizes_stay_in_range_and_injective(n, key):
    near_both_ends = np.concatenate([np.arange(2000), n - 1 - np.arange(2000)])
    images = Permutation(n, key)(near_both_ends)
    assert images.dtype == np.int64
    assert images.min() >= 0 and images.max() < n
    assert len(np.unique(images)) == 4000


def test_one_element_at_a_time_gives_the_same_and_shapes_are_kept():
    permutation = Permutation(1000, 7)
    whole = permutation(np.arange(1000))
    assert [int(permutation(i)) for i in range(0, 1000, 97)] == whole[::97].tolist()
    assert np.array_equal(permutation(np.arange(1000).reshape(10, 100)), whole.reshape(10, 100))
    assert permutation(np.empty(0, np.int64)).shape == (0,)


def test_order_is_frozen():
    # A change of these numbers changes the data order of every run: ORDER_VERSION in batches.py must then be raised.
    assert Permutation(10, 0)(np.arange(10)).tolist() == [7, 6, 1, 2, 4, 8, 3, 9, 0, 5]
    assert Permutation(2**60, 12345)(np.array([0, 1, 2**59])).tolist() == [
        143138212646975693,
        1021733861976895532,
        148017212307627910,
    ]
    assert derive_key(1234, 0, 1) == 8916167320489558991


def chi_square(observed: np.ndarray) -> float:
    """Standardised: about N(0, 1) for a uniform distribution."""
    expected = observed.sum() / observed.size
    value = ((observed - expected) ** 2 / expected).sum()
    freedom = observed.size - 1
    return float((value - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("n", [10, 37, 100])
def test_over_the_keys_every_image_and_every_distance_is_as_likely(n):
    images = np.array([Permutation(n, derive_key(k))(np.array([0, 1, n - 1])) for k in range(4000)])
    for column in range(3):
        assert abs(chi_square(np.bincount(images[:, column], minlength=n))) < 4.5
    distances = (images[:, 1] - images[:, 0]) % n
    assert abs(chi_square(np.bincount(distances, minlength=n)[1:])) < 4.5


def test_within_one_key_the_order_looks_random():
    n = 1_000_003
    images = Permutation(n, 99)(np.arange(n))
    # Any stretch of the order is spread evenly over the file, and neighbours are independent of each other.
    for start in (0, n // 2, n - 50_000):
        assert abs(chi_square(np.bincount(images[start : start + 50_000] * 100 // n, minlength=100))) < 4.5
    for lag in (1, 2, 1000, 1001):  # 1001 = ceil(sqrt(n)) is the side of the network
        correlation = np.corrcoef(images[:-lag], images[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(n)
    steps = np.diff(images)
    assert abs((steps > 0).mean() - 0.5) < 5 * np.sqrt(1 / 12 / n)  # variance of the ascents of a permutation: n / 12
    assert (images == np.arange(n)).sum() < 12  # Poisson(1) fixed points


def test_keys_differ_in_every_part():
    keys = {derive_key(seed, source, epoch) for seed in range(20) for source in range(20) for epoch in range(20)}
    assert len(keys) == 8000
    assert len({derive_key(1, 23), derive_key(12, 3), derive_key(123), derive_key(2**70, 1)}) == 4


def test_indices_and_sizes_outside_are_refused():
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, 0)(np.array([bad]))
    for n in (0, 2**60 + 1):
        with pytest.raises(ValueError, match="1 to 2"):
            Permutation(n, 0)
