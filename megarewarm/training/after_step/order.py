"""What follows each step of a run, in order."""

from __future__ import annotations

from collections.abc import Callable

from megarewarm.training.after_step.average import KeepAverage
from megarewarm.training.after_step.bad_steps import Judge
from megarewarm.training.after_step.dynamics import Dynamics
from megarewarm.training.after_step.evaluate import Evaluate
from megarewarm.training.after_step.log import Log, Show
from megarewarm.training.after_step.part import Context, StepPart
from megarewarm.training.after_step.replicas import Replicas
from megarewarm.training.after_step.saving import Due, Save
from megarewarm.training.after_step.step_times import Times
from megarewarm.training.after_step.stopping import AskStop, EndStopped
from megarewarm.training.after_step.value import Value

PARTS: list[Callable[[Context], StepPart]] = [
    Log,
    Judge,
    Times,
    Dynamics,
    Show,
    KeepAverage,
    Value,
    Evaluate,
    AskStop,
    Due,
    Replicas,
    Save,
    EndStopped,
]
"""A part that only looks belongs before ``Evaluate``; one with state that a checkpoint keeps before ``Save``."""
