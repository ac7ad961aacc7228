"""An operation added from outside, as CONTRIBUTING says: its definition, its kernel, the shapes of its results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megarewarm_kernels.operators import HAS_TRITON, INTERPRETED, define, exact
from torch import Tensor
from torch.autograd.function import once_differentiable


def _definition(x: Tensor, gate: Tensor | None, limit: float) -> tuple[Tensor, Tensor]:
    wide = x.to(exact(x.dtype))
    slope = 1 - torch.tanh(wide / limit).square()
    capped = limit * torch.tanh(wide / limit)
    return (capped if gate is None else capped * gate).to(x.dtype), slope


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _definition(*arguments)  # what a Triton launch would be


def _shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape, dtype=exact(x.dtype))


def _defined() -> Any:
    if hasattr(torch.ops.megarewarm, "soft_cap"):  # an operator lasts as long as its process
        return torch.ops.megarewarm.soft_cap.default
    return define("soft_cap", _definition, shapes=_shapes, kernel=_kernel)


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        out, slope = _defined()(x, None, limit)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(grad.dtype), None


def test_the_signature_is_the_definitions() -> None:
    schema = str(_defined()._schema)
    assert schema == "megarewarm::soft_cap(Tensor x, Tensor? gate, float limit) -> (Tensor, Tensor)"


@pytest.mark.parametrize("shape", [(3, 7), (1,), (0, 5)])
def test_pytorch_knows_the_operation(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for gate in (None, torch.rand(shape)):
        torch.library.opcheck(_defined(), (x, gate, 3.0), test_utils=("test_schema", "test_faketensor"))
    keys = torch._C._dispatch_dump("megarewarm::soft_cap")
    assert ("CUDA:" in keys) == HAS_TRITON and ("\nCPU:" in keys) == INTERPRETED


def test_gradients_and_compilation() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: _SoftCap.apply(given, 2.0), (x,))
    compiled = torch.compile(lambda given: _SoftCap.apply(given, 2.0) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * _SoftCap.apply(x, 2.0))


def test_arguments_that_are_written_to_are_named() -> None:
    def negate(x: Tensor, times: int) -> None:
        x.mul_((-1) ** times)

    if not hasattr(torch.ops.megarewarm, "negate_"):
        define("negate_", negate, shapes=lambda x, times: None, mutates=("x",))
    operation = torch.ops.megarewarm.negate_.default
    assert str(operation._schema) == "megarewarm::negate_(Tensor(a0!) x, int times) -> ()"
    x = torch.ones(3)
    operation(x, 3)
    assert x.tolist() == [-1.0] * 3
