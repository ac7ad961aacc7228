"""Faults within a rank, by patches of what the trainer calls: reads, writes, the clock, gradients, weights.

``arm`` is called in the rank's own process before megarewarm's ``main``. Each fault happens once, however often the run is
started again.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarewarm.data.mixture.batches import TrainingBatches
from megarewarm.parallel.engine import ParallelModel
from tests.chaos.faults import Fault, has_fired, mark_fired, read_schedule


class _Progress:
    """Which step this rank computes, and which batches it has read ahead, known from the rows that pass by."""

    def __init__(self, global_batch: int) -> None:
        self.computing = 0
        self.reading = 0
        self._global_batch = global_batch
        self._seen: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()  # rows are kept, so that no id comes twice
        share = TrainingBatches.share

        def watched(data: TrainingBatches, first_sample: int, *rest: int) -> np.ndarray:
            self.reading = first_sample // global_batch + 1
            rows = share(data, first_sample, *rest)
            self._seen[id(rows)] = rows, self.reading
            if len(self._seen) > 8:
                self._seen.popitem(last=False)
            return rows

        TrainingBatches.share = watched  # type: ignore[assignment, method-assign]

    def step_of(self, rows: np.ndarray) -> int:
        """The step whose batch ``rows`` is."""
        return self._seen[id(rows)][1]


def arm(control: Path, rank: int, run: Path, global_batch: int) -> None:
    """Let the faults of the schedule in ``control`` that lie within ``rank`` happen in this process. ``run``: its folder."""
    progress = _Progress(global_batch)
    faults = [fault for fault in read_schedule(control) if fault.rank == rank and not has_fired(control, fault)]
    _watch_computation(control, progress, [fault for fault in faults if fault.kind in ("nan", "bit_flip")])
    for fault in faults:
        if fault.kind in ("read_error", "reads_fail"):
            _fail_reads(control, progress, fault)
        elif fault.kind == "clock":
            _move_the_clock(control, progress, fault)
        elif fault.kind == "refused":
            _fail_a_write(control, progress, fault, run)


def _watch_computation(control: Path, progress: _Progress, faults: list[Fault]) -> None:
    compute = ParallelModel.forward_backward

    def watched(model: ParallelModel, rows: np.ndarray, *rest: Any, **named: Any) -> Any:
        progress.computing = progress.step_of(rows)
        due = [fault for fault in faults if progress.computing >= fault.step]
        for fault in due:
            if fault.kind == "bit_flip" and mark_fired(control, fault):
                _flip_a_bit(model.parameters[_pick(model, fault)])
        result = compute(model, rows, *rest, **named)
        for fault in due:
            if fault.kind == "nan" and mark_fired(control, fault):
                _gradient(model, _pick(model, fault)).view(-1)[0] = float("nan")
        return result

    ParallelModel.forward_backward = watched  # type: ignore[assignment, method-assign]


def _pick(model: ParallelModel, fault: Fault) -> str:
    names = sorted(name for name, parameter in model.parameters.items() if parameter.numel())
    return names[int(float(fault.detail) * len(names))]


def _gradient(model: ParallelModel, name: str) -> torch.Tensor:
    """As the backward pass left it, before the ranks' are added up, or by fully_shard after that."""
    sharded = getattr(model.gradients, "_sharded", None)
    gradient = model.parameters[name].grad if sharded is None else sharded[name].grad.to_local()
    assert gradient is not None
    return gradient


def _flip_a_bit(parameter: torch.nn.Parameter) -> None:
    """Of the mantissa: the value changes a little, as no check of its size would notice."""
    parameter.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 18)


def _fail_reads(control: Path, progress: _Progress, fault: Fault) -> None:
    read, failing = os.pread, False

    def watched(descriptor: int, count: int, offset: int, /) -> bytes:
        nonlocal failing
        if not failing and progress.reading >= fault.step and mark_fired(control, fault):
            failing = fault.kind == "reads_fail"
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, count, offset)

    os.pread = watched


def _move_the_clock(control: Path, progress: _Progress, fault: Fault) -> None:
    now, hours = time.time, float(fault.detail)
    moved = False

    def wrong() -> float:
        nonlocal moved
        if not moved and progress.computing >= fault.step:
            moved = mark_fired(control, fault)
        return now() + 3600 * hours * moved

    time.time = wrong


def _fail_a_write(control: Path, progress: _Progress, fault: Fault, run: Path) -> None:
    opened = builtins.open

    def due() -> bool:
        return progress.computing >= fault.step and mark_fired(control, fault)

    def watched(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        stream = opened(file, mode, *rest, **named)
        ours = isinstance(file, str | os.PathLike) and Path(file).is_relative_to(run)
        if not ours or not Path(file).name.startswith(fault.detail) or not set("wa") & set(mode):
            return stream
        return _Refusing(stream, due)

    builtins.open = io.open = watched


class _Refusing:
    """A stream that has no room when its time has come."""

    def __init__(self, stream: Any, due: Callable[[], bool]) -> None:
        self._stream, self._due = stream, due

    def write(self, data: Any) -> Any:
        if self._due():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Refusing:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)
