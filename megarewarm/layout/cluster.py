"""The time of a training step on a cluster of known GPUs, estimated from FLOPs, bandwidths and the pipeline bubble.

It ranks layouts; its seconds are rough. Its assumptions are the constants below, and none of them was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megarewarm.config.execution import ParallelConfig
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.layout.gpus import Gpu
from megarewarm.layout.memory import Part, Traffic, Work, memory_of, parameters_of, parts, traffic_of
from megarewarm.layout.micro_batch import work_of
from megarewarm.model.size import PASSES, stage_costs, training_flops_per_token
from megarewarm.model.trained import Trained
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.mesh import Layout

MATMUL_EFFICIENCY = 0.65  # share of the peak that large bf16 matmuls reach, kernels between them included
HALF_EFFICIENT = (768, 192)  # tokens of a micro-batch, and columns of a rank's share of a layer, at which it is half
LINK_EFFICIENCY = 0.8  # share of a link's bandwidth that collectives reach
OVERLAPPED = 0.7  # share of the sharded data-parallel traffic that overlaps with compute
MEMORY_IN_USE = 0.92  # share of memory for training; the allocator and the driver take the rest


@dataclass(frozen=True)
class LayoutEstimate:
    """A layout with its estimates. ``keys``: the configuration that selects it; ``hours``: for all steps of the run."""

    layout: Layout
    keys: dict[str, Any]
    memory: float
    seconds: float
    bubble: float
    tokens_per_second: float
    mfu: float
    hours: float


def rank_layouts(
    config: RunConfig,
    model: ModelConfig,
    gpus: int,
    gpu: Gpu,
    teacher: ModelConfig | None = None,
    trained: Trained | None = None,
) -> list[LayoutEstimate]:
    """All layouts of ``gpus`` GPUs that fit into memory, fastest first; ``teacher``: of ``distill``, ``trained``: see ``Work``.
    Times are those of a run in which everything trains. Raises ``UserError`` if
    none does."""
    plans = []
    smallest = math.inf
    for parallel, recompute, micro_batch in _candidates(config, model, gpus, gpu):
        left = gpus // (parallel.pipeline * parallel.tensor)
        shard = 1 if parallel.sharding == "none" else left
        layout = Layout(parallel.pipeline, left // shard, shard, parallel.tensor)
        training = config.training.model_copy(update={"micro_batch": micro_batch, "recompute": recompute})
        tried = config.model_copy(update={"parallel": parallel, "training": training})
        try:
            check_fit(tried, model, layout, teacher)
        except UserError:
            continue
        work = work_of(tried, model, layout, micro_batch, value_bytes=2, on_gpu=True, teacher=teacher, trained=trained)
        held = parts(work, parallel, layout)
        memory = max(memory_of(part, rank, work, parallel, layout).total for rank, part in enumerate(held))
        smallest = min(smallest, memory)
        if memory > MEMORY_IN_USE * gpu.memory * 2**30:
            continue
        seconds, bubble = step_seconds(work, parallel, layout, gpu, held)
        tokens = config.tokens_per_step / seconds
        flops = training_flops_per_token(model, config.data.sequence_length)
        keys = {f"parallel.{key}": getattr(parallel, key) for key in ("tensor", "pipeline", "sharding")}
        if parallel.tensor > 1:
            keys["parallel.sequence"] = parallel.sequence
        if parallel.pipeline > 1:
            keys["parallel.schedule"] = parallel.schedule
        keys |= {"training.micro_batch": micro_batch, "training.recompute": recompute}
        mfu = tokens * flops / (gpus * gpu.tflops * 1e12)
        plans.append(LayoutEstimate(layout, keys, memory, seconds, bubble, tokens, mfu, config.total_steps * seconds / 3600))
    if not plans:
        least = "no layout divides model and batch" if math.isinf(smallest) else f"at least {smallest / 2**30:.0f} GiB"
        raise UserError(
            f"no layout fits on {gpus} GPUs of {gpu.memory:g} GiB ({least}); use more GPUs, or a global_batch with more "
            f"divisors"
        )
    # among equally fast layouts, the simpler first
    return sorted(plans, key=lambda plan: (round(plan.seconds, 4), plan.layout.model, plan.memory))


def _candidates(config: RunConfig, model: ModelConfig, gpus: int, gpu: Gpu) -> Iterator[tuple[ParallelConfig, str, int]]:
    batch = config.training.global_batch
    for tensor in (t for t in (1, 2, 4, 8) if t <= gpu.per_host and model.kv_heads % t == 0 and model.mlp_size % t == 0):
        for pipeline in range(1, min(gpus // tensor, model.num_layers) + 1):
            if gpus % (tensor * pipeline) or batch % (gpus // (tensor * pipeline)):
                continue
            share = batch // (gpus // (tensor * pipeline))
            for sharding in ("none", "zero2") if pipeline > 1 else ("none", "zero2", "zero3"):
                if sharding != "none" and gpus == tensor * pipeline:
                    continue
                for sequence in (False, True) if tensor > 1 and config.data.sequence_length % tensor == 0 else (False,):
                    parallel = ParallelConfig(
                        tensor=tensor,
                        pipeline=pipeline,
                        sharding=sharding,
                        sequence=sequence,
                    )
                    for micro_batch in (m for m in range(1, share + 1) if share % m == 0):
                        yield from ((parallel, recompute, micro_batch) for recompute in ("none", "selective", "full"))


def step_seconds(work: Work, parallel: ParallelConfig, layout: Layout, gpu: Gpu, held: list[Part]) -> tuple[float, float]:
    """(seconds per step, share of the step lost to the pipeline bubble)."""
    model, m = work.model, work.micro_batches
    layer, head = stage_costs(model, work.sequence_length)
    passes = PASSES[work.recompute]
    sizes = (work.tokens, model.hidden_size / layout.tensor)
    reached = MATMUL_EFFICIENCY * math.prod(size / (size + half) for size, half in zip(sizes, HALF_EFFICIENT, strict=True))
    per_micro = 0.0
    outside = Traffic(0.0, 0.0, 0.0)
    weights = 0
    for part in held:
        traffic = traffic_of(part, work, parallel, layout)
        flops = work.tokens * (passes * layer * sum(part.layers) + 3.0 * head * part.last) / layout.tensor
        rate = gpu.inner_rate if layout.tensor <= gpu.per_host else gpu.outer_rate
        seconds = flops / (gpu.tflops * 1e12 * reached) + traffic.tensor / m / (rate * 1e9 * LINK_EFFICIENCY)
        seconds += traffic.pipeline / m / (gpu.outer_rate * 1e9 * LINK_EFFICIENCY)
        per_micro = max(per_micro, seconds)
        outside = max(outside, traffic, key=lambda t: t.data)
        weights = max(weights, parameters_of(part, model, layout.tensor)[0])
    # fill and drain: each rank idles for the time of (P - 1) micro-batches, less with interleaved and zero_bubble
    waits = (layout.pipeline - 1) * {"1f1b": 1.0, "interleaved": 0.5, "zero_bubble": 0.1}[parallel.schedule]
    taught = _teacher_seconds(work, parallel, layout, gpu.tflops * 1e12 * reached)
    busy = m * (per_micro + taught)
    one_host = layout.data * layout.tensor <= gpu.per_host and layout.pipeline == 1
    data_rate = (gpu.inner_rate if one_host else gpu.outer_rate) * 1e9 * LINK_EFFICIENCY
    data = outside.data / data_rate * (1.0 if parallel.sharding == "none" else 1 - OVERLAPPED)
    # AdamW reads weight, gradient and moments and writes all but the gradient: 28 bytes per parameter
    update = 28.0 * weights / layout.shard / (gpu.memory_rate * 1e12)
    # the teacher's own pass through a pipeline comes before the step and fills it as 1F1B does
    bubble = waits * per_micro + (layout.pipeline - 1) * taught
    total = busy + bubble + data + update
    return total, bubble / total


def _teacher_seconds(work: Work, parallel: ParallelConfig, layout: Layout, rate: float) -> float:
    """Seconds that the teacher's forward pass of a micro-batch takes on its busiest rank, at ``rate`` FLOP/s."""
    if work.teacher is None:
        return 0.0
    layer, head = stage_costs(work.teacher, work.sequence_length)
    held = parts(replace(work, model=work.teacher), parallel, layout)
    return max(work.tokens * (layer * sum(part.layers) + head * part.last) for part in held) / layout.tensor / rate
