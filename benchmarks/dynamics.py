"""What ``logging.dynamics`` costs: a measurement of norms, updates and distances against a training step, as ratios of one run.

The trainer's own step and its measurement take turns on one model (Pythia 70M by default), so that whatever else the machine
does meets both. On a CPU both are counted in processor seconds, which other programs don't lengthen much.

    python benchmarks/dynamics.py [--rounds 7] [--batch 4] [--sequence 512]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

RUNS = (150, 1000, 10_000, 100_000)  # steps
SHARE = 0.02  # of a run between two measurements, the default


def sides(arguments: argparse.Namespace, device: Any) -> dict[str, Callable[[], object]]:
    """The training step and the measurement, both on the same model."""
    import numpy as np
    import torch

    from megarewarm.config.execution import OptimizerConfig, ParallelConfig, TrainingConfig
    from megarewarm.config.model import ModelConfig
    from megarewarm.optimizers.adamw import AdamW
    from megarewarm.parallel.engine import ParallelModel
    from megarewarm.parallel.mesh import Layout, Mesh
    from megarewarm.parallel.ranks import Ranks
    from megarewarm.training.after_step.dynamics import measure
    from megarewarm.training.start.weights import copy_weights

    torch.set_num_threads(arguments.threads)
    config = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_heads=arguments.heads,
        vocab_size=arguments.vocabulary,
        max_positions=arguments.sequence,
    )
    model = ParallelModel(
        config,
        Mesh(Ranks(0, 1, device), Layout()),
        parallel=ParallelConfig(),
        training=TrainingConfig(budget="1 steps", global_batch=arguments.batch, micro_batch=arguments.batch),
        sequence_length=arguments.sequence,
        precision="fp32" if device.type == "cpu" else "bf16",
    )
    model.initialize(1)
    start = copy_weights(model)
    optimizer = AdamW(model.parameters, model.cards, OptimizerConfig())
    rows = np.random.default_rng(0).integers(
        arguments.vocabulary, size=(arguments.batch, arguments.sequence + 1), dtype=np.int64
    )

    def step() -> None:
        model.gradients.zero()
        model.forward_backward(rows)
        model.gradients.reduce()
        norm = model.gradients.norm()
        optimizer.step(1e-4, model.gradients, min(1.0, 1 / (norm + 1e-6)))

    return {"step": step, "measurement": lambda: measure(model, optimizer, start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("layers", 6), ("hidden", 512), ("heads", 8), ("vocabulary", 50304), ("sequence", 512)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="of a step and a measurement each; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times: dict[str, list[float]] = {}
    actions = sides(arguments, device)
    for turn in range(arguments.rounds + 1):
        for name, action in actions.items():
            began = _now(device)
            action()
            if turn:
                times.setdefault(name, []).append(_now(device) - began)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["measurement"] / medians["step"]
    spread = sorted(m / s for m, s in zip(times["measurement"], times["step"], strict=True))
    print(
        f"{arguments.layers} layers, hidden {arguments.hidden}, vocabulary {arguments.vocabulary:,}, {arguments.batch} x "
        f"{arguments.sequence} tokens, {device}"
    )
    print(f"a step {medians['step']:.3f} s, a measurement {medians['measurement']:.3f} s: {ratio:.3f} of a step", end="")
    print(f" ({spread[0]:.3f} to {spread[-1]:.3f})")
    for steps in RUNS:
        interval = max(1, round(SHARE * steps))
        print(f"over a run of {steps:>7,} steps, every {interval:>5,}: {100 * ratio / interval:.3f} %")


def _now(device: Any) -> float:
    if device.type == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
