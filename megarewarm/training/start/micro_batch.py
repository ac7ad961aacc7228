"""``training.micro_batch: auto``: a number by the memory that is free, which a forward and backward pass on a GPU confirms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megarewarm.layout.micro_batch import fitting, sizes
from megarewarm.parallel.agreement import all_reduce_maxima
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.laid_out import DTYPES
from megarewarm.parallel.mesh import choose_layout
from megarewarm.process import is_out_of_memory
from megarewarm.spelling import bytes_text, counted
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.start.inputs import settle_precision
from megarewarm.training.start.memory import free_memory
from megarewarm.training.start.plan import Plan

_IN_USE = 0.8  # of what is free: the allocator, the kernels' own memory, and a step's short-lived values need the rest


def settle_micro_batch(plan: Plan, world_size: int, device: torch.device, free: float | None = None) -> tuple[Plan, list[str]]:
    """``plan`` with a number for ``training.micro_batch``, and the line that says which 'auto' has become.

    ``free``: bytes that each rank has, None: those of ``device``. A run that goes on keeps what it began with.
    """
    config = plan.config
    if config.training.micro_batch != "auto":
        return plan, []
    kept = RunFolder(Path(config.run_folder)).micro_batch() if plan.resumed else None
    if kept is not None:
        return with_micro_batch(plan, kept), [f"training.micro_batch: auto is {kept} sequences, as when the run began"]
    if config.training.device == "cuda" and device.type != "cuda":
        return with_micro_batch(plan, 1), ["training.micro_batch: auto is chosen at the start, on the GPU; shown is 1"]
    free = free_memory(device, world_size) if free is None else free
    size, needed = fitting(
        config,
        plan.model,
        choose_layout(config.parallel, world_size),
        _IN_USE * free,
        value_bytes=DTYPES[settle_precision(config, device)].itemsize,
        on_gpu=device.type == "cuda",
        teacher=plan.taught_by,
        trained=plan.trained_at_end,
    )
    room = f"a rank needs {bytes_text(needed)} of the {bytes_text(free)} that are free"
    return with_micro_batch(plan, size), [f"training.micro_batch: auto is {counted(size, 'sequence')}: {room}"]


def with_micro_batch(plan: Plan, size: int) -> Plan:
    """``plan`` with micro-batches of ``size`` sequences."""
    training = plan.config.training.model_copy(update={"micro_batch": size})
    return replace(plan, config=plan.config.model_copy(update={"training": training}))


@collective
def confirmed(model: ParallelModel, plan: Plan) -> tuple[Plan, list[str]]:
    """``plan`` with a micro-batch that every rank has tried with what it holds, and a line where it had to be smaller.

    All ranks call it, once the optimizer holds its memory. Only ranks that compute a micro-batch by themselves can try: where
    they need each other, one that runs out of memory leaves the others waiting.
    """
    layout, asked = model.mesh.layout, plan.config.training.micro_batch_size
    thaws = plan.trains is not None and plan.trained_at_end is None  # what it needs then can't be tried yet
    if layout.model > 1 or layout.shard > 1 or thaws:
        return plan, []
    size = asked
    while not _all_fit(model, size, plan.config.data.sequence_length) and size > 1:
        size = max(each for each in sizes(plan.config.training.global_batch // layout.data) if each <= size // 2)
    model.micro_batch = size
    if size == asked:
        return plan, []
    return with_micro_batch(plan, size), [f"training.micro_batch: auto is {size}: {asked} ran out of memory when it was tried"]


@collective
def _all_fit(model: ParallelModel, size: int, length: int) -> bool:
    """Whether no rank runs out of memory in micro-batches of ``size``. All ranks call it."""
    model.micro_batch, fits = size, True
    try:
        model.forward_backward(np.zeros((size, length + 1), np.int64))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    model.gradients.zero()
    if model.mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return not any(all_reduce_maxima([not fits]))
