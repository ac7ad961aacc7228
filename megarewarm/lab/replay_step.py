"""Recompute one step of a run from its checkpoint to inspect it: the losses of its sequences, its gradients, its data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megarewarm.config.load import read_run_config
from megarewarm.config.schema import RunConfig
from megarewarm.console import make_console
from megarewarm.data.order.row_places import RowPlace
from megarewarm.data.text.tokenizers import load_tokenizer
from megarewarm.errors import UserError
from megarewarm.packed_rows import PAD, plain
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.collective import collective
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.layout import step_of
from megarewarm.record.run import RecordedRun, read_run
from megarewarm.training.measuring import measure_moments
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.own_replay import with_own_replay
from megarewarm.training.start.plan import make_plan
from megarewarm.training.step import Clock, compute_gradients, training_step

_EXCERPT = 60  # characters of a sequence's text


@dataclass(frozen=True)
class Replayed:
    """Step ``step`` of a run, recomputed from the checkpoint of step ``since``.

    ``row_losses``: mean loss of each sequence of the global batch; ``groups``: norms of the weights and the gradient of each
    part of the model, and their counts of non-finite values. ``recorded``: the loss and the gradient norm that the run logged,
    None if it logged none or they were not finite; ``differing``: steps in between whose loss differs from the logged one.
    """

    step: int
    since: int
    loss: float
    norm: float
    recorded: tuple[float | None, float | None] | None
    differing: list[int]
    places: list[RowPlace]
    row_losses: list[float]
    texts: list[str]
    groups: dict[str, dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON; non-finite numbers become null."""
        return {
            **{key: _finite(value) for key, value in asdict(self).items() if key not in ("places", "row_losses", "texts")},
            "rows": [
                {"loss": _finite(loss), "text": text, **asdict(place)}
                for loss, text, place in zip(self.row_losses, self.texts, self.places, strict=True)
            ],
        }


@collective
def replay_step(
    folder: Path, step: int | None, ranks: Ranks, progress: Callable[[int, int, int], None] = lambda step, first, last: None
) -> Replayed:
    """Recompute ``step`` of the run in ``folder`` (None: the newest that went wrong, else the last). Writes nothing.

    Retrains the steps since the newest checkpoint before it, deterministically; the step numbers determine their data and
    learning rates. ``progress``: called with (step, first, last). All ranks call it; on a CPU, the run's layout reproduces the
    run bit for bit. Raises ``UserError``.
    """
    recorded = read_run(folder)
    config = _config_of(folder)
    step = _choose(step, folder, recorded, config)
    plan, _ = with_own_replay(make_plan(config, up_to=step - 1), ranks, make_console(quiet=not ranks.is_main))
    first = plan.position.step
    if step <= first:
        raise UserError(f"{folder}: the run begins at step {first + 1} and has no step {step}")
    run = build(plan, ranks)
    try:
        measure_moments(run)
        losses = _column(recorded, "loss")
        differing = []
        for number in range(first + 1, step):
            progress(number, first, step)
            run.thaw_if_due()
            result = training_step(run, plan.lr(number))
            if number in losses and losses[number] != _finite(result.loss):
                differing.append(number)
        progress(step, first, step)
        run.thaw_if_due()
        return _look(run, step, first, recorded, differing)
    finally:
        run.batches.close()


def _look(run: Run, step: int, since: int, recorded: RecordedRun, differing: list[int]) -> Replayed:
    size = run.plan.config.training.global_batch
    first_sample, rows = next(run.batches)
    mine = run.mesh.data_rank * len(rows)
    sums = [0.0] * (2 * size)
    for i in range(len(rows)):
        sums[mine + i], sums[size + mine + i] = run.model.evaluate([rows[i : i + 1]], most=1, micro_batch=1)
    sums = all_reduce_sums(sums)
    row_losses = [loss / count if count else math.nan for loss, count in zip(sums[:size], sums[size:], strict=True)]
    computed = compute_gradients(run, rows, Clock(run.ranks.device))
    then = [_column(recorded, name).get(step) for name in ("loss", "grad_norm")]
    return Replayed(
        step=step,
        since=since,
        loss=computed.loss,
        norm=computed.norm,
        recorded=(then[0], then[1]) if step in _column(recorded, "loss") else None,
        differing=differing,
        places=run.data.places(first_sample, size),
        row_losses=row_losses,
        texts=_texts(run, first_sample, size),
        groups=_groups(run),
    )


def _column(recorded: RecordedRun, name: str) -> dict[int, float | None]:
    """Step -> the value that the run logged under ``name``, None if it was not finite."""
    steps = recorded.train["step"].astype(int).tolist()
    return dict(zip(steps, map(_finite, recorded.train[name].tolist()), strict=True))


def _groups(run: Run) -> dict[str, dict[str, float]]:
    """For each part of the model, norms of weights and gradients and counts of non-finite values. Replicated values count
    once."""
    names = list(dict.fromkeys(card.group for card in run.model.cards.values()))
    sums = torch.zeros(len(names), 4, dtype=torch.float64)
    scale = run.scaler.scale if run.scaler is not None else 1.0
    for name, parameter in run.model.parameters.items():
        weights = run.model.unique_shard(name, parameter)
        if weights is None:
            continue
        part = run.model.trained.get(name)  # None where it is frozen
        gradient = None if part is None or part.grad is None else run.model.unique_trained(name, part.grad)
        for i, values in enumerate((weights, gradient / scale) if gradient is not None else (weights,)):
            finite = values.isfinite()
            sums[names.index(run.model.cards[name].group), i] += float(values.where(finite, 0).double().square().sum())
            sums[names.index(run.model.cards[name].group), 2 + i] += float((~finite).sum())
    total = torch.tensor(all_reduce_sums(sums.flatten().tolist()), dtype=torch.float64).view(-1, 4).tolist()
    return {
        name: {
            "weight_norm": math.sqrt(weights),
            "grad_norm": math.sqrt(gradient),
            "bad_weights": bad_weights,
            "bad_gradients": bad_gradients,
        }
        for name, (weights, gradient, bad_weights, bad_gradients) in zip(names, total, strict=True)
    }


def _texts(run: Run, first_sample: int, count: int) -> list[str]:
    """Each sequence as text, or its first ids if the run has no tokenizer."""
    rows = [plain(row[row != PAD]) for row in run.data.rows(first_sample, count)]
    if run.plan.config.data.tokenizer is None:
        return [" ".join(map(str, row[:16].tolist())) for row in rows]
    tokenizer = load_tokenizer(run.plan.config.data.tokenizer)
    return [tokenizer.decode(row) for row in rows]


def _config_of(folder: Path) -> RunConfig:
    """The run's configuration with deterministic kernels."""
    config = read_run_config(folder)
    kernels = config.kernels.model_copy(update={"deterministic": True})
    return config.model_copy(update={"folder": str(folder), "kernels": kernels})


def _choose(step: int | None, folder: Path, recorded: RecordedRun, config: RunConfig) -> int:
    if step is None:
        written = [n for path in RunFolder(folder).batches.glob("*.json") if (n := step_of(path.stem)) is not None]
        trained = list(_column(recorded, "loss"))
        if not written and not trained:
            raise UserError(f"{folder}: the run has logged no step yet; give one with --step")
        step = max(written or trained)
    if not 1 <= step <= config.total_steps:
        raise UserError(f"--step {step}: expected 1 to {config.total_steps}, the steps of the run")
    return step


def show(replayed: Replayed, console: Console, most: int = 12) -> None:
    """Print the result: the step against the log, its sequences with the highest losses, the parts of the model."""
    console.print(f"step {replayed.step}, recomputed from step {replayed.since}", style="bold", highlight=False)
    console.print(f"loss {replayed.loss:.6f}, gradient norm {replayed.norm:.6g}; {_verdict(replayed)}", highlight=False)
    if replayed.differing:
        few = ", ".join(map(str, replayed.differing[:5])) + (", ..." if len(replayed.differing) > 5 else "")
        console.print(
            f"{len(replayed.differing)} of the {replayed.step - replayed.since - 1} steps in between have other losses than "
            f"logged ({few}): the device, layout or number of threads differs, or weights were corrupted",
            style="yellow",
        )
    order = sorted(range(len(replayed.places)), key=lambda i: _badness(replayed.row_losses[i]), reverse=True)
    rows = Table(
        title="its sequences, highest loss first", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=True
    )
    for heading in ("row", "loss"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("source", overflow="ellipsis", no_wrap=True)
    rows.add_column("documents", max_width=20)
    rows.add_column("text", overflow="ellipsis", no_wrap=True, ratio=1)  # the others have their width, this one the rest
    for i in order[:most]:
        place = replayed.places[i]
        text = " ".join(replayed.texts[i].split())[:_EXCERPT]
        documents = ", ".join(str(part.document) for part in place.parts[:4]) + (", ..." if len(place.parts) > 4 else "")
        rows.add_row(str(place.row), f"{replayed.row_losses[i]:.4f}", place.source, documents, text)
    console.print(rows)
    if len(order) > most:
        console.print(f"and {len(order) - most} more (all of them with --out)", style="dim")
    groups = Table(title="the parts of the model", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("part", "weight norm", "gradient norm", "not finite"):
        groups.add_column(heading, justify="left" if heading == "part" else "right")
    for name, group in replayed.groups.items():
        bad = int(group["bad_weights"] + group["bad_gradients"])
        groups.add_row(
            name,
            f"{group['weight_norm']:.4g}",
            f"{group['grad_norm']:.4g}",
            f"{bad:,}" if bad else "-",
            style="red" if bad else None,
        )
    console.print(groups)


def _verdict(replayed: Replayed) -> str:
    if replayed.recorded is None:
        return "the run logged nothing for it"
    then = replayed.recorded
    if then == (_finite(replayed.loss), _finite(replayed.norm)):
        return "bit for bit as logged"
    shown = ", ".join("not finite" if value is None else f"{value:.6g}" for value in then)
    if None in then and math.isfinite(replayed.loss) and math.isfinite(replayed.norm):
        return f"the run logged {shown}: the problem does not recur"
    return f"the run logged {shown}"


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _finite(value: Any) -> Any:
    """``value`` with None for non-finite numbers, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finite(each) for each in value)
    return value
