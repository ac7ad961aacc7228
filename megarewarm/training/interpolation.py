"""Other weights than a run's last ones, evaluated on every validation set: those between its start checkpoint and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megarewarm.errors import UserError
from megarewarm.parallel.agreement import Between, nothing_between
from megarewarm.parallel.collective import collective
from megarewarm.training.after_step.evaluate import evaluate_set
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
    with in_between(run) as end:
        _load_start(run)
        start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        rows = {1.0: dict(run.state.losses)}
        if run.state.start_losses:
            rows[0.0] = dict(run.state.start_losses)
        for alpha in config.interpolate.alphas if alphas is None else alphas:
            for name, parameter in parameters.items():
                parameter.detach().copy_(torch.lerp(start[name].double(), end[name].double(), alpha))
            rows[alpha] = losses_of_sets(run, f"alpha {alpha:g}", show)
            for windows in run.validation:  # when all are known: an interrupted evaluation logs nothing
                loss = rows[alpha][windows.name]
                voice.metrics.event(
                    "interpolation", step=run.step, alpha=alpha, name=windows.name, role=windows.role, loss=loss
                )
    table = {f"{alpha:g}": rows[alpha] for alpha in sorted(rows)}
    show_losses(table, f"{config.name}: (1 - alpha) start + alpha end", "alpha", voice.console)


@contextmanager
def in_between(run: Run) -> Iterator[dict[str, Tensor]]:
    """Context in which the run's parameters may be overwritten. Gives copies of them in host memory, and restores them."""
    parameters = run.model.parameters
    end = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    try:
        yield end
    finally:
        for name, parameter in parameters.items():
            parameter.detach().copy_(end[name])
        run.model.forget_gathered()


def _load_start(run: Run) -> None:
    try:
        load_start(run.plan, run.model)
    except UserError as error:
        raise UserError(
            f"interpolate: the run is trained and saved, but its start checkpoint can't be read any more: {error}. "
            f"Restore it, or set interpolate to null"
        ) from error


@collective
def losses_of_sets(run: Run, what: str, show: Callable[[str], Between]) -> dict[str, float]:
    """The loss on every validation set with the parameters as they are now, overwritten to be ``what``, in nats per token, on
    the tokens of the run's last evaluation. All ranks call it."""
    run.model.forget_gathered()
    number, _ = evaluations_at(run.plan.config, run.step)[-1]
    return {
        windows.name: evaluate_set(run, windows, number, show(f"{windows.name} at {what}")).loss for windows in run.validation
    }


def show_losses(rows: Mapping[str, Mapping[str, float]], title: str, heading: str, console: Console) -> None:
    """Print losses by row and validation set; ``heading``: of the rows' names."""
    sets = list(dict.fromkeys(key for losses in rows.values() for key in losses))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (heading, *sets):
        table.add_column(name, justify="right")
    for row, losses in rows.items():
        table.add_row(row, *(f"{losses[key]:.4f}" if key in losses else "" for key in sets))
    console.print(table)
