"""What ``valuation`` costs with its defaults: a valued step against plain ones, all in one run of the trainer.

Every fourth step is valued; each interval between two steps' lines in metrics.jsonl is a plain step, or one with a part of the
valuation before its update or after it. So both take turns, whatever else the machine does. On a CPU all are counted in
processor seconds, which other programs don't lengthen much.

    python benchmarks/valuation.py --threads 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

EVERY = 4  # of the benchmark; the share of a run is at the default
# layers, hidden, heads, vocabulary, sequence, batch
SHAPES = {"small": (4, 128, 4, 4096, 128, 32), "larger": (6, 512, 8, 8192, 128, 32)}


def settings(place: Path, shape: tuple[int, ...], rounds: int) -> Any:
    import numpy as np

    from megarewarm.config.load import validate
    from megarewarm.config.schema import RunConfig
    from megarewarm.data.files.token_file import TokenFileWriter

    layers, hidden, heads, vocabulary, length, batch = shape
    steps = EVERY * (rounds + 1) + 1
    random = np.random.default_rng(1)
    for name, documents in (("train", steps * batch + 99), ("first", 256), ("second", 256)):
        with TokenFileWriter(place / name, np.uint16) as writer:
            for _ in range(documents):
                writer.add_document(random.integers(vocabulary, size=length + 1))
    sets = [{"name": name, "tokens": 128 * length, "sources": [{"path": str(place / name)}]} for name in ("first", "second")]
    return validate(
        RunConfig,
        {
            "name": "valued",
            "folder": str(place / "run"),
            "model": {
                "num_layers": layers,
                "hidden_size": hidden,
                "num_heads": heads,
                "vocab_size": vocabulary,
                "max_positions": length,
            },
            "data": {"sequence_length": length, "train": [{"path": str(place / "train")}], "validation": sets},
            "schedule": {"curve": "constant", "max_lr": 1e-4, "warmup": 0},
            "training": {"budget": steps, "global_batch": batch, "micro_batch": 8},
            "evaluation": {"every": steps, "at_start": False},
            "checkpoint": {"every": None},
            "logging": {"tensorboard": False, "dynamics": None},
            "valuation": {"against": ["first", "second"], "every": EVERY},
        },
        {},
    )


def measure(shape: tuple[int, ...], rounds: int) -> tuple[list[float], list[float], float]:
    """Seconds of plain steps, of each valuation, and the share of the compute that the trainer states at its default."""
    import torch

    from megarewarm.console import make_console
    from megarewarm.parallel.ranks import Ranks
    from megarewarm.training.start.valuation import valuation_cost
    from megarewarm.training.trainer import train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times: dict[int, float] = {}

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[event["step"]] = time.process_time() if device.type == "cpu" else time.perf_counter()

    with tempfile.TemporaryDirectory() as place:
        config = settings(Path(place), shape, rounds)
        train(config, Ranks(0, 1, device), make_console(quiet=True), [note])
        usual = config.model_copy(update={"valuation": config.valuation.model_copy(update={"every": _default_interval()})})
    took = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
    plain = [seconds for step, seconds in took.items() if step > EVERY and step % EVERY in (2, 3)]
    usual_step = statistics.median(plain)
    valued = [took[step] + took[step + 1] - 2 * usual_step for step in took if step > EVERY and step % EVERY == 0]
    cost = valuation_cost(usual.model_copy(update={"training": usual.training.model_copy(update={"budget": _long()})}), 0)
    assert cost is not None
    return plain, valued, cost.share


def _default_interval() -> Any:
    from megarewarm.config.valuation import ValuationConfig

    return ValuationConfig(against=["x"]).every


def _long() -> Any:
    from megarewarm.config.budget import Budget

    return Budget(amount=100_000, unit="steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="valued steps; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    for name in arguments.shapes:
        plain, valued, stated = measure(SHAPES[name], arguments.rounds)
        step, ratios = statistics.median(plain), sorted(seconds / statistics.median(plain) for seconds in valued)
        ratio, every = statistics.median(ratios), int(_default_interval().amount)
        layers, hidden, _, vocabulary, length, batch = SHAPES[name]
        print(f"{name}: {layers} layers, hidden {hidden}, vocabulary {vocabulary:,}, {batch} x {length} tokens, two sets")
        print(f"  a step {step:.3f} s, a valuation {ratio:.2f} steps ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        share = ratio / (every + ratio)
        print(f"  every {every} steps: {100 * share:.1f} % of a run; from forward passes alone {100 * stated:.1f} %")


if __name__ == "__main__":
    main()
