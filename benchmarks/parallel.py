"""What parallelism costs: the engine with one rank, bytes on the wire of each layout, and the pipelines' bubbles.

Everything runs on this machine with gloo ranks; ratios of one run count.

    overhead   the engine with one rank in every direction against the plain model and optimizer, step by step in turns
    overlap    data-parallel ranks that sum gradients during the backward pass against those that do after it, in turns
    wire       bytes that each layout sends in a step, counted at torch's operators, against the least that is possible
    bubble     pipelines whose stages sleep for a known time, against the shortest time that their order of work allows

    python benchmarks/parallel.py [overhead] [overlap] [wire] [bubble] [--json FILE] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megarewarm.config.execution import OptimizerConfig, ParallelConfig, TrainingConfig
from megarewarm.config.model import ModelConfig
from megarewarm.layout.memory import Work, parts, traffic_of
from megarewarm.model.parameters import cards
from megarewarm.optimizers.adamw import AdamW
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Layout, Mesh, choose_layout
from megarewarm.parallel.pipeline import Order, Pipeline, my_stages, rank_of, stages_per_rank
from megarewarm.parallel.ranks import Ranks


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``[function(ranks, *args) for each rank]`` on gloo ranks of this machine, each a process."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world_size, mp.get_context("spawn")) as pool:
        work = [pool.submit(_on_rank, rank, world_size, f"{folder}/store", function, args) for rank in range(world_size)]
        return [each.result() for each in work]


def _on_rank(rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    dist.barrier()  # or a rank that is done at once would close connections that others are still making
    try:
        return function(Ranks(rank, world_size, torch.device("cpu")), *args)
    finally:
        dist.barrier()
        dist.destroy_process_group()


# ---- overhead -----------------------------------------------------------------------------------------------------------

SEQUENCE, BATCH = 256, 4
SMALL = ModelConfig(num_layers=6, hidden_size=512, num_heads=8, vocab_size=8192, max_positions=SEQUENCE)


def plain_step() -> Callable[[np.ndarray], float]:
    """The model and the optimizer as one would write them down for one device."""
    from megarewarm.model.initialize import initial_value
    from megarewarm.model.transformer import Transformer

    model = Transformer(SMALL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(cards(SMALL)[name], SMALL, 1))
    optimizer = AdamW(dict(model.named_parameters()), cards(SMALL), OptimizerConfig())

    def step(rows: np.ndarray) -> float:
        tokens = torch.from_numpy(rows)
        optimizer.torch.zero_grad(set_to_none=True)
        total, count = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1e-4)
        return float(loss.detach())

    return step


def engine_step(config: ModelConfig, ranks: Ranks, parallel: ParallelConfig, layout: Layout, *, rows: int, micro: int) -> Any:
    """The trainer's step, with the engine in the given layout."""
    training = TrainingConfig(budget="1 steps", global_batch=rows, micro_batch=micro)
    model = ParallelModel(
        config,
        Mesh(ranks, layout),
        parallel=parallel,
        training=training,
        sequence_length=config.max_positions,
        precision="fp32",
    )
    model.initialize(1)
    optimizer = AdamW(model.parameters, model.cards, OptimizerConfig())
    tokens = rows * config.max_positions

    def step(batch: np.ndarray) -> float:
        model.gradients.zero()
        model.gradients.expect_reduce()
        loss = model.forward_backward(batch).sum / tokens
        model.gradients.reduce()
        norm = model.gradients.norm()
        if norm > 1:
            model.gradients.scale_(1 / (norm + 1e-6))
        optimizer.step(1e-4)
        return loss

    return step


def overhead(steps: int) -> dict[str, Any]:
    """Median of the ratio of two neighbouring steps, one by each side; which side goes first changes every time."""
    sides = {
        "plain": plain_step(),
        "engine": engine_step(SMALL, Ranks(0, 1, torch.device("cpu")), ParallelConfig(), Layout(), rows=BATCH, micro=BATCH),
    }
    random = np.random.default_rng(0)
    batches = random.integers(SMALL.vocab_size, size=(4, BATCH, SEQUENCE + 1), dtype=np.int64)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    apart = 0.0
    for i in range(steps + 3):
        losses = {}
        for side in sorted(sides, reverse=i % 2 == 1):
            began = time.perf_counter()
            losses[side] = sides[side](batches[i % 4])
            if i >= 3:
                seconds[side].append(time.perf_counter() - began)
        if i < 4:  # later, fp32 rounding has grown through Adam
            apart = max(apart, abs(losses["engine"] / losses["plain"] - 1))
    ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["engine"], strict=True))
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {"ratio": ratio, "seconds": medians, "loss_difference": apart, "steps": steps, "threads": torch.get_num_threads()}


# ---- sums during the backward pass --------------------------------------------------------------------------------------


def _overlapped(ranks: Ranks, steps: int) -> tuple[list[list[float]], int, bool]:
    """(of each pair of steps: processor seconds after, during, seconds by the clock after, during; the sums; the same bits)."""
    from megarewarm.parallel import buckets
    from tests.support.wire import Wire

    share, sides = BATCH // ranks.world_size, []
    for early in (False, True):
        buckets.OVERLAPPING = ("cpu",) if early else ()
        sides.append(engine_step(SMALL, ranks, ParallelConfig(), Layout(replicate=ranks.world_size), rows=BATCH, micro=share))
    batch = np.random.default_rng(ranks.rank).integers(SMALL.vocab_size, size=(share, SEQUENCE + 1), dtype=np.int64)
    pairs, same = [], True
    for i in range(steps + 3):
        worked, seconds, losses = [0.0] * 2, [0.0] * 2, [0.0] * 2
        for side in (i % 2, 1 - i % 2):
            dist.barrier()
            before = time.process_time(), time.perf_counter()
            losses[side] = sides[side](batch)
            worked[side], seconds[side] = time.process_time() - before[0], time.perf_counter() - before[1]
        same &= losses[0] == losses[1]
        pairs.append([*worked, *seconds])
    with Wire() as wire:
        sides[1](batch)
    return pairs[3:], wire.calls["allreduce_"], same


def overlap(steps: int, ranks: int = 2) -> dict[str, Any]:
    """Quartiles of the ratios of neighbouring steps; the processor seconds are those of all ranks."""
    answers = run_ranks(_overlapped, ranks, steps)
    assert all(same for _, _, same in answers), "a sum of two ranks has the same bits in any cut"
    pairs = np.array([found for found, _, _ in answers])
    ratios = {"processor": pairs[:, :, 1].sum(0) / pairs[:, :, 0].sum(0), "clock": pairs[0, :, 3] / pairs[0, :, 2]}
    quartiles = {name: np.quantile(ratio, [0.25, 0.5, 0.75]).tolist() for name, ratio in ratios.items()}
    return {"ranks": ranks, "collectives": answers[0][1], "steps": steps, **quartiles}


# ---- bytes on the wire --------------------------------------------------------------------------------------------------

WIRED = ModelConfig(num_layers=8, hidden_size=128, num_heads=8, vocab_size=1024, max_positions=64)
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {},
        {"sharding": "zero2"},
        {"sharding": "zero3"},
        {"tensor": 2},
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        {"pipeline": 2, "schedule": "interleaved"},
        {"pipeline": 2, "schedule": "zero_bubble"},
    ],
    4: [
        {},
        {"sharding": "zero3", "shard_ranks": 2},
        {"tensor": 4},
        {"tensor": 2, "sequence": True, "sharding": "zero2"},
        {"pipeline": 4},
        {"pipeline": 2, "tensor": 2},
    ],
    8: [{"pipeline": 2, "tensor": 2}, {"pipeline": 2, "tensor": 2, "sequence": True, "sharding": "zero2"}],
}


def _loopback() -> float:
    """Bytes that have gone over this machine's loopback, TCP's own included; NaN where Linux does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return math.nan
    return float(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def _send(ranks: Ranks, layouts: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """For each layout: (least bytes, bytes sent) of this rank in its second step, and what all ranks put on the loopback."""
    from tests.support.wire import Wire

    found = []
    for settings in layouts:
        parallel = ParallelConfig(**settings)
        layout = choose_layout(parallel, ranks.world_size)
        rows, micro = 16, 2
        step = engine_step(WIRED, ranks, parallel, layout, rows=rows, micro=micro)
        share = rows // layout.data
        batch = np.random.default_rng(0).integers(1024, size=(share, WIRED.max_positions + 1), dtype=np.int64)
        step(batch)
        with Wire() as wire:
            step(batch)
        dist.barrier()
        before = _loopback()
        dist.barrier()
        for _ in range(4):
            step(batch)
        dist.barrier()
        seen = (_loopback() - before) / 4
        work = Work(WIRED, WIRED.max_positions, micro, share // micro)
        pipeline_rank = ranks.rank // (layout.tensor * layout.data)
        part = parts(work, parallel, layout)[pipeline_rank]
        found.append((traffic_of(part, work, parallel, layout).total, wire.bytes, seen))
    return found


def wire() -> list[dict[str, Any]]:
    """Bytes per step, summed over the ranks, and the largest excess of a rank."""
    rows = []
    for world_size, layouts in LAYOUTS.items():
        answers = run_ranks(_send, world_size, layouts)
        for i, settings in enumerate(layouts):
            least = sum(answer[i][0] for answer in answers)
            sent = sum(answer[i][1] for answer in answers)
            worst = max(answer[i][1] / answer[i][0] - 1 for answer in answers)
            rows.append(
                {
                    "ranks": world_size,
                    "layout": settings,
                    "least": least,
                    "sent": sent,
                    "worst_excess": worst,
                    "loopback": answers[0][i][2],
                }
            )
    return rows


# ---- bubbles ------------------------------------------------------------------------------------------------------------

Event = tuple[str, int, float, float]  # kind (F, I, W), stage, begin, end


class _Sleep(torch.autograd.Function):
    """The identity whose backward sleeps: on the way of an input or of a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: SleepingStage, kind: str) -> Tensor:
        ctx.stage, ctx.kind = stage, kind
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.stage.sleep(ctx.kind)
        return grad, None, None


class SleepingStage(nn.Module):
    """A stage that takes ``unit`` seconds forward, for the gradient of its input and for that of its weight each."""

    def __init__(self, number: int, unit: float, *, first: bool) -> None:
        super().__init__()
        self.number, self.unit, self.first = number, unit, first
        self.weight = nn.Parameter(torch.ones(4))
        self.events: list[Event] = []

    def sleep(self, kind: str) -> None:
        began = time.perf_counter()
        time.sleep(self.unit)
        self.events.append((kind, self.number, began, time.perf_counter()))

    def forward(self, x: Tensor, length: int) -> Tensor:
        self.sleep("F")
        x = x.float().unsqueeze(-1).expand(*x.shape, 4) if self.first else _Sleep.apply(x, self, "I")
        return x * _Sleep.apply(self.weight, self, "W")


def _pipeline(
    ranks: Ranks, order: Order, micro_batches: int, unit: float, repeats: int
) -> tuple[list[float], list[Event], float]:
    """(seconds of each step, what this rank did in the last one, when that began)."""
    per_rank = stages_per_rank(order, None)
    numbers = my_stages(order, ranks.rank, ranks.world_size, per_rank)
    count = per_rank * ranks.world_size
    # a stage's share of the work, so that a rank's is the same in every order
    stages = [SleepingStage(number, unit / per_rank, first=number == 0) for number in numbers]
    everyone = list(range(ranks.world_size))
    group, reverse_group = dist.new_group(everyone), dist.new_group(everyone)
    assert group is not None and reverse_group is not None
    pipeline = Pipeline(
        stages,
        numbers,
        count,
        order=order,
        group=group,
        reverse_group=reverse_group,
        device=ranks.device,
        micro_batches=micro_batches,
        micro_batch=1,
        sequence_length=1,
        local_length=1,
        hidden_size=4,
        dtype=torch.float32,
        loss=lambda hidden, targets: hidden.sum(),
    )
    tokens = torch.ones((micro_batches, 1), dtype=torch.int64)
    seconds = []
    began = 0.0
    for _ in range(repeats + 1):
        for stage in stages:
            stage.events.clear()
        dist.barrier()
        began = time.perf_counter()
        pipeline.train(tokens, tokens, None)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return seconds[1:], [event for stage in stages for event in stage.events], began


def closed_form(order: Order, ranks: int, micro_batches: int) -> float | None:
    """Seconds of a step where a rank's part of a micro-batch takes 1 forward, 1 for its input's gradient, 1 for its weights'.

    1F1B: (m + p - 1)(f + b). Interleaved with v stages a rank: m(f + b) + (p - 1)(f + b)/v (Narayanan et al. 2021,
    arXiv 2104.04473, section 2.2). ZB-V: no bubble between ranks; the first stages' way through the pipeline remains
    (Qi et al. 2024, arXiv 2405.15362): there is no formula for few micro-batches, see ``shortest``.
    """
    if order == "1f1b":
        return 3.0 * (micro_batches + ranks - 1)
    if order == "interleaved":
        return 3.0 * micro_batches + 3.0 * (ranks - 1) / 2
    return None


def shortest(order: Order, ranks: int, micro_batches: int) -> float:
    """The same by playing the library's own order of work: each piece begins when its rank and what it needs are ready."""
    per_rank = stages_per_rank(order, None)
    count, unit = per_rank * ranks, 1.0 / per_rank
    pieces: list[list[tuple[str, int, int]]] = _order_of_work(order, ranks, micro_batches, per_rank)
    done: dict[tuple[str, int, int], float] = {}
    clock, position = [0.0] * ranks, [0] * ranks
    while any(position[rank] < len(pieces[rank]) for rank in range(ranks)):
        moved = False
        for rank in range(ranks):
            while position[rank] < len(pieces[rank]):
                kind, stage, micro = pieces[rank][position[rank]]
                needs = {
                    "F": [("F", stage - 1, micro)] if stage else [],
                    "B": [("F", stage, micro)] + ([("I", stage + 1, micro)] if stage + 1 < count else []),
                    "I": [("F", stage, micro)] + ([("I", stage + 1, micro)] if stage + 1 < count else []),
                    "W": [("I", stage, micro)],
                }[kind]
                if not all(need in done for need in needs):
                    break
                # the first stage has no input whose gradient is wanted
                length = {"F": 1, "B": 1 if stage == 0 else 2, "I": 0 if stage == 0 else 1, "W": 1}[kind] * unit
                clock[rank] = max([clock[rank], *(done[need] for need in needs)]) + length
                done["I" if kind == "B" else kind, stage, micro] = clock[rank]
                position[rank] += 1
                moved = True
        assert moved, "the order of work waits for itself"
    return max(clock)


def _order_of_work(order: Order, ranks: int, micro_batches: int, per_rank: int) -> list[list[Any]]:
    """(kind, stage, micro-batch) for every rank; taken from the schedule objects where they keep it."""
    if order == "1f1b":
        found = []
        for rank in range(ranks):
            warmup = min(micro_batches, ranks - 1 - rank)
            line = [("F", rank, i) for i in range(warmup)]
            for i in range(micro_batches - warmup):
                line += [("F", rank, warmup + i), ("B", rank, i)]
            line += [("B", rank, i) for i in range(micro_batches - warmup, micro_batches)]
            found.append(line)
        return found
    with _single_process_group():
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

        count = ranks * per_rank
        stages = []
        for number in my_stages(order, 0, ranks, per_rank):
            stage = PipelineStage.__new__(PipelineStage)
            stage.__dict__.update(
                stage_index=number,
                num_stages=count,
                group_size=ranks,
                group_rank=0,
                is_first=number == 0,
                is_last=number == count - 1,
                stage_index_to_group_rank={n: rank_of(order, n, ranks) for n in range(count)},
                has_backward=True,
                submod=nn.Identity(),
                device=torch.device("cpu"),
                group=None,
            )
            stages.append(stage)
        kind = ScheduleInterleaved1F1B if order == "interleaved" else ScheduleZBVZeroBubble
        schedule = kind(stages, micro_batches, loss_fn=lambda x, y: x)  # type: ignore[arg-type]
    short = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    return [
        [
            (short[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in schedule.pipeline_order[rank]
            if action is not None and action.computation_type.name in short
        ]
        for rank in range(ranks)
    ]


@contextmanager
def _single_process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def bubble(unit: float, repeats: int) -> tuple[list[dict[str, Any]], dict[str, list[list[Event]]]]:
    """Median seconds of a step in units of ``unit``, against the formula and the shortest possible; what each rank did."""
    rows, pictures = [], {}
    for ranks, micro_batches in ((2, 8), (4, 8)):
        for order in ("1f1b", "interleaved", "zero_bubble"):
            answers = run_ranks(_pipeline, ranks, order, micro_batches, unit, repeats)
            seconds = statistics.median(max(answer[0][i] for answer in answers) for i in range(repeats)) / unit
            ideal = shortest(order, ranks, micro_batches)
            work = 3.0 * micro_batches
            rows.append(
                {
                    "ranks": ranks,
                    "micro_batches": micro_batches,
                    "order": order,
                    "formula": closed_form(order, ranks, micro_batches),
                    "shortest": ideal,
                    "measured": seconds,
                    "excess": seconds / ideal - 1,
                    "bubble_share": 1 - work / seconds,
                }
            )
            pictures[f"{order}, {ranks} ranks"] = [
                [(kind, stage, (begin - answer[2]) / unit, (end - answer[2]) / unit) for kind, stage, begin, end in answer[1]]
                for answer in answers
            ]
    return rows, pictures


def draw(pictures: dict[str, list[list[Event]]], path: Path) -> None:
    """What every rank did and when, one row of boxes a rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"F": "#4477aa", "I": "#ee8866", "W": "#bbbb55"}
    names = {"F": "forward", "I": "gradient of the input", "W": "gradient of the weights"}
    figure, axes = pyplot.subplots(
        len(pictures),
        figsize=(10, 1.0 + 0.26 * sum(2 + len(ranks) for ranks in pictures.values())),
        sharex=True,
        gridspec_kw={"height_ratios": [1 + len(ranks) for ranks in pictures.values()]},
    )
    for axis, (title, ranks) in zip(axes, pictures.items(), strict=True):
        for rank, events in enumerate(ranks):
            for kind, colour in colours.items():
                boxes = [(begin, end - begin) for what, _, begin, end in events if what == kind]
                axis.broken_barh(boxes, (rank - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.4)
        axis.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left", pad=3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("time in units of a rank's forward pass of one micro-batch")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, names.values(), loc="upper right", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=130)


# ---- the command line ---------------------------------------------------------------------------------------------------


WHAT = ["overhead", "overlap", "wire", "bubble"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=WHAT, default=WHAT)
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps for overhead and overlap; default: %(default)s")
    parser.add_argument("--unit", type=float, default=0.1, help="seconds a rank sleeps per pass; default: %(default)s")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="a PNG of who did what and when in the pipelines")
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = {}
    if "overhead" in arguments.what:
        found = result["overhead"] = overhead(arguments.steps)
        seconds = found["seconds"]
        console.print(
            f"one rank: plain {seconds['plain'] * 1e3:.1f} ms, engine {seconds['engine'] * 1e3:.1f} ms a step, "
            f"ratio of neighbours {found['ratio']:.3f}; losses differ by at most {found['loss_difference']:.1e}"
        )
    if "overlap" in arguments.what:
        found = result["overlap"] = overlap(arguments.steps)
        ratios = (f"{what} {at[1]:.3f} ({at[0]:.3f} to {at[2]:.3f})" for what, at in found.items() if isinstance(at, list))
        console.print(
            f"{found['ranks']} ranks, {found['collectives']} sums of gradients that start during the backward pass against one "
            f"after it, ratios of neighbours, quartiles in brackets: {', '.join(ratios)}"
        )
    if "wire" in arguments.what:
        rows = result["wire"] = wire()
        heads = ["ranks", "layout", "least, kB", "sent, kB", "more, all", "more, worst rank", "loopback, kB"]
        table = Table(*heads, title="bytes sent in a step")
        for row in rows:
            layout = ", ".join(f"{key} {value}" for key, value in row["layout"].items()) or "data"
            excess = f"{row['sent'] / row['least'] - 1:.2%}"
            sizes = (f"{row[key] / 1e3:,.0f}" for key in ("least", "sent"))
            worst, seen = f"{row['worst_excess']:.2%}", f"{row['loopback'] / 1e3:,.0f}"
            table.add_row(str(row["ranks"]), layout, *sizes, excess, worst, seen)
        console.print(table)
    if "bubble" in arguments.what:
        rows, pictures = bubble(arguments.unit, 3)
        result["bubble"] = rows
        heads = ["ranks", "micro-batches", "order", "formula", "shortest", "measured", "more", "bubble"]
        table = Table(*heads, title="a pipeline's step, in units of a rank's forward pass of a micro-batch")
        for row in rows:
            numbers = [f"{row[key]:.2f}" if row[key] else "" for key in ("formula", "shortest", "measured")]
            shares = [f"{row['excess']:.1%}", f"{row['bubble_share']:.1%}"]
            table.add_row(str(row["ranks"]), str(row["micro_batches"]), row["order"], *numbers, *shares)
        console.print(table)
        if arguments.picture:
            draw(pictures, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
