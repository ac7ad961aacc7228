#!/usr/bin/env python3
"""Rank the layouts of a run on a cluster: python tools/plan_layout.py RUN.yml --gpus 64 --gpu h100-80gb"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
from typing import TYPE_CHECKING

from rich.table import Table

from megarewarm.arguments import Parser
from megarewarm.config.load import read_configs, validate
from megarewarm.config.schema import RunConfig
from megarewarm.console import make_console
from megarewarm.errors import UserError
from megarewarm.parallel.gpus import GPUS
from megarewarm.process import importing, run

if TYPE_CHECKING:
    from megarewarm.parallel.cluster import Plan


def main() -> None:
    parser = Parser(description="Rank the layouts of a run on a cluster by a model of their step time.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG | section.key=value", help="as for launch.sh")
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True, help="which")
    parser.add_argument("--most", type=int, default=10, help="layouts shown; default: %(default)s")
    arguments = parser.parse_args()
    with importing():
        from megarewarm.parallel.cluster import rank_layouts

    config = validate(RunConfig, *read_configs(arguments.configs))
    if config.model is None:
        raise UserError("model: needed to plan; 'extends' one of configs/pythia/*.yml")
    plans = rank_layouts(config, config.model, arguments.gpus, GPUS[arguments.gpu])
    make_console().print(show(plans[: arguments.most], f"{len(plans)} layouts fit on {arguments.gpus} x {arguments.gpu}"))
    best = plans[0]
    print("the fastest: " + " ".join(f"{key}={value}" for key, value in best.keys.items()))


def show(plans: list[Plan], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    headings = "pipeline data tensor sharding recompute micro-batch memory bubble step tokens/s MFU"
    for heading in headings.split():
        table.add_column(heading, justify="left" if heading in ("sharding", "recompute") else "right", no_wrap=True)
    for plan in plans:
        layout = plan.layout
        table.add_row(
            f"{layout.pipeline}",
            f"{layout.data}",
            f"{layout.tensor}{' seq' if plan.keys.get('parallel.sequence') else ''}",
            str(plan.keys["parallel.sharding"]),
            str(plan.keys["training.recompute"]),
            str(plan.keys["training.micro_batch"]),
            f"{plan.memory / 2**30:.1f} GiB",
            f"{plan.bubble:.0%}",
            f"{plan.seconds:.2f} s",
            f"{plan.tokens_per_second / 1e3:,.0f}k",
            f"{plan.mfu:.0%}",
        )
    return table


if __name__ == "__main__":
    run(main)
