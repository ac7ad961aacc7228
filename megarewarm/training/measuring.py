"""Moments for a start that has none: those that the optimizer has after steps at learning rate 0 (``start.moments: measure``).

Adam's are m_k = b1 m_(k-1) + (1 - b1) g_k and v_k = b2 v_(k-1) + (1 - b2) g_k^2 (Kingma & Ba, arXiv 1412.6980, algorithm 1)
from zeros, with g_k the gradient of batch k at the weights of the start, clipped as in every step. After N batches the step
count, which sets the bias correction, is N; so that of the run's first step is N + 1.
"""

from __future__ import annotations

import math

from megarewarm.errors import UserError
from megarewarm.parallel.agreement import Between, nothing_between
from megarewarm.parallel.collective import collective
from megarewarm.training.run import Run
from megarewarm.training.step import Clock, StepResult, clip_factor, compute_gradients, loss_scale


@collective
def measure_moments(run: Run, between: Between = nothing_between) -> None:
    """Measure what ``run.plan`` asks for, if anything, from the batches of the run's first steps. All ranks call it.

    The weights, the position in the data and the schedule stay; an fp16 loss scale adapts, so that no batch is left out.
    ``between``: called before each batch. Raises ``UserError`` for a batch whose gradient is not finite.
    """
    plan, batches = run.plan, run.plan.measured_batches
    if not batches:
        return
    for number in range(batches):
        between(number, batches)
        result = _gradients(run, plan.samples(plan.position.step + number))
        run.optimizer.step(0.0, run.model.gradients, clip_factor(run, result) / loss_scale(run))
        if run.scaler is not None:
            run.scaler.update(finite=True)
    run.optimizer.set_lr(plan.schedule.lr(plan.position.schedule))
    assert run.optimizer.completed_steps == plan.position.optimizer_step, "the reset table was not applied"


def _gradients(run: Run, first_sample: int) -> StepResult:
    """Those of the global batch that begins with ``first_sample``, left in ``run.model.gradients``."""
    size = run.plan.config.training.global_batch
    rows = run.data.share(first_sample, size, run.mesh.data_rank, run.mesh.layout.data)
    for _ in range(2):  # a transient fault of the hardware does not recur
        result = compute_gradients(run, rows, Clock(run.ranks.device))
        while math.isfinite(result.loss) and not math.isfinite(result.norm) and run.scaler is not None and run.scaler.adapts:
            run.scaler.update(finite=False)
            result = compute_gradients(run, rows, Clock(run.ranks.device))
        if math.isfinite(result.loss) and math.isfinite(result.norm):
            return result
    raise UserError(
        f"start.moments: 'measure' found a loss of {result.loss:g} with a gradient of norm {result.norm:g} in samples "
        f"{first_sample:,} to {first_sample + size - 1:,} of the training data; set it to 'reset', or look at these data and "
        f"at {run.plan.config.start.from_}"
    )
