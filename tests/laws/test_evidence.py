"""LogME against the brute-force maximum of the exact marginal likelihood, and against scikit-learn's BayesianRidge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from megarewarm.laws.evidence import evidence, logme, standardised

Array = NDArray[np.float64]
SHAPES = [(60, 8), (20, 40), (30, 30), (200, 5)]  # the second and third: no more samples than channels


def some(n: int, d: int, seed: int = 0, noise: float = 0.7) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    features = random.normal(size=(n, d)) * random.uniform(0.1, 3, d)
    return features, features @ (random.normal(size=d) / np.sqrt(d)) + noise * random.normal(size=n)


def exact(features: Array, y: Array, alpha: float, beta: float) -> float:
    """ln N(y | 0, 1/beta + F F'/alpha) / n by its covariance, (n, n)."""
    n = len(y)
    covariance = np.eye(n) / beta + features @ features.T / alpha
    _, determinant = np.linalg.slogdet(covariance)
    return float(-0.5 * determinant - 0.5 * y @ np.linalg.solve(covariance, y) - n / 2 * np.log(2 * np.pi)) / n


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_highest_marginal_likelihood(shape: tuple[int, int]) -> None:
    features, y = some(*shape)
    found = evidence(features, y)
    at = exact(features, y, found.alpha[0], found.beta[0])
    assert found.per_sample[0] == pytest.approx(at, rel=1e-10)
    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000}
    starts = [[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], np.log([found.alpha[0], found.beta[0]])]
    best = max(
        -minimize(lambda v: -exact(features, y, *np.exp(np.clip(v, -40, 40))), s, method="Nelder-Mead", options=options).fun
        for s in starts
    )
    assert found.per_sample[0] == pytest.approx(best, abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_scikit_learns_bayesian_ridge(shape: tuple[int, int]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the second implementation")
    features, y = some(*shape, seed=3)
    tiny = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 1e-12)
    ridge = linear_model.BayesianRidge(fit_intercept=False, compute_score=True, max_iter=20_000, tol=1e-14, **tiny)
    ridge.fit(features, y)
    found = evidence(features, y)
    assert found.per_sample[0] == pytest.approx(ridge.scores_[-1] / len(y), abs=1e-6)
    assert found.alpha[0] == pytest.approx(ridge.lambda_, rel=1e-3) and found.beta[0] == pytest.approx(ridge.alpha_, rel=1e-3)


def test_the_published_formula_differs_with_fewer_samples_than_channels() -> None:
    """d/2 ln alpha over all columns, but ln(alpha + beta sigma) over the singular values alone."""
    features, y = some(20, 40)
    found = evidence(features, y)
    published = found.per_sample[0] + (40 - 20) / 2 * np.log(found.alpha[0]) / 20
    truth = exact(features, y, found.alpha[0], found.beta[0])
    assert abs(published - truth) > 0.05 and found.per_sample[0] == pytest.approx(truth, rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 24), st.integers(1, 30), st.integers(0, 2**31), st.floats(0.1, 10))
def test_columns_that_say_nothing_new_change_nothing(n: int, d: int, seed: int, scale: float) -> None:
    """The value depends on F F' alone: rotated columns, and columns of zeros, give the same, and c F the same as F."""
    features, y = some(n, d, seed)
    base = evidence(features, y).per_sample
    if not np.isfinite(base).all():
        return
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    wider = np.hstack([features @ rotation, np.zeros((n, 7))])
    assert evidence(wider, y).per_sample == pytest.approx(base, rel=1e-7, abs=1e-9)
    assert evidence(scale * features, y).per_sample == pytest.approx(base, rel=1e-7, abs=1e-9)


def test_several_labels_at_once_are_each_by_itself() -> None:
    features, y = some(50, 9)
    labels = np.stack([y, y[::-1], np.sign(y)], 1)
    alone = [evidence(features, column).per_sample[0] for column in labels.T]
    assert evidence(features, labels).per_sample == pytest.approx(alone, rel=1e-12)


def test_classes_that_features_separate_score_higher() -> None:
    random = np.random.default_rng(1)
    classes = random.integers(5, size=400)
    centres = 2 * random.normal(size=(5, 12))
    noise = random.normal(size=(400, 12))
    scores = [logme(standardised(centres[classes] + scale * noise), classes) for scale in (0.3, 1.0, 3.0, 30.0)]
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[-1] > 0.3
    members = (classes[:, None] == np.arange(5)) * 1.0
    features = standardised(centres[classes] + random.normal(size=(400, 12)))
    one_by_one = [evidence(features, column - column.mean(), centred=True).per_sample[0] for column in members.T]
    assert logme(features, classes) == pytest.approx(np.mean(one_by_one), rel=1e-12)
    assert logme(features, 7 * classes + 3) == logme(features, classes)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_means_there_is_one_sample_less(shape: tuple[int, int]) -> None:
    """The same in an orthonormal basis of the space without the mean; with the mean's direction the fit would be exact."""
    features, y = some(*shape)
    n = len(y)
    basis = np.linalg.svd(np.eye(n) - 1 / n)[0][:, : n - 1].T
    wanted = evidence(basis @ features, basis @ y).per_sample
    found = evidence(features - features.mean(0), y - y.mean(), centred=True).per_sample
    assert found == pytest.approx(wanted, rel=1e-9) and np.isfinite(found).all()


def test_standardised_columns_have_mean_0_and_deviation_1_or_nothing() -> None:
    features = np.random.default_rng(2).normal(3.0, 5.0, size=(40, 4)).astype(np.float32)
    features[:, 2] = 7
    found = standardised(features)
    assert found.dtype == np.float64 and np.abs(found.mean(0)).max() < 1e-12
    assert found.std(0) == pytest.approx([1, 1, 0, 1])


def test_labels_without_noise_have_no_highest_evidence() -> None:
    features, _ = some(30, 4)
    assert np.isposinf(evidence(features, features @ np.ones(4)).per_sample).all()


@pytest.mark.parametrize(
    ("features", "labels", "said"),
    [
        (np.zeros((5, 2)), np.ones(5), "zero throughout"),
        (np.ones((5, 2)), np.zeros(5), "zero throughout"),
        (np.full((5, 2), np.nan), np.ones(5), "finite"),
    ],
)
def test_nothing_to_judge_by(features: Array, labels: Array, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evidence(features, labels)
    with pytest.raises(ValueError, match="two classes"):
        logme(np.ones((5, 2)), np.zeros(5, int))
