"""Each fused operation on a GPU against plain PyTorch, torch.compile and Liger-Kernel (where it has the operation), in one run.

Shapes are those of Pythia 410M with 8 sequences of 2048, bf16; forward with backward; the median of many, the cache of the GPU
flushed before each. Bytes and FLOPs are those that the operation cannot do without; rates are set against the machine's own
ceilings, a copy of 1 GiB and a product of 8192 x 8192, measured in the same run.

    python benchmarks/kernels.py [--json FILE] [--picture FILE.png]
    python benchmarks/kernels.py --smoke                      (small shapes, also on a CPU: shows that it works, not how fast)
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from gpu_timing import Run, ceilings, differentiated, measure
from megarewarm_kernels import (
    AdamWTensors,
    attention,
    bias_gelu,
    gelu_products,
    linear_cross_entropy,
    no_triton,
    norm_heads,
    residual_norms,
    residual_rms_norm,
    rms_norm,
    rotate_,
    swiglu,
)
from megarewarm_kernels.attention.choose import BACKENDS, choose
from megarewarm_kernels.layer.gelu_products import LowLayer
from megarewarm_kernels.products import linear
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Operation:
    """``sides``: what is measured, by name. ``bytes`` and ``flops``: the least that forward and backward take."""

    name: str
    sides: dict[str, Run]
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Shape:
    """b sequences of s, width h, n heads, f in the MLP, v in the vocabulary."""

    b: int
    s: int
    h: int
    n: int
    f: int
    v: int
    device: str

    def tensor(self, *size: int, grad: bool = True) -> Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=self.device).requires_grad_(grad)

    def weight(self, *size: int) -> Tensor:
        """fp32, as the trainer keeps it."""
        return torch.randn(size, device=self.device).mul_(0.02).requires_grad_()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile."""
    return torch.compile(function)


def norms(shape: Shape) -> Operation:
    t, h = shape.b * shape.s, shape.h
    inputs = [shape.tensor(t, h) for _ in range(3)] + [shape.weight(h) for _ in range(4)]

    def plain(x: Tensor, a: Tensor, m: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        x = x + a + m
        normed = [F.layer_norm(x, (h,), w.to(x.dtype), b.to(x.dtype)) for w, b in ((w1, b1), (w2, b2))]
        return x, *normed

    sides = {"ours": differentiated(residual_norms, inputs), "PyTorch": differentiated(plain, inputs)}
    sides["torch.compile"] = differentiated(compiled(plain), inputs)
    if (liger := optional("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")) is not None:

        def by_liger(x: Tensor, a: Tensor, m: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
            x = x + a + m
            return x, *(liger.apply(x, w, b, 1e-5) for w, b in ((w1, b1), (w2, b2)))

        sides["Liger"] = differentiated(by_liger, inputs)
    return Operation("residual + two norms", sides, 22.0 * t * h)


def gelu(shape: Shape) -> Operation:
    t, f = shape.b * shape.s, shape.f
    inputs = [shape.tensor(t, f), shape.weight(f)]
    plain = lambda x, b: F.gelu(x + b.to(x.dtype), approximate="tanh")  # noqa: E731
    sides = {
        "ours": differentiated(lambda x, b: bias_gelu(x, b, approximate="tanh"), inputs),
        "PyTorch": differentiated(plain, inputs),
        "torch.compile": differentiated(compiled(plain), inputs),
    }
    return Operation("bias + GELU", sides, 10.0 * t * f)


def mlp(shape: Shape) -> Operation:
    """Both products and what is between them; weights' gradients are added in fp32 to those that are there."""
    t, h, f = shape.b * shape.s, shape.h, shape.f
    layers = []
    for size in ((f, h), (h, f)):
        weight, bias = shape.weight(*size), shape.weight(size[0])
        weight.grad = torch.zeros_like(weight)
        layers.append(LowLayer(weight, bias, weight.detach().bfloat16(), bias.detach().bfloat16()))
    first, second = layers
    inputs = [shape.tensor(t, h), first.bias, second.bias]

    def separately(x: Tensor, one: Tensor, other: Tensor) -> Tensor:
        active = bias_gelu(linear(x, first.weight, None, first.low, None), one, approximate="tanh")
        return linear(active, second.weight, other, second.low, second.low_bias)

    def together(x: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return gelu_products(x, first._replace(bias=one), second._replace(bias=other))

    sides = {"ours": differentiated(separately, inputs), "ours, GELU by cuBLASLt": differentiated(together, inputs)}
    return Operation("MLP", sides, 0.0, 12.0 * t * h * f)


def rms(shape: Shape) -> Operation:
    t, h = shape.b * shape.s, shape.h
    inputs = [shape.tensor(t, h), shape.weight(h)]
    plain = lambda x, w: F.rms_norm(x, (h,), w.to(x.dtype), 1e-6)  # noqa: E731
    sides = {
        "ours": differentiated(rms_norm, inputs),
        "PyTorch": differentiated(plain, inputs),
        "torch.compile": differentiated(compiled(plain), inputs),
    }
    if (liger := optional("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")) is not None:
        sides["Liger"] = differentiated(lambda x, w: liger.apply(x, w, 1e-6), inputs)
    return Operation("RMSNorm", sides, 10.0 * t * h)


def residual_rms(shape: Shape) -> Operation:
    t, h = shape.b * shape.s, shape.h
    inputs = [shape.tensor(t, h), shape.tensor(t, h), shape.weight(h)]

    def plain(x: Tensor, delta: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x = x + delta
        return x, F.rms_norm(x, (h,), w.to(x.dtype), 1e-6)

    sides = {"ours": differentiated(residual_rms_norm, inputs), "PyTorch": differentiated(plain, inputs)}
    sides["torch.compile"] = differentiated(compiled(plain), inputs)
    if (liger := optional("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")) is not None:

        def by_liger(x: Tensor, delta: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            normed, total = liger.apply(delta, x, w, 1e-6, 0.0, "llama", False)
            return total, normed

        sides["Liger"] = differentiated(by_liger, inputs)
    return Operation("residual + RMSNorm", sides, 16.0 * t * h)


def gated(shape: Shape) -> Operation:
    t, f = shape.b * shape.s, shape.f
    inputs = [shape.tensor(t, 2 * f)]
    plain = lambda pairs: F.silu(pairs[:, 0::2]) * pairs[:, 1::2]  # noqa: E731
    halves = lambda pairs: F.silu(pairs[:, :f]) * pairs[:, f:]  # noqa: E731  # what others' fused projections give
    sides = {
        "ours": differentiated(swiglu, inputs),
        "PyTorch": differentiated(plain, inputs),
        "PyTorch, halves": differentiated(halves, inputs),
        "torch.compile": differentiated(compiled(plain), inputs),
    }
    if (liger := optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")) is not None:
        two = [shape.tensor(t, f), shape.tensor(t, f)]
        sides["Liger, two tensors"] = differentiated(lambda gate, up: liger.apply(gate, up), two)
    return Operation("SwiGLU", sides, 16.0 * t * f)


def heads(shape: Shape) -> Operation:
    """Four queries a key head."""
    t, d = shape.b * shape.s, shape.h // shape.n
    row = shape.n // 2 * 6 * d
    inputs = [shape.tensor(t, row), shape.weight(d), shape.weight(d)]

    def plain(qkv: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key, value = qkv.view(t, -1, 6, d).split([4, 1, 1], 2)
        normed = [F.rms_norm(part, (d,), w.to(part.dtype), 1e-6) for part, w in ((query, q), (key, k))]
        return torch.cat([*normed, value], 2).view(t, row)

    sides = {
        "ours": differentiated(lambda qkv, q, k: norm_heads(qkv, q, k, head_dim=d, group=4), inputs),
        "PyTorch": differentiated(plain, inputs),
        "torch.compile": differentiated(compiled(plain), inputs),
    }
    return Operation("norms of heads", sides, 10.0 * t * row)


def rotary(shape: Shape) -> Operation:
    """Pythia's: a quarter of the channels."""
    _, sides, moved = rotations(shape, group=1, half=shape.h // shape.n // 8)
    return Operation("rotary, forward", sides, moved)


def grouped_rotary(shape: Shape) -> Operation:
    """Llama's: all channels, four queries a key head."""
    d, keys = shape.h // shape.n, shape.n // 2
    (cos, sin), sides, moved = rotations(shape, group=4, half=d // 2)
    if (liger := optional("liger_kernel.ops.rope", "LigerRopeFunction")) is not None:
        # like a projection's output: heads in the third dimension of the storage
        query, key = (shape.tensor(shape.b, shape.s, n, d, grad=False).transpose(1, 2) for n in (4 * keys, keys))
        both = [torch.cat([table, table], -1)[None] for table in (cos, sin)]
        sides["Liger, two tensors"] = lambda: liger.apply(query, key, *both)
    return Operation("rotary of grouped heads, forward", sides, moved)


def rotations(shape: Shape, group: int, half: int) -> tuple[Tensor, dict[str, Run], float]:
    """Cosines and sines (2, s, half), sides and bytes of n / 2 key heads of ``group`` queries each, of n where it is 1."""
    t, d = shape.b * shape.s, shape.h // shape.n
    keys = shape.n if group == 1 else shape.n // 2
    tables = torch.randn(2, shape.s, half, device=shape.device)
    cos, sin = tables
    qkv = shape.tensor(t, keys * (group + 2) * d, grad=False)

    def plain(qkv: Tensor) -> Tensor:
        query_key, value = qkv.view(shape.b, shape.s, keys, group + 2, d).split([group + 1, 1], 3)
        one, other, rest = query_key.split([half, half, d - 2 * half], -1)
        c, s = cos[:, None, None], sin[:, None, None]
        turned = torch.cat([one * c - other * s, other * c + one * s, rest], -1).to(qkv.dtype)
        return torch.cat([turned, value], 3)

    compiled_plain = compiled(plain)
    sides: dict[str, Run] = {
        "ours": lambda: rotate_(qkv, cos, sin, head_dim=d, group=group),
        "PyTorch": lambda: plain(qkv),
        "torch.compile": lambda: compiled_plain(qkv),
    }
    return tables, sides, 4.0 * t * keys * (group + 1) * 2 * half


def attend(shape: Shape) -> Operation:
    t, d = shape.b * shape.s, shape.h // shape.n
    cos, sin = torch.randn(2, shape.s, d // 8, device=shape.device)
    leaf = shape.tensor(shape.b, shape.s, 3 * shape.h)
    sides = {}
    for backend in BACKENDS:
        try:
            found, _ = choose(shape.device, torch.bfloat16, d, wanted=backend)
        except ValueError:
            continue
        if found == backend and (backend != "reference" or shape.s <= 512):
            # consumed, so each time a copy: 12 n d bytes a token, which a projection's output costs nobody
            use = lambda x, backend=backend: attention(x.clone(), cos, sin, head_dim=d, backend=backend)  # noqa: E731
            sides["ours" if backend == "triton" else backend] = differentiated(use, [leaf])
    return Operation("attention with rotary", sides, 0.0, 3.5 * 2.0 * t * shape.s * shape.h)


def loss(shape: Shape) -> Operation:
    t = shape.b * shape.s
    inputs = [shape.tensor(t, shape.h), shape.tensor(shape.v, shape.h)]
    targets = torch.randint(shape.v, (t,), device=shape.device)
    plain = lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets, reduction="sum")  # noqa: E731
    sides = {
        f"ours, {budget >> 20} MiB": differentiated(
            lambda x, w, budget=budget: linear_cross_entropy(x, w, targets, memory_budget=budget)[0], inputs
        )
        for budget in (2**31, 2**26)
    }
    sides["PyTorch"] = differentiated(plain, inputs)
    sides["torch.compile"] = differentiated(compiled(plain), inputs)
    if hasattr(F, "linear_cross_entropy"):
        sides["F.linear_cross_entropy"] = differentiated(
            lambda x, w: F.linear_cross_entropy(x, w, targets, reduction="sum"), inputs
        )
    if (
        liger := optional("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    ) is not None:
        function = liger(reduction="sum")
        sides["Liger"] = differentiated(lambda x, w: function(w, x, targets), inputs)
    return Operation("head + cross entropy", sides, 0.0, 6.0 * t * shape.h * shape.v)


def optimizer(shape: Shape) -> Operation:
    sizes = [(shape.v, shape.h)] * 2 + [(shape.f, shape.h), (3 * shape.h, shape.h), (shape.h, shape.f), (shape.h, shape.h)] * 24
    parameters = [torch.randn(size, device=shape.device).mul_(0.02) for size in sizes]
    state = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    gradients = [torch.randn_like(p) for p in parameters]
    ours = AdamWTensors(parameters, *state, decays=[0.1] * len(sizes))
    others = [torch.nn.Parameter(p.clone()) for p in parameters]
    for other, gradient in zip(others, gradients, strict=True):
        other.grad = gradient
    fused = torch.optim.AdamW(others, lr=1e-4, fused=True)

    def by_torch() -> None:
        torch._foreach_mul_(gradients, 0.9999)
        fused.step()

    count = sum(p.numel() for p in parameters)
    sides: dict[str, Run] = {
        "ours": lambda: ours.step(gradients, step=10, lr=1e-4, scale=0.9999),
        "PyTorch, fused": by_torch,
    }
    return Operation("clip + AdamW", sides, 28.0 * count)


OPERATIONS = (norms, rms, residual_rms, gelu, mlp, gated, heads, rotary, grouped_rotary, attend, loss, optimizer)


def optional(module: str, name: str) -> Any:
    """A name of a package that may be missing, or None."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):
        return None


def main() -> None:
    """Measure everything, print a table, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="at least, for each side of each operation")
    parser.add_argument(
        "--json",
        type=Path,
        help="written after each operation; operations that it has, of this GPU and torch, are not repeated",
    )
    parser.add_argument("--picture", type=Path, help="PNG: share of the ceiling that each side reaches")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.smoke:
        sys.exit("this measures a GPU, and there is none here; --smoke shows that it works")
    shape = Shape(1, 64, 64, 2, 128, 100, device) if arguments.smoke else Shape(8, 2048, 1024, 16, 4096, 50304, device)
    bandwidth, rate = ceilings(device, arguments.smoke)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; Triton: {no_triton(torch.device(device)) or 'yes'}")
    print(f"ceilings: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n")
    print("| operation | side | ms | TB/s or TFLOP/s | of the ceiling |\n|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    here, done = {"device": name, "torch": torch.__version__}, 0
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        if before.get("done") and all(before[key] == value for key, value in here.items()):
            done, rows = before["done"], before["rows"]
    for number, make in enumerate(OPERATIONS[done:], done + 1):
        operation = make(shape)
        for side, run in operation.sides.items():
            try:
                seconds = measure(run, device, arguments.seconds, arguments.smoke)
            except (RuntimeError, TypeError) as error:  # a peer of another version, out of memory
                print(f"| {operation.name} | {side} | failed: {str(error).splitlines()[0]} | | |", flush=True)
                continue
            reached, ceiling, unit = (
                (operation.flops / seconds, rate, "TFLOP/s")
                if operation.flops
                else (operation.bytes / seconds, bandwidth, "TB/s")
            )
            share = reached / ceiling
            rows.append({"operation": operation.name, "side": side, "seconds": seconds, "share": share})
            print(
                f"| {operation.name} | {side} | {1e3 * seconds:.3f} | {reached / 1e12:.2f} {unit} | {100 * share:.0f} % |",
                flush=True,
            )
        del operation
        if device == "cuda":
            torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(json.dumps({**here, "done": number, "rows": rows}))
    if arguments.picture:
        draw(rows, name, arguments.picture)


def draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Bars: the share of its ceiling that each side of each operation reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sides = list(dict.fromkeys(row["side"] for row in rows))
    colours = dict(zip(sides, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    for place, row in enumerate(reversed(rows)):
        axes.barh(place, 100 * row["share"], color=colours[row["side"]])
        axes.text(100 * row["share"] + 1, place, f"{1e3 * row['seconds']:.2f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['operation']}: {row['side']}" for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("% of the ceiling measured in this run (copy or bf16 product)")
    axes.set_title(device, fontsize=10)
    axes.set_xlim(0, 115)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
