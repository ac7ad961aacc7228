"""Causal attention on a CPU by batched matrix products, block by block of queries or keys, whose scores stay in the caches.

PyTorch's attention on a CPU multiplies small pieces by a BLAS; oneDNN's products in bf16 are several times as fast where the
CPU has AVX512_BF16. Forward: a block of queries against all keys that they see, scores and softmax in fp32. Backward (the
formulas in flash_attention.py): a block of keys against all queries that see them, in bf16. oneDNN rounds what a product gives
to bf16, by 2^-9 of it, so the products are made to give small numbers (fp32 needs none of this: softmax_blocks.py). Rows of
queries get three more columns, against ones of the keys, which hold their log-sum-exp (lse): q k' / sqrt(d) - lse is the log of
a weight, which is near 0 where it counts. Rows of out's gradient get sum(out dout) in the same way, so the gradient of the
weights comes out with it taken off.

Bytes of scores beside the products' operands, s positions, for each of n heads: s^2 / 2 scores, forward 4 written and read by
some 5 passes, then 2 for the weights in bf16; backward 2 for the weights and 2 for their gradient, 4 passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.attention.softmax_blocks import later, scores, seen_by_a_block, softmax_blocks_attention, unseen
from megarewarm_kernels.operators import define, exact

_SCRATCH = 2**21  # bytes of scores at a time
_LEAST, _MOST = 64, 256  # positions of a block
FP32_LENGTHS = 256, 384, 2048
"""Of rows of fp32 that are faster by blocks: with documents or a window from the first on, else from the second to the third,
after which both are equal."""

_TINY = 1e-30  # below it the log of a softmax in fp32 has lost digits


def blocks_attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(d)) v of each position along the keys from ``first`` to itself.

    Args:
        query: (b, s, n, d), bf16, fp32 or fp64, any strides.
        key, value: (b, s, k, d), n a multiple of k: that many queries in a row share a key head.
        first: (b or 1, s) int32, the first position that each one sees; it must not decrease along s. None: 0.

    Returns:
        (b, s, n, d), contiguous. Weights and their gradients are rounded to query's dtype before the products with them.
    """
    if query.dtype != torch.bfloat16:
        return softmax_blocks_attention(query, key, value, first)
    result: Tensor = _Blocks.apply(query, key, value, first)
    return result


def is_faster(dtype: torch.dtype, length: int, partly: bool) -> bool:
    """Whether rows of ``length`` positions have been measured to be faster this way than by PyTorch's attention.

    In bf16: on CPUs with AVX512_BF16 and without AMX, which has other products, for which PyTorch packs its operands. In fp32:
    with MKL and up to two threads. ``partly``: there are documents or a window, for which PyTorch computes all scores.
    """
    if dtype == torch.bfloat16:
        found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("avx512_bf16") and not found.get("amx_bf16") and torch.backends.mkldnn.enabled)
    measured = dtype == torch.float32 and torch.backends.mkl.is_available() and torch.get_num_threads() <= 2
    least, least_whole, most_whole = FP32_LENGTHS
    return measured and (length >= least if partly else least_whole <= length < most_whole)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
        out, lse = _forward(query, key, value, first)
        ctx.save_for_backward(query, key, value, first, out, lse)
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, first, out, lse = ctx.saved_tensors
        return *_backward(grad, out, lse, query, key, value, first), None


def _define_forward(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out (b, s, n, d), the logs of the sums of exponentials (b k, s n / k) in the exact dtype)."""
    (batch, length, heads, channels), kind = query.shape, exact(query.dtype)
    group, scale = heads // key.shape[2], 1 / math.sqrt(channels)
    queries, keys, values = (_by_key_head(x, key.shape[2]) for x in (query, key, value))
    seen = None if first is None else _of_key_heads(first, batch, key.shape[2])
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2], dtype=kind)
    size = _positions(length, first)
    longest = seen_by_a_block(first, length, 2 * size)
    come_later = later(size, group, lse)
    for some in _heads(len(queries), size * group * longest * kind.itemsize):
        scaled, wide = queries[some].to(kind, copy=True).mul_(scale), keys[some].to(kind)
        for begin in range(0, length, size):
            end = min(begin + size, length)
            rows = slice(begin * group, end * group)
            start, before = 0, None
            if seen is not None:
                start, last = int(seen[some, begin].min()) // size * size, int(seen[some, end - 1].max())
                before = unseen(seen[some, begin:end], slice(start, last), group, lse) if last > start else None
            hidden = come_later[: (end - begin) * group, : end - begin], before
            operands = scaled[:, rows], wide[:, start:end], hidden
            p = scores(*operands)
            # A position sees itself, so lse follows from its own score and weight, without a pass over the others.
            own = p.view(len(p), end - begin, group, -1)[..., begin - start :].diagonal(dim1=1, dim2=3)
            score = own.clone()
            torch.softmax(p, 2, out=p)
            found = (score - own.log()).mT.flatten(1)
            lse[some, rows] = found if own.min() > _TINY else scores(*operands).logsumexp(2)
            torch.bmm(p.to(query.dtype), values[some, start:end], out=out[some, rows])
    return _by_position(out, batch, group).contiguous(), lse


def _define_backward(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. Scores have a row for each key here."""
    (batch, length, heads, channels), dtype, kind = query.shape, query.dtype, exact(query.dtype)
    group, scale = heads // key.shape[2], 1 / math.sqrt(channels)
    queries, keys, values, grads = (_by_key_head(x, key.shape[2]) for x in (query, key, value, grad))
    seen = None if first is None else _of_key_heads(first, batch, key.shape[2])
    delta = _by_key_head((grad.to(kind) * out.to(kind)).sum(-1, keepdim=True), key.shape[2])[..., 0]
    # Weights times the root of how many keys are seen, a power of 2, are on both sides of 1, where their logs are small.
    number = torch.arange(1, length + 1, device=query.device) - (0 if seen is None else seen)
    power = number.log2().div_(2).round_().to(kind).repeat_interleave(group, -1)
    less = torch.exp2(-power)
    queries = _with_columns(queries, (power * math.log(2) - lse) / scale)
    grads = _with_columns(grads * less.to(dtype)[..., None], -delta * less)
    keys, values = _with_columns(keys, None), _with_columns(values, None)
    d_query = queries.new_empty((*queries.shape[:2], channels))
    d_key, d_value = (keys.new_empty((*keys.shape[:2], channels)) for _ in range(2))
    size = _positions(length, first)
    longest = seen_by_a_block(first, length, 2 * size)
    come_later, nothing = later(size, group, queries).T.contiguous(), queries.new_empty(())
    for some in _heads(len(queries), size * group * longest * dtype.itemsize):
        q, k, v, g = queries[some], keys[some], values[some], grads[some]
        total = q.new_zeros((*q.shape[:2], channels), dtype=kind)
        for begin in range(0, length, size):
            end = min(begin + size, length)
            last = length if seen is None else min(-(-int((seen[some] < end).sum(1).max()) // size) * size, length)
            rows, here = slice(begin * group, last * group), slice(begin, end)
            p = torch.baddbmm(nothing, k[:, here], q[:, rows].mT, beta=0, alpha=scale)
            p[..., : (end - begin) * group].add_(come_later[: end - begin, : (end - begin) * group])
            if seen is not None and (known := int((seen[some] <= begin).sum(1).min())) < last:
                p[..., (known - begin) * group :].add_(unseen(seen[some, known:last], here, group, queries).mT)
            p.exp_()
            torch.bmm(p, g[:, rows, :channels], out=d_value[some, here])
            p.mul_(torch.bmm(v[:, here], g[:, rows].mT))
            torch.baddbmm(nothing, p, q[:, rows, :channels], beta=0, alpha=scale, out=d_key[some, here])
            total[:, rows] += torch.bmm(p.mT, k[:, here, :channels])
        d_query[some] = total.mul_(scale)
    return _by_position(d_query, batch, group), _by_position(d_key, batch, 1), _by_position(d_value, batch, 1)


def _positions(length: int, first: Tensor | None) -> int:
    """Positions of a block, a power of 2, so that there are few: for each shape oneDNN makes code, half a MiB of it."""
    if first is not None:  # as for one document in which a position sees as many on average
        length = int(2 * (torch.arange(1, length + 1, device=first.device) - first).double().mean())
    return int(min(_MOST, max(_LEAST, 2 ** (length.bit_length() - 3))))


def _heads(count: int, bytes_each: int) -> Iterator[slice]:
    """Key heads that are computed at a time, of ``count`` whose scores take ``bytes_each`` each: always the same number."""
    size = next(size for size in range(max(1, min(count, _SCRATCH // bytes_each)), 0, -1) if count % size == 0)
    for start in range(0, count, size):
        yield slice(start, start + size)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """(b, s, n, d) to (b k, s n / k, d): position by position the rows that share a key head."""
    return x.unflatten(2, (key_heads, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _by_position(x: Tensor, batch: int, group: int) -> Tensor:
    """Back to (b, s, n, d)."""
    return x.unflatten(0, (batch, -1)).unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)


def _of_key_heads(first: Tensor, batch: int, key_heads: int) -> Tensor:
    """(b or 1, s) to (b k, s)."""
    return first.expand(batch, -1).repeat_interleave(key_heads, 0)


def _with_columns(x: Tensor, numbers: Tensor | None) -> Tensor:
    """(m, r, d) with three more columns: ``numbers`` (m or 1, r) as a sum of three in x's dtype, or ones."""
    columns = x.new_ones((*x.shape[:2], 3))
    if numbers is not None:
        for column in columns.unbind(-1):
            column.copy_(numbers)
            numbers = numbers - column
    return torch.cat([x, columns], -1)


def _shape_forward(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    size = batch * key.shape[2], length * (heads // key.shape[2])
    return query.new_empty(query.shape), query.new_empty(size, dtype=exact(query.dtype))


def _shape_backward(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, _, heads, _), key_heads = query.shape, key.shape[2]
    groups = heads // key_heads, 1, 1
    found = (x.new_empty(_by_key_head(x, key_heads).shape) for x in (query, key, value))
    one, two, three = (_by_position(x, batch, group) for x, group in zip(found, groups, strict=True))
    return one, two, three


_forward = define("blocks_attention", _define_forward, shapes=_shape_forward)
_backward = define("blocks_attention_backward", _define_backward, shapes=_shape_backward)
