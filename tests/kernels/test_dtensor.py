"""The operators on DTensors: two ranks that divide tokens, heads or columns compute what one computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.support.distributed import run_ranks

B, S, H, N, D = 4, 6, 16, 2, 8
WHOLE = Replicate()


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cases() -> dict[str, tuple[list[Tensor], Any, list[list[Any]]]]:
    """name -> (arguments, function, the ways in which the arguments are divided)."""
    from megarewarm_kernels import bias_gelu, norm_heads, residual_norm, residual_norms, residual_rms_norm, rms_norm, swiglu

    x, a, m = (_random(B, S, H, seed=i) for i in range(3))
    vectors = [_random(H, seed=3 + i) for i in range(4)]
    qkv = _random(B, S, N * 3 * D, seed=9)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3]] * B, dtype=torch.int32)

    class Attend(torch.autograd.Function):
        """The operators themselves: rotary positions are another matter."""

        @staticmethod
        def forward(ctx: Any, qkv: Tensor, starts: Tensor) -> Tensor:
            out, lse = torch.ops.megarewarm.flash_attention(qkv, starts, D, 1)
            ctx.save_for_backward(qkv, out, lse, starts)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            qkv, out, lse, starts = ctx.saved_tensors
            return torch.ops.megarewarm.flash_attention_backward(grad, qkv, out, lse, starts, D, 1), None

    def first(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return residual_norms(x, None, None, *weights)

    def with_biases(x: Tensor, a: Tensor, m: Tensor, weight: Tensor, bias: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return residual_norm(x, a, m, weight, bias, biases=(one, other))

    tokens = [[Shard(d)] * 3 + [WHOLE] * 4 for d in (0, 1)]
    columns = [Shard(2), Shard(0)]
    heads = [qkv, vectors[0][:D], vectors[1][:D]]
    norm_both = lambda qkv, q, k: norm_heads(qkv, q, k, head_dim=D)  # noqa: E731
    return {
        "residual_norms": ([x, a, m, *vectors], residual_norms, tokens),
        "norms": ([x, *vectors], first, [[Shard(d)] + [WHOLE] * 4 for d in (0, 1)]),
        "norm": ([x, *vectors[:2]], lambda x, w, b: residual_norm(x, None, None, w, b), [[Shard(1), WHOLE, WHOLE]]),
        "norm_biases": ([x, a, m, *vectors], with_biases, tokens),
        "bias_gelu": ([x, vectors[0]], bias_gelu, [[Shard(0), WHOLE], [Shard(1), WHOLE], columns]),
        "residual_rms_norm": ([x, a, vectors[0]], residual_rms_norm, [[Shard(d)] * 2 + [WHOLE] for d in (0, 1)]),
        "rms_norm": ([x, vectors[0]], rms_norm, [[Shard(d), WHOLE] for d in (0, 1)]),
        "swiglu": ([x], swiglu, [[Shard(d)] for d in (0, 1, 2)]),
        "norm_heads": (heads, norm_both, [[Shard(d), WHOLE, WHOLE] for d in (0, 1, 2)]),
        "attention": ([qkv, starts], Attend.apply, [[Shard(0), Shard(0)], [Shard(2), WHOLE]]),
    }


def _compare(ranks: Any) -> list[str]:
    import megarewarm_kernels.sharding  # noqa: F401

    mesh = init_device_mesh("cpu", (ranks.world_size,))
    wrong = []
    for name, (arguments, function, ways) in _cases().items():
        alone = [x.clone().requires_grad_(x.is_floating_point()) for x in arguments]
        wanted = function(*alone)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        upstream = [_random(*out.shape, seed=50 + i) for i, out in enumerate(wanted)]
        torch.autograd.backward(wanted, upstream)
        for way in ways:
            parts = [
                distribute_tensor(x.clone(), mesh, [p]).requires_grad_(x.is_floating_point())
                for x, p in zip(arguments, way, strict=True)
            ]
            found = function(*parts)
            found = found if isinstance(found, tuple) else (found,)
            torch.autograd.backward(
                found, [distribute_tensor(g, mesh, out.placements) for g, out in zip(upstream, found, strict=True)]
            )
            gradients = [(p.grad, x.grad) for p, x in zip(parts, alone, strict=True) if x.grad is not None]
            pairs = [*zip(found, wanted, strict=True), *gradients]
            for i, (one, other) in enumerate(pairs):
                assert isinstance(one, DTensor)
                if not torch.allclose(one.full_tensor(), other.detach(), rtol=1e-10, atol=1e-12):
                    wrong.append(f"{name} {way}: result {i}")
            if all(isinstance(p, Replicate) for p in found[-1].placements):
                wrong.append(f"{name} {way}: the result was gathered")
    return wrong


@pytest.mark.parametrize("world_size", [2])
def test_divided_operators_compute_the_whole(world_size: int) -> None:
    assert run_ranks(_compare, world_size) == [[]] * world_size
