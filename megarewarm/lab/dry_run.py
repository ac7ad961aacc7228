"""``--dry-run``: sizes, costs, the LR curve, the ranks, the data, the reset table. Trains nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from megarewarm.config.experiment import Experiment
from megarewarm.config.load import dump
from megarewarm.config.schema import RunConfig
from megarewarm.console import only_ascii
from megarewarm.data.order.seen_samples import SeenSource
from megarewarm.errors import UserError
from megarewarm.lab.experiment import check_folders, chosen_arms, settled
from megarewarm.lab.plan_ahead import plan_ahead
from megarewarm.lab.seen_pace import SeenPace, seen_pace
from megarewarm.lab.start_checks import Checked, check_start, missing_files, prepared_folder, ranks_of
from megarewarm.layout.memory import memory_of, parts, traffic_of
from megarewarm.layout.micro_batch import work_of
from megarewarm.model.size import count_parameters, training_flops_per_token
from megarewarm.parallel.connect import choose_device
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.laid_out import DTYPES
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.mesh import choose_layout
from megarewarm.report.figures.terminal import draw_curve
from megarewarm.rewarm.reset import table
from megarewarm.rewarm.switches import training_phases
from megarewarm.spelling import bytes_text, counted, tokens_text
from megarewarm.training.finish import is_trained
from megarewarm.training.start.averaging import averaging
from megarewarm.training.start.epochs import settle_epochs
from megarewarm.training.start.evaluation_cost import EvaluationCost, evaluation_cost, evaluation_note, tokens_asked
from megarewarm.training.start.inputs import check_place, settle_precision
from megarewarm.training.start.memory import Room, memory_note, room
from megarewarm.training.start.micro_batch import settle_micro_batch, with_micro_batch
from megarewarm.training.start.own_replay import cost as own_replay_cost
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.planned import PlannedCheckpoint
from megarewarm.training.start.tasks import RunTasks
from megarewarm.training.start.valuation import valuation_cost
from megarewarm.training.summary import print_reset_table


def show_run(
    config: RunConfig,
    console: Console,
    launch: Launch,
    *,
    allow_missing: bool = False,
    show_config: bool = False,
    world_size: int | None = None,
) -> int:
    """Print the plan of one run on ``world_size`` ranks; None: those that a launcher started, else as many as the config
    needs. ``show_config``: also print every key. Returns exit code 0.

    Prints what it can, then raises the ``UserError`` that the run's start would raise. With ``allow_missing``, files, start
    checkpoints and GPUs that this machine lacks are only listed.
    """
    config, lengths = settle_epochs(config)
    check_place(config)
    plan, missing = plan_ahead(config)
    world_size = world_size or ranks_of(config, launch.world_size)
    refusal = None
    checked = Checked([], [], tokens_asked(config))
    chosen: list[str] = []
    try:
        plan, chosen = settle_micro_batch(plan, world_size, _device(config))
        if not is_trained(plan):
            checked = check_start(plan, world_size, missing, partial(choose_device, launch), allow_missing=allow_missing)
    except UserError as error:
        refusal, checked = error, replace(checked, absent=[*missing, *missing_files(plan.config)])
        plan = with_micro_batch(plan, 1) if plan.config.training.micro_batch == "auto" else plan
    cost = evaluation_cost(plan, checked.evaluated, checked.task_tokens)
    notes = [*lengths, *chosen, *checked.notes, *evaluation_note(plan, cost)]
    try:
        needed = _show_plan(plan, console, world_size, cost, launch, checked.tasks)
        if _on_gpu(config) or not allow_missing:  # allow_missing plans for another machine
            notes += memory_note(plan.config, needed, launch, on_gpu=_on_gpu(config))
    except UserError as error:
        refusal = refusal or error
    if show_config:
        _print_keys(plan.config, console)
    for note in notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    for problem in checked.absent:
        console.print(f"missing, needed to train: {problem}", style="yellow", highlight=False)
    if refusal is not None:
        raise refusal
    return 0


def _print_keys(config: RunConfig, console: Console) -> None:
    console.print(Syntax(dump(config).rstrip(), "yaml", background_color="default", word_wrap=True))
    console.print()


def _on_gpu(config: RunConfig) -> bool:
    device = config.training.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _device(config: RunConfig) -> torch.device:
    return torch.device("cuda" if _on_gpu(config) and torch.cuda.is_available() else "cpu")


def _show_plan(
    plan: Plan, console: Console, world_size: int, cost: EvaluationCost | None, launch: Launch, tasks: RunTasks | None
) -> list[float]:
    """Print the plan. Returns the bytes that each rank needs."""
    config = plan.config
    pace = seen_pace(plan, world_size, "cuda" if _on_gpu(config) else "cpu")
    needed, ranks = _ranks(plan, world_size)
    written = own_replay_cost(plan, world_size, "cuda" if _on_gpu(config) else "cpu")
    _print_costs(plan, console, cost, room(needed, launch, on_gpu=_on_gpu(config)), pace, tasks, written)
    console.print()
    console.print(_curve(plan, console, width=min(100, console.width)), highlight=False, markup=False)
    console.print()
    for line in ranks:
        console.print(line, style="yellow" if isinstance(line, str) else None, highlight=False)
    console.print()
    _print_data(plan, console)
    console.print()
    parameters, seed = count_parameters(plan.model), config.training.seed
    rows = table(
        plan.policy, plan.source, plan.schedule, plan.position, parameters, seed, freezing=plan.freezing, model=plan.model
    )
    print_reset_table(rows, console, lambda line: None)
    if is_trained(plan):
        console.print(f"the run is complete in {config.run_folder}", style="yellow", highlight=False)
    elif plan.resumed:
        console.print(f"the run is at step {plan.position.step:,}; the same command resumes it", style="yellow")
    console.print()
    return needed


def show_experiment(
    experiment: Experiment,
    console: Console,
    launch: Launch,
    only: Sequence[str] = (),
    *,
    allow_missing: bool = False,
    show_config: bool = False,
) -> int:
    """Print the runs of an experiment, their total cost and the LR curve of each, with ``show_config`` also its keys. Returns
    exit code 0; raises as ``show_run``."""
    experiment = settled(experiment)
    chosen = chosen_arms(experiment, only)
    check_folders(experiment)
    prepared = prepared_folder(experiment)
    seeds = Counter(arm.arm for arm in chosen)
    overview = Table(title=f"experiment {experiment.config.experiment} in {experiment.folder}", title_justify="left", box=None)
    overview.add_column("run", overflow="fold")
    for heading in ("from", "curve"):
        overview.add_column(heading, overflow="fold")
    for heading in ("peak lr", "steps", "tokens", "PFLOP", "seeds"):
        overview.add_column(heading, justify="right", no_wrap=True)
    tokens, petaflops = 0, 0.0
    plans: dict[str, Plan] = {}
    absent: dict[str, None] = {}
    costs: dict[str, EvaluationCost] = {}
    refusal: UserError | None = None
    for arm in experiment.arms:
        plans[arm.name], missing = plan_ahead(arm.config, list(plans.values()))
        if arm not in chosen or is_trained(plans[arm.name]):
            continue
        plan, world_size = plans[arm.name], ranks_of(arm.config, launch.world_size)
        try:
            checked = check_start(
                plan,
                world_size,
                missing,
                partial(choose_device, launch),
                allow_missing=allow_missing,
                prepared=prepared,
            )
        except UserError as error:
            refusal, found = refusal or error, [*missing, *missing_files(arm.config, prepared)]
            absent |= dict.fromkeys(found)
            continue
        absent |= dict.fromkeys(checked.absent)
        if (cost := evaluation_cost(plan, checked.evaluated, checked.task_tokens)) is not None:
            costs[arm.name] = cost
    shown: dict[str, Plan] = {}
    for arm in chosen:
        plan, run = plans[arm.name], arm.config
        run_tokens = run.total_steps * run.tokens_per_step
        run_flops = run_tokens * training_flops_per_token(plan.model, run.data.sequence_length, plan.taught_by) / 1e15
        tokens, petaflops = tokens + run_tokens, petaflops + run_flops
        if arm.arm in shown:
            continue
        shown[arm.arm] = plan
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
        console.print(_curve(plan, console, width=min(80, console.width), height=6), highlight=False, markup=False)
        if show_config:
            _print_keys(plan.config, console)
    if costs:
        name = max(costs, key=lambda name: costs[name].share)
        console.print()
        console.print(f"evaluation, at most (in {name}): {costs[name]}", highlight=False)
        if told := costs[name].of_tasks:
            console.print(f"tasks, in {name}: {told}", highlight=False)
        for note in evaluation_note(plans[name], costs[name]):
            console.print(f"note: {name}: {note}", style="yellow", highlight=False)
    for problem in absent:
        console.print(f"missing, needed to train: {problem}", style="yellow", highlight=False)
    if refusal is not None:
        raise refusal
    return 0


def _curve(plan: Plan, console: Console, *, width: int, height: int = 12) -> str:
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
        unicode=not only_ascii(console),
    )


def _print_costs(
    plan: Plan,
    console: Console,
    cost: EvaluationCost | None,
    here: Room | None,
    pace: SeenPace | None,
    tasks: RunTasks | None,
    written: str | None,
) -> None:
    config = plan.config
    length = config.data.sequence_length
    tokens = config.total_steps * config.tokens_per_step
    per_token = training_flops_per_token(plan.model, length, plan.taught_by)
    costs = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    costs.add_row("run", f"{config.name}: {plan.policy.intent}{f' from {config.start.from_}' if config.start.from_ else ''}")
    costs.add_row("parameters", f"{count_parameters(plan.model):,}")
    if plan.freezing is not None:
        costs.add_row("trained", plan.freezing.of(plan.model))
    costs.add_row("steps", f"{config.total_steps:,} of {config.tokens_per_step:,} tokens")
    costs.add_row("tokens", f"{tokens:,}")
    costs.add_row(
        "FLOPs", f"{tokens * per_token:.3g} ({per_token:.3g} per token, causal attention, forward and backward{_teacher(plan)})"
    )
    if cost is not None and config.data.validation:
        costs.add_row("evaluation", str(cost))
    if cost is not None and tasks is not None and tasks.tasks:
        costs.add_row("tasks", f"{tasks}, {cost.of_tasks}")
    if (valuation := valuation_cost(config, plan.origin.step)) is not None:
        costs.add_row("valuation", str(valuation))
    if batches := plan.measured_batches:
        share = 100 * batches / (batches + config.total_steps - plan.origin.step)
        tokens_read = tokens_text(batches * config.tokens_per_step)
        costs.add_row(
            "moments",
            f"{batches:,} batches at rate 0 before the first step, {tokens_read} tokens, {share:.1f} % of the steps' compute",
        )
    if (average := averaging(config, plan.origin.step)) is not None:
        costs.add_row("average", f"{average}, {bytes_text(4 * count_parameters(plan.model))} of memory over all ranks")
    if written is not None:
        costs.add_row("own replay", written)
    if here is not None:
        costs.add_row("memory", str(here))
    if pace is not None and not is_trained(plan):
        costs.add_row("time", pace.outlook(plan, cost))
    console.print(costs, highlight=False)


def _teacher(plan: Plan) -> str:
    """What the FLOPs count besides the model."""
    distill, teacher = plan.config.distill, plan.taught_by
    if distill is None or teacher is None:
        return ""
    return f", and forward of the teacher {distill.from_ or plan.config.start.from_}, {count_parameters(teacher):,} parameters"


def _print_data(plan: Plan, console: Console) -> None:
    """Print the share and tokens of each data source, with the step from which it is read."""
    config = plan.config
    notes = []
    try:
        old = plan.replayed()
    except UserError as error:
        if not plan.awaits_replay and not isinstance(plan.source, PlannedCheckpoint):
            raise
        assert plan.source is not None and config.replay is not None
        share = f"{100 * config.replay.fraction:.4g} % of the samples are replayed"
        what = "what its start writes" if plan.awaits_replay else f"the lineage, known once {plan.source.name} exists"
        old, notes = [], [f"{share}, of {what} ({error}); the shares above are of the rest"]
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


def _ranks(plan: Plan, world_size: int) -> tuple[list[float], list[Table | str]]:
    """(bytes that each rank needs, what to print): memory and traffic of each pipeline rank, the same for all ranks of its
    tensor and data groups, and remarks."""
    config = plan.config
    layout = choose_layout(config.parallel, world_size)
    remarks = check_fit(config, plan.model, layout, plan.taught_by)
    # another machine's GPU may resolve 'auto' differently; fp32 is the upper bound
    value_bytes = DTYPES[settle_precision(config, _device(config))].itemsize
    size = config.training.micro_batch_size
    work = work_of(
        config,
        plan.model,
        layout,
        size,
        value_bytes=value_bytes,
        on_gpu=_on_gpu(config),
        teacher=plan.taught_by,
        trained=plan.trained_at_end,
    )
    portions = f"{work.micro_batches} micro-batch{'es' * (work.micro_batches != 1)} of {size}"
    title = f"per rank: {counted(world_size, 'rank')}, {layout}; {portions}"
    ranks = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("stage", "layers", "weights", "grads", "optim.", "activ.", "loss", "memory", "sent"):
        ranks.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    needed: list[float] = []
    for rank, part in enumerate(parts(work, config.parallel, layout)):
        memory, traffic = memory_of(part, rank, work, config.parallel, layout), traffic_of(part, work, config.parallel, layout)
        sizes = (*vars(memory).values(), memory.total, traffic.total)
        ranks.add_row(", ".join(map(str, part.numbers)), "+".join(map(str, part.layers)), *map(bytes_text, sizes))
        needed += [memory.total] * (layout.data * layout.tensor)
        if plan.freezing is not None and plan.trained_at_end is None:
            now = memory_of(part, rank, replace(work, trained=plan.freezing.trained), config.parallel, layout)
            remarks.append(
                f"up to step {plan.freezing.until:,} stage {', '.join(map(str, part.numbers))} takes "
                f"{bytes_text(now.gradients)} for grads and {bytes_text(now.optimizer)} for the optimizer"
            )
    return needed, [ranks, *remarks]
