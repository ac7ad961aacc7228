"""What the tests of attention share: arguments at random, documents, outputs and gradients, errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Arguments:
    """Of attention, and the gradient that comes back."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    head_dim: int
    starts: Tensor | None
    grad: Tensor
    group: int = 1
    window: int | None = None

    def to(self, dtype: torch.dtype) -> Arguments:
        """In a dtype; the tables in fp32 or, for fp64, in fp64."""
        exact = torch.promote_types(dtype, torch.float32)
        cos, sin = self.cos.to(exact), self.sin.to(exact)
        return replace(self, qkv=self.qkv.to(dtype), cos=cos, sin=sin, grad=self.grad.to(dtype))

    def on(self, device: str) -> Arguments:
        """On a device."""
        names = ("qkv", "cos", "sin", "grad", "starts")
        moved: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else x.to(device) for name in names}
        return replace(self, **moved)


def starts_of(documents: Sequence[Sequence[int]], length: int) -> Tensor:
    """(b, s) int32 for the lengths of the documents of each row."""
    starts = torch.zeros(len(documents), length, dtype=torch.int32)
    for row, sizes in zip(starts, documents, strict=True):
        for begin in accumulate(sizes[:-1]):
            row[begin:] = begin
    return starts


def arguments(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    rotated: int,
    documents: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    each: bool = False,
    group: int = 1,
    window: int | None = None,
) -> Arguments:
    """Random, in fp64. ``heads``: of keys. ``each``: angles for every token, not every position."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    angles = normal(*([batch] if each else []), length, rotated // 2)
    # tables that fp32 holds exactly, so that all dtypes turn by the same angles
    cos, sin = angles.cos().float().double(), angles.sin().float().double()
    starts = None if documents is None else starts_of(documents, length)
    qkv, grad = normal(batch, length, heads * (group + 2) * head_dim), normal(batch, length, heads * group * head_dim)
    return Arguments(qkv, cos, sin, head_dim, starts, grad, group, window)


def results(function: Callable[..., Tensor], given: Arguments) -> tuple[Tensor, Tensor]:
    """The output and the gradient of qkv."""
    leaf = given.qkv.detach().requires_grad_()
    named = {"head_dim": given.head_dim, "group": given.group, "window": given.window, "starts": given.starts}
    out = function(leaf.clone(), given.cos, given.sin, **named)
    (gradient,) = torch.autograd.grad(out, [leaf], given.grad)
    return out.detach(), gradient


def by_torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    group: int = 1,
    window: int | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """What a user would write without us: complex numbers turn queries and keys, keys are repeated, PyTorch attends."""
    heads = qkv.unflatten(-1, (-1, group + 2, head_dim))
    query, key, value = heads[..., :group, :].flatten(2, 3), heads[..., group, :], heads[..., group + 1, :]
    query, key = (_turned(part, cos, sin) for part in (query, key))
    query, key, value = (part.transpose(1, 2) for part in (query, *(x.repeat_interleave(group, 2) for x in (key, value))))
    mask = None
    if starts is not None or window is not None:
        mask = torch.ones(qkv.shape[0], qkv.shape[1], qkv.shape[1], dtype=torch.bool, device=qkv.device).tril()
    if mask is not None and starts is not None:
        # position i and j are in one document where their starts are equal
        mask &= starts[:, :, None] == starts[:, None, :]
    if mask is not None and window is not None:
        mask = mask.triu(1 - window)
    mask = None if mask is None else mask[:, None]
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
    return out.transpose(1, 2).flatten(2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x.to(cos.dtype)
    plane = torch.complex(wide[..., :half], wide[..., half : 2 * half])
    angle = torch.complex(cos, sin).unsqueeze(-2)
    turned = plane * angle
    return torch.cat([turned.real, turned.imag, wide[..., 2 * half :]], -1).to(x.dtype)


def errors(found: Sequence[Tensor], true: Sequence[Tensor]) -> list[float]:
    """Relative, in the norm of all."""
    pairs = zip(found, true, strict=True)
    return [(one.to(other) - other).norm().item() / (other.norm().item() or 1.0) for one, other in pairs]


def assert_as_exact_as_torch(
    function: Callable[..., Tensor], given: Arguments, dtype: torch.dtype, device: str | None = None
) -> None:
    """Errors against float64 at most twice those of PyTorch's attention in the same dtype, from the same numbers.

    ``device``: of ours and PyTorch's; None: where the numbers are.
    """
    rounded = given.to(dtype)
    device = device or str(given.qkv.device)
    true = results(by_torch, rounded.to(torch.float64))
    ours, theirs = results(function, rounded.on(device)), results(by_torch, rounded.on(device))
    tiny = torch.finfo(dtype).eps / 2
    for name, found, mine, other in zip(("out", "dqkv"), ours, errors(ours, true), errors(theirs, true), strict=True):
        assert found.dtype == dtype
        assert mine <= 2 * other + tiny, f"{name}: error {mine:.3g}, torch has {other:.3g}"
