"""Causal attention with rotary positions on the fused projection, without the scores in memory and deterministic.

out = softmax(q k' / sqrt(d)) v along the keys that a query may see, the softmax in one walk along them with a running maximum
(Dao et al. 2022, arXiv 2205.14135, algorithm 1; rows in parallel and base 2 as Dao 2023, arXiv 2307.08691). The gradients
follow from out and the logarithm of the sum of exponentials (there, section 3.1.2): p = exp(q k' / sqrt(d) - lse),
ds = p (dout v' - sum(out dout)), dq = ds k / sqrt(d), dk = ds' q / sqrt(d), dv = p' dout. One kernel has the queries' and one
the keys' and values', so nothing is added atomically, at the price of seven matrix products where five would do.

Grouped queries (arXiv 2305.13245): a program of the keys' gradients adds up those of its group's queries, in their order. A
sliding window of w is a document's beginning that moves along: position i sees from i - w + 1 on.

Bytes moved, bf16, n query and k key heads of d, for each token: forward at least 4 (n + k) d (queries, keys and values read,
out written) and 4 n of statistics; backward 8 (n + k) d and 12 n: out and its gradient read, and dq, dk and dv written where
the gradient of the projection is to lie, with no copy. Rotary positions add those of rotary.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from megarewarm_kernels.attention import rotary
from megarewarm_kernels.layer.given_bias import column_sums
from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact

MOST_CHANNELS = 256


def flash_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    group: int = 1,
    window: int | None = None,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Rotary positions and causal attention, within documents where ``starts`` says so.

    Args:
        qkv: (b, s, k x (group + 2) x d), contiguous, a projection's output: key head by key head its queries, its key and its
            value. It is consumed: rotated in place, and kept for the backward pass. Nobody may have saved it or use it
            afterwards.
        cos, sin: (s, r / 2) or (b, s, r / 2), fp32 (fp64 for fp64), r <= d; see ``rotate_``. They get no gradients.
        head_dim: d. The kernels take up to 256 channels; more, and fp64, are computed by the definition.
        group: queries of each key head; n = k x group.
        window: how many positions each one sees, itself included; None for all earlier ones.
        starts: (b, s) int32, at each position the first one of its document, or None for one document. Position i attends
            to j where starts[i] <= j <= i. Must not decrease along s, and starts[i] <= i; values are not checked.
        bias: (k x (group + 2) x d,), which qkv holds already but without a derivative. It gets its gradient here: the sum of
            qkv's over all tokens, in fp32. None: there is none, or it has a derivative.

    Returns:
        (b, s, n x d). Raises ValueError on wrong shapes or dtypes and on a leaf that asks for gradients.
    """
    cos, sin = check(qkv, cos, sin, head_dim, group, window, starts, bias)
    first = first_seen(qkv.shape[1], window, starts, qkv.device)
    first = None if first is None else first.expand(qkv.shape[:2])
    result: Tensor = _FlashAttention.apply(qkv, cos, sin, first, bias, head_dim, group)
    return result


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    group: int = 1,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """The definition of ``flash_attention`` in plain PyTorch, with all scores in memory. Leaves ``qkv`` alone."""
    cos, sin = (table.flatten(0, -2) for table in (cos, sin))
    rotated = qkv
    if cos.shape[1]:
        rotated = rotary.reference(qkv.flatten(0, 1), cos, sin, head_dim=head_dim, group=group).view(qkv.shape)
    query, key, value = _heads(rotated, head_dim, group)
    out = _scores(query, key, first_seen(qkv.shape[1], window, starts, qkv.device)).softmax(-1) @ value
    return _joined(out).to(qkv.dtype)


def check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    group: int,
    window: int | None,
    starts: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin`` as ``rotate_`` takes them. Raises ValueError where the arguments of attention don't fit."""
    if qkv.dim() != 3 or not qkv.is_contiguous():
        found = f"{tuple(qkv.shape)} with strides {qkv.stride()}"
        raise ValueError(f"need qkv (b, s, heads x {group + 2} x {head_dim}), contiguous, got {found}")
    b, s = qkv.shape[:2]
    if cos.shape[:-1] not in ((s,), (b, s)):
        raise ValueError(f"cos and sin are ({s}, r / 2) or ({b}, {s}, r / 2), got {tuple(cos.shape)}")
    flat_cos, flat_sin = (table.flatten(0, -2) for table in (cos, sin))
    rotary.check(qkv.view(-1, qkv.shape[2]), flat_cos, flat_sin, head_dim, group)
    if window is not None and window < 1:
        raise ValueError(f"the window holds at least 1 position, got {window}")
    if starts is not None and (starts.shape != qkv.shape[:2] or starts.dtype != torch.int32):
        raise ValueError(f"starts is {tuple(qkv.shape[:2])} int32, got {tuple(starts.shape)} {starts.dtype}")
    if bias is not None and bias.shape != qkv.shape[2:]:
        raise ValueError(f"bias is {tuple(qkv.shape[2:])}, got {tuple(bias.shape)}")
    check_floats(bias=bias)
    if qkv.requires_grad and qkv.is_leaf and torch.is_grad_enabled():
        raise ValueError("qkv is consumed, so a leaf that asks for gradients can't be given: pass a projection's output")
    return flat_cos, flat_sin


def first_seen(length: int, window: int | None, starts: Tensor | None, device: torch.device) -> Tensor | None:
    """(b, s) int32, the first position that each one of a sequence sees; (1, s) where ``starts`` is None; None where that is
    the sequence's first."""
    if window is None or window >= length:
        return starts
    moving = torch.arange(1 - window, length - window + 1, dtype=torch.int32, device=device).clamp_(min=0)
    return moving[None] if starts is None else torch.maximum(starts, moving)


def visible(length: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """(1 or b, 1, s, s), true where a query (a row) may see a key."""
    position = torch.arange(length, device=device)
    mask = (position[:, None] >= position)[None, None]
    return mask if starts is None else mask & (starts[:, None, :, None] <= position)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        starts: Tensor | None,
        bias: Tensor | None,
        head_dim: int,
        group: int,
    ) -> Tensor:
        rotary.consume(qkv, cos, sin, head_dim, group)
        out, lse = _forward(qkv, starts, head_dim, group)
        ctx.save_for_backward(qkv, out, lse, cos, sin, starts, bias)
        ctx.head_dim, ctx.group = head_dim, group
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, cos, sin, starts, bias = ctx.saved_tensors
        dqkv = _backward(grad, qkv, out, lse, starts, ctx.head_dim, ctx.group)
        rotary.apply_rotary(dqkv.view(-1, dqkv.shape[2]), cos, sin, ctx.head_dim, ctx.group, True)
        return dqkv, None, None, None, column_sums(dqkv, bias) if ctx.needs_input_grad[4] else None, None, None


def _heads(qkv: Tensor, head_dim: int, group: int) -> tuple[Tensor, ...]:
    """Queries (b, k, group, s, d), keys and values (b, k, 1, s, d), in the dtype in which they are computed."""
    heads = qkv.shape[2] // ((group + 2) * head_dim)
    wide = qkv.to(exact(qkv.dtype)).view(*qkv.shape[:2], heads, group + 2, head_dim)
    return tuple(part.permute(0, 2, 3, 1, 4) for part in wide.split([group, 1, 1], 3))


def _scores(query: Tensor, key: Tensor, starts: Tensor | None) -> Tensor:
    """(b, k, group, s, s)."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~visible(query.shape[-2], starts, query.device).unsqueeze(1), -math.inf)


def _joined(heads: Tensor) -> Tensor:
    """(b, k, group, s, d) to (b, s, k x group x d)."""
    return heads.permute(0, 3, 1, 2, 4).flatten(2)


def _define_forward(qkv: Tensor, starts: Tensor | None, head_dim: int, group: int) -> tuple[Tensor, Tensor]:
    query, key, value = _heads(qkv, head_dim, group)
    scores = _scores(query, key, starts)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ value
    return _joined(out).to(qkv.dtype).contiguous(), lse.flatten(1, 2)


def _define_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, head_dim: int, group: int
) -> Tensor:
    query, key, value = _heads(qkv, head_dim, group)
    apart = lambda x: x.to(query.dtype).view(*x.shape[:2], *query.shape[1:3], head_dim).permute(0, 2, 3, 1, 4)  # noqa: E731
    wide, out_heads = apart(grad), apart(out)
    p = (_scores(query, key, starts) - lse.view(query.shape[:-1])[..., None]).exp()
    ds = p * (wide @ value.transpose(-2, -1) - (wide * out_heads).sum(-1, keepdim=True)) / math.sqrt(head_dim)
    over_group = lambda x: x.sum(2, keepdim=True)  # noqa: E731
    parts = (ds @ key, over_group(ds.transpose(-2, -1) @ query), over_group(p.transpose(-2, -1) @ wide))
    return _joined(torch.cat(parts, 2)).to(qkv.dtype)


def _shape_forward(qkv: Tensor, starts: Tensor | None, head_dim: int, group: int) -> tuple[Tensor, Tensor]:
    batch, length, row = qkv.shape
    heads = row // ((group + 2) * head_dim) * group
    lse = qkv.new_empty((batch, heads, length), dtype=exact(qkv.dtype))
    return qkv.new_empty((batch, length, heads * head_dim)), lse


def _shape_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, head_dim: int, group: int
) -> Tensor:
    return qkv.new_empty(qkv.shape)


if HAS_TRITON:
    import triton

    from megarewarm_kernels.attention import flash_kernels as kernels
    from megarewarm_kernels.attention.flash_blocks import Blocks, architecture, blocks_of, width_of

    def _launch(
        kernel: Any, name: str, pointers: list[Tensor], qkv: Tensor, starts: Tensor | None, head_dim: int, group: int
    ) -> None:
        batch, length, row = qkv.shape
        key_heads = row // ((group + 2) * head_dim)
        blocks: Blocks = blocks_of(name, head_dim, qkv.dtype, architecture(qkv.device), starts is not None, group)
        rows, heads = (blocks.keys, key_heads) if name == "keys" else (blocks.queries, key_heads * group)
        kernel[(triton.cdiv(length, rows) * batch * heads,)](
            *pointers,
            length,
            key_heads * group,
            qkv.stride(0),
            qkv.stride(1),
            head_dim**-0.5,
            DOCUMENTS=starts is not None,
            GROUP=group,
            D=head_dim,
            WIDTH=width_of(head_dim),
            QUERIES=blocks.queries,
            KEYS=blocks.keys,
            PRECISION=blocks.precision,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **LAUNCH,
        )

    def _kernel_forward(qkv: Tensor, starts: Tensor | None, head_dim: int, group: int) -> tuple[Tensor, Tensor]:
        if qkv.dtype == torch.float64 or head_dim > MOST_CHANNELS:
            return _define_forward(qkv, starts, head_dim, group)
        out, lse = _shape_forward(qkv, starts, head_dim, group)
        if out.numel():
            # without documents no kernel reads starts: any pointer will do
            begins = lse if starts is None else starts.contiguous()
            _launch(kernels.attention_forward, "forward", [qkv, begins, out, lse], qkv, starts, head_dim, group)
        return out, lse

    def _kernel_backward(
        grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, head_dim: int, group: int
    ) -> Tensor:
        if qkv.dtype == torch.float64 or head_dim > MOST_CHANNELS:
            return _define_backward(grad, qkv, out, lse, starts, head_dim, group)
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        if dqkv.numel():
            grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
            delta = torch.empty_like(lse)
            begins, ends = lse, lse
            if starts is not None:
                begins = starts.contiguous()
                position = torch.arange(qkv.shape[1], dtype=torch.int32, device=qkv.device).expand_as(begins).contiguous()
                ends = torch.searchsorted(begins, position, right=True, out_int32=True)
            pointers = [qkv, begins, out, grad, lse, delta, dqkv]
            _launch(kernels.attention_backward_queries, "queries", pointers, qkv, starts, head_dim, group)
            pointers = [qkv, begins, ends, grad, lse, delta, dqkv]
            _launch(kernels.attention_backward_keys, "keys", pointers, qkv, starts, head_dim, group)
        return dqkv
else:
    _kernel_forward = _kernel_backward = None  # type: ignore[assignment]

_forward = define("flash_attention", _define_forward, shapes=_shape_forward, kernel=_kernel_forward)
_backward = define("flash_attention_backward", _define_backward, shapes=_shape_backward, kernel=_kernel_backward)


def _operations(products: int, qkv: Sequence[int], group: int) -> int:
    """Of matrix products over half of the scores, the causal ones, counted as one document."""
    batch, length, row = qkv
    return products * batch * length * length * (row // (group + 2) * group)


@register_flop_formula(torch.ops.megarewarm.flash_attention)
def _operations_forward(qkv: Sequence[int], starts: Any, head_dim: int, group: int, **named: Any) -> int:
    return _operations(2, qkv, group)


@register_flop_formula(torch.ops.megarewarm.flash_attention_backward)
def _operations_backward(
    grad: Sequence[int], qkv: Sequence[int], out: Any, lse: Any, starts: Any, head_dim: int, group: int, **named: Any
) -> int:
    return _operations(5, qkv, group)
