"""The gradients of queries, keys and values, turned back and brought together as that of the projection, with its bias's.

Implementations of attention write three tensors, where the backward pass of the projection wants one in the layout of
rotary.py, before the rotation: the derivative of a rotation is the rotation back. The gradient of a bias is the sum over all
tokens of what is written, taken in fp32 before it is rounded.

Bytes moved, bf16, n query and k key heads of d: 4 (n + 2 k) d for each token (each gradient read and written once), the tables,
4 r for each token and four heads, r rotary channels, and partial sums of 8 (n + 2 k) d for each 256 tokens. Concatenation,
rotation in place and column sum move 6 (n + 2 k) d + 4 (n + k) r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarewarm_kernels.attention.rotary import apply_rotary
from megarewarm_kernels.layer.given_bias import column_sums
from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, define
from megarewarm_kernels.part_sums import sums_of

_ELEMENTS = 2048  # of a tile: 16 for each thread
_TOKENS = 256  # that a program walks along
_WARPS = 4
_MOST_CHANNELS = 1024


def _define(
    queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, group: int
) -> tuple[Tensor, Tensor]:
    """The gradient of the projection (b, s, k x (group + 2) x d), and that of ``bias``, an empty tensor without one.

    ``queries``: (b, s, n, d) of any strides, ``keys`` and ``values`` (b, s, k, d), gradients of what ``rotate_`` has made;
    ``cos``, ``sin``: (s, r / 2) or (b x s, r / 2).
    """
    parts = [queries.unflatten(2, (-1, group)), keys.unsqueeze(3), values.unsqueeze(3)]
    joined = torch.cat(parts, 3).flatten(2)
    apply_rotary(joined.view(-1, joined.shape[2]), cos, sin, queries.shape[3], group, True)
    return joined, joined.new_empty(0) if bias is None else column_sums(joined, bias)


def _shape(
    queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, group: int
) -> tuple[Tensor, Tensor]:
    batch, length, heads, head_dim = keys.shape
    joined = queries.new_empty((batch, length, heads * (group + 2) * head_dim))
    return joined, queries.new_empty(0) if bias is None else bias.new_empty(bias.shape)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.operators import PREFETCH

    @triton.jit
    def walk_heads(  # type: ignore[no-untyped-def]
        grad_ptr,
        cos_ptr,
        sin_ptr,
        joined_ptr,
        partial_ptr,
        begin,
        end,
        first_head,
        heads,
        position_stride,
        head_stride,
        row,
        D: tl.constexpr,
        HALF: tl.constexpr,
        WIDTH: tl.constexpr,
        REST: tl.constexpr,
        MEMBERS: tl.constexpr,
        GROUP: tl.constexpr,
        PLACE: tl.constexpr,
        HEADS: tl.constexpr,
        TOKENS: tl.constexpr,
        SUMS: tl.constexpr,
    ):
        """HEADS heads of the positions from ``begin`` to ``end``, TOKENS at a time. Of each key head's vectors of the
        projection these are MEMBERS, from PLACE on. HALF, WIDTH: half of the channels that are turned, and a power of two
        that holds them; REST: one that holds the others."""
        vector = tl.arange(0, HEADS * TOKENS)
        head = first_head + vector % HEADS
        column = head // MEMBERS * ((GROUP + 2) * D) + (head % MEMBERS + PLACE) * D
        plane = tl.arange(0, WIDTH)
        channel = tl.arange(0, REST)
        first_sum = tl.zeros((HEADS * TOKENS, WIDTH), tl.float32)
        second_sum = tl.zeros((HEADS * TOKENS, WIDTH), tl.float32)
        rest_sum = tl.zeros((HEADS * TOKENS, REST), tl.float32)
        kind = joined_ptr.dtype.element_ty
        for start in tl.range(begin, end, TOKENS, num_stages=PREFETCH):
            position = start + vector // HEADS
            there = (position < end) & (head < heads)
            # offsets may pass 2^31
            at = position.to(tl.int64) * position_stride + head.to(tl.int64) * head_stride
            to = position.to(tl.int64) * row + column
            if HALF > 0:
                inside = there[:, None] & (plane < HALF)[None, :]
                angle = position.to(tl.int64)[:, None] * HALF + plane[None, :]
                cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
                sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
                from_ptr = grad_ptr + at[:, None] + plane[None, :]
                one = tl.load(from_ptr, mask=inside, other=0.0).to(tl.float32)
                two = tl.load(from_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
                first = one * cos + two * sin
                second = two * cos - one * sin
                to_ptr = joined_ptr + to[:, None] + plane[None, :]
                tl.store(to_ptr, first.to(kind), mask=inside)
                tl.store(to_ptr + HALF, second.to(kind), mask=inside)
                if SUMS:
                    first_sum += first
                    second_sum += second
            if 2 * HALF < D:
                inside = there[:, None] & (channel < D - 2 * HALF)[None, :]
                rest = tl.load(grad_ptr + 2 * HALF + at[:, None] + channel[None, :], mask=inside, other=0.0)
                tl.store(joined_ptr + 2 * HALF + to[:, None] + channel[None, :], rest, mask=inside)
                if SUMS:
                    rest_sum += rest.to(tl.float32)
        if SUMS:
            head = first_head + tl.arange(0, HEADS)
            column = head // MEMBERS * ((GROUP + 2) * D) + (head % MEMBERS + PLACE) * D
            if HALF > 0:
                inside = (head < heads)[:, None] & (plane < HALF)[None, :]
                to_ptr = partial_ptr + column[:, None] + plane[None, :]
                tl.store(to_ptr, tl.sum(first_sum.reshape(TOKENS, HEADS, WIDTH), axis=0), mask=inside)
                tl.store(to_ptr + HALF, tl.sum(second_sum.reshape(TOKENS, HEADS, WIDTH), axis=0), mask=inside)
            if 2 * HALF < D:
                inside = (head < heads)[:, None] & (channel < D - 2 * HALF)[None, :]
                to_ptr = partial_ptr + 2 * HALF + column[:, None] + channel[None, :]
                tl.store(to_ptr, tl.sum(rest_sum.reshape(TOKENS, HEADS, REST), axis=0), mask=inside)

    @triton.jit
    def join_gradients(  # type: ignore[no-untyped-def]
        queries_ptr,
        keys_ptr,
        values_ptr,
        cos_ptr,
        sin_ptr,
        joined_ptr,
        partial_ptr,
        length,
        key_heads,
        parts,
        each,
        queries_batch,
        queries_position,
        queries_head,
        keys_batch,
        keys_position,
        keys_head,
        values_batch,
        values_position,
        values_head,
        tables_batch,
        D: tl.constexpr,
        HALF: tl.constexpr,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        REST: tl.constexpr,
        WHOLE: tl.constexpr,
        HEADS: tl.constexpr,
        TOKENS: tl.constexpr,
        SUMS: tl.constexpr,
    ):
        """A program has HEADS heads of ``each`` positions of a sequence; ``parts`` programs have all of them."""
        query_tiles = tl.cdiv(key_heads * GROUP, HEADS)
        key_tiles = tl.cdiv(key_heads, HEADS)
        tiles = query_tiles + 2 * key_tiles
        tile = tl.program_id(0) % tiles
        walk = (tl.program_id(0) // tiles).to(tl.int64)
        batch = walk // parts
        begin = (walk % parts).to(tl.int32) * each
        end = min(begin + each, length)
        row = key_heads * (GROUP + 2) * D
        cos_ptr += batch * tables_batch
        sin_ptr += batch * tables_batch
        joined_ptr += batch * length * row
        partial_ptr += walk * row
        if tile < query_tiles:
            walk_heads(
                queries_ptr + batch * queries_batch, cos_ptr, sin_ptr, joined_ptr, partial_ptr, begin, end,
                tile * HEADS, key_heads * GROUP, queries_position, queries_head, row,
                D, HALF, WIDTH, REST, GROUP, GROUP, 0, HEADS, TOKENS, SUMS,
            )  # fmt: skip
        elif tile < query_tiles + key_tiles:
            walk_heads(
                keys_ptr + batch * keys_batch, cos_ptr, sin_ptr, joined_ptr, partial_ptr, begin, end,
                (tile - query_tiles) * HEADS, key_heads, keys_position, keys_head, row,
                D, HALF, WIDTH, REST, 1, GROUP, GROUP, HEADS, TOKENS, SUMS,
            )  # fmt: skip
        else:
            walk_heads(
                values_ptr + batch * values_batch, cos_ptr, sin_ptr, joined_ptr, partial_ptr, begin, end,
                (tile - query_tiles - key_tiles) * HEADS, key_heads, values_position, values_head, row,
                D, 0, 1, WHOLE, 1, GROUP, GROUP + 1, HEADS, TOKENS, SUMS,
            )  # fmt: skip

    def tile_of(head_dim: int, half: int, key_heads: int) -> dict[str, int]:
        """The constants of ``join_gradients``. Heads of a tile share angles and mostly lie side by side."""
        vectors = max(1, _ELEMENTS // triton.next_power_of_2(head_dim))
        heads = min(4, vectors, triton.next_power_of_2(key_heads))
        width, rest, whole = (triton.next_power_of_2(max(1, part)) for part in (half, head_dim - 2 * half, head_dim))
        shape = {"D": head_dim, "HALF": half, "WIDTH": width, "REST": rest, "WHOLE": whole}
        return shape | {"HEADS": heads, "TOKENS": vectors // heads}

    def _kernel(
        queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, group: int
    ) -> tuple[Tensor, Tensor]:
        batch, length, key_heads, head_dim = keys.shape
        if queries.dtype == torch.float64 or head_dim > _MOST_CHANNELS:
            return _define(queries, keys, values, cos, sin, bias, group)
        joined, none = _shape(queries, keys, values, cos, sin, None, group)
        tile = tile_of(head_dim, cos.shape[1], key_heads)
        each = max(tile["TOKENS"], _TOKENS)
        parts = triton.cdiv(length, each)
        sums = 0 if bias is None else batch * parts
        partial = torch.empty((sums, 1, joined.shape[2]), dtype=torch.float32, device=queries.device)
        if joined.numel():
            grads = [part if part.stride(3) == 1 else part.contiguous() for part in (queries, keys, values)]
            tiles = triton.cdiv(key_heads * group, tile["HEADS"]) + 2 * triton.cdiv(key_heads, tile["HEADS"])
            join_gradients[(tiles * parts * batch,)](
                *grads,
                cos.contiguous(),
                sin.contiguous(),
                joined,
                partial,
                length,
                key_heads,
                parts,
                each,
                *(stride for part in grads for stride in part.stride()[:3]),
                0 if cos.shape[0] == length else length * cos.shape[1],
                GROUP=group,
                SUMS=bias is not None,
                **tile,
                num_warps=_WARPS,
                **LAUNCH,
            )
        return joined, none if bias is None else sums_of(partial, [bias])[0]
else:
    _kernel = None  # type: ignore[assignment]

join_gradients_of = define("join_gradients", _define, shapes=_shape, kernel=_kernel)
