"""Adds the weights after a step to the average that stands for a decay (``checkpoint.average``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarewarm.training.after_step.part import Context, Moment


class KeepAverage:
    """Before the evaluations, which a stop may break off: a checkpoint after a step has its weights in the average."""

    def __init__(self, context: Context) -> None:
        self._run = context.run

    def state(self) -> dict[str, Any]:
        average = self._run.average
        return {"average": average.of.recorded()} if average is not None and average.weights else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing: the settings are compared before the run is built, which loads the tensors."""

    def after(self, moment: Moment) -> None:
        if self._run.average is not None and moment.when in ("start", "step"):
            self._run.average.add(self._run.step)
