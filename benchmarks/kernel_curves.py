"""Two hundred steps with fused kernels against the same steps in plain PyTorch: same data, same seed, one picture.

Runs of the trainer itself, from scratch, on the bytes of Python's own library (256 ids), bf16 where the GPU has it. A third
run, plain PyTorch with another seed of the data's order, shows how far apart curves of equal worth lie.

    python benchmarks/kernel_curves.py --folder DIR [--steps 200] [--picture docs/kernel_curves.png]
    python benchmarks/kernel_curves.py --folder DIR --smoke      (a small model, also on a CPU)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megarewarm.data.files.token_file import TokenFileWriter

RUNS: dict[str, dict[str, Any]] = {
    "plain PyTorch": {"kernels": "reference"},
    "fused kernels": {"kernels": "triton"},
    "plain PyTorch, other order of data": {"kernels": "reference", "seed": 99},
}


def write_bytes(prefix: Path) -> None:
    """Every .py of Python's library as a document of bytes."""
    with TokenFileWriter(prefix, np.uint16, overwrite=True) as writer:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:3000]:
            writer.add_document(np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16))


def configuration(arguments: argparse.Namespace, name: str, kernels: str, seed: int = 1234) -> dict[str, Any]:
    """One run."""
    small = {"num_layers": 2, "hidden_size": 64, "num_heads": 2}
    model = small if arguments.smoke else {"num_layers": 12, "hidden_size": 768, "num_heads": 12}
    length, batch = (64, 4) if arguments.smoke else (1024, 32)
    return {
        "name": name.replace(" ", "_").replace(",", ""),
        "folder": str(arguments.folder / name.replace(" ", "_").replace(",", "")),
        "model": {**model, "vocab_size": 256, "max_positions": length},
        "data": {
            "sequence_length": length,
            "seed": seed,
            "train": [{"path": str(arguments.folder / "bytes"), "max_epochs": None}],
        },
        "schedule": {"curve": "cosine", "max_lr": 1e-3, "min_lr": 1e-4, "warmup": "10%"},
        "training": {"budget": arguments.steps, "global_batch": batch, "micro_batch": batch},
        "checkpoint": {"every": None},
        "kernels": kernels,
        "logging": {"tensorboard": False, "dynamics": None},
    }


def main() -> None:
    """Run, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for data and run folders; new or of an earlier run of this")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_bytes(arguments.folder / "bytes")
    curves: dict[str, list[float]] = {}
    for name, settings in RUNS.items():
        config = configuration(arguments, name, **settings)
        path = arguments.folder / f"{config['name']}.yml"
        path.write_text(yaml.safe_dump(config))
        subprocess.run([sys.executable, "launch.sh", path.resolve()], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in (Path(config["folder"]) / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [line["loss"] for line in lines if line["event"] == "train"]
    plain, fused, other = (np.array(curve) for curve in curves.values())
    kernels, order = np.abs(fused - plain), np.abs(other - plain)
    print(f"kernels: largest difference {kernels.max():.4f} nats, mean {kernels.mean():.4f}, last {kernels[-1]:.4f}")
    print(f"another order of the data: largest {order.max():.4f}, mean {order.mean():.4f}, last {order[-1]:.4f}")
    if arguments.picture:
        draw(curves, arguments.picture)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves above, their differences from the first below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2))
    first = np.array(next(iter(curves.values())))
    styles = {0: ("#0072B2", "-"), 1: ("#D55E00", "--"), 2: ("#999999", ":")}
    for i, (name, curve) in enumerate(curves.items()):
        colour, line = styles[i]
        above.plot(range(1, len(curve) + 1), curve, line, color=colour, label=name, linewidth=1.6)
        if i:
            below.plot(range(1, len(curve) + 1), np.array(curve) - first, line, color=colour, label=f"{name} - plain PyTorch")
    above.set_ylabel("loss, nats a byte")
    below.set_ylabel("difference, nats")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
