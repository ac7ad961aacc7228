"""A learning-rate schedule of your own, used by its name. Usage: python examples/add_schedule.py [PICTURE.png]"""

from __future__ import annotations

import sys

import megarewarm
from megarewarm.schedules.curves import Values
from megarewarm.schedules.schedule import CURVES, decay


def quadratic(u: Values, max_lr: float, min_lr: float) -> Values:
    """min_lr + (max_lr - min_lr)(1 - u)^2, where u goes from 0 at the end of the warmup to 1 at the end of the decay."""
    return min_lr + (max_lr - min_lr) * (1.0 - u) ** 2


CURVES["quadratic"] = decay(quadratic)

config = megarewarm.load_config(
    {
        "name": "quadratic",
        "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "max_positions": 64},
        "data": {"sequence_length": 64, "train": [{"path": "tokens"}]},
        "schedule": {"curve": "quadratic", "max_lr": 3e-4, "min_lr": "10%", "warmup": "10%"},
        "training": {"budget": 200, "global_batch": 8, "micro_batch": 8},
    }
)
rates = megarewarm.plan(config).learning_rates
print(f"{len(rates)} steps, peak {rates.max():.2g}, last {rates[-1]:.2g}")

if len(sys.argv) > 1:
    from megarewarm.report.figures.schedules import draw_gallery

    draw_gallery(sys.argv[1])  # all schedules, with this one
