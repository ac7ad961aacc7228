"""Causal attention on the fused projection by the best available kernels: other packages', PyTorch's, this package's own.

What is computed is the definition in flash_attention.py. Which implementation is used depends on what is installed, the GPU,
the dtype, documents and windows; ``choose`` says which and why. On Hopper FlashAttention 3 and cuDNN are faster
than FlashAttention 2 (Shah et al. 2024, arXiv 2407.08608, figures 5 and 6), hence the order.

Bytes moved: those of flash_attention.py; the implementations that are not ours write the three gradients apart, and
4 (n + 2 k) d bytes more for each token (bf16, n query and k key heads of d) bring them together, turned back, with the sum
over all tokens (joined_gradients.py). They want the queries in one
row of heads: with a group of more than 1 all are copied, 4 (n + 2 k) d bytes more, and the projection's output is given up.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from megarewarm_kernels.attention import rotary
from megarewarm_kernels.attention.blocks import FP32_LENGTHS, blocks_attention, is_faster
from megarewarm_kernels.attention.flash_attention import MOST_CHANNELS, check, first_seen, flash_attention, reference, visible
from megarewarm_kernels.attention.joined_gradients import join_gradients_of
from megarewarm_kernels.layer.given_bias import give_bias_gradients
from megarewarm_kernels.operators import HAS_TRITON, INTERPRETED

BACKENDS = ("flash4", "flash3", "cudnn", "flash2", "triton", "blocks", "sdpa", "reference")
"""In the order in which they are tried."""

_MODULES = {"flash4": "flash_attn.cute.interface", "flash3": "flash_attn_interface", "flash2": "flash_attn"}
_HALF = (torch.bfloat16, torch.float16)
_PREFERRED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_log = logging.getLogger("megarewarm_kernels")
_said: set[str] = set()


def attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    group: int = 1,
    window: int | None = None,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """Rotary positions and causal attention, within documents where ``starts`` says so. Scores are scaled by 1 / sqrt(d).

    Args:
        qkv: (b, s, k x (group + 2) x d), contiguous, a projection's output: key head by key head its queries, its key and its
            value. It is consumed: rotated in place and kept for the backward pass. Nobody may have saved it or use it
            afterwards; a checkpointed region must hold the projection too.
        cos, sin: (s, r / 2) or (b, s, r / 2), fp32 (fp64 for fp64), r <= d; see ``rotate_``. They get no gradients.
        head_dim: d.
        group: queries of each key head; n = k x group.
        window: how many positions each one sees, itself included; None for all earlier ones.
        starts: (b, s) int32, at each position the first one of its document, or None for one document. Position i attends
            to j where starts[i] <= j <= i and i - window < j. Must not decrease along s, and starts[i] <= i; values are not
            checked. With "flash2" to "flash4" each new tensor waits for the device once, to count the documents.
        bias: (k x (group + 2) x d,), which qkv holds already but without a derivative: F.linear(x, weight, bias.detach()). Its
            gradient is given here, summed in fp32 in the pass that writes qkv's. None: there is none, or it has a derivative.
        backend: one of BACKENDS or "auto". One that can't be used gives way to the next that can, and a warning says so once.
        deterministic: the same gradients at every run, bit for bit.

    Returns:
        (b, s, n x d). Raises ValueError on wrong shapes or dtypes and on a leaf that asks for gradients.
    """
    flat_cos, flat_sin = check(qkv, cos, sin, head_dim, group, window, starts, bias)
    if window is not None and window >= qkv.shape[1]:
        window = None
    # the least length of those that are treated alike: with one of its own for each, choices would not be remembered
    length = max([1] + [least for least in FP32_LENGTHS if qkv.shape[1] >= least])
    given = {"documents": starts is not None, "window": window is not None, "deterministic": deterministic}
    name = _chosen(qkv.device, qkv.dtype, head_dim, backend, length, **given)
    if name == "triton":
        return flash_attention(qkv, cos, sin, head_dim=head_dim, group=group, window=window, starts=starts, bias=bias)
    if name == "reference" or not qkv.numel():
        qkv = give_bias_gradients(qkv, bias)
        return reference(qkv, cos, sin, head_dim=head_dim, group=group, window=window, starts=starts)
    # queries (b, s, n, d), keys and values (b, s, k, d)
    query, key, value = _RotateAndSplit.apply(qkv, flat_cos, flat_sin, bias, head_dim, group)
    if name in _MODULES:
        return _by_flash(name, query, key, value, window, starts).flatten(2)
    first = first_seen(qkv.shape[1], window, starts, qkv.device)
    if name == "blocks":
        return blocks_attention(query, key, value, first).flatten(2)
    return _by_torch(name, query, key, value, first, deterministic).flatten(2)


def choose(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    length: int = 1,
    documents: bool = False,
    window: bool = False,
    deterministic: bool = False,
    wanted: str = "auto",
) -> tuple[str, str]:
    """(the backend that ``attention`` uses for these, why). Raises ValueError where none can, or none is called ``wanted``."""
    if wanted != "auto" and wanted not in BACKENDS:
        raise ValueError(f"the attention backend is auto or one of {', '.join(BACKENDS)}, not '{wanted}'")
    device = torch.device(device)
    refused: list[str] = []
    for name in BACKENDS if wanted == "auto" else BACKENDS[BACKENDS.index(wanted) :]:
        objection = _objection(name, device, dtype, head_dim, length, documents, window, deterministic, asked=name == wanted)
        if objection is None:
            return name, "; ".join(refused) or ("as asked" if name == wanted else "the first choice")
        refused.append(f"{name} {objection}")
    raise ValueError(f"no attention for heads of {head_dim} in {dtype} on {device.type}: {refused[-1]}")


# each layer asks in each step; the device's properties alone take 20 us
@lru_cache
def _remembered(threads: int, *given: Any, **named: Any) -> tuple[str, str]:
    """As ``choose``, whose answer depends on the number of threads, which a process may change between two runs."""
    return choose(*given, **named)


def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int, wanted: str, length: int, **given: bool) -> str:
    """As ``choose``; what is not as asked is logged once."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    name, reason = _remembered(threads, device, dtype, head_dim, wanted=wanted, length=length, **given)
    if wanted not in ("auto", name):
        message = f"attention is computed by '{name}', not by '{wanted}' as asked: {reason}"
        if message not in _said:
            _said.add(message)
            _log.warning(message)
    return name


# what torch.compiler.assume_constant_result does, which imports the whole compiler, a third of a process's start
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _objection(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    documents: bool,
    window: bool,
    deterministic: bool,
    asked: bool,
) -> str | None:
    """Why ``name`` can't be used, or None. ``asked``: the user did, so preferences don't count."""
    if name in ("sdpa", "reference"):
        fits = dtype in (*_HALF, torch.float32, torch.float64) and head_dim >= 1
        return None if fits else "takes bf16, fp16, fp32 and fp64, and heads of at least 1"
    if name == "triton":
        return _objection_of_triton(device, dtype, head_dim, documents or window or deterministic or asked)
    if name == "blocks":
        if device.type != "cpu" or dtype == torch.float16:
            return "is for CPUs, and takes bf16, fp32 and fp64"
        fits = asked or is_faster(dtype, length, documents or window)
        return None if fits else "is faster in bf16 on CPUs with AVX512_BF16, or in fp32 for long rows and two threads"
    if device.type != "cuda":
        return "runs on CUDA only"
    most = 256 if name in ("flash2", "flash3") else 128
    if dtype not in _HALF or head_dim % 8 or not 8 <= head_dim <= most:
        return f"takes bf16 and fp16, and heads of a multiple of 8 up to {most}"
    if deterministic:
        return "adds up gradients in no fixed order"
    major = _capability(device)
    if name == "cudnn":
        if documents or window:
            return "keeps no documents apart and has no window"
        return None if major == 9 or (asked and major >= 8) else "is the fastest on compute capability 9 only"
    if name == "flash4" and major == 9 and not asked:
        return "is a beta that nobody has measured on compute capability 9"
    generations = {"flash4": (9, 10), "flash3": (9,), "flash2": (8, 9, 10, 12)}[name]
    if major not in generations:
        return f"runs on compute capability {' and '.join(map(str, generations))}, this is {major}"
    return None if functions(name) else f"can't be imported from {_MODULES[name]}"


def _objection_of_triton(device: torch.device, dtype: torch.dtype, head_dim: int, preferred: bool) -> str | None:
    if not HAS_TRITON:
        return "is not installed"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return "runs on CUDA only"
    if device.type == "cuda" and _capability(device) < 8:
        return "runs on compute capability 8 and above"
    if dtype not in (*_HALF, torch.float32) or not 1 <= head_dim <= MOST_CHANNELS:
        return f"takes bf16, fp16 and fp32, and heads up to {MOST_CHANNELS}"
    return None if preferred else "is for documents, windows and determinism, or where asked for"


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@lru_cache
def functions(name: str) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """FlashAttention's function for batches and that for documents, or None where they are not there."""
    try:
        module = importlib.import_module(_MODULES[name])
        return module.flash_attn_func, module.flash_attn_varlen_func
    except (ImportError, AttributeError, OSError, RuntimeError):  # not installed, another package, built for another PyTorch
        return None


class _RotateAndSplit(torch.autograd.Function):
    """Queries, keys and values as views of the projection or, with a group of more than 1, copies. Their gradients meet in one
    tensor and are rotated there."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, head_dim: int, group: int
    ) -> tuple[Tensor, ...]:
        qkv = qkv.detach()
        rotary.consume(qkv, cos, sin, head_dim, group)
        ctx.save_for_backward(cos, sin, bias)
        ctx.group = group
        heads = qkv.view(*qkv.shape[:2], -1, group + 2, head_dim)
        queries = heads[:, :, :, :group].flatten(2, 3)
        keys_values = heads[:, :, :, group:]
        if group > 1 and heads.shape[2] > 1:
            # the queries had to be copied: with the rest copied too, the projection's output is kept for none of them
            keys_values = keys_values.contiguous()
        return queries, keys_values[:, :, :, 0], keys_values[:, :, :, 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, bias = ctx.saved_tensors
        wanted = bias if ctx.needs_input_grad[3] else None
        grad, found = join_gradients_of(*grads, cos, sin, wanted, ctx.group)
        return grad, None, None, found if wanted is not None else None, None, None


def _by_torch(name: str, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, deterministic: bool) -> Tensor:
    """``first``: as first_seen."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    if name == "cudnn":
        # never with a mask: cuDNN's gradients of queries have been NaN with one
        with sdpa_kernel(_PREFERRED, set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    mask = None if first is None else visible(query.shape[2], first, query.device)
    allowed = sdpa_kernel(SDPBackend.MATH) if deterministic and query.is_cuda else nullcontext()
    with allowed:
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def _by_flash(name: str, query: Tensor, key: Tensor, value: Tensor, window: int | None, starts: Tensor | None) -> Tensor:
    found = functions(name)
    assert found is not None
    seen = {} if window is None else {"window_size": (window - 1, 0)}
    if starts is None:
        return _first(found[0](query, key, value, causal=True, **seen))
    cuts, longest = documents_of(starts)
    flat = [part.flatten(0, 1) for part in (query, key, value)]
    named = {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return _first(found[1](*flat, **named, causal=True, **seen)).view(query.shape)


def _first(result: Any) -> Tensor:
    """The output: some versions return the statistics too."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


_documents: Any = WeakTensorKeyDictionary()


def documents_of(starts: Tensor) -> tuple[Tensor, int]:
    """((documents + 1,) int32, where in b x s positions each document begins, and the end; the longest's length).

    Waits for the device, so what was found for a tensor is kept for the other layers, as long as the tensor lives.
    """
    version = 0 if starts.is_inference() else starts._version
    known = _documents.get(starts)
    if known is None or known[0] != version:
        position = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
        begins = (starts == position).flatten().nonzero().flatten()
        cuts = F.pad(begins, (0, 1), value=starts.numel()).to(torch.int32)
        known = version, cuts, int(cuts.diff().max())
        _documents[starts] = known
    return known[1], known[2]
