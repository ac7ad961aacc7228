"""What a complete run still owes: losses between start and end, and the export, asked for later or lost to a signal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megarewarm.record.run import read_run
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.start.plan import Plan


@dataclass(frozen=True)
class Owed:
    """``alphas``: of ``interpolate``, those at which not every validation set was evaluated. ``export``: to Hugging Face."""

    alphas: tuple[float, ...] = ()
    export: bool = False

    def __bool__(self) -> bool:
        return bool(self.alphas) or self.export


def is_trained(plan: Plan) -> bool:
    """Whether all steps of the run are made, and evaluated."""
    if not plan.resumed or plan.position.step < plan.config.total_steps:
        return False
    assert plan.source is not None and plan.source.training is not None
    return plan.source.training.recent is None or not plan.source.training.recent.unevaluated


def owed(plan: Plan) -> Owed:
    """What the run of ``plan``, all of whose steps are made, has yet to do. Raises ``UserError`` for damaged metrics."""
    folder = RunFolder(Path(plan.config.run_folder))
    return Owed(_alphas(plan, folder), plan.config.export.huggingface and not folder.export.exists())


def _alphas(plan: Plan, folder: RunFolder) -> tuple[float, ...]:
    wanted = plan.config.interpolate
    if wanted is None:
        return ()
    assert plan.source is not None and plan.source.training is not None
    sets = set(plan.source.training.lineage.stages[-1].losses)  # those that were evaluated at the end
    told: dict[float, set[str]] = {}
    for event in read_run(folder.path).events if folder.metrics_file.exists() else ():
        if event["event"] == "interpolation" and event["step"] == plan.position.step:
            told.setdefault(event["alpha"], set()).add(event["name"])
    return tuple(alpha for alpha in wanted.alphas if alpha not in told or sets - told[alpha])
