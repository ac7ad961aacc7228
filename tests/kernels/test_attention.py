"""Attention on any machine: its definition and derivative, documents, the choice of an implementation, PyTorch's rules."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import megarewarm_kernels as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarewarm_kernels.attention.choose import attention, choose, documents_of
from megarewarm_kernels.attention.flash_attention import flash_attention, reference
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.support.attention_cases import Arguments, arguments, assert_as_exact_as_torch, by_torch, results

MODULE = importlib.import_module("megarewarm_kernels.attention.choose")
DOCUMENTS = [[4, 5], [1, 6, 2]]


def backend(name: str) -> Callable[..., Tensor]:
    if name == "flash":  # its definition, off CUDA
        return flash_attention
    return lambda *given, **named: attention(*given, **named, backend=name)


IMPLEMENTATIONS = ("flash", "blocks", "sdpa", "reference")
WAYS: dict[str, dict[str, Any]] = {
    "2 queries a key": {"group": 2},
    "6 queries a key": {"group": 6},
    "a window": {"window": 3},
    "a window of one": {"window": 1, "group": 2},
    "all together": {"group": 3, "window": 4, "documents": DOCUMENTS},
}


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_derivative(name: str, documents: list[list[int]] | None) -> None:
    case = arguments(2, 9, 2, 5, 4, documents)
    leaf = case.qkv.requires_grad_()

    def ours(x: Tensor) -> Tensor:
        return backend(name)(x * 1.0, case.cos, case.sin, head_dim=5, starts=case.starts)

    assert torch.autograd.gradcheck(ours, [leaf])
    for mine, wanted in zip(results(backend(name), case), results(by_torch, case), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_groups_and_windows(name: str, way: str) -> None:
    case = arguments(2, 9, 2, 4, 4, **WAYS[way])
    named = {"head_dim": 4, "group": case.group, "window": case.window, "starts": case.starts}
    assert torch.autograd.gradcheck(lambda x: backend(name)(x * 1.0, case.cos, case.sin, **named), [case.qkv.requires_grad_()])
    for mine, wanted in zip(results(backend(name), case), results(by_torch, case), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 9, 40])
def test_a_group_adds_up_what_equal_heads_would_get(window: int | None) -> None:
    """Keys and values copied for each query are heads of their own, whose gradients' sum is the key's."""
    case = arguments(2, 33, 2, 8, 8, group=3, window=window)
    heads = case.qkv.unflatten(-1, (2, 5, 8))
    key_value = heads[..., 3:, :].unsqueeze(-3).expand(-1, -1, -1, 3, -1, -1)
    apart = torch.cat([heads[..., :3, None, :], key_value], -2).flatten(2)  # (b, s, 6 x 3 x 8)
    out, gradient = results(flash_attention, case)
    alone = Arguments(apart, case.cos, case.sin, 8, None, case.grad, 1, window)
    wanted, each = results(flash_attention, alone)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    each = each.unflatten(-1, (2, 3, 3, 8))
    summed = torch.cat([each[..., 0, :], each[..., 1:, :].sum(-3)], -2).flatten(2)
    torch.testing.assert_close(gradient, summed, rtol=1e-12, atol=1e-12)


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    for name in IMPLEMENTATIONS:
        found = [results(backend(name), arguments(2, 9, 2, 8, 4, window=window)) for window in (None, 9, 100)]
        assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("way", [{"group": 2}, {"group": 6, "window": 20}, {"window": 7, "documents": [[20, 1, 44], [65]]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "auto"])
def test_groups_and_windows_as_exact_as_torch(name: str, dtype: torch.dtype, way: dict[str, Any]) -> None:
    assert_as_exact_as_torch(backend(name), arguments(2, 65, 2, 20, 8, each=True, **way), dtype)


@pytest.mark.parametrize("documents", [None, [[20, 1, 44], [65]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "auto"])
def test_as_exact_as_torch(name: str, dtype: torch.dtype, documents: list[list[int]] | None) -> None:
    assert_as_exact_as_torch(backend(name), arguments(2, 65, 3, 20, 8, documents, each=True), dtype)


@st.composite
def lengths(draw: st.DrawFn, length: int) -> list[int]:
    cuts = sorted({0, length, *draw(st.lists(st.integers(1, max(1, length - 1)), max_size=4))} & set(range(length + 1)))
    return [end - begin for begin, end in pairwise(cuts)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    batch=st.integers(0, 3),
    length=st.integers(1, 17),
    heads=st.integers(1, 3),
    half=st.integers(1, 4),
    turned=st.integers(0, 4),
    name=st.sampled_from(IMPLEMENTATIONS),
)
def test_documents_are_as_if_each_stood_by_itself(
    data: st.DataObject, batch: int, length: int, heads: int, half: int, turned: int, name: str
) -> None:
    documents = [data.draw(lengths(length)) for _ in range(batch)]
    case = arguments(batch, length, heads, 2 * half, 2 * min(turned, half), documents)
    found = results(backend(name), case)
    assert all(part.shape[:2] == (batch, length) for part in found)
    for row, cuts in enumerate(documents):
        begin = 0
        for size in cuts:
            here = (slice(row, row + 1), slice(begin, begin + size))
            span = here[1]
            alone = Arguments(case.qkv[here], case.cos[span], case.sin[span], case.head_dim, None, case.grad[here])
            for mine, wanted in zip(found, results(by_torch, alone), strict=True):
                torch.testing.assert_close(mine[here], wanted, rtol=1e-10, atol=1e-10)
            begin += size


def test_no_tokens() -> None:
    for batch, length in ((0, 4), (2, 0)):
        for name in IMPLEMENTATIONS:
            out, gradient = results(backend(name), arguments(batch, length, 2, 8, 4))
            assert out.shape == (batch, length, 16) and gradient.shape == (batch, length, 48)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_compiled_whole_and_checkpointed(name: str, documents: list[list[int]] | None) -> None:
    case = arguments(2, 9, 2, 8, 4, documents)
    x, weight = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(48, 6, dtype=torch.float64).requires_grad_()

    def layer(function: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        qkv = F.linear(x.flatten(0, 1), weight).view(2, 9, 48)  # a view, as in the model
        return function(qkv, case.cos, case.sin, head_dim=8, starts=case.starts)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return layer(backend(name), x, weight)

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    again = lambda *inputs: checkpoint.checkpoint(ours, *inputs, use_reentrant=False)  # noqa: E731
    wanted = torch.autograd.grad(layer(by_torch, x, weight), [weight], case.grad)
    for function in (ours, compiled, again):
        torch.testing.assert_close(torch.autograd.grad(function(x, weight), [weight], case.grad), wanted)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(ours(x, weight), layer(by_torch, x, weight))


@pytest.mark.parametrize("name", ["flash", "sdpa"])
def test_a_saved_projection_is_not_recomputed_from_wrongly(name: str) -> None:
    """Selective checkpointing that keeps the projection would find it rotated already: an error, not a wrong gradient."""
    case = arguments(1, 4, 2, 8, 4)
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(48, 6, dtype=torch.float64).requires_grad_()

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return backend(name)(F.linear(x, weight).view(1, 4, 48), case.cos, case.sin, head_dim=8)

    def contexts() -> Any:
        return checkpoint.create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    out = checkpoint.checkpoint(ours, x, weight, use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="mutated"):
        out.sum().backward()


def test_nothing_is_kept_but_what_the_backward_pass_needs() -> None:
    case = arguments(2, 9, 2, 8, 4, DOCUMENTS)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaf = case.qkv.requires_grad_()
    qkv = leaf * 1.0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        flash_attention(qkv, case.cos, case.sin, head_dim=8, starts=case.starts)
    rotated, out, statistics, tables, starts = qkv.nbytes, qkv.nbytes // 3, 2 * 2 * 9 * 8, 2 * case.cos.nbytes, 2 * 9 * 4
    assert sum(kept.values()) == rotated + out + statistics + tables + starts


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_operators_keep_pytorchs_rules(documents: list[list[int]] | None, group: int) -> None:
    case = arguments(2, 9, 2, 8, 4, documents, group=group).to(torch.float32)
    ops = torch.ops.megarewarm
    forward = (case.qkv, case.starts, 8, group)
    out, lse = ops.flash_attention.default(*forward)
    backward = (case.grad, case.qkv, out, lse, case.starts, 8, group)
    for operator, given_to in ((ops.flash_attention, forward), (ops.flash_attention_backward, backward)):
        checks = torch.library.opcheck(operator.default, given_to, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("group", [1, 3])
def test_operations_are_counted(group: int) -> None:
    """By the queries: three heads each time, of one key or of three."""
    case = arguments(2, 9, 3 // group, 8, 4, group=group)
    leaf = case.qkv.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = flash_attention(leaf * 1.0, case.cos, case.sin, head_dim=8, group=group)
        forward = counter.get_total_flops()
        out.backward(case.grad)
    product = 2 * (2 * 3) * 9 * 9 * 8 // 2  # of one pair of matrices, for half of the scores
    assert forward == 2 * product and counter.get_total_flops() == (2 + 5) * product


BF16, FP32 = torch.bfloat16, torch.float32
ALL = {"flash2", "flash3", "flash4"}


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "dim", "asked", "expected"),
    [
        (9, ALL, BF16, 64, {}, "flash3"),
        (9, {"flash4", "flash2"}, BF16, 64, {}, "cudnn"),
        (9, ALL, BF16, 64, {"wanted": "flash4"}, "flash4"),
        (9, {"flash3", "flash2"}, BF16, 64, {}, "flash3"),
        (9, {"flash2"}, BF16, 64, {}, "cudnn"),
        (9, {"flash2"}, BF16, 64, {"documents": True}, "flash2"),
        (9, {"flash2"}, BF16, 256, {}, "flash2"),
        (9, set(), BF16, 64, {"documents": True}, "triton"),
        (9, ALL, BF16, 64, {"deterministic": True}, "triton"),
        (10, {"flash3"}, BF16, 64, {}, "sdpa"),
        (10, ALL, BF16, 128, {}, "flash4"),
        (8, ALL, BF16, 80, {}, "flash2"),
        (8, set(), BF16, 80, {}, "sdpa"),
        (9, ALL, BF16, 84, {}, "sdpa"),
        (9, ALL, FP32, 64, {}, "sdpa"),
        (9, ALL, FP32, 64, {"documents": True}, "triton"),
        (9, ALL, torch.float64, 64, {"deterministic": True}, "sdpa"),
        (9, ALL, BF16, 300, {"documents": True}, "sdpa"),
        (7, ALL, BF16, 64, {"documents": True}, "sdpa"),
        (8, ALL, BF16, 64, {"wanted": "cudnn"}, "cudnn"),
        (9, ALL, BF16, 64, {"wanted": "cudnn", "documents": True}, "flash2"),
        (9, ALL, BF16, 64, {"wanted": "triton"}, "triton"),
        (9, ALL, BF16, 64, {"wanted": "reference"}, "reference"),
        (9, ALL, BF16, 64, {"wanted": "flash2", "deterministic": True}, "triton"),
        (9, {"flash2"}, BF16, 64, {"wanted": "flash3"}, "cudnn"),
        (9, ALL, BF16, 64, {"window": True}, "flash3"),
        (9, {"flash2"}, BF16, 64, {"window": True}, "flash2"),
        (9, set(), BF16, 64, {"window": True}, "triton"),
        (9, ALL, FP32, 64, {"window": True}, "triton"),
        (9, ALL, BF16, 64, {"wanted": "cudnn", "window": True}, "flash2"),
    ],
)
def test_the_choice_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    installed: set[str],
    dtype: torch.dtype,
    dim: int,
    asked: dict[str, Any],
    expected: str,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(MODULE, "_capability", lambda device: capability)
    monkeypatch.setattr(MODULE, "functions", lambda name: (min, max) if name in installed else None)
    name, reason = choose("cuda", dtype, dim, **asked)
    assert name == expected and reason


@pytest.mark.parametrize(
    ("found", "dtype", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, BF16, "blocks"),
        ({"avx512_bf16": True, "amx_bf16": True}, BF16, "sdpa"),
        ({"avx512_bf16": False}, BF16, "sdpa"),
        ({"bf16": True}, BF16, "sdpa"),
        ({}, BF16, "sdpa"),
        ({"avx512_bf16": True}, FP32, "sdpa"),
        ({"avx512_bf16": True}, torch.float16, "sdpa"),
    ],
)
def test_the_choice_by_the_cpus_arithmetic(
    found: dict[str, bool], dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert choose("cpu", dtype, 64)[0] == expected
    asked, _ = choose("cpu", dtype, 64, wanted="blocks")
    assert asked == ("sdpa" if dtype == torch.float16 else "blocks"), "what is asked for needs no other arithmetic"


@pytest.mark.parametrize(
    ("length", "way", "threads", "expected"),
    [
        (383, {}, 1, "sdpa"),
        (384, {}, 2, "blocks"),
        (2047, {}, 1, "blocks"),
        (2048, {}, 1, "sdpa"),
        (255, {"documents": True}, 1, "sdpa"),
        (256, {"documents": True}, 1, "blocks"),
        (4096, {"documents": True}, 1, "blocks"),
        (4096, {"window": 7}, 2, "blocks"),
        (1024, {"window": 7}, 3, "sdpa"),
        (1024, {}, 3, "sdpa"),
    ],
    ids=str,
)
def test_the_choice_in_fp32_by_length(
    length: int, way: dict[str, Any], threads: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    MODULE._remembered.cache_clear()  # what was found on this machine
    chosen = []
    monkeypatch.setattr(MODULE, "blocks_attention", lambda query, *rest: chosen.append("blocks") or query)
    monkeypatch.setattr(MODULE, "_by_torch", lambda name, query, *rest: chosen.append(name) or query)
    qkv, tables = torch.zeros(1, length, 3 * 2), torch.zeros(length, 0)
    starts = torch.zeros(1, length, dtype=torch.int32) if way.get("documents") else None
    attention(qkv, tables, tables, head_dim=2, window=way.get("window"), starts=starts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # a later run of the same process
    attention(qkv, tables, tables, head_dim=2, window=way.get("window"), starts=starts)
    MODULE._remembered.cache_clear()
    assert chosen == [expected, "sdpa"]


def test_the_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert choose("cpu", BF16, 64)[0] == "sdpa"
    name, reason = choose("cpu", BF16, 64, documents=True, deterministic=True, wanted="flash3")
    assert name == "sdpa" and "flash3 runs on CUDA only" in reason
    with pytest.raises(ValueError, match=r"auto or one of flash4, .*, not 'flash5'"):
        choose("cpu", BF16, 64, wanted="flash5")
    for dtype, dim in ((torch.int64, 64), (torch.float8_e4m3fn, 64), (BF16, 0)):
        with pytest.raises(ValueError, match=f"no attention for heads of {dim} in {dtype} on cpu"):
            choose("cpu", dtype, dim)


def test_giving_way_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_said", set())
    case = arguments(1, 4, 1, 8, 4)
    with caplog.at_level(logging.WARNING, logger="megarewarm_kernels"):
        for _ in range(2):
            results(backend("flash2"), case)
        results(backend("auto"), case)
    assert [record.message for record in caplog.records] == [
        "attention is computed by 'sdpa', not by 'flash2' as asked: flash2 runs on CUDA only; triton runs on CUDA only; "
        "blocks is faster in bf16 on CPUs with AVX512_BF16, or in fp32 for long rows and two threads"
    ]


def flash_module(name: str, with_statistics: bool) -> ModuleType:
    """FlashAttention's interface, as its packages have it, computed document by document."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:
        assert q.shape[2] % k.shape[2] == 0 and k.shape == v.shape and causal
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        left, right = window_size  # how many positions before and after it a query sees; -1: all
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = (distance >= 0) & ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale).transpose(1, 2)
        return (out, None) if with_statistics else out

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        cuts = cu_seqlens_q.tolist()
        sizes = [end - begin for begin, end in pairwise(cuts)]
        assert max(sizes) == max_seqlen_q == max_seqlen_k and cuts[0] == 0 and cuts[-1] == q.shape[0] and min(sizes) > 0
        outs = []
        for begin, end in pairwise(cuts):
            one, two, three = (part[None, begin:end] for part in (q, k, v))
            out = flash_attn_func(one, two, three, softmax_scale, causal, window_size)
            outs.append((out[0] if with_statistics else out)[0])
        return (torch.cat(outs), None) if with_statistics else torch.cat(outs)

    module: Any = ModuleType(name)
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@pytest.fixture
def fresh() -> Iterator[None]:
    MODULE.functions.cache_clear()
    yield
    MODULE.functions.cache_clear()


@pytest.mark.parametrize("way", [{}, {"documents": DOCUMENTS}, *WAYS.values()])
@pytest.mark.parametrize("name", ["flash4", "flash3", "flash2"])
def test_others_kernels_are_called_as_they_ask(
    monkeypatch: pytest.MonkeyPatch, fresh: None, name: str, way: dict[str, Any]
) -> None:
    path = MODULE._MODULES[name]
    for depth in range(path.count(".") + 1):
        part = path.rsplit(".", depth)[0]
        monkeypatch.setitem(sys.modules, part, flash_module(part, with_statistics=name == "flash4"))
    monkeypatch.setattr(MODULE, "_chosen", lambda *given, **named: name)
    case = arguments(2, 9, 2, 8, 4, **way)
    for mine, wanted in zip(results(attention, case), results(by_torch, case), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_package_of_the_same_name_is_not_taken(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert MODULE.functions("flash2") is None and MODULE.functions("flash4") is None


def test_cudnns_order_of_preference_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_chosen", lambda *given, **named: "cudnn")
    for group in (1, 2, 6):
        case = arguments(2, 9, 2, 8, 4, group=group)
        for mine, wanted in zip(results(attention, case), results(by_torch, case), strict=True):
            torch.testing.assert_close(mine, wanted)


def test_documents_are_counted_once_for_a_tensor() -> None:
    starts = arguments(2, 9, 1, 2, 2, DOCUMENTS).starts
    assert starts is not None
    cuts, longest = documents_of(starts)
    assert cuts.tolist() == [0, 4, 9, 10, 16, 18] and longest == 6
    assert documents_of(starts)[0] is cuts and documents_of(starts.clone())[0] is not cuts
    starts[1] = 0
    assert documents_of(starts)[0].tolist() == [0, 4, 9, 18]


def wrong(change: dict[str, Any], words: str) -> Any:
    return pytest.param(change, words, id=words)


@pytest.mark.parametrize("function", [attention, flash_attention])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        wrong({"qkv": torch.zeros(8, 24)}, r"need qkv \(b, s, heads x 3 x 8\), contiguous, got \(8, 24\)"),
        wrong({"qkv": torch.zeros(2, 24, 4).transpose(1, 2)}, "contiguous"),
        wrong({"qkv": torch.zeros(2, 4, 25)}, r"need qkv .* got \(8, 25\)"),
        wrong({"qkv": torch.zeros(2, 4, 48)[..., :24]}, r"contiguous, got \(2, 4, 24\) with strides \(192, 48, 1\)"),
        wrong({"qkv": torch.zeros(2, 4, 24, dtype=torch.int64)}, "'qkv' is torch.int64, need bf16"),
        wrong({"qkv": torch.zeros(2, 4, 24).to(torch.float8_e4m3fn)}, "'qkv' is torch.float8_e4m3fn, need bf16"),
        wrong({"cos": torch.ones(5, 2)}, r"cos and sin are \(4, r / 2\) or \(2, 4, r / 2\), got \(5, 2\)"),
        wrong({"sin": torch.ones(4, 3)}, "two equal tables"),
        wrong({"cos": torch.ones(4, 2, dtype=torch.float64)}, "are in torch.float32, got torch.float64"),
        wrong({"starts": torch.zeros(2, 4)}, r"starts is \(2, 4\) int32, got \(2, 4\) torch.float32"),
        wrong({"starts": torch.zeros(2, 3, dtype=torch.int32)}, r"got \(2, 3\)"),
        wrong({"qkv": torch.zeros(2, 4, 24).requires_grad_()}, "qkv is consumed"),
        wrong({"group": 2}, r"need qkv .* heads x 4 x 8\), got \(8, 24\)"),
        wrong({"group": 0}, r"need qkv .* heads x 2 x 8\)"),
        wrong({"window": 0}, "the window holds at least 1 position, got 0"),
    ],
)
def test_wrong_arguments_are_named(function: Callable[..., Tensor], change: dict[str, Any], words: str) -> None:
    plain = {"qkv": torch.zeros(2, 4, 24), "cos": torch.ones(4, 2), "sin": torch.ones(4, 2)} | change
    with pytest.raises(ValueError, match=words):
        function(**plain, head_dim=8)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    case = arguments(1, 4, 1, 8, 4)
    leaf = case.qkv.requires_grad_()
    for name in ("flash", "sdpa"):
        out = backend(name)(leaf * 1.0, case.cos, case.sin, head_dim=8)
        (gradient,) = torch.autograd.grad(out.square().sum(), [leaf], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_the_definition_leaves_its_input_alone() -> None:
    case = arguments(2, 5, 2, 8, 4)
    before = case.qkv.clone()
    kept = reference(case.qkv, case.cos, case.sin, head_dim=8)
    assert torch.equal(case.qkv, before)
    torch.testing.assert_close(kernels.attention(case.qkv, case.cos, case.sin, head_dim=8), kept)
    assert not torch.equal(case.qkv, before), "consumed, as its page says"
