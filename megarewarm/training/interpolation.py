"""Weights on the straight line between the start checkpoint and a run's end, evaluated on every validation set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megarewarm.errors import UserError
from megarewarm.parallel.agreement import Between, nothing_between
from megarewarm.parallel.collective import collective
from megarewarm.training.after_step.evaluate import evaluate_set
from megarewarm.training.output.metrics import Metrics
from megarewarm.training.output.voice import Voice
from megarewarm.training.run import Run
from megarewarm.training.start.evaluations import evaluations_at
from megarewarm.training.start.weights import load_start


@collective
def interpolate(
    run: Run,
    voice: Voice,
    alphas: Sequence[float] | None = None,
    show: Callable[[str], Between] = lambda what: nothing_between,
) -> None:
    """Evaluate (1 - alpha) start + alpha end for every alpha of ``interpolate.alphas``, or of ``alphas`` if the others are
    done: events 'interpolation', and a table.

    All ranks call it, after the last step; it restores the end weights bit for bit. Raises ``UserError`` if the start
    checkpoint can't be read any more. ``show``: called between the portions of each set. Linear interpolation: Wortsman et
    al., arXiv 2109.01903.
    """
    config = run.plan.config
    if config.interpolate is None or run.step < config.total_steps:
        return
    parameters = run.model.parameters
    end = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    try:
        _load_start(run)
        start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        rows = {1.0: dict(run.state.losses)}
        if run.state.start_losses:
            rows[0.0] = dict(run.state.start_losses)
        for alpha in config.interpolate.alphas if alphas is None else alphas:
            for name, parameter in parameters.items():
                parameter.data.copy_(torch.lerp(start[name].double(), end[name].double(), alpha))
            run.model.forget_gathered()
            rows[alpha] = _losses(run, voice.metrics, alpha, show)
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(end[name])
        run.model.forget_gathered()
    _show(rows, config.name, voice.console)


def _load_start(run: Run) -> None:
    try:
        load_start(run.plan, run.model)
    except UserError as error:
        raise UserError(
            f"interpolate: the run is trained and saved, but its start checkpoint can't be read any more: {error}. "
            f"Restore it, or set interpolate to null"
        ) from error


def _losses(run: Run, metrics: Metrics, alpha: float, show: Callable[[str], Between]) -> dict[str, float]:
    number, _ = evaluations_at(run.plan.config, run.step)[-1]
    losses = {}
    for windows in run.validation:
        losses[windows.name] = evaluate_set(run, windows, number, show(f"{windows.name} at alpha {alpha:g}")).loss
    for windows in run.validation:  # when all are known: an interrupted evaluation logs nothing
        metrics.event(
            "interpolation", step=run.step, alpha=alpha, name=windows.name, role=windows.role, loss=losses[windows.name]
        )
    return losses


def _show(rows: dict[float, dict[str, float]], name: str, console: Console) -> None:
    sets = list(dict.fromkeys(key for losses in rows.values() for key in losses))
    table = Table(title=f"{name}: (1 - alpha) start + alpha end", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("alpha", *sets):
        table.add_column(heading, justify="right")
    for alpha in sorted(rows):
        table.add_row(f"{alpha:g}", *(f"{rows[alpha][key]:.4f}" if key in rows[alpha] else "" for key in sets))
    console.print(table)
