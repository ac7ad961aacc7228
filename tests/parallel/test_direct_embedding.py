"""An embedding that adds its gradient to what is there, against autograd's, over several micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megarewarm.parallel.direct_embedding import DirectEmbedding


@pytest.mark.parametrize("there", [False, True])
def test_it_has_autograds_gradient(there: bool) -> None:
    """``there``: into memory that others hold, as data-parallel ranks do."""
    plain, direct = (nn.Embedding(11, 6) for _ in range(2))
    direct.load_state_dict(plain.state_dict())
    direct.__class__ = DirectEmbedding
    flat = torch.zeros(70)
    if there:
        direct.weight.grad = flat[2:68].view(11, 6)
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        tokens, upstream = torch.randint(11, (2, 9), generator=random), torch.randn(2, 9, 6, generator=random)
        for embedding in (plain, direct):
            embedding(tokens).bfloat16().backward(upstream.bfloat16())
    torch.testing.assert_close(direct.weight.grad, plain.weight.grad)
    if there:
        torch.testing.assert_close(flat[2:68].view(11, 6), plain.weight.grad)


def test_what_it_rounds_itself_has_the_bits_of_a_cast_behind_it() -> None:
    random = torch.Generator().manual_seed(0)
    tokens, upstream = torch.randint(11, (2, 9), generator=random), torch.randn(2, 9, 6, generator=random).bfloat16()
    values, found = torch.randn(11, 6, generator=random), []
    for rounds in (True, False):
        direct = nn.Embedding(11, 6, _weight=values.clone())
        direct.__class__ = DirectEmbedding
        assert isinstance(direct, DirectEmbedding)
        direct.rounds = rounds
        assert direct(tokens).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            result = direct(tokens)
        assert result.dtype == (torch.bfloat16 if rounds else torch.float32)
        result.bfloat16().backward(upstream)
        assert direct.weight.grad is not None
        found.append((result.bfloat16(), direct.weight.grad))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


def test_a_frozen_one_is_left_alone() -> None:
    direct = nn.Embedding(11, 6)
    direct.__class__ = DirectEmbedding
    direct.requires_grad_(False)
    assert not direct(torch.tensor([[1, 2]])).requires_grad
