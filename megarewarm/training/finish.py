"""After the last step, in this start or a later one: losses between start and end, and the export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megarewarm.checkpoint.convert import DTYPES
from megarewarm.checkpoint.export.huggingface import ModelWeights, export
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.data.tasks.items import task_name
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import read_run
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.start.averaging import check_average
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.texts import Texts


@dataclass(frozen=True)
class Pending:
    """``alphas``: of ``interpolate``, those at which not every validation set was evaluated. ``average``: RUN/average is not
    written. ``export``: to Hugging Face."""

    alphas: tuple[float, ...] = ()
    average: bool = False
    export: bool = False

    def __bool__(self) -> bool:
        return bool(self.alphas) or self.average or self.export


def is_trained(plan: Plan) -> bool:
    """Whether all steps of the run are done, and evaluated."""
    if not plan.resumed or plan.position.step < plan.config.total_steps:
        return False
    assert plan.source is not None and plan.source.training is not None
    return not plan.source.training.recent_steps.unevaluated


def pending(plan: Plan) -> Pending:
    """What the trained run of ``plan`` still has to do: requested later, or interrupted by a signal. Raises ``UserError``
    for damaged metrics, and for an average that its last checkpoint does not hold."""
    folder = RunFolder(Path(plan.config.run_folder))
    average = plan.config.checkpoint.average is not None and not folder.average.exists()
    if average:
        check_average(plan)
    return Pending(_alphas(plan, folder), average, plan.config.export.huggingface and not folder.export.exists())


def untested(plan: Plan) -> list[str]:
    """Of the trained run of ``plan``: the ``evaluation.tasks`` of whose names it has no scores, because they were asked for
    afterwards. Raises ``UserError`` for damaged metrics."""
    folder = RunFolder(Path(plan.config.run_folder))
    if not plan.config.evaluation.tasks or not folder.metrics_file.exists():
        return []
    tested = {event.name for event in read_run(folder.path).tests}
    return [name for name in plan.config.evaluation.tasks if task_name(name) not in tested]


def _alphas(plan: Plan, folder: RunFolder) -> tuple[float, ...]:
    wanted = plan.config.interpolate
    if wanted is None:
        return ()
    assert plan.source is not None and plan.source.training is not None
    sets = set(plan.source.training.lineage.stages[-1].losses)  # those evaluated at the end
    evaluated: dict[float, set[str]] = {}
    for event in read_run(folder.path).events if folder.metrics_file.exists() else ():
        if event["event"] == "interpolation" and event["step"] == plan.position.step:
            evaluated.setdefault(event["alpha"], set()).add(event["name"])
    return tuple(alpha for alpha in wanted.alphas if alpha not in evaluated or sets - evaluated[alpha])


def export_run(plan: Plan, texts: Texts, folder: RunFolder, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Write what ``export`` asks for, from the newest checkpoint. The main rank writes."""
    if not (plan.config.export.huggingface and ranks.is_main):
        return
    newest, _ = folder.newest_checkpoint(alone=True)
    assert newest is not None
    checkpoint = OwnCheckpoint(newest, verified=True)
    weights = ModelWeights(checkpoint.whole_model())
    name = plan.config.export.dtype or ("bf16" if checkpoint.lineage.began_in_bf16 else "fp32")
    export(weights, plan.model, folder.export, tokenizer=texts.exported, dtype=DTYPES[name], lineage=checkpoint.lineage)
    say(f"{plan.config.name}: exported to {folder.export} ({name})")
