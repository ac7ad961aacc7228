"""One training step on the CPU against transformers' own model: tokens/s and peak memory, as ratios of one run.

Same shape (Pythia 70M by default, or --model), same weights, same batch, fp32, eager: forward, backward, clipping, AdamW.
Each side runs in a process of its own (peak memory is a process's); the two take turns, block by block, so that whatever
else the machine does meets both. The losses of both sides are compared.

    python benchmarks/cpu_training_step.py [--model smollm2-135m] [--layers 6] [--steps 5] [--blocks 3] [--json FILE]
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
    from megarewarm.parallel.mesh import Layout, Mesh
    from megarewarm.parallel.ranks import Ranks

    config, device = model_config(arguments), torch.device("cpu")
    operations, _ = choose_operations(KernelsConfig(), config, device, torch.float32, documents=False)
    model = ParallelModel(
        config,
        Mesh(Ranks(0, 1, device), Layout()),
        parallel=ParallelConfig(),
        training=TrainingConfig(budget="1 steps", global_batch=arguments.batch, micro_batch=arguments.batch),
        sequence_length=arguments.sequence,
        precision="fp32",
        operations=operations,
    )
    model.initialize(1)
    optimizer = AdamW(model.parameters, model.cards, OptimizerConfig())

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
    """transformers' model and loss, torch's clipping and AdamW, as its users write it."""
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(rows: Any) -> float:
        tokens = torch.from_numpy(rows)
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


SHAPES: dict[str, dict[str, Any]] = {
    "pythia-70m": {"num_layers": 6, "hidden_size": 512, "num_heads": 8, "vocab_size": 50304},
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
    step = {"megarewarm": ours, "transformers": theirs}[side](arguments)
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
    parser.add_argument("--steps", type=int, default=5, help="steps of a block; default: %(default)s")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each side; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = mp.get_context("spawn")
    sides = {}
    for side in ("transformers", "megarewarm"):
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
    rates, work = (
        {side: tokens / statistics.median(times[kind] for times in state["times"]) for side, state in sides.items()}
        for kind in (0, 1)
    )
    apart = max(abs(a - b) / a for a, b in zip(sides["transformers"]["losses"], sides["megarewarm"]["losses"], strict=True))
    shape = model_config(arguments)
    print(f"{arguments.model}, {shape.num_layers} layers, {arguments.batch} x ", end="")
    print(f"{arguments.sequence} tokens, fp32, {arguments.threads} threads; losses differ by at most {apart:.1e} (relative)")
    print(f"{'':14}{'tokens/s':>10}{'a CPU second':>14}{'peak MiB':>10}{'before the first step':>24}")
    for side, state in sides.items():
        print(f"{side:14}{rates[side]:10.0f}{work[side]:14.0f}{state['peak']:10.0f}{state['built']:24.0f}")
    speed, effort = (rate["megarewarm"] / rate["transformers"] for rate in (rates, work))
    memory = sides["megarewarm"]["peak"] / sides["transformers"]["peak"]
    print(f"{'ratio':14}{speed:10.2f}{effort:14.2f}{memory:10.2f}")
    if arguments.json:
        result = {
            "speed": speed,
            "per_cpu_second": effort,
            "memory": memory,
            "tokens_per_second": rates,
            "loss_difference": apart,
        }
        result["peak_mib"] = {side: state["peak"] for side, state in sides.items()}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
