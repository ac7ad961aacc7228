"""``linear_distillation`` over a vocabulary that is divided between ranks, without gathering logits.

Each rank has both models' logits of its rows. What the ranks tell each other about a token is six numbers, in one all-gather:
of each model the largest logit, the sum of exponentials below it, and the target's logit where it lives. The divergence is a
sum over rows, which they add up once per call.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megarewarm_kernels.loss.linear_distillation import Distillation
from megarewarm_kernels.loss.logit_passes import define_statistics, log_terms, loss_of, place_of
from megarewarm_kernels.loss.logits_in_place import even_chunk, gathered
from megarewarm_kernels.loss.sharded_linear_cross_entropy import check_shards
from megarewarm_kernels.operators import check_floats, exact
from megarewarm_kernels.products import accumulate

MIB = 2**20


def sharded_linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    share: float,
    group: dist.ProcessGroup,
    vocab_size: int,
    teacher_rows: int | None = None,
    ignore_index: int = -100,
    memory_budget: int = 64 * MIB,
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_distillation`` of heads whose rows are divided alike between the T ranks of ``group``.

    Args:
        hidden: (t, h), equal on all ranks, any floating dtype. weight: (ceil(v / T), h), the rows from rank * ceil(v / T) on;
            those from ``vocab_size`` on are padding, of any finite numbers.
        targets: (t,) int64, equal on all ranks, each below ``vocab_size`` or equal to ``ignore_index``.
        teacher_hidden: (t, g), equal on all ranks; teacher_weight: (ceil(v / T), g), the same rows of the teacher's head.
        share: weight of the divergence. group: the ranks; each calls this function with the same sizes and settings.
        vocab_size: v without padding. teacher_rows: ids that the teacher knows, at most ``vocab_size``; None: all.
        memory_budget: bytes that the logits of a chunk may take, at least one token's worth.

    Returns:
        total: scalar, parts: (2,), the cross entropy and the divergence, both in fp32 (fp64 for fp64 inputs), count: tokens
        that have a target, int64; equal on all ranks. The gradient of ``hidden`` is this rank's part of a sum over the group.
        Gradients are computed in the forward pass. Raises ValueError on wrong shapes or dtypes.
    """
    check_shards(hidden, weight, targets, group, vocab_size)
    wanted = (hidden.shape[0], teacher_weight.shape[1]), (weight.shape[0], teacher_weight.shape[1])
    if (tuple(teacher_hidden.shape), tuple(teacher_weight.shape)) != wanted:
        raise ValueError(
            f"need the teacher's hidden ({hidden.shape[0]}, g) and weight ({weight.shape[0]}, g), got "
            f"{tuple(teacher_hidden.shape)} and {tuple(teacher_weight.shape)}"
        )
    known = vocab_size if teacher_rows is None else teacher_rows
    if not 0 < known <= vocab_size:
        raise ValueError(f"teacher_rows {known} does not lie in 1..{vocab_size}")
    check_floats(hidden=hidden, weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
    device, rows = hidden.device.type, weight.shape[0]
    first = group.rank() * rows
    valid, taught = (max(0, min(rows, ids - first)) for ids in (vocab_size, known))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # all ranks must cut alike, so the size of a chunk comes from the shape that is the same everywhere
    most = max(1, memory_budget // (rows * (2 * exact(dtype).itemsize + dtype.itemsize)))
    tracked = torch.is_grad_enabled()
    needs = tracked and hidden.requires_grad, tracked and weight.requires_grad
    settings = first, valid, taught, ignore_index, share, even_chunk(len(hidden), most), dtype, group, *needs
    tensors = hidden, weight, targets, teacher_hidden.detach(), teacher_weight.detach()
    total, parts = Distillation.apply(_compute, share, settings, *tensors)
    return total, parts, (targets != ignore_index).sum()


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    first: int,
    valid: int,
    taught: int,
    ignore_index: int,
    share: float,
    chunk: int,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses (2,), the gradients of ``hidden`` (this rank's part) and of ``weight``, empty where not needed.

    The first ``valid`` rows of ``weight`` are classes ``first`` and following, of which the teacher knows ``taught``."""
    kind = exact(dtype)
    head, wanted_head = weight[:valid].to(dtype), teacher_weight[:taught].to(dtype)
    parts = hidden.new_zeros(2, dtype=torch.float64)  # however many chunks there are
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=kind)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        target, ignored = targets[part], targets[part] == ignore_index
        masked = ignored[:, None]
        # a masked row may hold anything
        x, y = (states[part].to(dtype).masked_fill(masked, 0) for states in (hidden, teacher_hidden))
        logits, wanted = torch.mm(x, head.t()).to(kind), torch.mm(y, wanted_head.t()).to(kind)
        both = ((logits, valid), (wanted, taught))
        found = torch.cat([define_statistics(z, target, first, n, ignore_index) for z, n in both], 1)
        mine, theirs = gathered(found, group).split(len(x), 1)
        log_sum, log_target = log_terms(mine)
        parts[0] += loss_of(log_sum, log_target, ignored, 0.0)
        log_p, log_q = logits.sub_(log_sum[:, None]), wanted.sub_(log_terms(theirs)[0][:, None])
        q = log_q.exp()
        parts[1] += log_q.sub_(log_p[:, :taught]).mul_(q).sum(1).masked_fill(ignored, 0).sum()
        if not valid or not (need_hidden or need_weight):
            continue
        dz = log_p.exp_().mul_(1 + share)
        dz[:, :taught].sub_(q, alpha=share)
        local, here = place_of(target, first, valid, ignore_index)
        dz.scatter_add_(1, local[:, None], -here[:, None].to(kind))
        dz = dz.masked_fill_(masked, 0).to(dtype)
        if need_hidden:
            torch.mm(dz, head, out=grad_hidden[part])
        if need_weight:
            accumulate(grad_weight[:valid], dz, x, first=start == 0)
    dist.all_reduce(parts[1:], group=group)
    return parts.to(kind), grad_hidden, grad_weight
