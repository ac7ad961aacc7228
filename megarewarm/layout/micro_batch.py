"""The micro-batch that fits into a rank's memory, estimated without running anything."""

from __future__ import annotations

from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.layout.memory import Work, memory_of, parts
from megarewarm.model.trained import Trained
from megarewarm.parallel.mesh import Layout
from megarewarm.parallel.pipeline import micro_batches

_MOST_ON_CPU = 8192  # tokens of a micro-batch: a CPU is no faster with more of them
_TO_FILL = 4  # micro-batches per pipeline rank: they limit the bubble to a fifth of the time


def sizes(share: int, pipeline: int = 1) -> list[int]:
    """Candidate micro-batches, ascending, for ``share`` sequences per step on a rank of ``pipeline``: divisors, and powers of
    two, whose last micro-batch may be smaller. A pipeline would pad the last one, so it gets divisors only."""
    most = share if pipeline == 1 else max(1, share // (_TO_FILL * pipeline))
    divisors = {size for size in range(1, most + 1) if share % size == 0}
    return sorted(divisors | ({2**k for k in range(most.bit_length())} if pipeline == 1 else set()))


def work_of(
    config: RunConfig,
    model: ModelConfig,
    layout: Layout,
    size: int,
    *,
    value_bytes: int,
    on_gpu: bool,
    teacher: ModelConfig | None = None,
    trained: Trained | None = None,
) -> Work:
    """What a rank of ``layout`` computes in micro-batches of ``size`` sequences. ``trained``: see ``Work``."""
    return Work(
        model,
        config.data.sequence_length,
        size,
        micro_batches(config.parallel, config.training.global_batch // layout.data, size),
        config.training.recompute,
        value_bytes,
        config.kernels.logit_bytes("cuda" if on_gpu else "cpu"),
        config.optimizer.kind,
        _is_fused(config, model, on_gpu),
        config.valuation is not None,
        teacher,
        config.checkpoint.average is not None,
        trained,
    )


def _is_fused(config: RunConfig, model: ModelConfig, on_gpu: bool) -> bool:
    """Whether layers keep as little as with fused operations; of RMSNorm and SwiGLU torch's compiler drops as much."""
    kernels = config.kernels
    if "reference" in (kernels.use, kernels.norms, kernels.gelu):
        return False
    if model.norm == "layer":  # only there is the residual stream rounded
        return on_gpu and kernels.use != "compile" and kernels.norms != "apex"
    return on_gpu or kernels.use == "auto"


def fitting(
    config: RunConfig,
    model: ModelConfig,
    layout: Layout,
    memory: float,
    *,
    value_bytes: int,
    on_gpu: bool,
    teacher: ModelConfig | None = None,
    trained: Trained | None = None,
) -> tuple[int, float]:
    """(sequences, bytes that the fullest rank needs) of the micro-batch that fits into ``memory`` bytes on each rank.

    It is the smallest with as few micro-batches per step as the largest that fits; 1 if none fits.
    """
    share = max(1, config.training.global_batch // layout.data)
    needed: dict[int, float] = {}
    for size in sizes(share, layout.pipeline):
        work = work_of(config, model, layout, size, value_bytes=value_bytes, on_gpu=on_gpu, teacher=teacher, trained=trained)
        held = parts(work, config.parallel, layout)
        most = max(memory_of(part, rank, work, config.parallel, layout).total for rank, part in enumerate(held))
        if not needed or (most <= memory and (on_gpu or work.tokens <= _MOST_ON_CPU)):
            needed[size] = most
    fewest = -(-share // max(needed))
    return next((size, most) for size, most in needed.items() if -(-share // size) == fewest)
