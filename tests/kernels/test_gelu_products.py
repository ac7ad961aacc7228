"""GELU as part of the products around it: float64 is the judge, a stand-in does what cuBLASLt's manual says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from megarewarm_kernels import bias_gelu, gelu_products, products
from megarewarm_kernels.layer import cublaslt
from megarewarm_kernels.layer.gelu_products import LowLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.cublaslt import DGELU_BGRAD, GELU_AUX_BIAS, StandIn, gelu

MICRO_BATCHES = 4
Mlp = Callable[[Tensor, LowLayer, LowLayer], Tensor]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """CPU tensors are multiplied by the stand-in."""
    stand_in = StandIn()
    lt = cublaslt.CublasLt(stand_in)
    monkeypatch.setattr(cublaslt, "objection", lambda *_: "")
    monkeypatch.setattr(cublaslt, "loaded", lambda: lt)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 48)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return stand_in


def layers(dtype: torch.dtype, sizes: tuple[int, int, int] = (16, 40, 24)) -> tuple[LowLayer, LowLayer]:
    """Of h, f and o; the parameters in fp32, or in float64."""
    random, exact = torch.Generator().manual_seed(3), torch.promote_types(dtype, torch.float32)
    made = []
    for wide, tall in pairwise(sizes):
        drawn = [torch.randn(size, generator=random, dtype=torch.float64) for size in ((tall, wide), (tall,))]
        weight, bias = (nn.Parameter(each.to(exact) / wide**0.5) for each in drawn)
        made.append(LowLayer(weight, bias, weight.detach().to(dtype), bias.detach().to(dtype)))
    return made[0], made[1]


def batches(dtype: torch.dtype, h: int = 16, o: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Inputs (2, 9, h) and gradients (2, 9, o) of some micro-batches."""
    random = torch.Generator().manual_seed(4)
    drawn = lambda size: torch.randn(2, 9, size, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    return [(drawn(h), drawn(o)) for _ in range(MICRO_BATCHES)]


def true(given: list[tuple[Tensor, Tensor]], first: LowLayer, second: LowLayer) -> list[Tensor]:
    """Results, gradients of inputs, and those of the parameters, in float64, at what the products read."""
    w1, b1, w2, b2 = (part.double().requires_grad_() for layer in (first, second) for part in layer[2:])
    found: list[Tensor] = []
    for x, grad in given:
        x = x.double().requires_grad_()
        y = F.linear(gelu(F.linear(x, w1, b1))[0], w2, b2)
        y.backward(grad.double())
        found += [y.detach(), *([x.grad] if x.grad is not None else [])]
    return found + [part.grad for part in (w1, b1, w2, b2) if part.grad is not None]


def ours(mlp: Mlp, given: list[tuple[Tensor, Tensor]], first: LowLayer, second: LowLayer) -> list[Tensor]:
    found: list[Tensor] = []
    for x, grad in given:
        x = x.clone().requires_grad_()
        y = mlp(x, first, second)
        assert y.dtype == x.dtype
        y.backward(grad)
        found += [y.detach(), *([x.grad] if x.grad is not None else [])]
    parameters = first.weight, first.bias, second.weight, second.bias
    return found + [parameter.grad for parameter in parameters if parameter.grad is not None]


def separately(x: Tensor, first: LowLayer, second: LowLayer) -> Tensor:
    """As the trainer does it without."""
    z = products.linear(x, first.weight, None, first.low, None)
    active = bias_gelu(z, first.bias, approximate="tanh")
    return products.linear(active, second.weight, second.bias, second.low, second.low_bias)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_and_gradients_are_the_definitions(dtype: torch.dtype, keep: bool) -> None:
    first, second = layers(dtype, (5, 7, 3))
    given = batches(dtype, 5, 3)
    found = ours(lambda *arguments: gelu_products(*arguments, keep=keep), given, first, second)
    for mine, wanted in zip(found, true(given, first, second), strict=True):
        assert error(mine, wanted) < (1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["definition", "cublaslt"])
def test_no_less_exact_than_separate_ones(by: str, dtype: torch.dtype, keep: bool, request: pytest.FixtureRequest) -> None:
    """Several micro-batches, of which each weight's gradient is one sum in fp32."""
    stand_in = request.getfixturevalue("library") if by == "cublaslt" else None
    given = batches(dtype)
    first, second = layers(dtype)
    found = ours(lambda *arguments: gelu_products(*arguments, keep=keep), given, first, second)
    others = layers(dtype)
    apart = ours(separately, given, *others)
    assert len(found) == 2 * MICRO_BATCHES + 4
    for number, (mine, other, wanted) in enumerate(zip(found, apart, true(given, first, second), strict=True)):
        assert error(mine, wanted) < 2 * error(other, wanted) + torch.finfo(dtype).eps / 4, number
    if stand_in is not None:
        assert stand_in.calls.count("Matmul") == 2 * MICRO_BATCHES
        chosen = stand_in.calls.count("MatmulAlgoGetHeuristic")
        assert chosen == stand_in.calls.count("MatmulDescCreate")
        assert chosen <= 6, "one for each shape and alignment, which on a CPU is 64, 128 or 256 bytes"


def test_a_weights_gradient_is_added_in_place() -> None:
    first, second = layers(torch.float32)
    place = torch.zeros(2000)
    for layer, at in ((first, 7), (second, 800)):
        layer.weight.grad = place[at : at + layer.weight.numel()].view_as(layer.weight)
    given = batches(torch.float32)
    wanted = true(given, first, second)
    ours(gelu_products, given, first, second)
    assert error(place[7 : 7 + 640].view(40, 16), wanted[-4]) < 2e-6
    assert error(place[800 : 800 + 960].view(24, 40), wanted[-2]) < 2e-6
    assert not place[:7].any() and not place[647:800].any() and not place[1760:].any()


def test_what_is_frozen_or_given_elsewhere_gets_nothing(library: StandIn) -> None:
    first, second = layers(torch.bfloat16)
    given = batches(torch.bfloat16)[:1]
    second.weight.requires_grad_(False)
    found = ours(gelu_products, given, first, second._replace(bias=second.bias.detach()))
    assert second.weight.grad is second.bias.grad is None and len(found) == 4
    wanted = true(given, first, second)
    assert max(error(mine, other) for mine, other in zip(found, wanted[:4], strict=True)) < 8e-3

    first, second = layers(torch.bfloat16)
    first.weight.requires_grad_(False), first.bias.requires_grad_(False)
    library.calls.clear()
    gelu_products(given[0][0], first, second).backward(given[0][1])
    assert first.weight.grad is None and library.calls.count("Matmul") == 1, "nothing before the last layer trains"
    assert second.weight.grad is not None and error(second.weight.grad, wanted[-2]) < 8e-3


def test_a_checkpointed_layer_computes_its_last_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = layers(torch.float32)
    given = batches(torch.float32)[:1]
    made: list[Tensor] = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *given, **named: made.append(addmm(*given, **named)) or made[-1])
    found = ours(lambda *arguments: checkpoint(gelu_products, *arguments, use_reentrant=False), given, first, second)
    assert [len(tensor[0]) for tensor in made] == [40, 24, 40], "the first product twice, the last once"
    for mine, wanted in zip(found, true(given, first, second), strict=True):
        assert error(mine, wanted) < 2e-6


def test_no_tokens_and_no_gradients(library: StandIn) -> None:
    first, second = layers(torch.bfloat16)
    empty = torch.zeros(0, 16, dtype=torch.bfloat16, requires_grad=True)
    gelu_products(empty, first, second).sum().backward()
    assert empty.grad is not None and not library.calls
    assert first.weight.grad is not None and not first.weight.grad.any()
    with torch.no_grad():
        assert not gelu_products(batches(torch.bfloat16)[0][0], first, second).requires_grad


def test_wrong_arguments_are_refused() -> None:
    first, second = layers(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'x' is torch\.float32, its products need copies of that dtype"):
        gelu_products(torch.zeros(2, 16), first, second)
    with pytest.raises(ValueError, match=r"need x \(\.\.\., h\), weights \(f, h\) and \(o, f\), got \(2, 8\), \(40, 16\)"):
        gelu_products(torch.zeros(2, 8, dtype=torch.bfloat16), first, second)
    with pytest.raises(ValueError, match=r"'x' is torch\.int64"):
        gelu_products(torch.zeros(2, 16, dtype=torch.int64), first, second)


def test_pytorch_knows_both_operators() -> None:
    first, second = layers(torch.float32)
    x, ops = torch.randn(6, 16), torch.ops.megarewarm
    _, before = ops.gelu_product.default(x, first.low, first.low_bias)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.gelu_product.default, (x, first.low, first.low_bias), test_utils=tests)
    torch.library.opcheck(ops.gelu_product_backward.default, (torch.randn(6, 24), second.low, before), test_utils=tests)


# ---- cuBLASLt ---------------------------------------------------------------------------------------------------------------


def arguments(t: int, k: int, n: int, dtype: torch.dtype, transposed: bool, offset: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(t)
    drawn = lambda *size: torch.randn(size, generator=random).to(dtype)  # noqa: E731
    x = torch.zeros(t * k + offset, dtype=dtype)[offset:].view(t, k).copy_(drawn(t, k))
    weight = drawn(n, k) if transposed else drawn(k, n)
    out, bias, aux = torch.full((t, n), torch.nan, dtype=dtype), drawn(n), drawn(t, n)
    return {"x": x, "weight": weight, "out": out, "bias": bias, "aux": aux}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "k", "n"), [(1, 8, 8), (5, 16, 40), (64, 40, 16)])
def test_the_calls_say_what_is_multiplied(t: int, k: int, n: int, dtype: torch.dtype) -> None:
    lt = cublaslt.CublasLt(StandIn())
    assert (cublaslt.GELU_AUX_BIAS, cublaslt.DGELU_BGRAD) == (GELU_AUX_BIAS, DGELU_BGRAD)
    for _ in range(2):  # the second time by what was kept, with other memory
        forward = arguments(t, k, n, dtype, transposed=True)
        lt.multiply(**forward, epilogue=GELU_AUX_BIAS, handle=48, stream=0)
        before = forward["x"].double() @ forward["weight"].double().t() + forward["bias"].double()
        assert torch.equal(forward["aux"], before.to(dtype)) and torch.equal(forward["out"], gelu(before)[0].to(dtype))
        backward = arguments(t, k, n, dtype, transposed=False)
        lt.multiply(**backward, epilogue=DGELU_BGRAD, handle=48, stream=0)
        dz = backward["x"].double() @ backward["weight"].double() * gelu(backward["aux"].double())[1]
        assert torch.equal(backward["out"], dz.to(dtype)) and torch.equal(backward["bias"], dz.sum(0).to(dtype))


def test_what_is_kept_is_of_one_dtype_and_number_of_rows() -> None:
    lt = cublaslt.CublasLt(StandIn())
    for dtype in (torch.bfloat16, torch.float16):
        for t in (3, 64, 5):
            given = arguments(t, 16, 24, dtype, transposed=True)
            lt.multiply(**given, epilogue=GELU_AUX_BIAS, handle=48, stream=0)
            before = given["x"].double() @ given["weight"].double().t() + given["bias"].double()
            assert torch.equal(given["aux"], before.to(dtype))


def test_the_heuristic_learns_how_pointers_are_aligned() -> None:
    stand_in = StandIn()
    lt = cublaslt.CublasLt(stand_in)
    for _ in range(2):
        for offset, most in ((0, 256), (8, 16), (1, 2)):
            given = arguments(4, 16, 24, torch.bfloat16, transposed=True, offset=offset)
            lt.multiply(**given, epilogue=GELU_AUX_BIAS, handle=48, stream=0)
            assert given["x"].data_ptr() % (2 * most) == most or most == 256
    promised = [set(alignments.values()) for alignments in stand_in.chosen.values()]
    assert {16} in promised and {2} in promised and all(len(each) == 1 for each in promised)


@pytest.mark.parametrize("name", ["MatmulDescCreate", "MatmulDescSetAttribute", "MatmulAlgoGetHeuristic", "Matmul"])
def test_an_error_names_the_call(name: str) -> None:
    stand_in = StandIn()
    lt, given = cublaslt.CublasLt(stand_in), arguments(4, 16, 24, torch.bfloat16, transposed=True)
    stand_in.fails = {name}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^cublasLt{name} of cuBLASLt: cublasStatus_t 15; set kernels.gelu to triton"):
            lt.multiply(**given, epilogue=GELU_AUX_BIAS, handle=48, stream=0)
    stand_in.fails = set()
    lt.multiply(**given, epilogue=GELU_AUX_BIAS, handle=48, stream=0)
    assert not given["out"].isnan().any(), "what was kept of a call that failed is no obstacle"


def test_no_algorithm_is_an_error() -> None:
    stand_in = StandIn()
    stand_in.finds = 0
    with pytest.raises(RuntimeError, match="no algorithm for this product"):
        cublaslt.CublasLt(stand_in).multiply(
            **arguments(4, 16, 24, torch.bfloat16, transposed=True), epilogue=GELU_AUX_BIAS, handle=48, stream=0
        )


def test_what_can_t_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert cublaslt.objection(torch.device("cpu"), torch.bfloat16, 16) == "it runs on GPUs"
    assert "in bf16 or fp16, not float32" in cublaslt.objection(cuda, torch.float32, 16)
    assert cublaslt.objection(cuda, torch.bfloat16, 16, 20) == "its rows need multiples of 8 values, not 20"
    for version, library in ((None, None), ("99.1", None), ("13.0", SimpleNamespace())):
        monkeypatch.setattr(torch.version, "cuda", version)
        if library is not None:  # one without the functions
            monkeypatch.setattr(cublaslt.ctypes, "CDLL", lambda *_, library=library, **__: library)
        cublaslt.loaded.cache_clear()
        assert "PyTorch has loaded no libcublasLt" in cublaslt.objection(cuda, torch.bfloat16, 16)
    opened = []
    monkeypatch.setattr(cublaslt.ctypes, "CDLL", lambda name, **mode: opened.append((name, mode)) or StandIn())
    cublaslt.loaded.cache_clear()
    assert cublaslt.objection(cuda, torch.float16, 16) == "" and opened[0][0] == "libcublasLt.so.13"
    cublaslt.loaded.cache_clear()
