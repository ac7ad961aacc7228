"""Run a function on several gloo ranks of this machine and give back what each returned."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megarewarm.parallel.mesh import Ranks


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _work(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple, answers: Any) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        answers.put((rank, function(Ranks(rank, world_size, torch.device("cpu")), *args), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """``[function(ranks, *args) for each rank]``, the ranks being processes. ``function`` must be importable.

    Raises ``AssertionError`` with the traceback of the first rank that failed.
    """
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_work, args=(rank, world_size, port, function, args, answers)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            for other in processes:
                other.kill()
            raise AssertionError(f"a rank of {function.__name__} did not finish in {timeout} s")
    results: dict[int, Any] = {}
    for _ in processes:
        assert not answers.empty(), f"a rank died without an answer: exit codes {[p.exitcode for p in processes]}"
        rank, result, error = answers.get()
        assert error is None, f"rank {rank}:\n{error}"
        results[rank] = result
    return [results[rank] for rank in range(world_size)]
