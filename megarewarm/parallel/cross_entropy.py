"""Cross entropy of a laid out model, whose vocabulary tensor ranks may share."""

from __future__ import annotations

from typing import Any

from megarewarm_kernels import linear_cross_entropy, sharded_linear_cross_entropy
from torch import Tensor

from megarewarm.parallel.collectives import Group


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    group: Group | None,
    vocab_size: int,
    memory: int,
    kernel: str,
    low: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss in nats summed, number of targets) of states ``hidden`` (b, s, h) after the last norm, which each rank of ``group``
    has whole; ``targets`` (b, s), ``head`` (v, h) this rank's rows, ``low`` its copy in the dtype of the products if there is
    one. ``memory``: bytes of logits at a time. ``upstream``: see ``linear_cross_entropy``."""
    states, wanted = hidden.flatten(0, 1), targets.flatten()
    settings: dict[str, Any] = {"memory_budget": memory, "kernel": kernel, "low": low, "upstream": upstream}
    if group is None:
        return linear_cross_entropy(states, head, wanted, valid_rows=vocab_size, **settings)
    return sharded_linear_cross_entropy(states, head, wanted, group=group, vocab_size=vocab_size, **settings)
