"""The fused operations as the tests see them: arguments at random, the public function, its definition, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import megarewarm_kernels as kernels
import torch
from megarewarm_kernels.layer.bias_gelu import reference as bias_gelu_reference
from megarewarm_kernels.layer.residual_norms import reference as residual_norms_reference
from torch import Tensor
from torch.nn import functional as F

Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """``shapes``: of the arguments for (rows, columns). ``torch``: what a user would write without us."""

    shapes: Callable[[int, int], list[tuple[int, ...]]]
    ours: Callable[..., Outputs]
    definition: Callable[..., Outputs]
    torch: Callable[..., Outputs]


def _gelu(approximate: str) -> Case:
    return Case(
        shapes=lambda rows, columns: [(rows, columns), (columns,)],
        ours=lambda x, b: [kernels.bias_gelu(x, b, approximate=approximate)],
        definition=lambda x, b: [bias_gelu_reference(x, b, approximate=approximate)],
        torch=lambda x, b: [F.gelu(x + b, approximate=approximate)],
    )


def _norms_by_torch(*arguments: Tensor) -> Outputs:
    x = arguments[0] + arguments[1] + arguments[2] if len(arguments) == 7 else arguments[0]
    weight1, bias1, weight2, bias2 = arguments[-4:]
    return [x, *(F.layer_norm(x, x.shape[-1:], w, b) for w, b in ((weight1, bias1), (weight2, bias2)))]


def _norms(added: bool) -> Case:
    def padded(arguments: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return arguments if added else (arguments[0], None, None, *arguments[1:])

    return Case(
        shapes=lambda rows, columns: [(rows, columns)] * (3 if added else 1) + [(columns,)] * 4,
        ours=lambda *arguments: kernels.residual_norms(*padded(arguments)),
        definition=lambda *arguments: residual_norms_reference(*padded(arguments)),
        torch=_norms_by_torch,
    )


CASES = {
    "bias_gelu": _gelu("none"),
    "bias_gelu_tanh": _gelu("tanh"),
    "residual_norms": _norms(added=True),
    "norms": _norms(added=False),
}


def arguments_of(case: Case, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Random arguments, those of one dimension near 1 in size; all ask for gradients."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in case.shapes(rows, columns)
    ]


def results(function: Callable[..., Outputs], arguments: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs and gradients, for random upstream gradients."""
    copies = [argument.detach().requires_grad_() for argument in arguments]
    outputs = list(function(*copies))
    random = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(output.shape, generator=random, dtype=torch.float64).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, copies, upstream)
    return [*(output.detach() for output in outputs), *gradients]


def assert_as_exact_as_torch(case: Case, arguments: list[Tensor], device: str = "cpu") -> None:
    """Errors against float64 at most twice those of PyTorch's own operations in the same dtype."""
    true = results(case.torch, [argument.detach().double() for argument in arguments])
    theirs = results(case.torch, [argument.detach().to(device) for argument in arguments])
    ours = results(case.ours, [argument.detach().to(device) for argument in arguments])
    tiny = 4 * torch.finfo(arguments[0].dtype).eps * 2**-3
    for number, (wanted, mine, other) in enumerate(zip(true, ours, theirs, strict=True)):
        assert mine.dtype == arguments[0].dtype and mine.shape == wanted.shape
        size = wanted.norm().item() or 1.0
        error, allowed = (
            (mine.cpu().double() - wanted).norm().item() / size,
            (other.cpu().double() - wanted).norm().item() / size,
        )
        assert error <= 2 * allowed + tiny, f"result {number}: error {error:.3g}, torch has {allowed:.3g}"
