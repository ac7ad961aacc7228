"""RMSNorm and SwiGLU against transformers' modules, and what is special in them: results that nobody uses, what is kept."""

from __future__ import annotations

from typing import Any

import megarewarm_kernels as kernels
import pytest
import torch
from megarewarm_kernels.layer import swiglu as swiglu_module
from megarewarm_kernels.layer.rms_norm import reference
from torch import Tensor
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kept(function: Any) -> dict[int, int]:
    """The storages that autograd saves while ``function`` runs: address -> bytes."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return storages


@pytest.mark.parametrize("size", [1, 7, 576, 16384, 20000])
def test_the_norm_is_llamas(size: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(size, eps=1e-5)
    theirs.weight.data.copy_(random(size))
    x, delta = random(2, 3, size, seed=1).requires_grad_(), random(2, 3, size, seed=2).requires_grad_()
    upstream = random(2, 3, size, seed=3), random(2, 3, size, seed=4)
    total, normed = kernels.residual_rms_norm(x, delta, theirs.weight, eps=1e-5)
    wanted = x + delta
    torch.testing.assert_close(normed, theirs(wanted), rtol=2e-6, atol=1e-6)
    assert torch.equal(total, wanted)
    found = torch.autograd.grad([total, normed], [x, delta, theirs.weight], upstream)
    true = torch.autograd.grad([wanted, theirs(wanted)], [x, delta, theirs.weight], upstream)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_either_result_may_be_left_unused(used: tuple[int, ...], added: bool) -> None:
    inputs = [random(4, 6, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(1 + added)]
    weight = random(6, seed=3, dtype=torch.float64).requires_grad_()
    leaves = [*inputs, weight]

    def gradients(function: Any) -> tuple[Tensor | None, ...]:
        results = function(inputs[0], inputs[1] if added else None, weight)
        loss = torch.stack([results[i].pow(3).sum() for i in used]).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    for found, wanted in zip(gradients(kernels.residual_rms_norm), gradients(reference), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted)


def test_what_is_kept_and_what_is_not_copied() -> None:
    x, delta, weight = random(64, 32).requires_grad_(), random(64, 32, seed=1), random(32).requires_grad_()
    total, _ = kernels.residual_rms_norm(x, None, weight)
    assert total.data_ptr() == x.data_ptr()
    sums = kept(lambda: kernels.residual_rms_norm(x, delta, weight))
    assert sorted(sums.values()) == sorted([x.nbytes, weight.nbytes, 64 * 4])
    first = kept(lambda: kernels.rms_norm(x, weight))
    assert sorted(first.values()) == sorted([x.nbytes, weight.nbytes, 64 * 4]) and x.data_ptr() in first
    pairs = random(64, 32).requires_grad_()
    assert kept(lambda: kernels.swiglu(pairs)) == {pairs.data_ptr(): pairs.nbytes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_fp32_beside_activations_in_half_precision(dtype: torch.dtype) -> None:
    x, delta = (random(33, 130, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    weight = random(130, seed=3).requires_grad_()
    total, normed = kernels.residual_rms_norm(x, delta, weight)
    exact = F.rms_norm(total.double(), (130,), weight.double(), 1e-6)
    assert normed.dtype == total.dtype == dtype and torch.equal(total, x + delta)
    assert ((normed.double() - exact).abs() <= torch.finfo(dtype).eps * (0.51 * exact.abs() + 1e-4)).all(), "rounded once"
    dx, ddelta, dweight = torch.autograd.grad([normed], [x, delta, weight], [random(33, 130, seed=4, dtype=dtype)])
    assert dx.dtype == ddelta.dtype == dtype and dweight.dtype == torch.float32
    wide = total.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(
        F.rms_norm(wide, (130,), weight.double(), 1e-6), [wide], random(33, 130, seed=4, dtype=dtype).double()
    )
    torch.testing.assert_close(dx.double(), true, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_rows_far_from_one_in_size(scale: float) -> None:
    x = (random(3, 64) * scale).requires_grad_()
    weight = random(64, seed=1).requires_grad_()
    found = torch.autograd.grad(kernels.rms_norm(x, weight, eps=1e-30), [x, weight], random(3, 64, seed=2))
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    wanted = torch.autograd.grad(F.rms_norm(wide[0], (64,), wide[1], 1e-30), wide, random(3, 64, seed=2).double())
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= 1e-6 * other.norm()


def test_swiglu_is_llamas_mlp_with_interleaved_rows() -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=10, num_attention_heads=2)).double()
    x = random(2, 5, 12, dtype=torch.float64)
    rows = torch.stack([theirs.gate_proj.weight, theirs.up_proj.weight], 1).flatten(0, 1)
    ours = F.linear(kernels.swiglu(F.linear(x, rows)), theirs.down_proj.weight)
    torch.testing.assert_close(ours, theirs(x), rtol=1e-12, atol=1e-12)
    parameters, upstream = list(theirs.parameters()), random(2, 5, 12, seed=1, dtype=torch.float64)
    found = torch.autograd.grad(ours, parameters, upstream)
    for one, other in zip(found, torch.autograd.grad(theirs(x), parameters, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglus_derivative_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    pairs, grad = random(11, 14, dtype=dtype), random(11, 7, seed=1, dtype=dtype)
    backward = torch.ops.megarewarm.swiglu_backward
    whole = backward(grad, pairs)
    monkeypatch.setattr(swiglu_module, "_CHUNK", 28)  # 4, 4 and 3 rows
    # not bit for bit: PyTorch computes what is left of a row after whole vectors by other instructions
    torch.testing.assert_close(swiglu_module._define_backward(grad, pairs), whole)
    leaf = pairs.double().requires_grad_()
    (true,) = torch.autograd.grad(F.silu(leaf[:, ::2]) * leaf[:, 1::2], [leaf], grad.double())
    torch.testing.assert_close(whole.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_swiglu_where_exponentials_overflow() -> None:
    pairs = torch.tensor([-200.0, 3.0, 200.0, 3.0, 0.0, 3.0, -200.0, 0.0]).requires_grad_()
    out = kernels.swiglu(pairs)
    assert out.tolist() == [0.0, 600.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(out.sum(), [pairs])
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 3.0, 200.0, 1.5, 0.0, 0.0, 0.0]))
