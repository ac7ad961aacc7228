"""One training step on the CPU against transformers' own model and against its matrix products alone: tokens/s and peak memory.

Same shape (Pythia 70M by default, or --model), same weights, same batch, eager: forward, backward, clipping, AdamW. The side
"products" computes nothing but the step's matrix products and torch's attention, with the shapes, chunks and dtypes of
megarewarm's: the limit of a step on this machine. Each side runs in a process of its own (peak memory is a process's); they
take turns, block by block, so that whatever else the machine does meets all. Losses are compared.

    python benchmarks/cpu_training_step.py [--model pythia-14m] [--precision bf16] [--threads 1] [--steps 5] [--blocks 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

MIB = 2**20


def ours(arguments: argparse.Namespace) -> Callable[[Any], float]:
    """The trainer's own step: the engine with one rank, its gradient buffer, clipping and optimizer."""
    import torch

    from megarewarm.config.execution import KernelsConfig, OptimizerConfig, ParallelConfig, TrainingConfig
    from megarewarm.model.operations import choose_operations
    from megarewarm.optimizers.adamw import AdamW
    from megarewarm.parallel.engine import ParallelModel
    from megarewarm.parallel.laid_out import DTYPES
    from megarewarm.parallel.mesh import Layout, Mesh
    from megarewarm.parallel.ranks import Ranks
    from megarewarm.process import freed_memory_kept
    from megarewarm.training.start.memory import keeps_freed_memory

    config, device = model_config(arguments), torch.device("cpu")
    dtype = DTYPES[arguments.precision]
    operations, _ = choose_operations(KernelsConfig(), config, device, dtype, length=arguments.sequence, documents=False)
    model = ParallelModel(
        config,
        Mesh(Ranks(0, 1, device), Layout()),
        parallel=ParallelConfig(),
        training=TrainingConfig(budget="1 steps", global_batch=arguments.batch, micro_batch=arguments.batch),
        sequence_length=arguments.sequence,
        precision=arguments.precision,
        operations=operations,
    )
    model.initialize(1)
    optimizer = AdamW(model.parameters, model.cards, OptimizerConfig())
    if keeps_freed_memory(model.parameters.values(), device, arguments.precision):  # as the trainer
        freed_memory_kept().__enter__()  # until the process ends

    def step(rows: Any) -> float:
        model.gradients.zero()
        loss = model.forward_backward(rows).sum / (arguments.batch * arguments.sequence)
        model.gradients.reduce()
        norm = model.gradients.norm()
        if norm > 1:
            model.gradients.scale_(1 / (norm + 1e-6))
        optimizer.step(1e-4)
        return loss

    return step


def theirs(arguments: argparse.Namespace) -> Callable[[Any], float]:
    """transformers' model and loss, torch's clipping and fused AdamW, as its Trainer has them; bf16 by autocast."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megarewarm.checkpoint.foreign.families import model_type_of_family
    from megarewarm.model.initialize import initial_value
    from megarewarm.model.parameters import cards

    config = model_config(arguments)
    kind = model_type_of_family(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.name, **kind.write(config)), attn_implementation="sdpa")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, card in cards(config).items():
            whole = initial_value(card, config, 1)
            names = kind.stored(name)
            parts = [whole] if len(names) == 1 or card.interleaved is None else card.interleaved.split(whole)
            for stored, part in zip(names, parts, strict=True):
                parameters["lm_head.weight" if stored == "embed_out.weight" else stored].copy_(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    low = torch.autocast("cpu", torch.bfloat16) if arguments.precision == "bf16" else nullcontext()

    def step(rows: Any) -> float:
        tokens = torch.from_numpy(rows)
        optimizer.zero_grad(set_to_none=True)
        with low:
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def products(arguments: argparse.Namespace) -> Callable[[Any], float]:
    """The matrix products and the attention of a step, forward and backward, into memory that stays."""
    import torch
    from megarewarm_kernels.loss.linear_cross_entropy import MIB as UNIT
    from megarewarm_kernels.loss.linear_cross_entropy import _chunk

    from megarewarm.parallel.laid_out import DTYPES

    config, dtype = model_config(arguments), DTYPES[arguments.precision]
    tokens, hidden = arguments.batch * arguments.sequence, config.hidden_size
    heads, kv = config.num_heads, config.num_kv_heads or config.num_heads
    width = config.head_width
    gated = 1 if config.norm == "layer" else 2
    linear = [(hidden, (heads + 2 * kv) * width), (heads * width, hidden), (hidden, gated * config.mlp_size)]
    linear.append((config.mlp_size, hidden))
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).mul_(0.1).to(dtype)

    # a layer's own weights and their gradients; inputs and outputs are shared by the layers
    weights = [[drawn(out, into) for into, out in linear] for _ in range(config.num_layers)]
    gradients = [[torch.empty_like(weight) for weight in layer] for layer in weights]
    inputs, outputs = ([drawn(tokens, pair[side]) for pair in linear] for side in (0, 1))
    results = [[torch.empty_like(x) for x in states] for states in (inputs, outputs)]
    query, key, value = (drawn(arguments.batch, n, arguments.sequence, width).requires_grad_() for n in (heads, kv, kv))
    upstream = drawn(arguments.batch, heads, arguments.sequence, width)
    head, state = drawn(config.vocab_size, hidden), drawn(tokens, hidden)
    chunk = _chunk(tokens, config.vocab_size, dtype, 64 * UNIT, "cpu")
    logits, total, back = drawn(chunk, config.vocab_size), torch.empty_like(head), torch.empty_like(state)
    attend = torch.nn.functional.scaled_dot_product_attention

    def step(rows: Any) -> float:
        attended = []
        for layer in weights:
            for weight, x, y in zip(layer, inputs, results[1], strict=True):
                torch.mm(x, weight.t(), out=y)
            attended.append(attend(query, key, value, is_causal=True, enable_gqa=kv != heads))
        for part in state.split(chunk):
            here = logits[: len(part)]
            torch.mm(part, head.t(), out=here)
            torch.mm(here, head, out=back[: len(part)])
            torch.mm(here.t(), part, out=total)
        for layer, grads, context in zip(weights, gradients, attended, strict=True):
            for weight, grad, x, dx, dy in zip(layer, grads, inputs, results[0], outputs, strict=True):
                torch.mm(dy, weight, out=dx)
                torch.mm(dy.t(), x, out=grad)
            torch.autograd.grad(context, (query, key, value), upstream)
        return 0.0

    return step


SIDES = {"megarewarm": ours, "transformers": theirs, "products": products}
SHAPES: dict[str, dict[str, Any]] = {
    "pythia-70m": {"num_layers": 6, "hidden_size": 512, "num_heads": 8, "vocab_size": 50304},
    "pythia-14m": {"num_layers": 6, "hidden_size": 128, "num_heads": 4, "vocab_size": 50304},
    "quickstart": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "vocab_size": 2048},
    "smollm2-135m": {
        "family": "llama",
        "num_layers": 30,
        "hidden_size": 576,
        "num_heads": 9,
        "num_kv_heads": 3,
        "ffn_size": 1536,
        "vocab_size": 49152,
        "rotary_base": 1e5,
        "tie_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "family": "qwen2",
        "num_layers": 24,
        "hidden_size": 896,
        "num_heads": 14,
        "num_kv_heads": 2,
        "ffn_size": 4864,
        "vocab_size": 151936,
        "rotary_base": 1e6,
        "tie_embeddings": True,
    },
}


def model_config(arguments: argparse.Namespace) -> Any:
    """The shape that is asked for."""
    from megarewarm.config.model import ModelConfig

    shape = SHAPES[arguments.model] | {"max_positions": arguments.sequence}
    return ModelConfig(**shape | ({} if arguments.layers is None else {"num_layers": arguments.layers}))


def serve(side: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """A process: builds its side, then runs a block of steps whenever asked."""
    import numpy as np
    import torch

    torch.set_num_threads(arguments.threads)
    step = SIDES[side](arguments)
    random = np.random.default_rng(0)
    # both sides predict s tokens: transformers shifts inside, so its rows are those of ours as well
    batches = random.integers(
        SHAPES[arguments.model]["vocab_size"], size=(2, arguments.batch, arguments.sequence + 1), dtype=np.int64
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send(before)
    done = 0
    while (steps := pipe.recv()) is not None:
        times, losses = [], []
        for _ in range(steps):
            began = time.perf_counter(), time.process_time()
            losses.append(step(batches[done % 2]))
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            done += 1
        pipe.send((times, losses, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="pythia-70m", help="whose shape; default: %(default)s")
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step; default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block; default: %(default)s")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each side; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = mp.get_context("spawn")
    sides: dict[str, dict[str, Any]] = {}
    for side in arguments.sides:
        mine, other = context.Pipe()
        process = context.Process(target=serve, args=(side, arguments, other), daemon=True)
        process.start()
        sides[side] = {"pipe": mine, "process": process, "built": mine.recv(), "times": [], "losses": [], "peak": 0.0}
    for block in range(arguments.blocks + 1):
        for state in sides.values():
            state["pipe"].send(2 if block == 0 else arguments.steps)
            times, losses, state["peak"] = state["pipe"].recv()
            state["losses"] += losses
            if block:
                state["times"] += times
    for state in sides.values():
        state["pipe"].send(None)
        state["process"].join()

    tokens = arguments.batch * arguments.sequence
    wall, work = (
        {side: statistics.median(times[kind] for times in state["times"]) for side, state in sides.items()} for kind in (0, 1)
    )
    shape = model_config(arguments)
    print(f"{arguments.model}, {shape.num_layers} layers, {arguments.batch} x {arguments.sequence} tokens, ", end="")
    print(f"{arguments.precision}, {arguments.threads} threads")
    print(f"{'':14}{'tokens/s':>10}{'CPU s a step':>14}{'peak MiB':>10}{'before the first step':>24}")
    for side, state in sides.items():
        print(f"{side:14}{tokens / wall[side]:10.0f}{work[side]:14.4f}{state['peak']:10.0f}{state['built']:24.0f}")
    result: dict[str, Any] = {
        "tokens_per_second": {side: tokens / seconds for side, seconds in wall.items()},
        "cpu_seconds": work,
        "peak_mib": {side: state["peak"] for side, state in sides.items()},
    }
    here = sides.get("megarewarm")
    for side in sides if here else ():
        if here is None or side == "megarewarm":
            continue
        found = {"speed": wall[side] / wall["megarewarm"], "cpu": work["megarewarm"] / work[side]}
        found["memory"] = here["peak"] / sides[side]["peak"]
        text = f"megarewarm to {side}: tokens/s {found['speed']:.2f}, CPU s {found['cpu']:.3f}, memory {found['memory']:.2f}"
        if side == "transformers":
            losses = zip(sides[side]["losses"], here["losses"], strict=True)
            found["loss_difference"] = max(abs(theirs - ours) / theirs for theirs, ours in losses)
            text += f"; losses differ by at most {found['loss_difference']:.1e} (relative)"
        print(text)
        result[f"to {side}"] = found
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
