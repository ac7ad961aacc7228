"""Saving during training: the tensors are copied, training goes on, and a thread writes the copies to the disk."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarewarm.checkpoint.own.folder import remove_superseded
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.own.store import Tensors, local, write
from megarewarm.errors import UserError
from megarewarm.parallel.agreement import all_reduce_sums, on_all_ranks, position
from megarewarm.parallel.collective import collective
from megarewarm.parallel.groups import new_patient_group
from megarewarm.parallel.placement import TensorSlice
from megarewarm.parallel.ranks import is_rank_loss
from megarewarm.record.layout import step_name

_PATIENCE = timedelta(hours=2)  # for a rank whose disk is slower than the others'
_WORD_EVERY = 1.0  # seconds between the reports that ranks exchange while they wait for their disks


@dataclass(frozen=True)
class Saved:
    """A completed checkpoint. ``stall``: seconds that training waited for it; ``seconds``: from then until it was complete."""

    step: int
    path: Path
    stall: float
    seconds: float


class Saver:
    """Writes a run's checkpoints into ``folder``. All ranks make one at the same moment, and call the same methods.

    ``asynchronous``: keeps copies in host memory (as large as the tensors) and reuses them for each save; otherwise ``save``
    returns when the checkpoint is complete.
    """

    def __init__(self, folder: Path, retention: Retention, *, asynchronous: bool) -> None:
        self._folder, self._retention = folder, retention
        # a separate group: its messages may cross those of training, and its tensors are on the CPU
        several = position()[1] > 1
        self._group = new_patient_group(_PATIENCE) if several else None
        self._staging = _Staging() if asynchronous else None
        # with several ranks always a thread, so that the main rank can distinguish a slow disk from a lost rank
        threaded = asynchronous or several
        self._thread = ThreadPoolExecutor(1, "checkpoint", _on_device, (_device(),)) if threaded else None
        self._reserved: Future[None] | None = None
        self._pending: Future[Saved] | None = None
        self._finished: list[Saved] = []

    def reserve(self, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        """Allocate the buffers for ``tensors`` while training begins, because new memory is slow and the first save would
        wait for it."""
        if self._staging is not None and self._thread is not None:
            self._reserved = self._thread.submit(self._staging.reserve, tensors)

    def save(self, state: TrainingState, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        """Save, after a save that is still in progress. Raises ``UserError`` if the disk refused."""
        began = time.perf_counter()
        self.wait()
        if self._reserved is not None:
            self._reserved.result()
            self._reserved = None
        if self._thread is None:
            self._finished.append(self._write(state, tensors, began, began))
            return
        if self._staging is None:
            self._pending = self._thread.submit(self._write, state, tensors, began, began)
            self.wait()
            return
        staged = self._staging.copy(tensors)
        self._pending = self._thread.submit(self._write, state, staged, began, time.perf_counter())

    @collective
    def write_aside(self, path: Path, state: TrainingState, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        """Write a checkpoint that is none of the run's own steps, after a save that is still in progress. All ranks call it.
        Raises ``UserError`` if the disk refused."""
        self.wait()
        with _refused(path):
            write(path, state, tensors, self._group)

    @property
    def failed(self) -> bool:
        """Whether the background save failed; ``wait`` raises its error on all ranks."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finished(self) -> list[Saved]:
        """The checkpoints completed since the last call."""
        if self._pending is not None and self._pending.done() and not self.failed:
            self._take()
        found, self._finished = self._finished, []
        return found

    @collective
    def wait(self) -> None:
        """Wait until no rank is writing. All ranks call it. Raises ``UserError`` if the disk refused. Slow disks are
        tolerated, silent ranks are not: each rank must report within the timeout of training."""
        while True:
            writing = self._pending is not None and not futures.wait([self._pending], _WORD_EVERY).done
            if not any(all_reduce_sums([writing])):
                break
        self._take()

    def _take(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._finished.append(pending.result())

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Wait for the save in progress, ignoring its result; not if another rank is lost, because that wait would not end."""
        if self._thread is not None:
            self._thread.shutdown(wait=error is None or not is_rank_loss(error))

    def _write(self, state: TrainingState, tensors: Mapping[str, Tensor | TensorSlice], began: float, released: float) -> Saved:
        path = self._folder / step_name(state.step)
        main = position(self._group)[0] == 0

        def clean(step: int) -> None:
            remove = functools.partial(remove_superseded, self._folder, step, self._retention, replaced=state.step)
            on_all_ranks(remove if main else None, OSError, self._group)

        with _refused(path):
            # before the save too: a run that is killed after each of its saves would never remove one
            clean(state.step - 1)
            write(path, state, tensors, self._group)
            clean(state.step)
        ended = time.perf_counter()
        return Saved(state.step, path, (ended if self._staging is None else released) - began, ended - began)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Raises what the disk refuses as ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: the checkpoint could not be written ({error}); make room or correct the permissions and run the same "
            f"command again"
        ) from error


class _Staging:
    """Copies in host memory (pinned on GPU machines), allocated once and refilled for every save."""

    def __init__(self) -> None:
        self._held: Tensors = {}

    def reserve(self, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        for name, tensor in tensors.items():
            if name not in self._held or _place(self._held[name]) != _place(tensor):  # moments of rows become whole at a thaw
                self._held[name] = _in_host_memory(tensor)

    def copy(self, tensors: Mapping[str, Tensor | TensorSlice]) -> Tensors:
        self.reserve(tensors)
        for name, tensor in tensors.items():
            local(self._held[name]).copy_(local(tensor), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self._held[name] for name in tensors}


def _place(tensor: Tensor | TensorSlice) -> tuple[Any, ...]:
    """What a copy must share with ``tensor``."""
    part = tensor if isinstance(tensor, TensorSlice) else None
    return (part.offsets, part.shape, part.local.shape) if part is not None else (tensor.shape,)


def _in_host_memory(tensor: Tensor | TensorSlice) -> Tensor | TensorSlice:
    part = local(tensor)
    # written to, not only requested: the system allocates memory at the first access
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda).fill_(0)
    return replace(tensor, local=copy) if isinstance(tensor, TensorSlice) else copy


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _on_device(device: int | None) -> None:
    # a thread starts on GPU 0, where every rank of a node would take some memory
    if device is not None:
        torch.cuda.set_device(device)
