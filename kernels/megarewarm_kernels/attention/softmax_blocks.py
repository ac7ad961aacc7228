"""Causal attention on a CPU in fp32 or fp64, block by block of queries, whose scores and weights stay in the caches.

Forward: scores of a block against all keys that it sees, their softmax, and its product with the values. Backward: scores and
softmax again, then with P the weights and g the gradient of out (all of a block)

    dV += P' g,   dS = P (g V' - sum(P g V')),   dQ = dS K / sqrt(d),   dK += dS' Q / sqrt(d)

PyTorch's attention takes the exponential of a score and its log-sum-exp apart, by a slower function, in blocks of keys too.
In bf16 scores must not be rounded as a product rounds them: blocks.py has another form for it.

Floating-point operations of products for each head, s positions: forward 2 s^2 d, backward 5 s^2 d, and those of half a block
of each row, whose keys come later. Bytes: those of the operands, once for each block of queries that sees them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.operators import define

_SCRATCH = 2**19  # bytes of scores at a time for each thread: with their gradients, about a core's second cache
_POSITIONS = 64  # of a block


def softmax_blocks_attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    """As blocks.blocks_attention, in fp32 or fp64."""
    result: Tensor = _SoftmaxBlocks.apply(query, key, value, first)
    return result


class _SoftmaxBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, value, first)
        result: Tensor = _forward(query, key, value, first)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad, *ctx.saved_tensors), None


def _define_forward(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    """(b, s, n, d), contiguous."""
    out = query.new_empty(query.shape)
    for batches, heads, group in _parts(query, key, first):
        q, k, v = _part(query, batches, heads, group), _part(key, batches, heads, 1), _part(value, batches, heads, 1)
        q = q * (1 / math.sqrt(query.shape[3]))
        found = torch.empty_like(q)
        for rows, keys, hidden in _blocks(first, batches, group, q):
            torch.bmm(_weights(q[:, rows], k[:, keys], hidden), v[:, keys], out=found[:, rows])
        _put(found, out, batches, heads, group)
    return out


def _define_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, contiguous."""
    scale = 1 / math.sqrt(query.shape[3])
    all_found = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    for batches, heads, group in _parts(query, key, first):
        g, q = (_part(x, batches, heads, group) for x in (grad, query))
        k, v = (_part(x, batches, heads, 1) for x in (key, value))
        q = q * scale
        d_query, d_key, d_value = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, hidden in _blocks(first, batches, group, q):
            p = _weights(q[:, rows], k[:, keys], hidden)
            d_value[:, keys].baddbmm_(p.mT, g[:, rows])
            d_p = torch.bmm(g[:, rows], v[:, keys].mT)
            d_scores = torch._softmax_backward_data(d_p, p, 2, p.dtype)
            torch.bmm(d_scores, k[:, keys], out=d_query[:, rows])
            d_key[:, keys].baddbmm_(d_scores.mT, q[:, rows])
        d_query.mul_(scale)
        for found, result, members in zip((d_query, d_key, d_value), all_found, (group, 1, 1), strict=True):
            _put(found, result, batches, heads, members)
    return all_found


def seen_by_a_block(first: Tensor | None, length: int, positions: int) -> int:
    """The most keys that a block of ``positions`` queries sees."""
    if first is None:
        return length
    return min(length, int((torch.arange(length, device=first.device) - first).max()) + positions)


def later(positions: int, group: int, like: Tensor) -> Tensor:
    """(positions x group, positions): -inf where a key comes after the position of a row of queries, else 0."""
    position = torch.arange(positions, device=like.device)
    return _hide(position > position[:, None], group, like)


def unseen(first: Tensor, keys: slice, group: int, like: Tensor) -> Tensor:
    """(heads, positions x group, keys): -inf where a key comes before ``first`` (heads, positions), else 0."""
    return _hide(torch.arange(keys.start, keys.stop, device=first.device) < first[..., None], group, like)


def _hide(where: Tensor, group: int, like: Tensor) -> Tensor:
    return like.new_zeros(where.shape).masked_fill_(where, -math.inf).repeat_interleave(group, -2)


def scores(queries: Tensor, keys: Tensor, hidden: tuple[Tensor, Tensor | None]) -> Tensor:
    """(heads, rows, keys). ``hidden``: of the last keys those that come ``later``, of the first those that are ``unseen``."""
    found = torch.bmm(queries, keys.mT)
    after, before = hidden
    found[..., -after.shape[-1] :].add_(after)
    if before is not None:
        found[..., : before.shape[-1]].add_(before)
    return found


def _weights(queries: Tensor, keys: Tensor, hidden: tuple[Tensor, Tensor | None]) -> Tensor:
    p = scores(queries, keys, hidden)
    return torch.softmax(p, 2, out=p)


def _parts(query: Tensor, key: Tensor, first: Tensor | None) -> Iterator[tuple[slice, slice, int]]:
    """(batch elements, key heads, queries of each key head) that are computed at a time: whole elements, or heads of one."""
    (batch, length, heads, _), key_heads = query.shape, key.shape[2]
    group = heads // key_heads
    row = seen_by_a_block(first, length, _POSITIONS) * query.element_size()
    most = max(1, _SCRATCH * torch.get_num_threads() // (_POSITIONS * group * row))
    elements, members = max(1, most // key_heads), min(most, key_heads)
    for start in range(0, batch, elements):
        for head in range(0, key_heads, members):
            yield slice(start, start + elements), slice(head, head + members), group


def _part(x: Tensor, batches: slice, heads: slice, group: int) -> Tensor:
    """Of (b, s, k group, d) ``heads`` of k: (heads, s group, d), position by position the rows that share a key head. A view
    for a group of one and one batch element."""
    return x[batches].unflatten(2, (-1, group))[:, :, heads].transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _put(part: Tensor, x: Tensor, batches: slice, heads: slice, group: int) -> None:
    """``_part`` the other way."""
    to = x[batches].unflatten(2, (-1, group))[:, :, heads].transpose(1, 2)
    to.copy_(part.view(to.shape))


def _blocks(
    first: Tensor | None, batches: slice, group: int, like: Tensor
) -> Iterator[tuple[slice, slice, tuple[Tensor, Tensor | None]]]:
    """(rows of ``like``, keys that they see, what of these is hidden from whom as ``_weights`` wants it)."""
    length = like.shape[1] // group
    come_later = later(min(_POSITIONS, length), group, like)
    if first is not None and len(first) > 1:
        first = first[batches]
    for begin in range(0, length, _POSITIONS):
        end = min(begin + _POSITIONS, length)
        start, before = 0, None
        if first is not None:
            seen = first[:, begin:end]
            start, last = int(seen[:, 0].min()), int(seen[:, -1].max())
            if last > start:
                before = unseen(seen, slice(start, last), group, like)
                before = before.repeat_interleave(len(like) // len(before), 0) if len(before) > 1 else before
        hidden = come_later[: (end - begin) * group, : end - begin], before
        yield slice(begin * group, end * group), slice(start, end), hidden


def _shape_forward(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    return query.new_empty(query.shape)


def _shape_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_forward = define("softmax_blocks", _define_forward, shapes=_shape_forward)
_backward = define("softmax_blocks_backward", _define_backward, shapes=_shape_backward)
