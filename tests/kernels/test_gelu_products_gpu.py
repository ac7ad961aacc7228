"""GELU as part of the products on a device: cuBLASLt's own epilogues against float64, in a CUDA graph, and in the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megarewarm_kernels import gelu_products
from megarewarm_kernels.layer import cublaslt
from megarewarm_kernels.layer.gelu_products import LowLayer
from torch import Tensor, nn
from torch.nn import functional as F

from tests.kernels.test_gelu_products import error, layers, ours, separately, true
from tests.model.test_gelu_products import CHOSEN, exact_gradients, gradients, model_of
from tests.support.cublaslt import gelu
from tests.support.on_device import NEEDS_GPU

pytestmark = NEEDS_GPU
CUDA = torch.device("cuda")


def on_the_device(dtype: torch.dtype, h: int, f: int, o: int) -> tuple[LowLayer, LowLayer]:
    def moved(layer: LowLayer) -> LowLayer:
        weight, bias = (nn.Parameter(parameter.detach().to(CUDA)) for parameter in (layer.weight, layer.bias))
        return LowLayer(weight, bias, layer.low.to(CUDA), layer.low_bias.to(CUDA))

    first, second = layers(dtype, (h, f, o))
    return moved(first), moved(second)


def some(dtype: torch.dtype, count: int, tokens: int, h: int, o: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator(CUDA).manual_seed(4)
    drawn = lambda size: torch.randn(tokens, size, generator=random, device=CUDA).to(dtype)  # noqa: E731
    return [(drawn(h), drawn(o)) for _ in range(count)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "h", "f", "o"), [(1, 8, 16, 8), (37, 128, 512, 128), (2051, 200, 808, 200), (16384, 1024, 4096, 1024)]
)
def test_no_less_exact_than_separate_ones(tokens: int, h: int, f: int, o: int, dtype: torch.dtype, keep: bool) -> None:
    assert cublaslt.objection(CUDA, dtype, h, f, o) == ""
    given = some(dtype, 2, tokens, h, o)
    once, twice, apart = (on_the_device(dtype, h, f, o) for _ in range(3))
    found, again = (ours(lambda *each: gelu_products(*each, keep=keep), given, *side) for side in (once, twice))
    others, wanted = ours(separately, given, *apart), true(given, *once)
    for number, (mine, other, exact) in enumerate(zip(found, others, wanted, strict=True)):
        assert error(mine, exact) < 2 * error(other, exact) + torch.finfo(dtype).eps / 2, number
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_its_gelu_is_the_tanh_approximation() -> None:
    bias = torch.linspace(-4, 0, 4096, device=CUDA).half()
    weight, x = torch.zeros(4096, 8, device=CUDA).half(), torch.zeros(16, 8, device=CUDA).half()
    active, before = torch.ops.megarewarm.gelu_product(x, weight, bias)
    assert torch.equal(before, bias.expand(16, -1))
    distances = [float((active.double() - exact).abs().mean()) for exact in (gelu(bias.double())[0], F.gelu(bias.double()))]
    assert distances[0] < distances[1] / 2, distances


def test_sizes_that_it_can_t_have_are_computed_by_pytorch() -> None:
    assert cublaslt.objection(CUDA, torch.bfloat16, 5) != ""
    given, sides = some(torch.bfloat16, 2, 18, 5, 3), [on_the_device(torch.bfloat16, 5, 7, 3) for _ in range(2)]
    found, others = ours(gelu_products, given, *sides[0]), ours(separately, given, *sides[1])
    for mine, other, exact in zip(found, others, true(given, *sides[0]), strict=True):
        assert error(mine, exact) < 2 * error(other, exact) + 2e-3


def test_a_graph_replays_it() -> None:
    first, second = on_the_device(torch.bfloat16, 128, 512, 128)
    (x, grad), (other, _) = some(torch.bfloat16, 2, 256, 128, 128)
    place = x.clone().requires_grad_()
    for layer in (first, second):
        layer.weight.grad, layer.bias.grad = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
    place.grad = torch.zeros_like(place)

    def run() -> Tensor:
        result = gelu_products(place, first, second)
        result.backward(grad)
        return result.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    every = [place, first.weight, first.bias, second.weight, second.bias]
    sums = [each.grad for each in every if each.grad is not None]
    found = []
    for replayed in (True, False):
        for total in sums:
            total.zero_()
        with torch.no_grad():
            place.copy_(other)
        if replayed:
            graph.replay()
        else:
            result = run()
        torch.cuda.synchronize()
        found.append([result.clone(), *(total.clone() for total in sums)])
    assert len(sums) == 5 and all(torch.equal(one, another) for one, another in zip(*found, strict=True))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_model_is_no_less_exact(recompute: str) -> None:
    size: dict[str, Any] = {"hidden_size": 128}
    errors = {}
    for chosen in (dataclasses.replace(CHOSEN, gelu="triton"), CHOSEN):
        torch.manual_seed(5)
        model = model_of(chosen, recompute, "cuda", **size)
        found, wanted = gradients(model), exact_gradients(model)
        errors[chosen.gelu] = {name: (found[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted}
    for name, found_error in errors["cublaslt"].items():
        assert found_error < 1.5 * errors["triton"][name] + 4e-3 and found_error < 0.03, name
