"""The status of an experiment's runs in progress: state, progress, time left, and problems.

All of it comes from files, ``experiment.json`` and each run's ``metrics.jsonl``, so it works beside the job or on a login node.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import orjson

from megarewarm.errors import UserError
from megarewarm.record.events import TaskEvent
from megarewarm.record.experiment import read_record
from megarewarm.record.follow import Follower
from megarewarm.record.layout import CONFIG_FILE, EXPERIMENT_FILE, METRICS_FILE
from megarewarm.record.run import BITS, DOWNSTREAM, NATS, UPSTREAM, common_unit
from megarewarm.spelling import duration_text, loss_text, rate_text

State = Literal["diverged", "stalled", "running", "stopped", "waiting", "done"]
STATES: tuple[State, ...] = ("diverged", "stalled", "running", "stopped", "waiting", "done")
"""The most urgent first."""

RISE = 0.5
"""Nats per token by which the upstream loss may rise without an alarm. Published re-warmings at 0.4B parameters rose by 0.1 to
0.45 with new data close to the old (arXiv 2403.08763, section 7.1)."""

_SPIKE = 10.0  # times the median of the gradient norms before
_MEDIAN_OF = 256  # most train lines in such a median; below is the least
_MEDIAN_NEEDS = 20
_DATA_WAIT = 0.05  # share of a step's time
_SILENT_STEPS, _SILENT_GAPS, _SILENT_SECONDS = 20.0, 3.0, 60.0
_STARTING_SECONDS = 900.0  # loading, compiling and a first evaluation may take this long


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run as planned in ``experiment.json``. ``after`` names the runs that it waits for."""

    name: str
    folder: Path
    after: tuple[str, ...] = ()
    steps: int | None = None
    tokens_per_step: float | None = None


@dataclasses.dataclass(frozen=True)
class Losses:
    """Validation losses of one role in the overview's unit: (step, loss) pairs; ``start`` the start checkpoint's, if any."""

    points: list[tuple[int, float]]
    start: float | None

    @property
    def newest(self) -> float | None:
        return self.points[-1][1] if self.points else None

    @property
    def difference(self) -> float | None:
        """Newest loss minus the start checkpoint's."""
        return None if self.start is None or self.newest is None else self.newest - self.start


@dataclasses.dataclass(frozen=True)
class RunView:
    """The current status of a run. ``left`` is in seconds, ``alarms`` are sentences, ``tests`` the newest of each task;
    ``None`` for what is not known (yet)."""

    name: str
    state: State
    step: int | None
    total: int | None
    first: int
    upstream: Losses
    downstream: Losses
    loss: float | None
    lr: float | None
    tokens_per_second: float | None
    seconds_per_step: float | None
    tokens_per_step: float | None
    left: float | None
    after: tuple[str, ...]
    alarms: tuple[str, ...]
    tests: tuple[TaskEvent, ...] = ()

    @property
    def share(self) -> float:
        """Completed share of the run's steps."""
        if self.state == "done":
            return 1.0
        if self.step is None or self.total is None or self.total <= self.first:
            return 0.0
        return min(1.0, max(0.0, (self.step - self.first) / (self.total - self.first)))


@dataclasses.dataclass(frozen=True)
class Overview:
    """Every run in order, the completed share of all steps and the seconds left, ``None`` if unknown.

    ``idle`` counts the runs without a rate of progress (stopped, stalled or diverged), whose steps ``left`` omits. ``unit``: of
    the validation losses, as ``record.run.in_one_unit``; alarms speak of nats per token.
    """

    title: str
    runs: list[RunView]
    share: float
    left: float | None
    idle: int
    unit: str = NATS

    def count(self, state: State) -> int:
        return sum(run.state == state for run in self.runs)


class Watch:
    """Watches the runs of ``folder``: an experiment's, a run's, or one that contains run folders.

    ``rise`` is the rise of the upstream loss in nats per token that raises an alarm. ``clock`` gives seconds since 1970.
    ``only``: names of the runs to watch; the others that they start from are assumed to be complete. Raises ``UserError`` if
    the folder is none of these.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        rise: float = RISE,
        clock: Callable[[], float] = time.time,
        only: Collection[str] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._rise = rise
        self._clock = clock
        self._only = only
        self._followers: dict[Path, Follower] = {}
        self._seen: dict[Path, float] = {}
        self._alarms: dict[Path, list[str]] = {}
        planned_runs(self._folder)

    def look(self) -> Overview:
        """Read new lines and return the current status."""
        title, planned = planned_runs(self._folder)
        if self._only is not None:
            planned = [_alone(run, self._only) for run in planned if run.name in self._only]
        for run in planned:
            self._poll(run)
        followed = [self._followers[run.folder / METRICS_FILE] for run in planned]
        unit = common_unit([(each.start, each.evaluations.values()) for each in followed])
        views = [self._view(run, unit) for run in planned]
        views = _estimate(views)
        left, idle = _whole(views)
        in_tokens = all(view.tokens_per_step for view in views)
        weights = [_work(view, in_tokens) for view in views]
        done = sum(weight * view.share for weight, view in zip(weights, views, strict=True))
        return Overview(title, views, done / sum(weights) if sum(weights) else 0.0, left, idle, unit)

    def _poll(self, run: Planned) -> None:
        path = run.folder / METRICS_FILE
        known = path in self._followers
        follower = self._followers.setdefault(path, Follower(path))
        if changed := follower.poll():
            self._seen[path] = self._clock() if known else _modified(path)
        if changed or path not in self._alarms:
            self._alarms[path] = _alarms(follower, _losses(follower, UPSTREAM, NATS), self._rise)

    def _view(self, run: Planned, unit: str) -> RunView:
        path = run.folder / METRICS_FILE
        follower = self._followers[path]
        upstream, downstream = (_losses(follower, role, unit) for role in (UPSTREAM, DOWNSTREAM))
        silent = self._clock() - max(self._seen.get(path, 0.0), follower.time if math.isfinite(follower.time) else 0.0)
        pace = follower.seconds_per_step()
        newest = follower.recent[-1] if follower.recent else None
        state = _state(follower, silent, pace, upstream, downstream)
        alarms = list(self._alarms[path])
        if state == "stalled":
            times = f", {silent / pace:,.0f} step times" if pace and silent < 1000 * pace else ""
            alarms.insert(0, f"no new line for {duration_text(silent)}{times}: killed or hanging")
        first = follower.origin_step
        step = follower.step if follower.step is not None else first if follower.lines.number else None
        return RunView(
            name=run.name,
            state=state,
            step=step,
            total=follower.total_steps or run.steps,
            first=first,
            upstream=upstream,
            downstream=downstream,
            loss=newest.loss if newest else None,
            lr=newest.lr if newest else None,
            tokens_per_second=_median([line.tokens_per_second for line in list(follower.recent)[-64:]]),
            seconds_per_step=pace,
            tokens_per_step=follower.tokens_per_step() or run.tokens_per_step,
            left=None,
            after=run.after,
            alarms=tuple(alarms),
            tests=tuple({test.name: test for test in follower.tests.values()}.values()),
        )


def _alone(run: Planned, names: Collection[str]) -> Planned:
    """The run without dependencies that are not in ``names``."""
    return dataclasses.replace(run, after=tuple(name for name in run.after if name in names))


def planned_runs(folder: Path) -> tuple[str, list[Planned]]:
    """Title and runs of an experiment's folder, of a run's, or of a folder that contains run folders.

    Raises ``UserError`` if the folder is none of these, or its experiment.json is damaged.
    """
    plan = folder / EXPERIMENT_FILE
    if plan.is_file():
        return _experiment(plan, folder)
    if (folder / METRICS_FILE).is_file() or (folder / CONFIG_FILE).is_file():
        return folder.resolve().name, [Planned(folder.resolve().name, folder)]
    if not folder.is_dir():
        raise UserError(f"{folder.absolute()}: no such folder: give a run's folder or an experiment's")
    runs = sorted(path.parent for path in folder.glob(f"*/{METRICS_FILE}"))
    if not runs:
        raise UserError(f"{folder}: neither experiment.json nor metrics.jsonl in it: give a run's folder or an experiment's")
    runs.sort(key=lambda run: (_first_time(run / METRICS_FILE), run.name))
    return folder.resolve().name, [Planned(run.name, run) for run in runs]


def _experiment(plan: Path, folder: Path) -> tuple[str, list[Planned]]:
    try:
        told = read_record(folder)
        runs = [
            Planned(
                str(run["name"]),
                folder / run["folder"],
                tuple(map(str, run.get("after") or ())),
                _positive(run.get("steps")),
                _positive(run.get("tokens_per_step")),
            )
            for run in told["runs"]
        ]
        return str(told.get("title") or told["experiment"]), runs
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{plan}: damaged ({type(error).__name__}: {error}): start the experiment again to rewrite it"
        ) from None


def _positive(value: Any) -> Any:
    return value if isinstance(value, int | float) and value > 0 else None


def _first_time(path: Path) -> float:
    """When a metrics file's first line was written; infinite if unknown."""
    try:
        with open(path, "rb") as file:
            return float(orjson.loads(file.readline())["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _losses(follower: Follower, role: str, unit: str) -> Losses:
    points = follower.losses(role, bits=unit == BITS)
    start = points[0][1] if points and follower.is_continued and points[0][0] == follower.origin_step else None
    return Losses(points, start if start is not None and math.isfinite(start) else None)


def _state(follower: Follower, silent: float, pace: float | None, *roles: Losses) -> State:
    if not follower.lines.number:
        return "waiting"
    ends = [follower.recent[-1].loss] if follower.recent else []
    ends += [losses.newest for losses in roles if losses.newest is not None]
    reason = str(follower.stop.get("reason", "")) if follower.stop else ""
    if any(not math.isfinite(end) for end in ends) or "diverged" in reason or "not finite" in reason:
        return "diverged"
    if follower.stop is not None:
        total = follower.total_steps
        trained = total is not None and (follower.step or 0) >= total and follower.stop.get("evaluated", True)
        return "done" if reason == "complete" or trained else "stopped"
    limit = _STARTING_SECONDS
    if pace is not None and follower.recent:
        limit = max(_SILENT_SECONDS, _SILENT_STEPS * pace, _SILENT_GAPS * follower.longest_gap)
    return "stalled" if silent > limit else "running"


def _alarms(follower: Follower, upstream: Losses, rise: float) -> list[str]:
    """Problems, as sentences."""
    found = [f"{follower.damage}"] if follower.damage else []
    lines = list(follower.recent)
    if broken := [line.step for line in lines if not math.isfinite(line.loss)]:
        found.append(f"the training loss is not finite at step {broken[-1]}")
    if (bad := [step for step, loss in upstream.points if not math.isfinite(loss)]) and not broken:
        found.append(f"the upstream loss is not finite at step {bad[-1]}")
    if upstream.difference is not None and upstream.difference > rise:
        ends = f"{loss_text(upstream.start)} to {loss_text(upstream.newest)}"
        found.append(f"upstream loss rose by more than {rise:g}: {ends}")
    if spike := _spike(lines):
        found.append(spike)
    per_step = follower.tokens_per_step()
    timed = [line for line in lines if line.tokens_per_second > 0 and math.isfinite(line.data_wait)]
    if per_step and len(timed) >= _MEDIAN_NEEDS:
        share = sum(line.data_wait for line in timed) / sum(per_step / line.tokens_per_second for line in timed)
        if share > _DATA_WAIT:
            found.append(f"{min(share, 1.0):.0%} of the time is spent waiting for data")
    for alarm in follower.alarms[-2:]:
        what = str(alarm.get("message") or alarm.get("reason") or alarm.get("kind") or "alarm").rstrip(".")
        found.append(f"step {alarm.get('step', '?')}: {what}")
    if len(follower.alarms) > 2:
        found.append(f"{len(follower.alarms) - 2} more alarms before")
    return found


def _spike(lines: Sequence[Any]) -> str | None:
    """The newest gradient norm above ten times the median of those before it."""
    lines = [line for line in lines if math.isfinite(line.grad_norm)]
    if len(lines) <= _MEDIAN_NEEDS:
        return None
    overall = statistics.median(line.grad_norm for line in lines)
    for index in range(len(lines) - 1, _MEDIAN_NEEDS - 1, -1):
        norm = lines[index].grad_norm
        if norm <= overall:
            continue  # saves computing a median for half of the lines
        if norm > _SPIKE * overall or index < _MEDIAN_OF:
            before = statistics.median(line.grad_norm for line in lines[max(0, index - _MEDIAN_OF) : index])
            if before > 0 and norm > _SPIKE * before:
                return f"gradient norm {rate_text(norm)} at step {lines[index].step}, {norm / before:.0f} times its median"
    return None


def _estimate(views: list[RunView]) -> list[RunView]:
    """The views with ``left``: running ones from their own rate, waiting ones from the median rate of all that have one."""
    rates = [
        view.tokens_per_step / view.seconds_per_step
        for view in views
        if view.tokens_per_step and view.seconds_per_step and view.state in ("running", "done", "stopped")
    ]
    running = [
        view.tokens_per_step / view.seconds_per_step
        for view in views
        if view.tokens_per_step and view.seconds_per_step and view.state == "running"
    ]
    rate = _median(running or rates)
    result = []
    for view in views:
        left: float | None = None
        if view.total is not None:
            steps = max(0, view.total - (view.step if view.step is not None else view.first))
            if view.state == "running" and view.seconds_per_step is not None:
                left = steps * view.seconds_per_step
            elif view.state in ("waiting", "running") and rate and view.tokens_per_step:
                left = steps * view.tokens_per_step / rate
        result.append(dataclasses.replace(view, left=left))
    return result


def _whole(views: Sequence[RunView]) -> tuple[float | None, int]:
    """Seconds until all running and waiting runs are done, and the number of runs that this omits.

    Assumes that as many runs train at once as do now, and that no chain of runs that wait for each other ends before its sum.
    """
    ahead = [view for view in views if view.state in ("running", "waiting")]
    idle = sum(view.state in ("stopped", "stalled", "diverged") for view in views)
    if not ahead:
        return (0.0 if views and not idle else None), idle
    if any(view.left is None for view in ahead):
        return None, idle
    left = {view.name: view.left or 0.0 for view in ahead}
    ends: dict[str, float] = {}
    for _ in ahead:  # as many rounds as the longest chain can have
        before = dict(ends)
        for view in ahead:
            ends[view.name] = left[view.name] + max((ends.get(name, 0.0) for name in view.after if name in left), default=0.0)
        if ends == before:
            break
    at_once = max(1, sum(view.state == "running" for view in ahead))
    return max(sum(left.values()) / at_once, *ends.values()), idle


def _work(view: RunView, in_tokens: bool) -> float:
    """A run's weight in the total: its tokens, or its steps."""
    return max(0.0, ((view.total or 0) - view.first) * (view.tokens_per_step or 1.0 if in_tokens else 1.0))


def _median(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None
