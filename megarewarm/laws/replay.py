"""The loss of a continued run as a function of its tokens and of the share of old data: the D-CPT law (arXiv 2406.01375).

L(D, r) = E + B r^n / D^b + C / (r + e)^g for each validation set. r is the share of the training data that is of the set's
kind: old data for the upstream loss, new data for the downstream loss. All runs share one model size, so its term is part of E.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from megarewarm.laws.arms import Family, Floats, Trained
from megarewarm.laws.fitting import Bounds, HeldOut, Trial, at_bounds, fit, standard_error
from megarewarm.laws.support import FRACTION, Space
from megarewarm.record.run import UPSTREAM

NEEDED = 5
"""Minimum number of distinct fractions for a fit: with five, three are inside the range and each is held out once."""

SETTLED = 0.25
"""Share of a run after which its evaluations count: before it, re-warming dominates the loss, which the law doesn't model."""

_BOUNDS = Bounds.of(E=(0, 20), B=(0, 10), n=(0.01, 5), b=(0.01, 2), C=(0, 10), e=(1e-3, 2), g=(0.01, 3))
_TERMS = {"n": "B", "b": "B", "e": "C", "g": "C"}
_STARTS = [
    [2.0, size, 0.5, decay, 0.3, shift, 0.5] for size, decay, shift in itertools.product((0.3, 1.5), (0.1, 0.5), (0.02, 0.3))
]


@dataclasses.dataclass(frozen=True)
class ReplayLaw:
    """``parameters`` are E, B, n, b, C, e, g; tokens are counted in ``unit``. Valid for fractions in the tested range,
    [``low``, ``high``], and runs of ``tokens`` tokens."""

    role: str
    parameters: Floats
    unit: float
    tokens: float
    low: float
    high: float
    trial: Trial
    runs: tuple[Trained, ...] = ()

    def loss(self, fractions: ArrayLike, tokens: float | None = None) -> Floats:
        """Loss at the end of runs with these replay fractions, in nats per token; the shape of ``fractions``."""
        shares = own_share(np.asarray(fractions, dtype=np.float64), self.role)
        return _law(self.parameters, np.full(shares.shape, (tokens or self.tokens) / self.unit), shares)

    def uncertainty(self, fraction: float) -> float:
        """Standard error of a prediction from the fit, in nats per token; infinite if the prediction isn't identified."""

        def end(parameters: Floats) -> float:
            return float(dataclasses.replace(self, parameters=parameters).loss(np.array([fraction]))[0])

        return standard_error(_residuals(self.runs, self.role, self.unit), end, self.parameters, _BOUNDS, len(self.runs))


def own_share(fractions: ArrayLike, role: str) -> Floats:
    """The share of the training data that is of the role's kind, from the replay fraction."""
    fractions = np.asarray(fractions, dtype=np.float64)
    return fractions if role == UPSTREAM else 1.0 - fractions


def fit_replay(family: Family, role: str, space: Space | None = None) -> ReplayLaw | None:
    """Fit the law to the family's later evaluations of ``role``; ``None`` for fewer than five distinct fractions."""
    space = Space.of_replay(family) if space is None else space
    (kind,) = space.kinds
    fractions = space.levels(kind, FRACTION)
    if len(fractions) < NEEDED:
        return None
    unit = max(run.tokens for run in family.runs)
    parameters = _solve(family.runs, role, unit, _STARTS)
    held = []
    for fold in space.folds():
        if fold.along != FRACTION:
            continue
        left_out = [run for run in family.runs if run.arm in fold.arms]
        others = [run for run in family.runs if run.arm not in fold.arms]
        rest = _solve(others, role, unit, [parameters, *_STARTS[:2]])
        start = family.mean_start(role)
        for arm in fold.arms:
            share = own_share(np.array([np.mean([run.replay for run in family.of(arm)])]), role)
            end = np.array([float(np.mean([run.tokens for run in left_out])) / unit])
            held.append(
                HeldOut(
                    arm=arm,
                    measured=family.mean_final(arm, role),
                    predicted=float(_law(rest, end, share)[0]),
                    mean_of_others=start + float(np.mean([run.final(role) - run.start(role) for run in others])),
                    inside=arm in fold.inside,
                    along=fold.along,
                    level=fold.level,
                )
            )
    law = ReplayLaw(role, parameters, unit, unit, fractions[0], fractions[-1], Trial(held), tuple(family.runs))
    at = [float(np.mean([run.replay for run in family.of(arm)])) for arm in family.arms]
    ends = np.array([family.mean_final(arm, role) for arm in family.arms])
    stuck = at_bounds(parameters, _BOUNDS, _TERMS)
    return dataclasses.replace(law, trial=Trial(held, tuple((law.loss(at) - ends).tolist()), stuck=stuck))


def _solve(runs: Sequence[Trained], role: str, unit: float, starts: Sequence[ArrayLike]) -> Floats:
    """The parameters of the best fit."""
    d, r, _, weight = _columns(runs, role, unit)
    slopes: Callable[[Floats], Floats] = lambda p: weight[:, None] * _slopes(p, d, r)  # noqa: E731
    return fit(_residuals(runs, role, unit), _BOUNDS, starts, evaluations=100, slopes=slopes)[0]


def _residuals(runs: Sequence[Trained], role: str, unit: float) -> Callable[[Floats], Floats]:
    d, r, loss, weight = _columns(runs, role, unit)
    return lambda parameters: weight * (_law(parameters, d, r) - loss)


def _columns(runs: Sequence[Trained], role: str, unit: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Tokens, own shares, losses and weights of the later evaluations, (points,) each.

    A run's last evaluation weighs as much as all earlier ones together: those were made before the rate had decayed, which the
    law doesn't model, and runs are compared by their final losses."""
    tokens, shares, losses, weights = [], [], [], []
    for run in runs:
        steps, found = run.losses[role]
        late = steps >= SETTLED * run.steps
        tokens.append(steps[late] * run.tokens_per_step / unit)
        shares.append(own_share(np.full(int(late.sum()), run.replay), role))
        losses.append(found[late])
        weight = np.ones(int(late.sum()))
        weight[-1] = max(1.0, len(weight) - 1.0)
        weights.append(weight)
    d, r, loss, weight = (np.concatenate(column) for column in (tokens, shares, losses, weights))
    return d, r, loss, weight


def _law(parameters: Floats, d: Floats, r: Floats) -> Floats:
    big_e, big_b, n, b, c, e, g = parameters
    return np.asarray(big_e + big_b * r**n / d**b + c / (r + e) ** g, dtype=np.float64)


def _slopes(parameters: Floats, d: Floats, r: Floats) -> Floats:
    """The derivatives of ``_law`` with respect to its parameters, (points, 7)."""
    _, big_b, n, b, c, e, g = parameters
    old, new = r**n / d**b, (r + e) ** -g
    by_n = big_b * old * np.log(np.where(r > 0, r, 1.0))
    columns = [np.ones_like(old), old, by_n, -big_b * old * np.log(d), new, -c * g * new / (r + e), -c * new * np.log(r + e)]
    return np.stack(columns, axis=1)


def largest_new_share(law: ReplayLaw, limit: float, gaps: Sequence[tuple[float, float]] | None = None) -> float | None:
    """The largest share of new data with predicted upstream loss at most ``limit``; ``None`` if no tested fraction has it.

    Searches the range of tested fractions, or the tested fractions and the ``gaps`` between them. arXiv 2406.01375 and
    2407.17467 (CMR) use the law in this way.
    """
    fractions = np.linspace(law.low, law.high, 2001)
    if gaps is not None:
        tried = [run.replay for run in law.runs]
        fractions = np.unique(np.concatenate([tried, *(np.linspace(low, high, 501) for low, high in gaps)]))
    fitting = fractions[law.loss(fractions) <= limit]
    return float(1.0 - fitting.min()) if len(fitting) else None
