"""Attention on a device: every backend that is there against float64, ours twice for races."""

from __future__ import annotations

import pytest
import torch
from megarewarm_kernels import attention, flash_attention
from megarewarm_kernels.attention.choose import BACKENDS, choose

from tests.support.attention_cases import arguments, assert_as_exact_as_torch, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [
    # batch, length, heads, head_dim, rotated, documents
    (2, 2048, 4, 64, 16, None),
    (1, 1000, 2, 64, 16, [[1, 300, 64, 635]]),
    (2, 513, 2, 128, 32, [[513], [256, 257]]),
    (1, 333, 2, 80, 20, None),
    (1, 700, 1, 256, 64, [[350, 350]]),
    (3, 65, 2, 16, 4, None),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ours_is_as_exact_as_torch_and_the_same_twice(shape, dtype) -> None:
    case = arguments(*shape)
    assert_as_exact_as_torch(flash_attention, case, dtype, "cuda")
    on_device = case.to(dtype).on("cuda")
    first, second = results(flash_attention, on_device), results(flash_attention, on_device)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("documents", [None, [[100, 412], [512]]], ids=["whole", "documents"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_that_is_there(name, documents) -> None:
    found, why = choose("cuda", torch.bfloat16, 64, documents=documents is not None, wanted=name)
    if found != name:
        pytest.skip(f"{name}: {why}")

    def use(qkv, cos, sin, *, head_dim, starts):
        return attention(qkv, cos, sin, head_dim=head_dim, starts=starts, backend=name)

    assert_as_exact_as_torch(use, arguments(2, 512, 2, 64, 16, documents), torch.bfloat16, "cuda")


def test_offsets_beyond_two_to_the_31() -> None:
    """A projection of 2^31 elements and more: the last sequence is that of a small one."""
    small = arguments(1, 2048, 16, 64, 16).to(torch.bfloat16).on("cuda")
    count = 2**31 // small.qkv.numel() + 1
    large = small.qkv.expand(count, -1, -1).contiguous()
    with torch.no_grad():
        out = torch.ops.megarewarm.flash_attention(large, None, 64, 1)[0]
        alone = torch.ops.megarewarm.flash_attention(small.qkv, None, 64, 1)[0]
    assert torch.equal(out[-1], alone[0])
