"""Run a function on several gloo ranks of this machine and give back what each returned."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megarewarm.parallel.placement import TensorSlice
from megarewarm.parallel.ranks import Ranks

# Ranks are forked from one process that has imported what they need: seconds, once and not once a rank.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "megarewarm.training.trainer"])


def _work(
    rank: int,
    world_size: int,
    meeting_point: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple,
    answers: Any,
) -> None:
    os.environ.clear()
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world_size)
        dist.barrier()  # or a rank that is done at once would close connections that others are still making
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
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a rank that is killed may still write
        return _answers(function, world_size, f"{folder}/store", args, timeout)


def _answers(function: Callable[..., Any], world_size: int, meeting_point: str, args: tuple, timeout: float) -> list[Any]:
    answers = _CONTEXT.SimpleQueue()
    processes = [
        _CONTEXT.Process(target=_work, args=(rank, world_size, meeting_point, dict(os.environ), function, args, answers))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < world_size:
        # read while they run: a large answer blocks its rank until somebody takes it
        if answers.empty():
            gone = all(not process.is_alive() for process in processes) and answers.empty()
            if gone or time.monotonic() > deadline:
                for process in processes:
                    process.kill()
                what = f"died: exit codes {[p.exitcode for p in processes]}" if gone else f"did not finish in {timeout} s"
                raise AssertionError(f"ranks of {function.__name__} {what}")
            time.sleep(0.02)
            continue
        rank, result, error = answers.get()
        if error is not None:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank}:\n{error}")
        results[rank] = result
    for process in processes:
        process.join(timeout)
    return [results[rank] for rank in range(world_size)]


def whole(tensor: torch.Tensor | TensorSlice) -> torch.Tensor:
    """The tensor of which each rank holds a slice, NaN where nobody does. All ranks call it for the same tensors."""
    if not isinstance(tensor, TensorSlice):
        return tensor
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, (tensor.offsets, tensor.local))
    found = torch.full(tensor.shape, torch.nan)
    for offsets, local in held:
        TensorSlice(local, offsets, tensor.shape).of(found).copy_(local)
    return found
