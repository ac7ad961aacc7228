"""The whole training step on a GPU: our kernels, torch.compile, plain PyTorch and transformers' GPTNeoX, in one run.

Pythia 410M by default, bf16 over fp32 masters, 8 sequences of 2048: forward, backward, gradient norm, clipping, AdamW, from
the same weights on the same batches. Each side runs in a process of its own (peak memory is a process's), side after side,
``--rounds`` times over; times are of the device, between synchronisations. FLOPs are those of the model: 6 per matrix weight
and token, causal attention as what it needs (half the square), nothing for recomputation; MFU is their share of the GPU's dense
bf16 peak.

    python benchmarks/train_step.py [--json FILE] [--profile] [--rounds 2]
    python benchmarks/train_step.py --smoke                   (a few layers, also on a CPU: shows that it works, not how fast)
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

OURS: dict[str, dict[str, Any]] = {
    "megarewarm, triton": {"use": "triton"},
    "megarewarm, triton and graph": {"use": "triton", "graph": True},
    "megarewarm, triton and GELU by cuBLASLt": {"use": "triton", "gelu": "cublaslt"},
    "megarewarm, compile": {"use": "compile"},
    "megarewarm, compile and triton": {
        "use": "compile",
        "norms": "triton",
        "gelu": "triton",
        "loss": "triton",
        "optimizer": "triton",
    },
    "megarewarm, reference": {"use": "reference"},
}
SIDES = (*OURS, "transformers, sdpa", "transformers, sdpa, compiled")
RATE = 1e-4

# part of a GPU kernel's name -> its class; the first that fits, after those of our own
CLASSES = (
    ("attention", ("fmha", "flash", "sdpa", "cudnn_generated", "attention")),
    ("GEMM", ("gemm", "cutlass", "nvjet", "cublas", "xmma", "splitk")),
    ("copies", ("memcpy", "memset")),
    ("concatenation", ("catarray",)),
    ("Inductor", ("triton_",)),
    ("sums", ("reduce_kernel",)),
    ("optimizer", ("adam", "multi_tensor")),
)


def our_kernels() -> set[str]:
    """The names of the package's Triton kernels, which are those that a profile shows."""
    import megarewarm_kernels
    import triton

    modules = (
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(megarewarm_kernels.__path__, "megarewarm_kernels.")
    )
    kernels = (each for module in modules for each in vars(module).values())
    return {each.__name__ for each in kernels if isinstance(each, triton.runtime.JITFunction)}


def class_of(kernel: str, own: set[str]) -> str:
    """The class of a GPU kernel by its name."""
    if kernel in own:
        return "ours"
    name = kernel.lower()
    return next((label for label, words in CLASSES if any(word in name for word in words)), "elementwise and other")


def shape(arguments: argparse.Namespace) -> Any:
    """The model's shape."""
    from megarewarm.config.model import ModelConfig

    size = {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "vocab_size": 512} if arguments.smoke else {
        "num_layers": 24, "hidden_size": 1024, "num_heads": 16, "vocab_size": 50304}  # fmt: skip
    return ModelConfig(**size, max_positions=arguments.sequence)


def ours(arguments: argparse.Namespace, kinds: dict[str, Any]) -> tuple[Callable[[Any], float], str]:
    """The trainer's step with ``kernels: kinds``, and what was chosen."""
    import torch

    from megarewarm.config.execution import KernelsConfig, OptimizerConfig, ParallelConfig, TrainingConfig
    from megarewarm.model.operations import choose_operations, choose_optimizer
    from megarewarm.optimizers.adamw import AdamW
    from megarewarm.parallel.engine import ParallelModel
    from megarewarm.parallel.graph import MicroBatchGraph
    from megarewarm.parallel.laid_out import DTYPES
    from megarewarm.parallel.mesh import Layout, Mesh
    from megarewarm.parallel.ranks import Ranks
    from megarewarm.training.step import Told, guarded_scale

    device, config, kernels = torch.device(arguments.device), shape(arguments), KernelsConfig(**kinds)
    precision = "bf16"
    operations, notes = choose_operations(
        kernels, config, device, DTYPES[precision], length=arguments.sequence, documents=False
    )
    kind, more = choose_optimizer(kernels, device)
    model = ParallelModel(
        config,
        Mesh(Ranks(0, 1, device), Layout()),
        parallel=ParallelConfig(),
        training=TrainingConfig(budget="1 steps", global_batch=arguments.batch, micro_batch=arguments.batch),
        sequence_length=arguments.sequence,
        precision=precision,
        operations=operations,
        compile_layers=kernels.use == "compile",
        loss_memory=kernels.logit_bytes(device.type),
    )
    model.initialize(1)
    if kernels.graph is True and device.type == "cuda":
        shape_of_rows = arguments.batch, arguments.sequence + 1
        model.graph = MicroBatchGraph(lambda rows, scale: model.differentiate(rows, scale, None)[0], shape_of_rows, device)
    optimizer = AdamW(model.parameters, model.cards, OptimizerConfig(), kind, model.trained_copies)

    def step(rows: Any) -> float:
        model.gradients.zero()
        losses = model.forward_backward(rows)
        model.gradients.reduce()
        if optimizer.guarded and device.type == "cuda":  # as megarewarm/training/step.py
            loss, norm = losses.totals[0] / losses.targets, model.gradients.squares().sqrt()
            told = Told(torch.stack([loss, norm]))
            optimizer.step(RATE, model.gradients, guarded_scale(loss, norm, 1.0))
            return told.read()[0]
        length = model.gradients.norm()
        optimizer.step(RATE, model.gradients, 1 / (length + 1e-6) if length > 1 else 1.0)
        return losses.sum / losses.targets

    return step, f"{vars(operations)}, optimizer {kind}" + "".join(f"; {note}" for note in [*notes, *more])


def theirs(arguments: argparse.Namespace, compiled: bool) -> tuple[Callable[[Any], float], str]:
    """transformers' model under autocast, torch's clipping and fused AdamW, as its users write it."""
    import torch
    import transformers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from megarewarm.model.initialize import initial_value
    from megarewarm.model.parameters import cards

    config = shape(arguments)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(  # type: ignore[call-arg]
            num_hidden_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_size,
            vocab_size=config.vocab_size,
            max_position_embeddings=arguments.sequence,
            hidden_act="gelu_pytorch_tanh",
            use_parallel_residual=True,
            rotary_pct=0.25,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            attn_implementation="sdpa",
        )
    ).to(arguments.device)
    every = cards(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.removeprefix("gpt_neox.").replace("lm_head.", "embed_out.")
            parameter.copy_(initial_value(every[name], config, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model

    def step(rows: Any) -> float:
        tokens = torch.from_numpy(rows).to(arguments.device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # of even length, as ours
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
            loss = forward(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step, f"transformers {transformers.__version__}"


def run_side(arguments: argparse.Namespace) -> None:
    """One side in this process: times, losses, memory, as JSON on the last line."""
    import numpy as np
    import torch

    torch.set_float32_matmul_precision("high")
    cuda = arguments.device == "cuda"
    kinds = OURS.get(arguments.only)
    step, what = ours(arguments, kinds) if kinds else theirs(arguments, "compiled" in arguments.only)
    random = np.random.default_rng(0)
    batches = random.integers(shape(arguments).vocab_size, size=(4, arguments.batch, arguments.sequence + 1), dtype=np.int64)
    wait = torch.cuda.synchronize if cuda else lambda: None
    losses = [step(batches[i % 4]) for i in range(arguments.warmup)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for i in range(arguments.steps):
        wait()
        began = time.perf_counter()
        losses.append(step(batches[(arguments.warmup + i) % 4]))
        wait()
        times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    shares = profile(step, batches[0]) if arguments.profile and cuda else {}
    print(json.dumps({"times": times, "losses": losses, "memory": memory, "what": what, "shares": shares}))


def profile(step: Callable[[Any], float], rows: Any) -> dict[str, float]:
    """Milliseconds of one step by class of GPU kernel, and what lies between kernels."""
    import torch
    from torch.profiler import ProfilerActivity

    step(rows)
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step(rows)
        torch.cuda.synchronize()
    whole = (time.perf_counter() - began) * 1e3
    own = our_kernels()
    times: dict[str, float] = {}
    spans = []
    for event in found.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kind = class_of(event.name, own)
        times[kind] = times.get(kind, 0.0) + event.time_range.elapsed_us() / 1e3
        spans.append((event.time_range.start, event.time_range.end))
    if spans:
        first, last = min(a for a, _ in spans), max(b for _, b in spans)
        times["gaps"] = max(0.0, (last - first) / 1e3 - sum(times.values()))
    times["step under the profiler"] = whole
    return times


def main() -> None:
    """Run every side and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="measured in each round")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--profile", action="store_true", help="also one step of each side by class of kernel")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds for a side; default: %(default)s")
    parser.add_argument("--json", type=Path, help="written after each side")
    parser.add_argument("--device", default=None)
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.smoke:
        arguments.batch, arguments.sequence, arguments.steps, arguments.warmup, arguments.rounds = 2, 64, 2, 1, 1
    elif arguments.device == "cpu":
        sys.exit("this measures a GPU, and there is none here; --smoke shows that it works")
    if arguments.only:
        run_side(arguments)
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for side in arguments.sides:
            command = [sys.executable, os.fspath(__file__), *sys.argv[1:], "--only", side, "--device", arguments.device]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
            except subprocess.TimeoutExpired:
                print(f"{side}: not done after {arguments.limit:.0f} s", flush=True)
                continue
            if done.returncode:
                print(f"{side}: failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            results.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side}: {1e3 * statistics.median(results[side][-1]['times']):.2f} ms", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results))
    show(arguments, results)
    sys.exit(0 if all(len(results.get(side, ())) == arguments.rounds for side in arguments.sides) else 1)


def show(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """A Markdown table, what was chosen, losses, and the profiles."""
    import torch

    from megarewarm.model.size import peak_tflops, training_flops_per_token

    tokens = arguments.batch * arguments.sequence
    flops = tokens * training_flops_per_token(shape(arguments), arguments.sequence)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    peak = peak_tflops(name)
    try:
        import triton

        versions = f"torch {torch.__version__}, triton {triton.__version__}"
    except ImportError:
        versions = f"torch {torch.__version__}"
    print(f"\n{name}, {versions}, {tokens:,} tokens a step, {flops / 1e12:.1f} TFLOP (causal), {time.strftime('%Y-%m-%d')}\n")
    print("| | ms a step | tokens/s | TFLOP/s | MFU | peak memory, GiB | loss after the same steps |")
    print("|---|---|---|---|---|---|---|")
    for side, rounds in results.items():
        seconds = statistics.median([t for each in rounds for t in each["times"]])
        mfu = f"{100 * flops / seconds / (peak * 1e12):.1f} %" if peak else "-"
        print(
            f"| {side} | {1e3 * seconds:.2f} | {tokens / seconds:,.0f} | {flops / seconds / 1e12:.0f} | {mfu} | "
            f"{rounds[0]['memory']:.2f} | {rounds[0]['losses'][-1]:.4f} |"
        )
    for side, rounds in results.items():
        print(f"\n{side}: {rounds[0]['what']}")
        if rounds[0]["shares"]:
            print(
                ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in sorted(rounds[0]["shares"].items(), key=lambda item: -item[1]))
            )


if __name__ == "__main__":
    main()
