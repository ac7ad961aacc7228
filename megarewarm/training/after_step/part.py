"""A part of what follows a step: the protocol, its inputs, and the values that parts pass on. ``order.py`` lists the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from megarewarm.checkpoint.own.saver import Saver
from megarewarm.parallel.agreement import Between
from megarewarm.training.after_step.progress import RunProgress
from megarewarm.training.after_step.signals import Lookout, StopRequest
from megarewarm.training.after_step.time_limit import TimeLimit
from megarewarm.training.output.metrics import Metrics
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.output.voice import Voice
from megarewarm.training.run import Run
from megarewarm.training.step import StepResult


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, completed steps, newest validation losses, and the exit code: 0 where it is complete,
    128 + the signal that stopped it, ``EXIT_TIME_LIMIT``."""

    folder: Path
    step: int
    losses: dict[str, float]
    exit_code: int = 0


@dataclass
class Moment:
    """When the parts are called, and what they pass on to those after them.

    ``when``: "start" of a fresh run, before its first step; after a "step"; "late": at the start of a run that was stopped
    before the evaluation after its newest step was done; "stop": all ranks have broken off amid a step or an evaluation.
    ``result``: of the step, None at other times. ``began``: ``time.perf_counter()`` before the step; ``seconds``: it took.
    ``begun``: the evaluation before the first step, if any, is done.

    Set by parts: ``sound``: the newest step changed the weights, so they are worth a checkpoint; ``went_back``: to an earlier
    checkpoint, so one must be complete before the next step; ``unevaluated``: an evaluation is yet to be made; ``stopping``:
    the run ends here; ``saving``: a checkpoint is written now, "interim" if only because the run stops; ``saved``: a checkpoint
    holds the run as it is now; ``outcome``: how the run has ended.
    """

    when: Literal["start", "step", "late", "stop"]
    result: StepResult | None = None
    began: float = 0.0
    seconds: float = 0.0
    begun: bool = True
    sound: bool = True
    went_back: bool = False
    unevaluated: bool = False
    stopping: bool = False
    saving: Literal["planned", "interim"] | None = None
    saved: bool = False
    outcome: Outcome | None = None


class StepPart(Protocol):
    """One of the things that follow a step, made with the run's ``Context`` on all ranks."""

    def after(self, moment: Moment) -> None:
        """Do it. All ranks call it, at every moment of the run."""

    def state(self) -> dict[str, Any]:
        """The part's state for a checkpoint, as JSON values under keys of its own; {} without any."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over ``state`` of a checkpoint, which holds other parts' keys too, and lacks the part's own if it is older
        than the part."""


class Stateless:
    """The base of parts without state."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass
class Context:
    """What parts work with. ``lookout``: for evaluations, whose portions take another time. ``parts``: all, in order."""

    run: Run
    folder: RunFolder
    saver: Saver
    metrics: Metrics
    voice: Voice
    progress: RunProgress
    stop: StopRequest
    lookout: Lookout
    limit: TimeLimit
    parts: list[StepPart] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """The state of all parts for a checkpoint."""
        return {key: value for part in self.parts for key, value in part.state().items()}

    def between(self, what: str, does: str = "evaluates") -> Between:
        """Called between the portions of an evaluation of ``what``, or what else it ``does``: shows progress, obeys stops."""

        def between(done: int, portions: int) -> None:
            self.lookout(done, portions)
            self.progress.evaluating(what, done, portions, does)

        return between
