"""The lines in the terminal before the first step."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from megarewarm.model.size import count_parameters
from megarewarm.record.values import SIGN
from megarewarm.rewarm.reset import ResetLine
from megarewarm.training.output.voice import Voice
from megarewarm.training.run import Run
from megarewarm.training.start.evaluation_cost import EvaluationCost
from megarewarm.training.start.valuation import valuation_cost


def announce(run: Run, voice: Voice, evaluations: EvaluationCost | None) -> None:
    """Record and print that the run starts or resumes."""
    plan, metrics = run.plan, voice.metrics
    if plan.resumed:
        metrics.event("resume", step=plan.position.step)
    else:
        if metrics.has_past:
            # killed before its first checkpoint: its metrics are superseded as a whole
            metrics.event("resume", step=-1)
        metrics.event("start", **run.description())
    print_start(run, voice.console, evaluations)
    if not plan.resumed:
        print_reset_table(run.reset_table(), voice.console, metrics.text)


def print_start(run: Run, console: Console, evaluations: EvaluationCost | None) -> None:
    """One line on what starts or resumes, then the cost of evaluation and the notes that a user must know."""
    plan, config = run.plan, run.plan.config
    shape = f"{count_parameters(plan.model):,} parameters"
    length = f"{config.total_steps:,} steps of {config.tokens_per_step:,} tokens"
    where = f"{run.ranks.world_size} x {run.ranks.device.type}, {run.inputs.precision}"
    if run.ranks.world_size > 1:
        where += f", {run.mesh.layout} (by {run.ranks.launcher})"
    if plan.resumed:
        what = (
            f"resumes at step {plan.position.step:,} (its own checkpoint; 'start' was applied before and is not applied again)"
        )
    elif config.start.from_:
        what = f"{plan.policy.intent} from {config.start.from_}"
    else:
        what = "from scratch"
    console.print(f"[bold]{config.name}[/]: {what}; {shape}, {length}, {where}", highlight=False)
    chosen = {**vars(run.inputs.operations), "optimizer": run.optimizer.kind}
    del chosen["deterministic"]
    shown = ", ".join(f"{key} {value}" for key, value in chosen.items())
    compiled = "; layers compiled" if config.kernels.use == "compile" else ""
    graphed = "; a CUDA graph of a micro-batch" if run.inputs.graph else ""
    console.print(f"{config.name}: kernels: {shown}{compiled}{graphed}", highlight=False)
    if evaluations is not None and run.validation:
        console.print(f"{config.name}: evaluation: {evaluations}", highlight=False)
    if evaluations is not None and run.tasks.tasks:
        console.print(f"{config.name}: tasks: {run.tasks}, {evaluations.of_tasks}", highlight=False)
    if (valuation := valuation_cost(config, plan.origin.step)) is not None:
        console.print(f"{config.name}: valuation: {valuation}; {SIGN}", highlight=False)
    for note in run.notes:
        console.print(f"{config.name}: note: {note}", style="yellow", highlight=False)


def print_reset_table(rows: list[ResetLine], console: Console, log: Callable[[str], None]) -> None:
    """The reset table: what the checkpoint had, what this run has."""
    table = Table(title="reset table", title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("line", "choice", "checkpoint had", "this run has"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        style = "dim" if row.choice in ("keep", "continue", "load") else None
        table.add_row(row.line, row.choice, row.checkpoint_had, row.run_has, style=style)
        log(f"reset table: {row.line}: {row.choice}: {row.checkpoint_had} -> {row.run_has}")
    console.print(table)
