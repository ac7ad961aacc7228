"""The arms of an experiment in numbers: every measure for every seed, and the arms' differences paired by seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megarewarm.record.run import DOWNSTREAM, RecordedRun
from megarewarm.report.numbers.experiment import ArmRecord, ExperimentRecord, TrialRecord
from megarewarm.report.numbers.measure import MEASURES, Measure, measures_of, run_measures
from megarewarm.report.numbers.runs import Kind, row_of, same_length, tokens_to_reach
from megarewarm.report.numbers.seeds import Difference, Spread, paired, spread_of

COMPARED = ("upstream_after", "downstream_after", "average_after")


@dataclasses.dataclass(frozen=True)
class ArmRow:
    """An arm in numbers: ``values[measure][seed]``, of its complete runs only. ``seeds`` counts the complete runs, and all.

    ``scratch`` is the arm from scratch that ``tokens_saved`` is relative to, ``measures`` are those of the experiment.
    """

    arm: ArmRecord
    values: dict[str, dict[int | None, float]]
    scratch: str | None = None
    measures: Sequence[Measure] = tuple(MEASURES)

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def kind(self) -> Kind:
        return self.arm.kind

    @property
    def seeds(self) -> tuple[int, int]:
        return len(self.arm.complete), len(self.arm.trials)

    def spread(self, measure: str) -> Spread:
        """The measure over the seeds; empty if the arm has no such number."""
        return spread_of(list(self.values.get(measure, {}).values()))

    def mean(self, measure: str) -> float | None:
        return self.spread(measure).mean

    def flat(self) -> dict[str, Any]:
        """One level of keys and JSON values: name, mean, deviation, lowest and highest of every measure, and the number of
        seeds with a finite one."""
        flat: dict[str, Any] = {
            "arm": self.name,
            "kind": self.kind,
            "group": self.arm.group,
            "start": self.arm.start or None,
            "seeds_complete": self.seeds[0],
            "seeds": self.seeds[1],
            "compared_with_scratch": self.scratch,
        }
        for key in (measure.key for measure in self.measures if measure.arms):
            spread = self.spread(key)
            flat |= {
                f"{key}_mean": spread.mean,
                f"{key}_deviation": spread.deviation,
                f"{key}_lowest": spread.low,
                f"{key}_highest": spread.high,
                f"{key}_finite": len(spread.values),
                f"{key}_infinite": spread.others,
            }
        return flat


def arm_rows(experiment: ExperimentRecord) -> list[ArmRow]:
    """One row per arm, in order."""
    runs = [[(t.seed, row_of(run, t.name, arm.kind)) for t, run in _with_runs(arm.complete)] for arm in experiment.arms]
    measures = measures_of(row for of_arm in runs for _, row in of_arm)
    rows = []
    for arm, of_arm in zip(experiment.arms, runs, strict=True):
        values: dict[str, dict[int | None, float]] = {}
        for seed, row in of_arm:
            for name, value in run_measures(row, measures).items():
                values.setdefault(name, {})[seed] = value
        rows.append(ArmRow(arm, values, measures=measures))
    return [_with_tokens_saved(row, rows) for row in rows]


def _with_tokens_saved(row: ArmRow, rows: Sequence[ArmRow]) -> ArmRow:
    """The row with the tokens that it saved relative to an arm from scratch, seed by seed.

    That arm is the one with the lowest final downstream loss among those from scratch on the same training and validation data.
    The saving is its tokens minus the tokens at which this arm reached its final loss.
    """
    data = _training_data(row.arm)
    able = [
        (ended, other)
        for other in rows
        if other.kind == "scratch"
        and other.arm.sets == row.arm.sets
        and _training_data(other.arm) == data
        and (ended := other.mean("downstream_after")) is not None
    ]
    if row.kind != "continued" or not able:
        return row
    scratch = min(able, key=lambda entry: entry[0])[1]
    saved: dict[int | None, float] = {}
    for trial, run in _with_runs(row.arm.complete):
        target = scratch.values["downstream_after"].get(trial.seed)
        if target is not None and math.isfinite(target) and len(curve := run.curve(DOWNSTREAM)):
            saved[trial.seed] = scratch.values["tokens"][trial.seed] - tokens_to_reach(curve, target)
    return dataclasses.replace(row, values=row.values | {"tokens_saved": saved}, scratch=scratch.name)


def _training_data(arm: ArmRecord) -> Any:
    """The arm's training data from its configuration, without replay; ``None`` if the configuration has none."""
    for _, run in _with_runs(arm.complete):
        if isinstance(data := run.config.get("data"), dict):
            return data.get("train")
    return None


def _with_runs(trials: Sequence[TrialRecord]) -> list[tuple[TrialRecord, RecordedRun]]:
    return [(trial, trial.run) for trial in trials if trial.run is not None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against the reference arm of its group, in one measure; ``group`` is '' for arms in none. ``tokens``: the training
    tokens of the arm and of its reference, over all stages of a chain."""

    group: str
    arm: str
    reference: str
    measure: str
    difference: Difference
    tokens: tuple[float, float]

    @property
    def same_length(self) -> bool:
        """Whether both were trained on the same number of tokens; otherwise the difference includes the effect of length."""
        return same_length(*self.tokens)

    @property
    def established(self) -> bool:
        return self.same_length and self.difference.established

    def flat(self) -> dict[str, Any]:
        return {
            "group": self.group or None,
            "arm": self.arm,
            "reference": self.reference,
            "measure": self.measure,
            "mean": self.difference.mean,
            "margin_95": self.difference.margin,
            "seeds": len(self.difference.values),
            "interval_excludes_0": self.difference.established,
            "arm_tokens": round(self.tokens[0]),
            "reference_tokens": round(self.tokens[1]),
            "same_length": self.same_length,
        }


CHAINS = "chains of stages"


def reference_of(experiment: ExperimentRecord, group: str) -> ArmRecord | None:
    """The arm that a sweep's arms are compared with: one in its figure that isn't part of the sweep, else its first."""
    inside = [arm for arm in experiment.arms if group in arm.groups]
    return next((arm for arm in inside if arm.group != group), inside[0] if inside else None)


def comparisons(experiment: ExperimentRecord, rows: Sequence[ArmRow]) -> list[Comparison]:
    """Compares the arms of every sweep with its reference, the ends of chains with the first chain's, and all other arms that
    continue a checkpoint or started from scratch with the main arm; only arms with the same validation sets."""
    found: list[Comparison] = []
    by_name = {row.name: row for row in rows}
    tokens = {row.name: row.mean("tokens") or 0.0 for row in rows}
    for group in experiment.groups:
        reference = reference_of(experiment, group)
        found += _against(group, reference, [arm for arm in experiment.arms if group in arm.groups], by_name, tokens)
    ends = chain_ends(experiment)
    if ends:
        whole_chains = {end.name: sum(tokens[arm.name] for arm in chain_stages(experiment, end)) for end in ends}
        found += _against(CHAINS, ends[0], [*ends, *whole_runs(experiment)], by_name, tokens | whole_chains)
    whole = whole_runs(experiment)
    singles = [
        arm
        for arm in experiment.arms
        if not arm.groups and arm.chain is None and arm.kind != "pretraining" and arm not in whole
    ]
    return found + _against("", experiment.main, singles, by_name, tokens)


def _against(
    group: str, reference: ArmRecord | None, arms: Sequence[ArmRecord], rows: dict[str, ArmRow], tokens: dict[str, float]
) -> list[Comparison]:
    found = []
    for arm in arms:
        if reference is None or arm.name == reference.name or arm.sets != reference.sets:
            continue
        for measure in COMPARED:
            values = [rows[name].values.get(measure, {}) for name in (arm.name, reference.name)]
            if difference := paired(*values):
                lengths = (tokens[arm.name], tokens[reference.name])
                found.append(Comparison(group, arm.name, reference.name, measure, difference, lengths))
    return found


def chain_ends(experiment: ExperimentRecord) -> list[ArmRecord]:
    """The last stage of every chain."""
    last: dict[str, ArmRecord] = {}
    for arm in experiment.arms:
        if arm.chain is not None and ((arm.stage or 0) >= (last[arm.chain].stage or 0) if arm.chain in last else True):
            last[arm.chain] = arm
    return list(last.values())


def chain_stages(experiment: ExperimentRecord, end: ArmRecord) -> list[ArmRecord]:
    """The stages that lead to ``end``, first to last; stages of another chain too, if its chain starts from one."""
    stages = [end]
    while before := next((a for name in stages[0].after if (a := experiment.arm(name)) and a.chain is not None), None):
        stages.insert(0, before)
    return stages


def whole_runs(experiment: ExperimentRecord) -> list[ArmRecord]:
    """Single runs from scratch of the length of a whole chain: the equivalent of a chain with all data from the beginning."""
    lengths = [sum(arm.trials[0].tokens for arm in chain_stages(experiment, end)) for end in chain_ends(experiment)]
    return [
        arm
        for arm in experiment.arms
        if arm.kind == "scratch" and arm.chain is None and any(abs(arm.trials[0].tokens - n) <= 0.01 * n for n in lengths)
    ]
