"""From an experiment's keys to its runs: axes to their combinations, chains to their stages, all of it once for each seed."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from megarewarm.config.axes import choices_of
from megarewarm.config.budget import Budget
from megarewarm.config.execution import LOG_SPACED
from megarewarm.config.load import merge, validate
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import Origins
from megarewarm.errors import UserError, nearest
from megarewarm.record.layout import CHECKPOINTS, step_name
from megarewarm.untrusted import is_name

_WORD = re.compile(r"\$\{[^}]*\}")


@dataclass(frozen=True)
class Arm:
    """One run of an experiment. ``arm`` is its name without the seed, ``axes`` the values that its sweep gave it.

    ``groups``: the sweeps whose figures show it, with its values on their axes. ``folder`` is relative to the
    experiment's; ``after``: names of the runs that it starts from or is taught by; ``taught_by``: those that it does
    not start from.
    """

    name: str
    arm: str
    seed: int | None
    group: str | None
    axes: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    chain: str | None
    stage: int | None
    folder: str
    config: RunConfig
    after: tuple[str, ...] = ()
    taught_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Draft:
    """A run before its seed. ``mapping``: all its keys but name, folder and, in a chain, start.from."""

    arm: str
    mapping: dict[str, Any]
    origins: Origins
    where: str
    group: str | None = None
    axes: dict[str, Any] = field(default_factory=dict)
    chain: str | None = None
    stage: int | None = None
    previous: str | None = None


def arms_of(experiment: Mapping[str, Any], folder: str, origins: Origins, length: float = 1.0) -> list[Arm]:
    """The runs of an experiment (its validated keys), each after those that it starts from.

    ``length`` multiplies the budgets. Raises ``UserError`` for an axis that is no key, for runs that collide, for a start that
    no run makes, and for whatever is wrong with a run by itself.
    """
    drafts = list(_drafts(experiment, origins))
    taken: dict[str, _Draft] = {}
    for draft in drafts:
        if other := taken.get(draft.arm):
            raise UserError(
                f"{draft.where}: two runs are named '{draft.arm}' (the other: {other.where}); give one another name or label"
            )
        taken[draft.arm] = draft
    arms = [_arm(draft, seed, folder, length) for seed in experiment.get("seeds") or [None] for draft in drafts]
    arms = _linked(arms, folder, taken)
    _refuse_copies(arms, taken)
    return _in_order(_grouped(arms, experiment, origins))


# ---- from keys to drafts ---------------------------------------------------------------------------------------------


def _drafts(experiment: Mapping[str, Any], origins: Origins) -> Iterator[_Draft]:
    base, below = experiment["base"], _below(origins, ("base",))
    for i, run in enumerate(experiment["runs"]):
        place = ("runs", str(i))
        draft = _Draft(run["name"], _without(run, "name"), below | _below(origins, place), origins.get(place, "config"))
        yield from _stages(draft, base)
    for i, sweep in enumerate(experiment["sweeps"]):
        place = ("sweeps", str(i))
        where = origins.get(place, "config")
        own = below | _below(origins, place)
        common = _without(sweep, "name", "axes", "with", "permute", "orders")
        for combination in itertools.product(*choices_of(sweep, merge(dict(base), common), place, origins)):
            mapping, own_origins = common, dict(own)
            for choice in combination:
                mapping = merge(mapping, choice.keys)
                gone = choice.replaced
                own_origins = {path: line for path, line in own_origins.items() if not gone or path[: len(gone)] != gone}
                own_origins |= {path: choice.where for path in _paths(choice.keys)}
            yield from _stages(
                _Draft(
                    "_".join([sweep["name"], *(choice.label for choice in combination)]),
                    mapping,
                    own_origins,
                    where,
                    group=sweep["name"],
                    axes={choice.axis: choice.value for choice in combination},
                ),
                base,
            )


def _stages(draft: _Draft, base: Mapping[str, Any]) -> Iterator[_Draft]:
    """The run itself, laid over ``base``, or the runs of its chain."""
    stages = draft.mapping.get("stages")
    own = _without(draft.mapping, "stages")
    if stages is None:
        yield replace(draft, mapping=merge(dict(base), own))
        return
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{draft.where}: 'stages' of '{draft.arm}' is a list of runs, each with a 'name' and its keys")
    previous = None
    for number, stage in enumerate(stages):
        name = stage.get("name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{draft.where}: stage {number} of '{draft.arm}' has no 'name'")
        common = merge(dict(base), own)
        if previous is not None:  # where the chain starts from is no business of its later stages
            common = _without(common, "start")
        mapping = merge(common, _without(stage, "name"))
        arm = f"{draft.arm}-{name}"
        inside = _below(draft.origins, ("stages", str(number)))
        yield replace(
            draft, arm=arm, mapping=mapping, origins=draft.origins | inside, chain=draft.arm, stage=number, previous=previous
        )
        previous = arm


# ---- from drafts to runs ---------------------------------------------------------------------------------------------


def _arm(draft: _Draft, seed: int | None, folder: str, length: float) -> Arm:
    mapping = draft.mapping
    if "extends" in mapping:  # that of a file and of base is taken out where files are read
        place = draft.origins.get(("extends",), draft.where)
        raise UserError(
            f"{place}: '{draft.arm}' has 'extends', which is for whole files and for 'base'; "
            f"write the file's keys here, or 'extends' in base where all runs share it"
        )
    if mapping.get("folder") is not None:
        place = draft.origins.get(("folder",), draft.where)
        raise UserError(
            f"{place}: a run of an experiment has no 'folder' of its own; set the experiment's, and 'folder: null' in base "
            f"where a file that it extends has one"
        )
    runs = folder if seed is None else f"{folder}/seed_{seed}"
    if draft.previous is not None:
        start = dict(mapping.get("start") or {})
        start.setdefault("from", f"{runs}/{draft.previous}")
        mapping = mapping | {"start": start}
    if seed is not None:
        mapping = merge(mapping, {"training": {"seed": seed}, "data": {"seed": seed}})
    mapping = _filled(mapping, {"${folder}": folder, "${runs}": runs}, draft.where)
    if length != 1.0:
        mapping = _shortened(mapping, length)
    name = draft.arm if seed is None else f"{draft.arm}.s{seed}"
    if not is_name(draft.arm):  # it names a folder in the experiment's
        raise UserError(f"{draft.where}: the run's name {draft.arm[:80]!r} names no folder; use letters, digits, '_', '-', '.'")
    mapping |= {"name": name, "folder": f"{runs}/{draft.arm}"}
    return Arm(
        name=name,
        arm=draft.arm,
        seed=seed,
        group=draft.group,
        axes=draft.axes,
        groups={draft.group: draft.axes} if draft.group else {},
        chain=draft.chain,
        stage=draft.stage,
        folder=draft.arm if seed is None else f"seed_{seed}/{draft.arm}",
        config=validate(RunConfig, mapping, draft.origins),
    )


def _shortened(mapping: dict[str, Any], length: float) -> dict[str, Any]:
    try:
        budget = Budget.model_validate(mapping["training"]["budget"])
    except (KeyError, TypeError, ValidationError):
        return mapping  # errors in it are reported where the run is validated
    amount = max(2, round(budget.amount * length)) if budget.unit == "steps" else budget.amount * length
    return merge(mapping, {"training": {"budget": str(Budget(amount=amount, unit=budget.unit))}})


def _linked(arms: list[Arm], folder: str, drafts: Mapping[str, _Draft]) -> list[Arm]:
    """The runs with what they start from and are taught by settled: ``RUN@20%`` names a step of a run of the experiment, which
    then keeps it."""
    by_folder = {arm.config.run_folder: i for i, arm in enumerate(arms)}
    arms = list(arms)
    for i, section in itertools.product(range(len(arms)), ("start", "distill")):
        arm = arms[i]
        named = getattr(arm.config, section)
        start = None if named is None else named.from_
        if start is None:
            continue
        where = drafts[arm.arm].origins.get((section, "from"), drafts[arm.arm].where)
        run, _, moment = start.partition("@")
        if moment and run in by_folder:
            step = step_of_moment(moment, arms[by_folder[run]].config, where)
            start = f"{run}/{CHECKPOINTS}/{step_name(step)}"
            chosen = named.model_copy(update={"from_": start})
            arm = replace(arm, config=arm.config.model_copy(update={section: chosen}))
            arms[by_folder[run]] = _keeping(arms[by_folder[run]], step)
        made_by = [j for place, j in by_folder.items() if PurePosixPath(start).is_relative_to(place)]
        if not made_by and PurePosixPath(run).is_relative_to(folder):
            known = [other.arm for other in arms if other.seed == arm.seed]
            hint = nearest(PurePosixPath(run).name, known) or f"; its runs: {', '.join(known)}"
            does = {"start": "starts from", "distill": "is taught by"}[section]
            raise UserError(f"{where}: '{arm.arm}' {does} {start}, which no run of the experiment makes{hint}")
        makers = tuple(name for j in made_by if (name := arms[j].name) not in arm.after)
        arms[i] = replace(arm, after=arm.after + makers, taught_by=makers if section == "distill" else ())
    return arms


def step_of_moment(moment: str, config: RunConfig, where: str) -> int:
    """The step of a run that '20%', '500 steps' or '1B tokens' after an '@' means. Raises ``UserError``, which begins with
    ``where``."""
    try:
        budget = Budget.model_validate(moment)
    except ValidationError:
        raise UserError(
            f"{where}: '@{moment}' is no moment of a run; write it as '@20%', '@500 steps' or '@1B tokens'"
        ) from None
    if "epochs" in (budget.unit, config.training.budget.unit):
        raise UserError(
            f"{where}: '@{moment}' of '{config.name}': where lengths are in epochs, write the step, as '@500 steps'"
        )
    step = round(config.steps(budget))
    if not 1 <= step <= config.total_steps:
        raise UserError(f"{where}: '@{moment}' is step {step} of '{config.name}', which has steps 1 to {config.total_steps}")
    return step


def _keeping(arm: Arm, step: int) -> Arm:
    """The run with a checkpoint after ``step`` that stays."""
    settings = arm.config.checkpoint
    extra = settings.extra_steps
    listed = [s for s in LOG_SPACED if s <= arm.config.total_steps] if extra == "log_spaced" else list(extra)
    if step not in listed:
        listed.append(step)
    checkpoint = settings.model_copy(update={"extra_steps": sorted(listed)})
    return replace(arm, config=arm.config.model_copy(update={"checkpoint": checkpoint}))


def _refuse_copies(arms: Sequence[Arm], drafts: Mapping[str, _Draft]) -> None:
    seen: dict[str, Arm] = {}
    for arm in arms:
        content = repr(arm.config.model_copy(update={"name": "", "folder": ""}))
        if other := seen.get(content):
            raise UserError(
                f"{drafts[arm.arm].where}: the runs '{other.name}' and '{arm.name}' are the same in every key; remove one"
                + (f" (and name it under 'with' of sweep '{arm.group}')" if arm.group else "")
            )
        seen[content] = arm


def _grouped(arms: list[Arm], experiment: Mapping[str, Any], origins: Origins) -> list[Arm]:
    """The runs that ``with`` names put into the groups' figures too, with their own values on the axes."""
    names = {arm.arm for arm in arms}
    for i, sweep in enumerate(experiment["sweeps"]):
        for name in sweep.get("with") or []:
            if name not in names:
                place = origins.get(("sweeps", str(i), "with"), "config")
                raise UserError(f"{place}: 'with' names '{name}', which is no run of the experiment{nearest(str(name), names)}")
            for j, arm in enumerate(arms):
                if arm.arm == name:
                    content = arm.config.model_dump(mode="json", by_alias=True)
                    content["replay"] = content["replay"] or {"fraction": 0.0}
                    values = {axis: _at(content, axis.split(".")) for axis in sweep.get("axes", {})}
                    values |= {sweep["permute"]: arm.arm} if "permute" in sweep else {}
                    arms[j] = replace(arm, groups=arm.groups | {sweep["name"]: values})
    return arms


def _in_order(arms: list[Arm]) -> list[Arm]:
    """As they are, but each after those that it starts from."""
    waiting, done, ordered = list(arms), set[str](), list[Arm]()
    while waiting:
        ready = [arm for arm in waiting if done.issuperset(arm.after)]
        if not ready:
            raise UserError(
                f"the runs {', '.join(arm.name for arm in waiting)} start from each other, or teach each other, in a circle"
            )
        first = ready[0]
        ordered.append(first)
        done.add(first.name)
        waiting.remove(first)
    return ordered


# ---- mappings --------------------------------------------------------------------------------------------------------


def _filled(value: Any, words: Mapping[str, str], where: str) -> Any:
    """``value`` with its words replaced, once: what a folder is called is no word. Raises ``UserError`` for one not known."""
    if isinstance(value, str):
        # the environment's are left for the keys that are paths
        unknown = [word for word in sorted(set(_WORD.findall(value)) - words.keys()) if word[2:-1] not in os.environ]
        if unknown:
            known = ", ".join(words)
            raise UserError(f"{where}: '{unknown[0]}' stands for nothing; {known} do, in paths the environment's variables too")
        return _WORD.sub(lambda found: words.get(found[0], found[0]), value)
    if isinstance(value, list):
        return [_filled(item, words, where) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, words, where) for key, item in value.items()}
    return value


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _at(mapping: Any, path: Sequence[str]) -> Any:
    for part in path:
        mapping = mapping.get(part) if isinstance(mapping, dict) else None
    return mapping


def _paths(mapping: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in mapping.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))


def _below(origins: Origins, prefix: tuple[str, ...]) -> Origins:
    return {path[len(prefix) :]: where for path, where in origins.items() if path[: len(prefix)] == prefix}
