"""Saving during training: the tensors are copied, training goes on, and a thread writes the copies to the disk."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

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
_WORD_EVERY = 1.0  # seconds between words that ranks give each other while they wait for their disks


@dataclass(frozen=True)
class Saved:
    """A checkpoint that stands. ``stall``: seconds that training waited for it; ``seconds``: from then until it stood."""

    step: int
    path: Path
    stall: float
    seconds: float


class Saver:
    """Writes a run's checkpoints into ``folder``. All ranks make one, at the same moment, and call the same methods.

    ``asynchronous``: the copies are kept in host memory (once as much as the tensors take) and used again for each save;
    otherwise ``save`` returns when the checkpoint stands.
    """

    def __init__(self, folder: Path, retention: Retention, *, asynchronous: bool) -> None:
        self._folder, self._retention = folder, retention
        # a group of its own: its messages may cross those of training, and its tensors are on the CPU
        several = position()[1] > 1
        self._group = new_patient_group(_PATIENCE) if several else None
        self._staging = _Staging() if asynchronous else None
        # among several ranks always a thread, so that the main one can tell a slow disk from a rank that is gone
        threaded = asynchronous or several
        self._thread = ThreadPoolExecutor(1, "checkpoint", _on_device, (_device(),)) if threaded else None
        self._reserved: Future[None] | None = None
        self._pending: Future[Saved] | None = None
        self._finished: list[Saved] = []

    def reserve(self, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        """Make the buffers for ``tensors`` while training begins, so that the first save need not: fresh memory is slow."""
        if self._staging is not None and self._thread is not None:
            self._reserved = self._thread.submit(self._staging.reserve, tensors)

    def save(self, state: TrainingState, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        """Save; a save that is still being written is waited for first. Raises ``UserError`` where the disk refused."""
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

    @property
    def failed(self) -> bool:
        """Whether the save in the background has ended in an error, which ``wait`` raises on all ranks."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finished(self) -> list[Saved]:
        """The checkpoints that came to stand since this was last called."""
        if self._pending is not None and self._pending.done() and not self.failed:
            self._take()
        found, self._finished = self._finished, []
        return found

    @collective
    def wait(self) -> None:
        """Until no rank is writing. All ranks call it. Raises ``UserError`` where the disk refused.

        The disk may take its time, a rank may not: a word from each must come within the time that training waits for one.
        """
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
        """Wait for what is being written, whatever comes of it; not if another rank is lost, for whom it would wait as well."""
        if self._thread is not None:
            self._thread.shutdown(wait=error is None or not is_rank_loss(error))

    def _write(self, state: TrainingState, tensors: Mapping[str, Tensor | TensorSlice], began: float, released: float) -> Saved:
        path = self._folder / step_name(state.step)
        main = position(self._group)[0] == 0

        def clean(step: int) -> None:
            remove = functools.partial(remove_superseded, self._folder, step, self._retention, replaced=state.step)
            on_all_ranks(remove if main else None, OSError, self._group)

        try:
            # before as well: a run that is killed after each of its saves would never come to the other
            clean(state.step - 1)
            write(path, state, tensors, self._group)
            clean(state.step)
        except OSError as error:
            raise UserError(
                f"{path}: the checkpoint could not be written ({error}); make room or correct the permissions and run the same "
                f"command again"
            ) from error
        ended = time.perf_counter()
        return Saved(state.step, path, (ended if self._staging is None else released) - began, ended - began)


class _Staging:
    """Copies in host memory (pinned where there is a GPU), made once and filled anew for every save."""

    def __init__(self) -> None:
        self._held: Tensors = {}

    def reserve(self, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        for name, tensor in tensors.items():
            if name not in self._held:
                self._held[name] = _in_host_memory(tensor)

    def copy(self, tensors: Mapping[str, Tensor | TensorSlice]) -> Tensors:
        self.reserve(tensors)
        for name, tensor in tensors.items():
            local(self._held[name]).copy_(local(tensor), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self._held[name] for name in tensors}


def _in_host_memory(tensor: Tensor | TensorSlice) -> Tensor | TensorSlice:
    part = local(tensor)
    # written to, not only asked for: the system gives memory when it is first touched
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda).fill_(0)
    return replace(tensor, local=copy) if isinstance(tensor, TensorSlice) else copy


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _on_device(device: int | None) -> None:
    # a thread begins on GPU 0, where every rank of a node would take some memory
    if device is not None:
        torch.cuda.set_device(device)
