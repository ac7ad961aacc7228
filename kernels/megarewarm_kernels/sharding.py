"""How the operators act on DTensors: for those who divide a model by PyTorch's tensor parallelism or sequence sharding.

Importing this module registers the rules. Tokens may be divided everywhere (weights' gradients are then parts of a sum), heads
in attention and its norms, columns in bias and GELU and in SwiGLU; the hidden dimension of a norm never. The trainer of this
project needs none of it: its operators see each rank's own plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

import megarewarm_kernels  # noqa: F401  # defines the operators

Rules = list[tuple[list[Any], list[Any]]]
_OPERATORS = torch.ops.megarewarm
_WHOLE = Replicate()


def _rule(name: str) -> Callable[[Callable[..., Rules]], Any]:
    return register_sharding(getattr(_OPERATORS, name).default)


def _where(placement: Any, *parts: Any) -> list[Any]:
    """``placement`` for each part that is there, None for the others."""
    return [None if part is None else placement for part in parts]


@_rule("residual_norms")
def _norms(x: Any, attn_out: Any, mlp_out: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any, eps: float) -> Rules:
    weights = _where(_WHOLE, weight1, bias1, weight2, bias2)
    rules: Rules = []
    for tokens in (_WHOLE, *(Shard(d) for d in range(x.ndim - 1))):
        # without what is added, or a second norm, their results are empty tensors, the same everywhere
        total, second = (_WHOLE if part is None else tokens for part in (attn_out, weight2))
        rules.append(([total, tokens, second, tokens, tokens], [tokens, *_where(tokens, attn_out, mlp_out), *weights, None]))
    return rules


@_rule("residual_norms_backward")
def _norms_backward(
    residual: Any, grad1: Any, grad2: Any, total: Any, weight1: Any, weight2: Any, mean: Any, scale: Any, *biases: Any
) -> Rules:
    rules: Rules = []
    for tokens in (_WHOLE, *(Shard(d) for d in range(total.ndim - 1))):
        part = _WHOLE if tokens is _WHOLE else Partial()
        sums = [_WHOLE if like is None else part for like in (weight2, weight2, *biases)]  # without them empty tensors
        inputs = [*_where(tokens, residual, grad1, grad2, total), *_where(_WHOLE, weight1, weight2), tokens, tokens]
        rules.append(([tokens, part, part, *sums], [*inputs, *_where(_WHOLE, *biases)]))
    return rules


@_rule("bias_gelu")
def _gelu(x: Any, bias: Any, tanh: bool) -> Rules:
    rules: Rules = [([_WHOLE], [_WHOLE, _WHOLE, None])]
    rules += [([Shard(d)], [Shard(d), _WHOLE, None]) for d in range(x.ndim - 1)]
    return [*rules, ([Shard(x.ndim - 1)], [Shard(x.ndim - 1), Shard(0), None])]


@_rule("bias_gelu_backward")
def _gelu_backward(grad: Any, x: Any, bias: Any, tanh: bool) -> Rules:
    rules: Rules = [([_WHOLE] * 2, [_WHOLE] * 3 + [None])]
    rules += [([Shard(d), Partial()], [Shard(d), Shard(d), _WHOLE, None]) for d in range(x.ndim - 1)]
    columns = Shard(x.ndim - 1)
    return [*rules, ([columns, Shard(0)], [columns, columns, Shard(0), None])]


@_rule("residual_rms_norm")
def _rms_norm(x: Any, delta: Any, weight: Any, eps: float) -> Rules:
    added = lambda placement: _WHOLE if delta is None else placement  # noqa: E731  # without delta an empty tensor
    each = [_WHOLE, *(Shard(d) for d in range(x.ndim - 1))]
    return [([added(p), p, p], [p, *_where(p, delta), _WHOLE, None]) for p in each]


@_rule("residual_rms_norm_backward")
def _rms_norm_backward(residual: Any, grad: Any, total: Any, weight: Any, scale: Any) -> Rules:
    rules: Rules = [([_WHOLE] * 2, [*_where(_WHOLE, residual), *[_WHOLE] * 4])]
    for d in range(total.ndim - 1):
        tokens = Shard(d)
        rules.append(([tokens, Partial()], [*_where(tokens, residual), tokens, tokens, _WHOLE, tokens]))
    return rules


def _pairs(pairs: Any) -> list[Any]:
    whole = pairs.shape[-1] % (2 * pairs.mesh.size()) == 0  # no pair is divided
    return [_WHOLE, *(Shard(d) for d in range(pairs.ndim - (not whole)))]


@_rule("swiglu")
def _swiglu(pairs: Any) -> Rules:
    return [([p], [p]) for p in _pairs(pairs)]


@_rule("swiglu_backward")
def _swiglu_backward(grad: Any, pairs: Any) -> Rules:
    return [([p], [p, p]) for p in _pairs(pairs)]


@_rule("norm_heads")
def _heads(qkv: Any, query_weight: Any, key_weight: Any, head_dim: int, group: int, eps: float) -> Rules:
    # the last dimension is that of the heads, which the statistics have in the same place
    return [([p] * 2, [p, _WHOLE, _WHOLE, None, None, None]) for p in (_WHOLE, *map(Shard, range(qkv.ndim)))]


@_rule("norm_heads_backward")
def _heads_backward(grad: Any, qkv: Any, query_weight: Any, key_weight: Any, rstd: Any, head_dim: int, group: int) -> Rules:
    rules: Rules = [([_WHOLE] * 3, [_WHOLE] * 5 + [None, None])]
    for d in range(qkv.ndim):
        here = Shard(d)
        rules.append(([here, Partial(), Partial()], [here, here, _WHOLE, _WHOLE, here, None, None]))
    return rules


@_rule("flash_attention")
def _attention(qkv: Any, starts: Any, head_dim: int, group: int) -> Rules:
    batch, heads = Shard(0), Shard(2)
    return [
        ([_WHOLE] * 2, [_WHOLE, *_where(_WHOLE, starts), None, None]),
        ([batch] * 2, [batch, *_where(batch, starts), None, None]),
        ([heads, Shard(1)], [heads, *_where(_WHOLE, starts), None, None]),
    ]


@_rule("flash_attention_backward")
def _attention_backward(grad: Any, qkv: Any, out: Any, lse: Any, starts: Any, head_dim: int, group: int) -> Rules:
    batch, heads = Shard(0), Shard(2)
    return [
        ([_WHOLE], [_WHOLE] * 4 + [*_where(_WHOLE, starts), None, None]),
        ([batch], [batch] * 4 + [*_where(batch, starts), None, None]),
        ([heads], [heads, heads, heads, Shard(1), *_where(_WHOLE, starts), None, None]),
    ]
