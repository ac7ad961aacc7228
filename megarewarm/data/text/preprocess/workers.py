"""Workers: threads of this process, processes of this machine, or the ranks of an MPI job."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, TypeVar, cast

from megarewarm.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Workers:
    """``count`` tasks are worked on at a time, each with ``threads`` threads."""

    executor: Executor
    count: int
    threads: int


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def local(workers: int, tasks: int) -> Iterator[Workers]:
    """One process per task where there are several tasks, threads of this process where there is one."""
    processes = min(workers, tasks)
    if processes < 2:
        with ThreadPoolExecutor(1) as executor:
            yield Workers(executor, 1, workers)
        return
    threads = workers // processes
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # unblocks SIGINT where it starts, so before `_interrupted_later`
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker, initargs=(threads, os.getpid()))
    try:
        yield Workers(pool, processes, threads)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def mpi() -> Iterator[Workers | None]:
    """The ranks of this MPI job: one hands out the work, the others do it. None on those, when all is done."""
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except (ImportError, RuntimeError) as error:
        raise UserError(f"--mpi needs the package 'mpi4py' and an MPI library: {error}") from error
    size = MPI.COMM_WORLD.Get_size()
    if size == 1:
        with local(1, 1) as workers:
            yield workers
        return
    os.environ["RAYON_NUM_THREADS"] = "1"
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else Workers(cast(Executor, executor), size - 1, 1)


def in_order(
    workers: Workers, function: Callable[[T], R], tasks: Iterable[T], watch: Callable[[], None] = lambda: None
) -> Generator[R, None, None]:
    """Results in the order of the tasks, with two tasks per worker under way; ``watch`` is called twice a second. Raises
    what a task raised, and ``UserError`` where a worker was killed."""
    waiting: deque[Future[R]] = deque()
    active: set[Future[R]] = set()
    iterator = iter(tasks)
    ended = False
    try:
        while waiting or not ended:
            while not ended and len(active) < 2 * workers.count:
                try:
                    task = next(iterator)
                except StopIteration:
                    ended = True
                    break
                with _interrupted_later():  # it may start a process
                    waiting.append(workers.executor.submit(function, task))
                active.add(waiting[-1])
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
            _, active = wait(active, timeout=0.5, return_when=FIRST_COMPLETED)
            watch()
    except BrokenExecutor as error:
        raise UserError(
            "a worker process was killed, most likely because memory ran out: run the same command again with --resume, and "
            "with fewer --workers if it happens again"
        ) from error
    finally:
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C waits. Processes that start meanwhile never see it: they inherit the mask, and would print a traceback if it came
    while they import, before `_begin_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(threads: int, parent: int) -> None:
    """A worker ends with its parent, leaves Ctrl-C to it, and uses no more threads than are its share."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    library: Any = ctypes.CDLL(None)
    if hasattr(library, "prctl"):
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
