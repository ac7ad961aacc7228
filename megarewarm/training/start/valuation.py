"""Which rows of a run are valued, at which steps, against how many, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megarewarm.config.schema import RunConfig
from megarewarm.config.valuation import ValuationConfig
from megarewarm.errors import UserError
from megarewarm.model.size import PASSES
from megarewarm.parallel.mesh import Layout

_FEWEST = 4  # rows
_SEED = 20260101  # of the choice of rows: fixed, so that runs of other seeds value the same places


def valued_steps(config: RunConfig, first: int) -> dict[int, int]:
    """The steps whose rows are valued, each with its number from 0: every ``valuation.every`` from step ``first`` on."""
    if config.valuation is None:
        return {}
    points = config.grid(config.valuation.every).points(config.total_steps - first)
    return {first + point: number for number, point in enumerate(points)}


def valued_rows(config: RunConfig, step: int) -> list[int]:
    """Which rows of the global batch of ``step`` are valued, ascending: one of each of so many equal parts, so that neither
    the blend's pattern nor the layout of the ranks has a part in it."""
    count, batch = _rows_valued(_settings(config), config.training.global_batch), config.training.global_batch
    bounds = [i * batch // count for i in range(count + 1)]
    return np.random.default_rng((_SEED, step)).integers(bounds[:-1], bounds[1:]).tolist()


def validation_rows(config: RunConfig) -> int:
    """Rows of each validation set that a step's rows are valued against, as far as the set holds as many."""
    return _settings(config).rows or max(_FEWEST, config.training.global_batch // 8)


def _rows_valued(settings: ValuationConfig, batch: int) -> int:
    return min(batch, max(_FEWEST, round(settings.share * batch)))


def _settings(config: RunConfig) -> ValuationConfig:
    assert config.valuation is not None
    return config.valuation


@dataclass(frozen=True)
class ValuationCost:
    """``share`` of the run's compute that its valuation takes, counted in forward passes of rows: a validation row costs a
    training row's passes and one more after the step, a valued row two; both again for each set."""

    steps: int
    rows: int
    batch: int
    against: int
    sets: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        names = ", ".join(self.sets)
        return (
            f"{self.steps:,} x {self.rows} of {self.batch} rows against {self.against} of {names}, "
            f"{100 * self.share:.1f} % of the compute"
        )


def valuation_cost(config: RunConfig, first: int) -> ValuationCost | None:
    """Of a run whose first step follows ``first``; None without valuation."""
    settings, training = config.valuation, config.training
    if settings is None:
        return None
    steps, batch = len(valued_steps(config, first)), training.global_batch
    rows, against, taught = _rows_valued(settings, batch), validation_rows(config), config.distill is not None
    passes = PASSES[training.recompute]
    once = len(settings.against) * (against * (passes + 1) + 2 * rows * (1 + taught))
    trained = (config.total_steps - first) * batch * (passes + taught)
    share = steps * once / (steps * once + trained)
    return ValuationCost(steps, rows, batch, against, tuple(settings.against), share)


def check_valuation(config: RunConfig, sets: Sequence[str], precision: str, layout: Layout) -> list[str]:
    """Notes on the valuation of a run with validation ``sets``. Raises ``UserError`` where it can't be computed."""
    settings = config.valuation
    if settings is None:
        return []
    missing = [name for name in settings.against if name not in sets]
    if missing:  # left out of the run, because its split is empty
        raise UserError(f"valuation.against: validation set '{missing[0]}' has no documents; remove it, or give it others")
    if precision == "fp32":
        return []
    if config.parallel.sharding != "none" and layout.data > 1:
        raise UserError(
            f"valuation: with parallel.sharding the forward pass rounds weights to {precision}, which the differences of "
            f"losses don't survive; set training.precision: fp32 or parallel.sharding: none, or remove 'valuation'"
        )
    return [
        f"valuation: training computes in {precision}, the two forward passes of each valuation in fp32 from the fp32 weights"
    ]
