"""Norms of queries and keys against the modules of transformers that have them; heads divided among ranks; in place after."""

from __future__ import annotations

import megarewarm_kernels as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

transformers = pytest.importorskip("transformers")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parts_of(qkv: Tensor, group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (b, s, k x group, d), keys and values (b, s, k, d)."""
    heads = qkv.unflatten(-1, (-1, group + 2, head_dim))
    return heads[..., :group, :].flatten(-3, -2), heads[..., group, :], heads[..., group + 1, :]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batch=st.integers(0, 2), length=st.integers(1, 4), heads=st.integers(1, 3), group=st.integers(1, 4), d=st.integers(1, 9))
def test_each_head_is_normed_as_qwen_does(batch: int, length: int, heads: int, group: int, d: int) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norms = [Qwen3RMSNorm(d, eps=1e-6) for _ in range(2)]
    for seed, norm in enumerate(norms):
        norm.weight.data.copy_(random(d, seed=seed, dtype=torch.float32))
    qkv = random(batch, length, heads * (group + 2) * d, seed=5, dtype=torch.float32)
    found = kernels.norm_heads(qkv, norms[0].weight, norms[1].weight, head_dim=d, group=group)
    query, key, value = parts_of(qkv, group, d)
    wanted = norms[0](query), norms[1](key), value
    for one, other in zip(parts_of(found, group, d), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found.is_contiguous() and torch.equal(parts_of(found, group, d)[2], value)


@pytest.mark.parametrize("group", [1, 3])
def test_all_heads_together_are_normed_as_olmo_does(group: int) -> None:
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    heads, d = 2, 5
    norms = [Olmo2RMSNorm(heads * each * d, eps=1e-5) for each in (group, 1)]
    for seed, norm in enumerate(norms):
        norm.weight.data.copy_(random(*norm.weight.shape, seed=seed, dtype=torch.float32))
    weights = [norm.weight for norm in norms]
    qkv = random(2, 3, heads * (group + 2) * d, seed=5, dtype=torch.float32).requires_grad_()
    found = kernels.norm_widths(qkv, *weights, head_dim=d, group=group, eps=1e-5)
    query, key, value = parts_of(qkv, group, d)
    normed = norms[0](query.flatten(2)), norms[1](key.flatten(2)), value.flatten(2)
    pairs = [(one.flatten(2), other) for one, other in zip(parts_of(found, group, d), normed, strict=True)]
    upstream = [random(*other.shape, seed=7, dtype=torch.float32) for _, other in pairs]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    mine, true = (torch.autograd.grad(side, [qkv, *weights], upstream) for side in zip(*pairs, strict=True))
    for one, other in zip(mine, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_divided_among_ranks(ranks: int) -> None:
    """All ranks in one process: each adds the others' sums of squares, so that one graph has the derivative of all."""
    heads, group, d = 4, 2, 3
    whole = random(2, 3, heads * (group + 2) * d).requires_grad_()
    weights = [random(heads * each * d, seed=each).requires_grad_() for each in (group, 1)]
    shards = list(zip(whole.chunk(ranks, -1), weights[0].chunk(ranks), weights[1].chunk(ranks), strict=True))
    sums: list[Tensor] = []

    def noted(here: Tensor) -> Tensor:
        assert here.shape == (6, 2)
        sums.append(here)
        return here

    for shard in shards:
        kernels.norm_widths(*shard, head_dim=d, group=group, sum_over=noted, ranks=ranks)
    total = torch.stack(sums).sum(0)
    found = torch.cat(
        [kernels.norm_widths(*shard, head_dim=d, group=group, sum_over=lambda here: total, ranks=ranks) for shard in shards],
        -1,
    )
    wanted = kernels.norm_widths(whole, *weights, head_dim=d, group=group)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = random(*whole.shape, seed=9)
    leaves = [whole, *weights]
    for one, other in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wide", [False, True])
def test_attention_may_rotate_the_result_in_place(wide: bool) -> None:
    heads, group, d = 2, 2, 4
    qkv = random(1, 5, heads * (group + 2) * d).requires_grad_()
    sizes = (heads * group * d, heads * d) if wide else (d, d)
    weights = [random(size, seed=1 + i).requires_grad_() for i, size in enumerate(sizes)]
    angles = random(5, 2, seed=4)
    norm = kernels.norm_widths if wide else kernels.norm_heads

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        normed = norm(x, *weights, head_dim=d, group=group)
        return kernels.attention(normed, angles.cos(), angles.sin(), head_dim=d, group=group)

    before = qkv.detach().clone()
    assert torch.autograd.gradcheck(ours, [qkv, *weights])
    assert torch.equal(qkv.detach(), before)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, *weights), ours(qkv, *weights))


@pytest.mark.parametrize("wide", [False, True])
def test_a_projection_with_strides(wide: bool) -> None:
    d, group = 4, 2
    qkv = random(3, 2, 16)[..., ::1].transpose(0, 1)
    weights = [random(8 if wide else 4, seed=1), random(4, seed=2)]
    norm = kernels.norm_widths if wide else kernels.norm_heads
    found = norm(qkv, *weights, head_dim=d, group=group)
    assert torch.equal(found, norm(qkv.contiguous(), *weights, head_dim=d, group=group))
