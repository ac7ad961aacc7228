"""The fused operations on any machine: their definitions, their derivatives, and what PyTorch asks of an operator."""

from __future__ import annotations

from collections.abc import Callable

import megarewarm_kernels as kernels
import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint

from tests.support.kernel_cases import CASES, GROUP, PLAIN, arguments_of, assert_as_exact_as_torch, results

ALL = CASES | PLAIN


@pytest.mark.parametrize("name", ALL)
def test_derivatives_are_those_of_the_definition(name: str) -> None:
    case = ALL[name]
    arguments = arguments_of(case, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: tuple(case.ours(*inputs)), arguments)
    for mine, wanted in zip(results(case.ours, arguments), results(case.definition, arguments), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_as_exact_as_torch(name: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(ALL[name], arguments_of(ALL[name], 33, 130, dtype))


@pytest.mark.parametrize("name", ALL)
def test_more_dimensions_and_none(name: str) -> None:
    case = ALL[name]
    arguments = arguments_of(case, 6, 8, torch.float32)
    flat = results(case.ours, arguments)
    shaped = results(
        case.ours, [argument.detach().view(2, 3, -1) if argument.dim() == 2 else argument for argument in arguments]
    )
    for one, other in zip(flat, shaped, strict=True):
        torch.testing.assert_close(one, other.view(one.shape), rtol=0, atol=1e-6)
    empty = results(case.ours, arguments_of(case, 0, 8, torch.float32))
    assert all(not result.any() for result in empty), "no rows, no gradients"


def operators(name: str) -> list[tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    ops = torch.ops.megarewarm
    case = CASES[name]
    detached = [argument.detach() for argument in arguments_of(case, 4, 8, torch.float32)]
    if name.startswith("bias_gelu"):
        tanh = name.endswith("tanh")
        x, bias = detached
        return [(ops.bias_gelu.default, (x, bias, tanh)), (ops.bias_gelu_backward.default, (x + 1, x, bias, tanh))]
    if name == "swiglu":
        (pairs,) = detached
        return [(ops.swiglu.default, (pairs,)), (ops.swiglu_backward.default, (pairs[:, ::2] + 1, pairs))]
    if name == "norm_heads":
        forward: tuple[object, ...] = (*detached, len(detached[1]), GROUP, 1e-6)
        _, rstd = ops.norm_heads.default(*forward)
        backward: tuple[object, ...] = (detached[0] + 1, *detached, rstd, len(detached[1]), GROUP)
        return [(ops.norm_heads.default, forward), (ops.norm_heads_backward.default, backward)]
    if name.endswith("rms_norm"):
        x, *delta, weight = detached
        forward = (x, delta[0] if delta else None, weight, 1e-6)
        _, normed, rstd = ops.residual_rms_norm.default(*forward)
        backward = (delta[0] if delta else None, normed, x, weight, rstd)
        return [(ops.residual_rms_norm.default, forward), (ops.residual_rms_norm_backward.default, backward)]
    if name in ("norm", "residual_norm"):
        x, *more = detached
        alone = name == "norm"
        forward = (x, *([None, None] if alone else more[:2]), *(more if alone else more[2:4]), None, None, 1e-5)
        _, first, _, mean, scale = ops.residual_norms.default(*forward)
        backward = (None, first, None, x, forward[3], None, mean, scale, *([None, None] if alone else more[4:]))
        return [(ops.residual_norms.default, forward), (ops.residual_norms_backward.default, backward)]
    added, norms = (detached[:3], detached[3:7]) if len(detached) >= 7 else ([detached[0], None, None], detached[1:])
    biases: list[Tensor | None] = [*detached[7:]] or [None, None]
    forward = (*added, *norms, 1e-5)
    _, first, second, mean, scale = ops.residual_norms.default(*forward)
    backward = (first, second, first, detached[0], norms[0], norms[2], mean, scale, *biases)
    return [(ops.residual_norms.default, forward), (ops.residual_norms_backward.default, backward)]


@pytest.mark.parametrize("name", CASES)
def test_operators_keep_pytorchs_rules(name: str) -> None:
    for operator, arguments in operators(name):
        checks = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ALL)
def test_compiled_whole_and_checkpointed(name: str) -> None:
    case = ALL[name]
    arguments = arguments_of(case, 5, 8, torch.float32)
    wanted = results(case.ours, arguments)
    torch.compiler.reset()  # all cases are one function to it, whose number of versions is limited
    compiled = torch.compile(lambda *inputs: case.ours(*inputs), fullgraph=True, backend="aot_eager")
    again = lambda *inputs: checkpoint.checkpoint(case.ours, *inputs, use_reentrant=False)  # noqa: E731
    for function in (compiled, again):
        for one, other in zip(wanted, results(function, arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_that_nobody_asks_for() -> None:
    case = CASES["residual_norms"]
    arguments = [argument.detach() for argument in arguments_of(case, 4, 8, torch.float64)]
    arguments[3].requires_grad_()
    ours, theirs = (
        torch.stack([output.square().sum() for output in side(*arguments)]).sum() for side in (case.ours, case.torch)
    )
    (gradient,) = torch.autograd.grad(ours, [arguments[3]])
    (wanted,) = torch.autograd.grad(theirs, [arguments[3]])
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: kernels.bias_gelu(x, torch.ones(3)), r"need x .* got \(2, 4\) and \(3,\)"),
        (lambda x: kernels.bias_gelu(x, torch.ones(4), approximate="fast"), "not 'fast'"),
        (lambda x: kernels.residual_norms(x, x, None, *[torch.ones(4)] * 4), "'mlp_out' is nothing"),
        (lambda x: kernels.residual_norms(x, x, x[:1], *[torch.ones(4)] * 4), r"'mlp_out' is \(1, 4\)"),
        (lambda x: kernels.residual_norms(x, x, x, *[torch.ones(5)] * 4), r"are \(4,\), got \(5,\)"),
        (lambda x: kernels.residual_norms(x, x, x, *[torch.ones(4)] * 4, biases=(None, x[0, :1])), r"\(4,\), got \(1,\)"),
        (lambda x: kernels.residual_rms_norm(x, x[:1], torch.ones(4)), r"like x \(2, 4\) or None, got \(1, 4\)"),
        (lambda x: kernels.residual_rms_norm(x, x, torch.ones(3)), r"need x .* got \(2, 4\) and \(3,\)"),
        (lambda x: kernels.swiglu(x[:, :3]), r"need pairs \(..., 2 f\), got \(2, 3\)"),
        (lambda x: kernels.norm_heads(x, x[0], x[0], head_dim=4), r"need qkv \(..., heads x 3 x 4\), got \(2, 4\)"),
        (lambda x: kernels.norm_heads(x, x[0], x[0, :1], head_dim=1, group=2), r"'query_weight' is \(1,\), got \(4,\)"),
        (lambda x: kernels.norm_widths(x, x[0, :2], x[0], head_dim=1, group=2), r"'key_weight' is \(1,\), got \(4,\)"),
        (lambda x: kernels.norm_widths(x, x[0, :2], x[0, :1], head_dim=1, group=2, ranks=2), "2 ranks need sum_over"),
    ],
)
def test_wrong_arguments_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.ones(2, 4))  # type: ignore[operator]


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x: Tensor = torch.ones(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels.bias_gelu(x, torch.ones(4)).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_that_nothing_computes_in_are_named(dtype: torch.dtype) -> None:
    wrong, right, targets = torch.zeros(4, 4).to(dtype), torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64)
    calls: list[Callable[[], object]] = [
        lambda: kernels.bias_gelu(wrong, right[0]),
        lambda: kernels.residual_norms(right, right, right, right[0], right[0], right[0], wrong[0]),
        lambda: kernels.residual_rms_norm(right, wrong, right[0]),
        lambda: kernels.swiglu(wrong),
        lambda: kernels.norm_heads(right[:, :3], wrong[0, :1], right[0, :1], head_dim=1),
        lambda: kernels.norm_widths(right[:, :3], right[0, :1], wrong[0, :1], head_dim=1),
        lambda: kernels.linear_cross_entropy(wrong, right, targets),
        lambda: kernels.squared_norm(wrong),
        lambda: kernels.adamw_(right, wrong, right, right, step=1, lr=0.1),
        lambda: kernels.rotate_(wrong[:, :3], right[:, :0], right[:, :0], head_dim=1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"is {dtype}, need bf16, fp16, fp32 or fp64"):
            call()
