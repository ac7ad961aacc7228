"""``--dry-run``: the resolved configuration, sizes, costs, the reset table and the LR curve. Nothing is trained or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from megarewarm.config.experiment import Experiment
from megarewarm.config.load import dump
from megarewarm.config.schema import RunConfig
from megarewarm.data.file_bytes import find_bin
from megarewarm.data.seen_samples import SeenSource
from megarewarm.errors import UserError
from megarewarm.model.size import count_parameters, training_flops_per_token
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.mesh import choose_layout
from megarewarm.parallel.pipeline import micro_batches
from megarewarm.parallel.planning import Work, memory_of, parts, traffic_of
from megarewarm.report.terminal import draw_curve
from megarewarm.report.words import tokens_text
from megarewarm.rewarm.replay import replayed
from megarewarm.rewarm.reset import table
from megarewarm.rewarm.switches import training_phases
from megarewarm.training.evaluate import open_validation
from megarewarm.training.experiment import chosen_arms
from megarewarm.training.notes import logged_notes
from megarewarm.training.plan import Plan
from megarewarm.training.summary import print_reset_table
from megarewarm.training.texts import settle_texts
from megarewarm.training.unwritten import NotOpened, plan_ahead


def missing_files(config: RunConfig) -> list[str]:
    """A line for each token file of the run that is not on this machine."""
    old = config.replay.sources or [] if config.replay is not None else []
    switched = [source for switch in config.data.switches for source in switch.train]
    sources = [*config.data.train, *switched, *old, *(s for v in config.data.validation for s in v.sources)]
    missing = []
    for source in sources:
        if not find_bin(source.path.removesuffix(".bin").removesuffix(".idx")):
            missing.append(f"{source.path}: no such token file (.bin) here")
    return list(dict.fromkeys(missing))


def show_run(config: RunConfig, console: Console, world_size: int = 1) -> int:
    """Print everything about one run. Returns exit code 0; raises ``UserError`` for a config that could not run."""
    plan, missing = plan_ahead(config)
    absent = missing_files(config)
    notes = settle_texts(plan).notes
    if not absent:
        with logged_notes() as logged:
            notes = [*notes, *open_validation(plan.config, plan.model.vocab_size)[1], *logged]
    console.print(Syntax(dump(plan.config).rstrip(), "yaml", background_color="default", word_wrap=True))
    console.print()
    if world_size == 1:  # not under a launcher
        world_size = _ranks_needed(config)
    _print_costs(plan, console, world_size)
    console.print()
    _print_data(plan, console)
    console.print()
    rows = table(plan.policy, plan.source, plan.schedule, plan.position, count_parameters(plan.model), config.training.seed)
    print_reset_table(rows, console, lambda line: None)
    if plan.resumed:
        console.print(f"the run stands at step {plan.position.step:,}; the same command continues it", style="yellow")
    console.print()
    console.print(_curve(plan, width=min(100, console.width)), highlight=False, markup=False)
    for note in notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    for problem in [*missing, *absent]:
        console.print(f"not here, needed to train: {problem}", style="yellow", highlight=False)
    return 0


def _ranks_needed(config: RunConfig) -> int:
    parallel = config.parallel
    return parallel.pipeline * parallel.tensor * (parallel.data or 1)


def show_experiment(experiment: Experiment, console: Console, only: Sequence[str] = ()) -> int:
    """Print the runs of an experiment, their sum, and each one's LR curve. Returns exit code 0."""
    chosen = chosen_arms(experiment, only)
    seeds = Counter(arm.arm for arm in chosen)
    overview = Table(title=f"experiment {experiment.config.experiment} in {experiment.folder}", title_justify="left", box=None)
    overview.add_column("run", overflow="fold")
    for heading in ("from", "curve"):
        overview.add_column(heading, overflow="fold")
    for heading in ("peak lr", "steps", "tokens", "PFLOP", "seeds"):
        overview.add_column(heading, justify="right", no_wrap=True)
    tokens, petaflops = 0, 0.0
    plans: dict[str, Plan] = {}
    for arm in experiment.arms:
        plans[arm.name] = plan_ahead(arm.config, list(plans.values()))[0]
        settle_texts(plans[arm.name])
    shown: dict[str, Plan] = {}
    for arm in chosen:
        plan, run = plans[arm.name], arm.config
        run_tokens = run.total_steps * run.tokens_per_step
        run_flops = run_tokens * training_flops_per_token(plan.model, run.data.sequence_length) / 1e15
        tokens, petaflops = tokens + run_tokens, petaflops + run_flops
        if arm.arm in shown:
            continue
        shown[arm.arm] = plan
        check_fit(run, plan.model, choose_layout(run.parallel, _ranks_needed(run)))
        overview.add_row(
            arm.arm,
            Path(run.start.from_).name if run.start.from_ else "scratch",
            run.schedule.curve,
            f"{run.schedule.max_lr:.3g}",
            f"{run.total_steps:,}",
            tokens_text(run_tokens),
            f"{run_flops:.2g}",
            str(seeds[arm.arm]),
        )
    overview.add_row("all", "", "", "", "", tokens_text(tokens), f"{petaflops:.2g}", str(len(chosen)), style="bold")
    console.print(overview)
    for name, plan in shown.items():
        console.print()
        console.print(name, style="bold")
        console.print(_curve(plan, width=min(80, console.width), height=6), highlight=False, markup=False)
    return 0


def _curve(plan: Plan, *, width: int, height: int = 12) -> str:
    first, total = plan.origin.step, plan.config.total_steps
    count = max(2, min(total - first, 4 * width))
    steps = [first + 1 + round(i * (total - first - 1) / (count - 1)) for i in range(count)]
    return draw_curve(
        [float(step) for step in steps],
        [plan.lr(step) for step in steps],
        width=width,
        height=height,
        x_label="step",
        y_label="learning rate",
    )


def _print_costs(plan: Plan, console: Console, world_size: int) -> None:
    config = plan.config
    length = config.data.sequence_length
    tokens = config.total_steps * config.tokens_per_step
    per_token = training_flops_per_token(plan.model, length)
    costs = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    costs.add_row("parameters", f"{count_parameters(plan.model):,}")
    costs.add_row("steps", f"{config.total_steps:,} of {config.tokens_per_step:,} tokens")
    costs.add_row("tokens", f"{tokens:,}")
    costs.add_row("FLOPs", f"{tokens * per_token:.3g} ({per_token:.3g} a token, causal attention, forward and backward)")
    console.print(costs, highlight=False)
    _print_ranks(plan, console, world_size)


def _print_data(plan: Plan, console: Console) -> None:
    """Which source gives how much, from which step on."""
    config = plan.config
    notes = []
    try:
        old = replayed(config.replay, plan.history_to_replay)
    except UserError as error:
        if not isinstance(plan.source, NotOpened):
            raise
        old, notes = [], [f"what of the lineage is replayed shows when {plan.source.name} is there ({error})"]
    phases = training_phases(config, plan.schedule, plan.origin, old)
    shown = Table(title="data", title_justify="left", box=None, padding=(0, 2, 0, 1), header_style="bold")
    for heading in ("from step", "source", "share", "tokens"):
        shown.add_column(heading, justify="left" if heading == "source" else "right")
    end = plan.samples(config.total_steps)
    for i, phase in enumerate(phases):
        first = max(phase.first, plan.origin.samples)
        last = phases[i + 1].first if i + 1 < len(phases) else end
        step = plan.origin.step + (first - plan.origin.samples) // config.training.global_batch
        for j, source in enumerate(phase.sources if last > first else ()):
            name = source.name or Path(source.path).name
            if isinstance(source, SeenSource):
                read = sum((b - a) * part.order.sequence_length for part in source.parts for a, b in part.seen)
                name += f" ({read:,} tokens seen)"
            tokens = source.weight * (last - first) * config.data.sequence_length
            shown.add_row("" if j else f"{step + 1:,}", name, f"{100 * source.weight:.4g} %", f"{tokens:,.0f}")
    console.print(shown, highlight=False)
    for note in notes:
        console.print(note, style="yellow", highlight=False)


def _print_ranks(plan: Plan, console: Console, world_size: int) -> None:
    """Memory and traffic of each pipeline rank; the others of its tensor and data groups are like it."""
    config = plan.config
    layout = choose_layout(config.parallel, world_size)
    remarks = check_fit(config, plan.model, layout)
    on_gpu = config.training.device == "cuda" or (config.training.device == "auto" and torch.cuda.is_available())
    work = Work(
        plan.model,
        config.data.sequence_length,
        config.training.micro_batch,
        micro_batches(config.parallel, config.training.global_batch // layout.data, config.training.micro_batch),
        config.training.recompute,
        # what 'auto' will be on the cluster is not known here; fp32 is the larger
        2 if config.training.precision in ("bf16", "fp16") else 4,
        config.kernels.logit_bytes("cuda" if on_gpu else "cpu"),
    )
    ranks = Table(
        title=f"per rank: {world_size} rank{'s' * (world_size > 1)}, {layout}; {work.micro_batches} micro-batches",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for heading in ("stage", "layers", "weights", "grads", "Adam", "activ.", "loss", "memory", "sent"):
        ranks.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for rank, part in enumerate(parts(work, config.parallel, layout)):
        memory, traffic = memory_of(part, rank, work, config.parallel, layout), traffic_of(part, work, config.parallel, layout)
        ranks.add_row(
            ", ".join(map(str, part.numbers)),
            "+".join(map(str, part.layers)),
            *(_bytes(getattr(memory, name)) for name in ("weights", "gradients", "optimizer", "activations", "loss", "total")),
            _bytes(traffic.total),
        )
    console.print()
    console.print(ranks, highlight=False)
    for remark in remarks:
        console.print(remark, style="yellow", highlight=False)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
