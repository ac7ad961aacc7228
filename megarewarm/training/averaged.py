"""At the end of a run with ``checkpoint.average``: the average of its last weights, evaluated and written to RUN/average."""

from __future__ import annotations

from collections.abc import Callable

from megarewarm.checkpoint.export.own import weights_only_state
from megarewarm.checkpoint.lineage import Stage
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.parallel.agreement import Between, nothing_between
from megarewarm.parallel.collective import collective
from megarewarm.training.interpolation import in_between, losses_of_sets, show_losses
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.output.voice import Voice
from megarewarm.training.run import Run


@collective
def finish_average(
    run: Run,
    voice: Voice,
    saver: Saver,
    folder: RunFolder,
    show: Callable[[str], Between] = lambda what: nothing_between,
) -> None:
    """Evaluate the average on every validation set (events 'average', and a table), and write it with its lineage.

    All ranks call it, after the last step; it restores the end weights bit for bit. Raises ``UserError`` if the disk refuses.
    """
    average = run.average
    if average is None or run.step < run.plan.config.total_steps:
        return
    with in_between(run):
        for name, parameter in run.model.parameters.items():
            parameter.detach().copy_(average.weights[name])
        losses = losses_of_sets(run, "the average", show)
    for windows in run.validation:
        voice.metrics.event(
            "average", step=run.step, like=average.of.like, name=windows.name, role=windows.role, loss=losses[windows.name]
        )
    stage = Stage(run=folder.average.name, intent=f"merged: {average.of}", losses=losses)
    lineage = run.plan.history.extended(run.stage()).extended(stage)
    saver.write_aside(
        folder.average, weights_only_state(folder.average.name, run.plan.model, lineage), average.tensors("model")
    )
    if losses:
        show_losses({"end": run.state.losses, "average": losses}, f"{voice.name}: {average.of}", "weights", voice.console)
    voice.say(f"{voice.name}: the average is in {folder.average}")
