"""The fused operations as the tests see them: arguments at random, the public function, its definition, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import megarewarm_kernels as kernels
import torch
from megarewarm_kernels.attention.head_norms import reference as norm_heads_reference
from megarewarm_kernels.attention.width_norms import reference as norm_widths_reference
from megarewarm_kernels.layer.bias_gelu import reference as bias_gelu_reference
from megarewarm_kernels.layer.residual_norms import reference as residual_norms_reference
from megarewarm_kernels.layer.rms_norm import reference as rms_norm_reference
from megarewarm_kernels.layer.swiglu import reference as swiglu_reference
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


def _norms_with_biases() -> Case:
    """Biases that the two parts hold already."""

    def ours(x: Tensor, attn_out: Tensor, mlp_out: Tensor, *rest: Tensor) -> Outputs:
        *norms, one, other = rest
        held = attn_out + one.detach(), mlp_out + other.detach()
        return kernels.residual_norms(x, *held, *norms, biases=(one, other))

    def plainly(side: Callable[..., Outputs]) -> Callable[..., Outputs]:
        return lambda x, attn_out, mlp_out, *rest: side(x, attn_out + rest[-2], mlp_out + rest[-1], *rest[:-2])

    return Case(
        shapes=lambda rows, columns: [(rows, columns)] * 3 + [(columns,)] * 6,
        ours=ours,
        definition=plainly(residual_norms_reference),
        torch=plainly(_norms_by_torch),
    )


def _rms_norm_by_torch(*arguments: Tensor) -> Outputs:
    x, weight = arguments[0], arguments[-1]
    x = x + arguments[1] if len(arguments) == 3 else x
    normed = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return [x, normed] if len(arguments) == 3 else [normed]


def _swiglu_by_torch(pairs: Tensor) -> Outputs:
    return [F.silu(pairs[..., 0::2]) * pairs[..., 1::2]]


GROUP = 2  # queries of each of two key heads


def _norms_of_heads(wide: bool) -> Case:
    """``columns``: four times the channels of a head."""
    function, definition = (kernels.norm_widths, norm_widths_reference) if wide else (kernels.norm_heads, norm_heads_reference)

    def by_torch(qkv: Tensor, query_weight: Tensor, key_weight: Tensor) -> Outputs:
        query, key, value = qkv.unflatten(-1, (2, GROUP + 2, -1)).split([GROUP, 1, 1], -2)
        if wide:
            query, key = (
                F.rms_norm(part, part.shape[-3:], weight.view(part.shape[-3:]), 1e-6)
                for part, weight in ((query, query_weight), (key, key_weight))
            )
        else:
            query, key = (F.rms_norm(q, w.shape, w, 1e-6) for q, w in ((query, query_weight), (key, key_weight)))
        return [torch.cat([query, key, value], -2).flatten(-3)]

    def shapes(rows: int, columns: int) -> list[tuple[int, ...]]:
        d = max(1, columns // 4)
        return [(rows, 2 * (GROUP + 2) * d), *([(2 * GROUP * d,), (2 * d,)] if wide else [(d,)] * 2)]

    def run(side: Callable[..., Tensor]) -> Callable[..., Outputs]:
        return lambda qkv, query_weight, key_weight: [
            side(qkv, query_weight, key_weight, head_dim=qkv.shape[-1] // (2 * (GROUP + 2)), group=GROUP)
        ]

    return Case(shapes, run(function), run(definition), by_torch)


CASES = {
    "bias_gelu": _gelu("none"),
    "bias_gelu_tanh": _gelu("tanh"),
    "residual_norms": _norms(added=True),
    "norms": _norms(added=False),
    "residual_norms_biases": _norms_with_biases(),
    "residual_norm": Case(
        shapes=lambda rows, columns: [(rows, columns)] * 3 + [(columns,)] * 4,
        ours=lambda x, a, m, w, b, one, other: [
            kernels.residual_norm(x, a + one.detach(), m + other.detach(), w, b, biases=(one, other))
        ],
        definition=lambda x, a, m, w, b, one, other: [residual_norms_reference(x, a + one, m + other, w, b)[1]],
        torch=lambda x, a, m, w, b, one, other: [F.layer_norm(x + (a + one) + (m + other), x.shape[-1:], w, b)],
    ),
    "norm": Case(
        shapes=lambda rows, columns: [(rows, columns)] + [(columns,)] * 2,
        ours=lambda x, w, b: [kernels.residual_norm(x, None, None, w, b)],
        definition=lambda x, w, b: [residual_norms_reference(x, None, None, w, b)[1]],
        torch=lambda x, w, b: [F.layer_norm(x, x.shape[-1:], w, b)],
    ),
    "residual_rms_norm": Case(
        shapes=lambda rows, columns: [(rows, columns), (rows, columns), (columns,)],
        ours=kernels.residual_rms_norm,
        definition=rms_norm_reference,
        torch=_rms_norm_by_torch,
    ),
    "rms_norm": Case(
        shapes=lambda rows, columns: [(rows, columns), (columns,)],
        ours=lambda x, w: [kernels.rms_norm(x, w)],
        definition=lambda x, w: [rms_norm_reference(x, None, w)[1]],
        torch=_rms_norm_by_torch,
    ),
    "swiglu": Case(
        shapes=lambda rows, columns: [(rows, 2 * columns)],
        ours=lambda pairs: [kernels.swiglu(pairs)],
        definition=lambda pairs: [swiglu_reference(pairs)],
        torch=_swiglu_by_torch,
    ),
    "norm_heads": _norms_of_heads(wide=False),
}
PLAIN = {"norm_widths": _norms_of_heads(wide=True)}
"""Operations without a kernel of their own."""


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


def assert_as_exact_as_torch(case: Case, arguments: list[Tensor]) -> None:
    """Errors against float64 at most twice those of PyTorch's own operations in the same dtype."""
    true = results(case.torch, [argument.detach().double() for argument in arguments])
    theirs, ours = (results(function, arguments) for function in (case.torch, case.ours))
    tiny = torch.finfo(arguments[0].dtype).eps  # of results of few elements, where their errors are a matter of luck
    for number, (wanted, mine, other) in enumerate(zip(true, ours, theirs, strict=True)):
        assert mine.dtype == arguments[0].dtype and mine.shape == wanted.shape
        size = wanted.norm().item() or 1.0
        error, allowed = ((found.double() - wanted).norm().item() / size for found in (mine, other))
        assert error <= 2 * allowed + tiny, f"result {number}: error {error:.3g}, torch has {allowed:.3g}"
