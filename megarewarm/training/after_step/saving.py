"""When a checkpoint is due, and writing it: planned saves, saves that wait for a good step, saves at a stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarewarm.training.after_step.part import Context, Moment, Stateless
from megarewarm.training.start.saving import extra_steps, is_saved


class Due:
    """Decides whether a checkpoint is written now. Not while steps fail one after another, because bad weights would replace
    an earlier checkpoint. A planned save then waits for a good step."""

    def __init__(self, context: Context) -> None:
        self._run, self._saver = context.run, context.saver
        self._waiting = False
        self._newest: tuple[int, bool] | None = None
        """Of the newest checkpoint: its step, and whether the evaluation after it is missing."""

    def state(self) -> dict[str, Any]:
        return {"due": self._waiting}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._waiting = state["due"]
        self._newest = (self._run.step, state["unevaluated"])

    def after(self, moment: Moment) -> None:
        run = self._run
        config, is_last = run.plan.config, run.step == run.plan.config.total_steps
        self._waiting |= moment.went_back
        if moment.when == "start":
            moment.saving = "planned" if run.step in extra_steps(config) else None
        elif moment.when == "stop":
            self._saver.wait()
            moment.saved = self._newest == (run.step, moment.unevaluated)
            if moment.begun and not moment.saved and (moment.sound or run.is_finite()):
                moment.saving = "interim"
        else:
            self._waiting |= is_saved(config, run.step)
            if is_last or (self._waiting and moment.sound):
                moment.saving = "planned"
            elif moment.stopping and (moment.sound or run.is_finite()):
                moment.saving = "interim"
        if moment.saving == "planned":
            self._waiting = False
        if moment.saving:
            self._newest = (run.step, moment.unevaluated)


class Save(Stateless):
    """Writes the checkpoint, and reports those that are complete."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def after(self, moment: Moment) -> None:
        context = self._context
        run, saver = context.run, context.saver
        if moment.saving:
            run.model.check_copies()
            saver.save(run.training_state(context.state(), interim=moment.saving == "interim"), run.tensors())
            moment.saved = True
        if moment.stopping or moment.went_back or run.step == run.plan.config.total_steps:
            saver.wait()
        for saved in saver.finished():
            context.limit.saved(saved.seconds)
            stall, seconds = round(saved.stall, 3), round(saved.seconds, 3)
            context.metrics.event("save", step=saved.step, path=str(saved.path), stall=stall, seconds=seconds)
            context.voice.tell(f"saved step {saved.step} ({saved.seconds:.1f} s)")
