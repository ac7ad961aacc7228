"""The contents of a checkpoint for display: its counters, its history, its tensors' sizes, and differences between two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.filesize import decimal
from rich.table import Table
from rich.tree import Tree
from torch import Tensor

from megarewarm.checkpoint.lineage import Stage
from megarewarm.checkpoint.source import OpenedCheckpoint
from megarewarm.checkpoint.weights import OnBytes, Weights, in_order
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import HEAD
from megarewarm.model.size import count_parameters


@dataclass(frozen=True)
class Norms:
    """Of one parameter: root mean square, largest magnitude, and values that are not finite."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rms: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class TensorDifference:
    """Of one parameter in two checkpoints: values that differ, and |b - a| / |a| (2-norms)."""

    name: str
    shape: tuple[int, ...]
    changed: int
    relative: float


def norms(source: OpenedCheckpoint, on_bytes: OnBytes = lambda _: None) -> Iterator[Norms]:
    """Norms of the parameters in the model's order, summed in float64."""
    described = source.stored.describe()
    for name in in_order(described, source.model_config):
        tensor = source.stored.read(name)
        on_bytes(tensor.nbytes)
        finite = torch.isfinite(tensor)
        values = tensor if bool(finite.all()) else torch.where(finite, tensor, 0)
        rms = _norm(values) / max(1, tensor.numel()) ** 0.5
        yield Norms(name, tuple(tensor.shape), tensor.dtype, rms, float(values.abs().max()), int((~finite).sum()))


def differences(
    one: OpenedCheckpoint, other: OpenedCheckpoint, on_bytes: OnBytes = lambda _: None
) -> Iterator[TensorDifference]:
    """How each parameter changed from ``one`` to ``other``. Raises ``UserError`` if names or shapes don't match."""
    mine, theirs = dict(one.stored.describe()), dict(other.stored.describe())
    if one.model_config.tie_embeddings and other.model_config.tie_embeddings:  # some files hold the head nevertheless
        mine.pop(HEAD, None)
        theirs.pop(HEAD, None)
    for name in in_order({*mine, *theirs}, one.model_config):
        if name not in mine or name not in theirs:
            raise UserError(f"{name}: only in {one.name if name in mine else other.name}; the models differ")
        if mine[name].shape != theirs[name].shape:
            raise UserError(
                f"{name}: {mine[name].shape} in {one.name}, {theirs[name].shape} in {other.name}; the models differ"
            )
        before, after = one.stored.read(name), other.stored.read(name)
        on_bytes(before.nbytes + after.nbytes)
        changed = int((before != after).sum())
        scale = _norm(before)
        relative = _norm(after.double() - before.double()) / scale if scale else float(changed > 0)
        yield TensorDifference(name, tuple(before.shape), changed, relative)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def size_of(weights: Weights) -> int:
    """Bytes of all parameters."""
    return sum(item.nbytes for item in weights.describe().values())


def state_table(source: OpenedCheckpoint) -> Table:
    """Format, shape, and every counter."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    config = source.model_config
    dtypes = sorted({str(item.dtype).removeprefix("torch.") for item in source.stored.describe().values()})
    rows = {
        "checkpoint": source.name,
        "format": source.format,
        "model": f"{config.family}, {config.num_layers} layers, width {config.hidden_size}, {_heads(config)}, vocabulary "
        f"{config.vocab_size:,}, {config.max_positions:,} positions",
        "": f"{config.activation}, {config.residual} residual, {_rotary(config)}"
        + (", tied embeddings" if config.tie_embeddings else ""),
        "parameters": f"{count_parameters(config):,}, {', '.join(dtypes)}, {decimal(size_of(source.stored))}",
        "holds": "weights" + "".join(f", {line.replace('_', ' ')}" for line in sorted(source.keeps)),
    }
    if (state := source.training) is not None:
        rows |= {
            "step": f"{state.step:,}",
            "optimizer": f"{state.optimizer}, {state.optimizer_step:,} steps",
            "schedule": _schedule(state.schedule, state.schedule_position),
            "last learning rate": f"{state.last_lr:.4g}" if state.last_lr else "not recorded",
            "samples": f"{state.samples:,}" + (f" of data {state.data_fingerprint[:8]}" if state.data_fingerprint else ""),
        }
        if state.loss_scale is not None:
            rows["loss scale"] = f"{state.loss_scale['scale']:g}"
        if state.measured:
            rows["measured here"] = ", ".join(f"{name} {loss:.4f}" for name, loss in state.measured.items())
    for key, value in rows.items():
        table.add_row(key, value)
    for note in source.notes:
        table.add_row("note", note)
    return table


def _heads(config: ModelConfig) -> str:
    return f"{config.num_heads} heads" + ("" if config.kv_heads == config.num_heads else f" on {config.kv_heads} of keys")


def _rotary(config: ModelConfig) -> str:
    """The positions, and how far back a layer attends."""
    scaling, window, layers = config.rotary_scaling, config.sliding_window, config.window_layers
    words = f"rotary {config.rotary_fraction:g} of a head, base {config.rotary_base:g}"
    words += f", {scaling.kind} x {scaling.factor:g}" if scaling is not None else ""
    words += f", {len(config.unrotated_layers)} layers without" if config.unrotated_layers else ""
    words += f", window {window:,}" if window is not None else ""
    return words + (f" in {len(layers)} layers" if window is not None and layers is not None else "")


def _schedule(schedule: dict[str, object], position: int) -> str:
    shown = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in schedule.items() if v is not None)
    return f"at {position:,} of: {shown}"


def lineage_tree(source: OpenedCheckpoint) -> Tree:
    """The stages of training, the first at the root."""
    stages = source.lineage.stages
    if not stages:
        return Tree("no history is recorded")
    tree = branch = Tree(_stage(stages[0]))
    for stage in stages[1:]:
        branch = branch.add(_stage(stage))
    return tree


def _stage(stage: Stage) -> str:
    lines = [f"[bold]{stage.run}[/]: {stage.intent}"]
    if stage.steps:
        lines[0] += f", {stage.steps:,} steps, {stage.tokens:,} tokens"
    if stage.max_lr is not None:
        last = f", last {stage.last_lr:.3g}" if stage.last_lr is not None else ""
        lines.append(f"learning rate up to {stage.max_lr:.3g}{last}")
    lines += [f"{seen.name}: {seen.tokens:,} tokens ({seen.fingerprint[:8]})" for seen in stage.data]
    if stage.losses:
        lines.append("losses: " + ", ".join(f"{name} {loss:.4f}" for name, loss in stage.losses.items()))
    return "\n".join(lines)


def norms_table(found: list[Norms]) -> Table:
    """Parameters with their norms; what is not finite in red."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading, justify in (
        ("parameter", "left"),
        ("shape", "left"),
        ("dtype", "left"),
        ("rms", "right"),
        ("largest", "right"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("not finite", justify="right")
    for each in found:
        dtype = str(each.dtype).removeprefix("torch.")
        shape = " x ".join(map(str, each.shape))
        style = "red" if each.not_finite else None
        strange = f"{each.not_finite:,}" if each.not_finite else ""
        table.add_row(each.name, shape, dtype, f"{each.rms:.4g}", f"{each.largest:.4g}", strange, style=style)
    return table


def differences_table(found: list[TensorDifference], most: int) -> Table:
    """The parameters that changed most, and one line for those that did not change at all."""
    same = sum(each.changed == 0 for each in found)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
    table.caption = f"{same} of {len(found)} parameters are the same bit for bit"
    for heading in ("parameter", "shape", "values changed", "|b - a| / |a|"):
        table.add_column(heading, justify="left" if heading in ("parameter", "shape") else "right", overflow="fold")
    for each in sorted(found, key=lambda each: -each.relative)[:most]:
        if each.changed:
            shape = " x ".join(map(str, each.shape))
            table.add_row(each.name, shape, f"{each.changed:,}", f"{each.relative:.3g}")
    return table
