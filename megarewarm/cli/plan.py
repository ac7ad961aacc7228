"""Rank the layouts of a run on a cluster: megarewarm plan RUN.yml --gpus 64 --gpu h100-80gb"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.layout.gpus import GPUS
from megarewarm.process import importing

if TYPE_CHECKING:
    from rich.table import Table

    from megarewarm.config.schema import RunConfig
    from megarewarm.layout.cluster import LayoutEstimate


def command_line() -> Parser:
    parser = Parser(description="Rank the layouts of a run on a cluster by a model of their step time.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG | section.key=value", help="as for launch.sh")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True, help="type of the GPUs")
    parser.add_argument("--most", type=int, default=10, help="layouts shown; default: %(default)s")
    parser.add_argument(
        "--price", type=Price, metavar="EUR_PER_GPU_HOUR", help="such as 2.50 or 2.50EUR: adds a column with the run's cost"
    )
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.config.load import read_configs, validate
        from megarewarm.config.schema import RunConfig
        from megarewarm.console import make_console

    with importing():
        from megarewarm.checkpoint.lineage import Lineage
        from megarewarm.checkpoint.source import open_checkpoint
        from megarewarm.data.files.file_bytes import find_bin
        from megarewarm.layout.cluster import rank_layouts
        from megarewarm.rewarm.freezing import settle_freezing
        from megarewarm.training.start.epochs import packed, settle_epochs
        from megarewarm.training.start.plan import settle_model
        from megarewarm.training.start.teacher import open_teacher

    config, lengths = settle_epochs(validate(RunConfig, *read_configs(arguments.configs)))
    if config.model is None:
        if config.start.from_ is None:
            raise UserError("model: needed to plan; 'extends' one of configs/pythia or configs/llama, or give start.from")
        config = settle_model(config, open_checkpoint(config.start.from_))
    assert config.model is not None
    gpus = arguments.gpus
    teacher = None
    if config.distill is not None:
        teacher = config.model if config.distill.from_ is None else open_teacher(config).model_config
    source = open_checkpoint(config.start.from_) if config.optimizer.train is not None and config.start.from_ else None
    freezing = settle_freezing(config, config.model, source.lineage if source is not None else Lineage())
    trained = None if freezing is None else freezing.after(config.total_steps)
    plans = rank_layouts(config, config.model, gpus, GPUS[arguments.gpu], teacher, trained)
    console = make_console()
    fit = f"{len(plans):,} layouts fit on {gpus} x {arguments.gpu}"
    console.print(f"{fit}; hours are for all {config.total_steps:,} steps", highlight=False)
    for line in lengths:
        console.print(line, highlight=False)
    for read in config.data.train if config.data.pack is not None else ():
        here = find_bin(read.path.removesuffix(".bin"))
        told = packed(read, config).packing if here else "not here, so its padding is not known"
        console.print(f"data.pack: {read.name or read.path}: {told}", highlight=False)
    if config.replay is not None and config.replay.generate is not None:
        console.print(f"own replay: {own_replay(config, gpus, arguments.gpu, arguments.price)}", highlight=False)
    if freezing is not None:
        console.print(f"parameters: {freezing.of(config.model)}; times are as if all trained", highlight=False)
    console.print(fitted(plans[: arguments.most], gpus, console.width, arguments.price))
    best = plans[0]
    console.print("the fastest: " + " ".join(f"{key}={value}" for key, value in best.keys.items()), highlight=False)


def own_replay(config: RunConfig, gpus: int, gpu: str, price: Price | None) -> str:
    """What the start's writing before training takes."""
    from megarewarm.checkpoint.source import open_checkpoint
    from megarewarm.rewarm.own_replay import OwnReplay

    assert config.replay is not None and config.replay.generate is not None and config.start.from_ is not None
    try:
        source = open_checkpoint(config.start.from_)
    except UserError:
        return f"its cost is known once {config.start.from_} is here"
    own = OwnReplay(source, config.replay.generate, config.data.eod or 0)
    hours = own.least_seconds(gpus, 1e12 * GPUS[gpu].memory_rate) / 3600
    cost = "" if price is None else f", {hours * gpus * price.amount:,.2f} {price.word}"
    return (
        f"{own.settings.tokens:,} tokens before training, at most {own.flops:.3g} FLOPs, at least {hours:.3g} hours{cost} "
        f"({own.batch} documents at a time on each GPU, weights and cache read once a position at {GPUS[gpu].memory_rate} TB/s)"
    )


class Price:
    """The price of a GPU-hour: an amount, and its currency, which is printed as given."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\S{0,8})\s*", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"'{text}' is not a price; write it as 2.50 or 2.50EUR")
        self.amount, self.word = float(found[1]), found[2] or "cost"


COLUMNS: dict[str, Callable[[LayoutEstimate, int], str]] = {
    "pipe": lambda plan, gpus: f"{plan.layout.pipeline}",
    "data": lambda plan, gpus: f"{plan.layout.data}",
    "tensor": lambda plan, gpus: f"{plan.layout.tensor}{' seq' if plan.keys.get('parallel.sequence') else ''}",
    "shard": lambda plan, gpus: str(plan.keys["parallel.sharding"]),
    "recomp.": lambda plan, gpus: str(plan.keys["training.recompute"]),
    "micro": lambda plan, gpus: str(plan.keys["training.micro_batch"]),
    "GiB": lambda plan, gpus: f"{plan.memory / 2**30:.1f}",
    "bubble": lambda plan, gpus: f"{plan.bubble:.0%}",
    "s/step": lambda plan, gpus: f"{plan.seconds:#.3g}" if plan.seconds < 100 else f"{plan.seconds:,.0f}",
    "tok/s": lambda plan, gpus: f"{plan.tokens_per_second / 1e3:,.0f}k",
    "MFU": lambda plan, gpus: f"{plan.mfu:.0%}",
    "hours": lambda plan, gpus: _hours(plan.hours),
    "GPU-h": lambda plan, gpus: _hours(plan.hours * gpus),
}
DISPENSABLE = ("bubble", "GPU-h", "MFU", "GiB", "s/step", "hours")  # dropped in this order if the terminal is narrow


def fitted(plans: list[LayoutEstimate], gpus: int, width: int, price: Price | None = None) -> Table:
    """A row for each of ``plans`` on ``gpus`` GPUs, with as many columns as fit into ``width``."""
    cells = {name: [cell(plan, gpus) for plan in plans] for name, cell in COLUMNS.items()}
    if price is not None:
        cells[price.word] = [f"{plan.hours * gpus * price.amount:,.0f}" for plan in plans]
    for name in DISPENSABLE:
        if sum(1 + max(map(len, (heading, *column))) for heading, column in cells.items()) - 1 <= width:
            break
        del cells[name]
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in cells:
        table.add_column(name, justify="left" if name in ("shard", "recomp.") else "right", no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}"
