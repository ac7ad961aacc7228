"""Tables for decisions on a GPU: the layers' products, attention's directions by backend, chunks of the head and its loss.

    python benchmarks/kernel_tables.py products|attention|loss [--seconds 0.3] [--json FILE]
    python benchmarks/kernel_tables.py products --smoke        (small shapes, also on a CPU: shows that it works, not how fast)

products: five weights of Pythia 410M and three of a Llama of 1B, 16,384 tokens in bf16: forward, gradient of the input,
gradient of the weight, the last one also with an fp32 result and added to one, as it is accumulated. attention: each direction
(backward is both minus forward) for heads of 64 and 128, 16,384 tokens. loss: forward and backward of head and cross entropy by
bytes of logits at a time, with the peak of memory beyond the arguments. Times: gpu_timing.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from gpu_timing import Run, ceilings, differentiated, measure
from megarewarm_kernels import attention, linear_cross_entropy
from megarewarm_kernels.attention.choose import BACKENDS, choose

Row = dict[str, Any]
WEIGHTS: dict[str, tuple[int, int]] = {
    "410M qkv": (1024, 3072),
    "410M dense": (1024, 1024),
    "410M h->4h": (1024, 4096),
    "410M 4h->h": (4096, 1024),
    "410M head": (1024, 50304),
    "Llama 1B qkv": (2048, 3072),
    "Llama 1B gate, up": (2048, 16384),
    "Llama 1B down": (8192, 2048),
}
"""Columns in and out."""


def timed(run: Run, arguments: argparse.Namespace) -> float:
    """Median seconds."""
    return measure(run, arguments.device, arguments.seconds, arguments.smoke)


def products(arguments: argparse.Namespace) -> Iterator[Row]:
    tokens = 64 if arguments.smoke else 16384
    cuda = arguments.device == "cuda"
    for name, (wide, out) in WEIGHTS.items():
        if arguments.smoke:
            wide, out = wide // 64, out // 64
        x, w, dy = (
            torch.randn(size, dtype=torch.bfloat16, device=arguments.device)
            for size in ((tokens, wide), (out, wide), (tokens, out))
        )
        total = torch.zeros(out, wide, device=arguments.device)
        ways: dict[str, Run] = {
            "forward": lambda x=x, w=w: x @ w.t(),
            "input": lambda dy=dy, w=w: dy @ w,
            "weight": lambda dy=dy, x=x: dy.t() @ x,
        }
        if cuda:
            ways["weight, fp32"] = lambda dy=dy, x=x: torch.mm(dy.t(), x, out_dtype=torch.float32)
            ways["weight, added in fp32"] = lambda dy=dy, x=x, total=total: torch.addmm(
                total, dy.t(), x, out_dtype=torch.float32, out=total
            )
        for way, run in ways.items():
            yield {"product": name, "way": way, "seconds": timed(run, arguments), "flops": 2 * tokens * wide * out}


def attentions(arguments: argparse.Namespace) -> Iterator[Row]:
    tokens, heads = (128, 2) if arguments.smoke else (16384, 16)
    for head_dim in (64, 128):
        for length in (64,) if arguments.smoke else (512, 2048, 8192):
            flops = 2 * 2 * tokens * length * heads * head_dim / 2
            cos, sin = torch.randn(2, length, head_dim // 8, device=arguments.device)
            size = tokens // length, length, 3 * heads * head_dim
            leaf = torch.randn(size, dtype=torch.bfloat16, device=arguments.device).requires_grad_()
            for backend in BACKENDS:
                try:
                    found, _ = choose(arguments.device, torch.bfloat16, head_dim, wanted=backend)
                except ValueError:
                    continue
                if found != backend or (backend == "reference" and length > 512):
                    continue

                def use(x: torch.Tensor, backend: str = backend) -> torch.Tensor:
                    return attention(x.clone(), cos, sin, head_dim=head_dim, backend=backend)  # noqa: B023  # called below

                with torch.no_grad():
                    forward = timed(lambda use=use, leaf=leaf: use(leaf), arguments)
                both = timed(differentiated(use, [leaf]), arguments)
                where = {"head": head_dim, "length": length, "backend": backend}
                yield where | {"way": "forward", "seconds": forward, "flops": flops}
                yield where | {"way": "backward", "seconds": max(both - forward, 1e-9), "flops": 2.5 * flops}


def losses(arguments: argparse.Namespace) -> Iterator[Row]:
    tokens, wide, ids = (64, 64, 1000) if arguments.smoke else (16384, 1024, 50304)
    x, w = (
        torch.randn(size, dtype=torch.bfloat16, device=arguments.device).requires_grad_()
        for size in ((tokens, wide), (ids, wide))
    )
    targets = torch.randint(ids, (tokens,), device=arguments.device)
    for power in (26, 28, 29, 30, 31, 32):
        run = differentiated(lambda x, w, power=power: linear_cross_entropy(x, w, targets, memory_budget=2**power)[0], [x, w])
        row: Row = {"MiB of logits": 2 ** (power - 20), "seconds": timed(run, arguments), "flops": 6 * tokens * wide * ids}
        if arguments.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            row["peak, MiB"] = (torch.cuda.max_memory_allocated() - before) // 2**20
        yield row


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "products": products,
    "attention": attentions,
    "loss": losses,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.3, help="at least, for each row; default: %(default)s")
    parser.add_argument("--json", type=Path, help="written after each row")
    arguments = parser.parse_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cpu" and not arguments.smoke:
        sys.exit("this measures a GPU, and there is none here; --smoke shows that it works")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    _, rate = ceilings(arguments.device, arguments.smoke)
    print(
        f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; a bf16 product of 8192: {rate / 1e12:.0f} TFLOP/s\n"
    )
    rows: list[Row] = []
    for row in TABLES[arguments.table](arguments):
        row["share"] = row["flops"] / row["seconds"] / rate
        what = [str(value) for key, value in row.items() if key not in ("seconds", "flops", "share")]
        if not rows:
            keys = [key for key in row if key not in ("seconds", "flops", "share")]
            print(f"| {' | '.join(keys)} | ms | TFLOP/s | of the ceiling |\n|{'---|' * (len(keys) + 3)}")
        rate_here = row["flops"] / row["seconds"] / 1e12
        print(f"| {' | '.join(what)} | {1e3 * row['seconds']:.3f} | {rate_here:.1f} | {100 * row['share']:.0f} % |", flush=True)
        rows.append(row)
        if arguments.json:
            arguments.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
