"""The remaining cost of an experiment: the state of each run, FLOPs, tokens, disk and, once runs have trained, hours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from megarewarm.config.arms import Arm
from megarewarm.config.execution import LOG_SPACED
from megarewarm.config.experiment import Experiment
from megarewarm.errors import UserError
from megarewarm.lab.plan_ahead import plan_ahead
from megarewarm.lab.start_checks import check_start, missing_files, prepared_folder, ranks_of
from megarewarm.model.optimizer_state import state_bytes
from megarewarm.model.size import count_parameters, training_flops_per_token
from megarewarm.parallel.connect import choose_device
from megarewarm.parallel.launchers import Launch
from megarewarm.record.follow import Follower
from megarewarm.record.layout import METRICS_FILE
from megarewarm.spelling import duration_text, tokens_text
from megarewarm.training.finish import is_trained, pending
from megarewarm.training.start.evaluation_cost import evaluation_cost, tokens_asked
from megarewarm.training.start.plan import Plan

State = Literal["done", "begun", "waiting"]

_WEIGHT_BYTES = 4  # fp32


@dataclass(frozen=True)
class Prospect:
    """A run, its progress and the cost of the rest.

    ``flops``: of the remaining steps and evaluations; ``disk``: bytes of the checkpoints kept at its end;
    ``flops_per_second``: measured so far, None before it has trained; ``missing``: a line for each file that it needs and
    this machine lacks.
    """

    arm: Arm
    state: State
    tokens: int
    flops: float
    disk: float
    flops_per_second: float | None
    missing: tuple[str, ...]


def prospects(experiment: Experiment, arms: Sequence[Arm], ranks: int | None = None) -> list[Prospect]:
    """The remaining cost of each of ``arms`` on ``ranks`` processes (None: as many as its config needs). Plans every run.

    Raises ``UserError`` if a start checkpoint of one of ``arms`` is neither on this machine nor written by another run, or if
    planning or starting one would fail for another reason than missing files.
    """
    plans: list[Plan] = []
    found = []
    wanted = {arm.name for arm in arms}
    prepared = prepared_folder(experiment)
    unplanned: dict[Path, str] = {}
    for arm in experiment.arms:
        start = arm.config.start.from_
        why = "".join(text for folder, text in unplanned.items() if start is not None and Path(start).is_relative_to(folder))
        try:
            plan, missing = plan_ahead(arm.config, plans)
        except UserError as error:
            if arm.name in wanted:
                raise UserError(f"{arm.name}: {error}{why}") from error
            # its start may be made, by hand, of what the others write
            unplanned[Path(arm.config.run_folder)] = f"; the run that would write it can't be planned: {arm.name}: {error}{why}"
            continue
        missing = [line + why for line in missing]
        plans.append(plan)
        if arm.name not in wanted:
            continue
        config = plan.config
        follower = Follower(Path(config.run_folder) / METRICS_FILE)
        follower.poll()
        task_tokens = 0
        state: State = "begun" if plan.resumed or follower.step is not None else "waiting"
        if is_trained(plan) and not pending(plan):
            state = "done"
        else:
            try:
                choose = partial(choose_device, Launch(0, 1, 0, 1, "127.0.0.1", 0, "none"))
                task_tokens = check_start(
                    plan, ranks or ranks_of(config, 1), missing, choose, allow_missing=True, prepared=prepared
                ).task_tokens
            except UserError as error:
                raise UserError(f"{arm.name}: {error}") from error
        done = plan.position.step - plan.origin.step if plan.resumed else 0
        total = config.total_steps - plan.origin.step
        per_token = training_flops_per_token(plan.model, config.data.sequence_length, plan.taught_by)
        plain = training_flops_per_token(plan.model, config.data.sequence_length)
        cost = evaluation_cost(plan, tokens_asked(config), task_tokens)
        step = plan.position.step if plan.resumed else plan.origin.step - 1  # without a checkpoint the start is evaluated too
        evaluated = 0 if cost is None or state == "done" else cost.after(step)
        rates = [line.tokens_per_second for line in follower.recent if line.tokens_per_second > 0]
        found.append(
            Prospect(
                arm=arm,
                state=state,
                tokens=(total - done) * config.tokens_per_step,
                flops=(total - done) * config.tokens_per_step * per_token + evaluated / 3 * plain,
                disk=(
                    _WEIGHT_BYTES * count_parameters(plan.model)
                    + state_bytes(config.optimizer.kind, plan.model, plan.trained_at_end)
                )
                * (config.checkpoint.keep_last + _extra(arm)),
                flops_per_second=statistics.median(rates) * per_token if rates else None,
                missing=(*missing, *missing_files(config, prepared)),
            )
        )
    return found


def _extra(arm: Arm) -> int:
    extra = arm.config.checkpoint.extra_steps
    return len(LOG_SPACED if extra == "log_spaced" else extra)


def show_outlook(experiment: Experiment, found: Sequence[Prospect], jobs: int, console: Console) -> None:
    """Print the plan as a table, all seeds of an arm in one row, then its total cost with ``jobs`` runs at a time."""
    table = Table(title=f"experiment {experiment.config.experiment} in {experiment.folder}", title_justify="left", box=None)
    table.add_column("run", overflow="fold")
    for heading in ("done", "steps", "tokens left", "PFLOP left"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("starts from", overflow="fold")
    for name in dict.fromkeys(prospect.arm.arm for prospect in found):
        group = [prospect for prospect in found if prospect.arm.arm == name]
        first = group[0].arm.config
        table.add_row(
            name,
            f"{sum(prospect.state == 'done' for prospect in group)} of {len(group)}",
            f"{first.total_steps:,}",
            tokens_text(sum(prospect.tokens for prospect in group)),
            f"{sum(prospect.flops for prospect in group) / 1e15:.2g}",
            Path(first.start.from_).name if first.start.from_ else "scratch",
        )
    console.print(table)
    left = [prospect for prospect in found if prospect.state != "done"]
    flops = sum(prospect.flops for prospect in left)
    console.print(
        f"{len(found) - len(left)} of {len(found)} runs are done; left: {tokens_text(sum(p.tokens for p in left))} tokens, "
        f"{flops / 1e15:.3g} PFLOP; checkpoints take up to {sum(p.disk for p in found) / 1e9:.2g} GB",
        highlight=False,
    )
    rates = [prospect.flops_per_second for prospect in found if prospect.flops_per_second]
    if left and rates:
        seconds = max(flops / statistics.median(rates) / jobs, longest_chain(left, statistics.median(rates)))
        console.print(
            f"about {duration_text(seconds)} at the speed of its runs so far, {jobs} at a time",
            highlight=False,
        )
    elif left:
        console.print("no time estimate before its first run has trained for some steps", highlight=False)


def longest_chain(left: Sequence[Prospect], flops_per_second: float) -> float:
    """Seconds of the longest chain of runs that start from each other: the minimum for any number of jobs."""
    seconds: dict[str, float] = {}
    for prospect in left:
        before = max((seconds.get(name, 0.0) for name in prospect.arm.after), default=0.0)
        seconds[prospect.arm.name] = before + prospect.flops / flops_per_second
    return max(seconds.values(), default=0.0)
