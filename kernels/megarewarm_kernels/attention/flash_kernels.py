"""The Triton kernels of flash attention, causal, with documents: forward, the gradient of queries, that of keys and values.

A program has a block of queries (or keys) of one head and walks along the keys (queries) that it needs: first those that
need no comparison of positions, then those around the diagonal. Queries, keys and values lie in one tensor
(b, s, k, GROUP + 2, d): key head by key head its queries, its key and its value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megarewarm_kernels.operators import LN_2, LOG2_E


@triton.jit
def load_block(ptr, first, length, stride, CHECKED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(ROWS, WIDTH) of a matrix with D columns, from row ``first`` on; 0 outside. Offsets are 64-bit but within the block."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    at = ptr + tl.cast(first, tl.int64) * stride + row[:, None] * stride + channel[None, :]
    if CHECKED and D < WIDTH:
        return tl.load(at, mask=(first + row < length)[:, None] & (channel < D)[None, :], other=0.0)
    elif CHECKED:
        return tl.load(at, mask=(first + row < length)[:, None], other=0.0)
    elif D < WIDTH:
        return tl.load(at, mask=(channel < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_block(ptr, value, first, length, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The reverse of ``load_block``, rounding to the type that is pointed to."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    at = ptr + tl.cast(first, tl.int64) * stride + row[:, None] * stride + channel[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(first + row < length)[:, None] & (channel < D)[None, :])


@triton.jit
def first_key(starts_ptr, first, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the keys of a block of queries begin: at its first document, which is the smallest start."""
    begin = first * 0
    if DOCUMENTS:
        # clamped: a wrong table gives a wrong result, but no access outside of the tensors
        begin = tl.maximum(tl.minimum(tl.load(starts_ptr + first), first), 0) // KEYS * KEYS
    return begin


@triton.jit
def attention_step(  # type: ignore[no-untyped-def]
    m_i,
    l_i,
    acc,
    q,
    key_ptr,
    query,
    start,
    first,
    length,
    stride,
    scale,
    DIAGONAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys: the largest score so far (base 2), the sum and the mixture of values relative to it."""
    k = load_block(key_ptr, first, length, stride, DIAGONAL, KEYS, D, WIDTH)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    key = first + tl.arange(0, KEYS)
    if DIAGONAL:  # this also hides the keys past the end from every query that is kept
        score = tl.where(query[:, None] >= key[None, :], score, -float("inf"))
    if DOCUMENTS:
        score = tl.where(start[:, None] <= key[None, :], score, -float("inf"))
    new = tl.maximum(m_i, tl.max(score, 1) * scale)
    # within documents a query may see none of the keys yet: not infinity from infinity
    least = tl.where(new == -float("inf"), 0.0, new) if DOCUMENTS else new
    p = tl.exp2(score * scale - least[:, None])
    alpha = tl.exp2(m_i - least)
    v = load_block(key_ptr + D, first, length, stride, DIAGONAL, KEYS, D, WIDTH)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return new, l_i * alpha + tl.sum(p, 1), acc


@triton.jit
def attention_forward(  # type: ignore[no-untyped-def]
    qkv_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    length,
    heads,
    batch_stride,
    stride,
    scale,
    DOCUMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (b, s, n, d) and the logarithm of the sum of exponentials (b, n, s)."""
    blocks = tl.cdiv(length, QUERIES)
    # the longest rows first; neighbouring programs share keys and values in the cache
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    which = tl.program_id(0) // blocks
    batch = (which // heads).to(tl.int64)
    head = which % heads
    place = (head // GROUP) * (GROUP + 2) * D
    query_ptr = qkv_ptr + batch * batch_stride + place + head % GROUP * D
    key_ptr = qkv_ptr + batch * batch_stride + place + GROUP * D
    query = first + tl.arange(0, QUERIES)
    q = load_block(query_ptr, first, length, stride, True, QUERIES, D, WIDTH)
    start = query
    if DOCUMENTS:
        start = tl.load(starts_ptr + batch * length + query, mask=query < length, other=0)
    m_i = tl.full((QUERIES,), -float("inf"), tl.float32)
    l_i = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    scale = scale * LOG2_E
    begin = first_key(starts_ptr + batch * length, first, KEYS, DOCUMENTS)
    middle = first // KEYS * KEYS
    for key in range(begin, middle, KEYS):
        m_i, l_i, acc = attention_step(
            m_i, l_i, acc, q, key_ptr, query, start, key, length, stride, scale,
            False, DOCUMENTS, D, WIDTH, KEYS, PRECISION,
        )  # fmt: skip
    for key in range(middle, min(first + QUERIES, length), KEYS):
        m_i, l_i, acc = attention_step(
            m_i, l_i, acc, q, key_ptr, query, start, key, length, stride, scale,
            True, DOCUMENTS, D, WIDTH, KEYS, PRECISION,
        )  # fmt: skip
    row = heads * D
    out_ptr += batch * length * row + head * D
    store_block(out_ptr, acc / l_i[:, None], first, length, row, QUERIES, D, WIDTH)
    lse = (m_i + tl.log2(l_i)) * LN_2
    tl.store(lse_ptr + which.to(tl.int64) * length + query, lse, mask=query < length)


@triton.jit
def queries_step(  # type: ignore[no-untyped-def]
    dq,
    q,
    grad,
    lse,
    delta,
    key_ptr,
    query,
    start,
    first,
    length,
    stride,
    scale,
    DIAGONAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys: dq without its scale."""
    k = load_block(key_ptr, first, length, stride, DIAGONAL, KEYS, D, WIDTH)
    v = load_block(key_ptr + D, first, length, stride, DIAGONAL, KEYS, D, WIDTH)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    key = first + tl.arange(0, KEYS)
    if DIAGONAL:
        p = tl.where(query[:, None] >= key[None, :], p, 0.0)
    if DOCUMENTS:
        p = tl.where(start[:, None] <= key[None, :], p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def attention_backward_queries(  # type: ignore[no-untyped-def]
    qkv_ptr,
    starts_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    length,
    heads,
    batch_stride,
    stride,
    scale,
    DOCUMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and delta = sum of out x grad along the channels, which the other kernel reads."""
    blocks = tl.cdiv(length, QUERIES)
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    which = tl.program_id(0) // blocks
    batch = (which // heads).to(tl.int64)
    head = which % heads
    place = (head // GROUP) * (GROUP + 2) * D
    query_ptr = qkv_ptr + batch * batch_stride + place + head % GROUP * D
    key_ptr = qkv_ptr + batch * batch_stride + place + GROUP * D
    query = first + tl.arange(0, QUERIES)
    row = heads * D
    outer = batch * length * row + head * D
    grad = load_block(grad_ptr + outer, first, length, row, True, QUERIES, D, WIDTH)
    out = load_block(out_ptr + outer, first, length, row, True, QUERIES, D, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    statistic = which.to(tl.int64) * length + query
    tl.store(delta_ptr + statistic, delta, mask=query < length)
    lse = tl.load(lse_ptr + statistic, mask=query < length, other=float("inf")) * LOG2_E  # infinity: a probability of 0
    q = load_block(query_ptr, first, length, stride, True, QUERIES, D, WIDTH)
    start = query
    if DOCUMENTS:
        start = tl.load(starts_ptr + batch * length + query, mask=query < length, other=0)
    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    begin = first_key(starts_ptr + batch * length, first, KEYS, DOCUMENTS)
    middle = first // KEYS * KEYS
    for key in range(begin, middle, KEYS):
        dq = queries_step(
            dq, q, grad, lse, delta, key_ptr, query, start, key, length, stride, scale * LOG2_E,
            False, DOCUMENTS, D, WIDTH, KEYS, PRECISION,
        )  # fmt: skip
    for key in range(middle, min(first + QUERIES, length), KEYS):
        dq = queries_step(
            dq, q, grad, lse, delta, key_ptr, query, start, key, length, stride, scale * LOG2_E,
            True, DOCUMENTS, D, WIDTH, KEYS, PRECISION,
        )  # fmt: skip
    dqkv_ptr += batch * batch_stride + place + head % GROUP * D
    store_block(dqkv_ptr, dq * scale, first, length, stride, QUERIES, D, WIDTH)


@triton.jit
def keys_step(  # type: ignore[no-untyped-def]
    dk,
    dv,
    k,
    v,
    query_ptr,
    starts_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    key,
    first,
    length,
    stride,
    row,
    scale,
    DIAGONAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries: dk without its scale, and dv."""
    query = first + tl.arange(0, QUERIES)
    q = load_block(query_ptr, first, length, stride, True, QUERIES, D, WIDTH)
    lse = tl.load(lse_ptr + query, mask=query < length, other=float("inf")) * LOG2_E
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # (keys, queries)
    if DIAGONAL:
        p = tl.where(query[None, :] >= key[:, None], p, 0.0)
    if DOCUMENTS:
        start = tl.load(starts_ptr + query, mask=query < length, other=0)
        p = tl.where(start[None, :] <= key[:, None], p, 0.0)
    grad = load_block(grad_ptr, first, length, row, True, QUERIES, D, WIDTH)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    delta = tl.load(delta_ptr + query, mask=query < length, other=0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def attention_backward_keys(  # type: ignore[no-untyped-def]
    qkv_ptr,
    starts_ptr,
    ends_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    length,
    heads,
    batch_stride,
    stride,
    scale,
    DOCUMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv, summed over the group. ``ends`` (b, s): the first position past those that see each key."""
    blocks = tl.cdiv(length, KEYS)
    first = tl.program_id(0) % blocks * KEYS  # the first keys have the most queries
    which = tl.program_id(0) // blocks
    key_heads = heads // GROUP
    batch = (which // key_heads).to(tl.int64)
    key_head = which % key_heads
    place = key_head * (GROUP + 2) * D
    query_ptr = qkv_ptr + batch * batch_stride + place
    key_ptr = query_ptr + GROUP * D
    row = heads * D
    grad_ptr += batch * length * row + key_head * GROUP * D
    statistic = (batch * heads + key_head * GROUP) * length
    lse_ptr += statistic
    delta_ptr += statistic
    starts_ptr += batch * length
    key = first + tl.arange(0, KEYS)
    k = load_block(key_ptr, first, length, stride, True, KEYS, D, WIDTH)
    v = load_block(key_ptr + D, first, length, stride, True, KEYS, D, WIDTH)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    end = length
    if DOCUMENTS:
        end = min(tl.load(ends_ptr + batch * length + min(first + KEYS, length) - 1), length)
    middle = min(tl.cdiv(first + KEYS, QUERIES) * QUERIES, end)
    for _ in range(GROUP):
        for query in range(first // QUERIES * QUERIES, middle, QUERIES):
            dk, dv = keys_step(
                dk, dv, k, v, query_ptr, starts_ptr, grad_ptr, lse_ptr, delta_ptr, key, query, length, stride, row,
                scale * LOG2_E, True, DOCUMENTS, D, WIDTH, QUERIES, PRECISION,
            )  # fmt: skip
        for query in range(tl.cdiv(first + KEYS, QUERIES) * QUERIES, end, QUERIES):
            dk, dv = keys_step(
                dk, dv, k, v, query_ptr, starts_ptr, grad_ptr, lse_ptr, delta_ptr, key, query, length, stride, row,
                scale * LOG2_E, False, DOCUMENTS, D, WIDTH, QUERIES, PRECISION,
            )  # fmt: skip
        query_ptr += D
        grad_ptr += D
        lse_ptr += length
        delta_ptr += length
    dqkv_ptr += batch * batch_stride + place + GROUP * D
    store_block(dqkv_ptr, dk * scale, first, length, stride, KEYS, D, WIDTH)
    store_block(dqkv_ptr + D, dv, first, length, stride, KEYS, D, WIDTH)
