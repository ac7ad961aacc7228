"""A model as the trainer has it, of one process and small enough to look at each of its gradients."""

from __future__ import annotations

from typing import Any

import torch

from megarewarm.config.execution import ParallelConfig, TrainingConfig
from megarewarm.config.model import ModelConfig
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Layout, Mesh
from megarewarm.parallel.ranks import Ranks

SHAPE: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 64, "max_positions": 16}


def laid_out(
    made: dict[str, Any], batch: int, precision: str = "bf16", *, recompute: Any = "none", device: str = "cpu", **more: Any
) -> ParallelModel:
    """With its initial weights, for micro-batches of 2 sequences of 16; ``more``: as ``ParallelModel`` takes it."""
    model = ParallelModel(
        ModelConfig(**made),
        Mesh(Ranks(0, 1, torch.device(device)), Layout()),
        parallel=ParallelConfig(),
        training=TrainingConfig(budget="1 steps", global_batch=batch, micro_batch=2, recompute=recompute),
        sequence_length=16,
        precision=precision,
        **more,
    )
    model.initialize(1)
    return model
