"""Does anything grow? Memory, open files, threads and disk of a run of very many steps, sampled from outside all along.

A tiny model with everything switched on that a user has: checkpoints, evaluations, metrics.jsonl, log.txt, TensorBoard, layer
dynamics. After the warm-up (the first tenth) the median of every later tenth is compared with that of the first of them. What
grows by design, a constant number of bytes a step (metrics.jsonl, log.txt, TensorBoard), is shown apart. Linux only.

    python benchmarks/soak.py run FOLDER [--steps 100000] [--ranks 1]      # one measured run; samples in FOLDER/samples.json
    python benchmarks/soak.py show FOLDER... [--picture docs/soak.png]     # table, verdict, picture of measured runs
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np
import yaml

from megarewarm.data.files.token_file import TokenFileWriter

Sample = dict[str, float]
GROWS_BY_DESIGN = ("metrics.jsonl", "log.txt", "tensorboard")
MEASURES = {
    "memory": ("resident memory", "MiB"),
    "files": ("open files", ""),
    "threads": ("threads", ""),
    "disk": ("disk without logs", "KiB"),
}
WARM_UP, TENTHS, TOLERANCE = 0.1, 10, 0.01


def write_config(folder: Path, steps: int) -> Path:
    """A run of ``steps`` steps on random tokens, everything on, saved and evaluated 200 times."""
    random = np.random.default_rng(1)
    for name in ("train", "validation"):
        with TokenFileWriter(folder / name, np.uint16) as writer:
            for _ in range(200):
                writer.add_document(random.integers(64, size=int(random.integers(50, 500))))
    every = max(1, steps // 200)
    run = {
        "name": "soak",
        "folder": str(folder / "soak"),
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 64, "max_positions": 16},
        "data": {
            "sequence_length": 16,
            "train": [{"path": str(folder / "train"), "max_epochs": None}],
            "validation": [
                {"name": "held_out", "role": "downstream", "tokens": 256, "sources": [{"path": str(folder / "validation")}]}
            ],
        },
        "schedule": {"curve": "cosine", "max_lr": 1e-3, "min_lr": 1e-4, "warmup": "1%"},
        "training": {"budget": steps, "global_batch": 4, "micro_batch": 2},
        "evaluation": {"every": every},
        "checkpoint": {"every": every, "keep_last": 2},
        "logging": {"every": 10, "tensorboard": True, "dynamics": every},
    }
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump(run))
    return path


def descendants(pid: int) -> Iterator[int]:
    """``pid`` and the processes that came of it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from descendants(int(child))


def of_processes(pids: list[int]) -> Sample:
    """Resident memory in MiB, open files and threads of processes, added up."""
    total: Sample = {"memory": 0.0, "files": 0.0, "threads": 0.0}
    for pid in pids:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        total["memory"] += int(status["VmRSS"].split()[0]) / 1024
        total["threads"] += int(status["Threads"])
        total["files"] += len(os.listdir(f"/proc/{pid}/fd"))
    return total


def of_disk(run: Path) -> Sample:
    """KiB in a run's folder: what stays (checkpoints, configuration), and what grows by design."""
    total: Sample = {"disk": 0.0, "logs": 0.0}
    for file in run.rglob("*"):
        try:
            size = file.stat().st_size / 1024 if file.is_file() else 0.0
        except FileNotFoundError:
            continue  # a checkpoint that is just being replaced
        total["logs" if file.relative_to(run).parts[0] in GROWS_BY_DESIGN else "disk"] += size
    return total


def last_step(metrics: Path) -> int:
    """The newest step that a growing metrics file tells."""
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = file.read().split(b"\n")[1:-1]
    steps = [json.loads(line)["step"] for line in lines if line.startswith(b'{"event":"train"')]
    return int(steps[-1]) if steps else 0


def measure(folder: Path, steps: int, ranks: int, interval: float) -> None:
    """Carry the run out and write ``samples.json``."""
    folder.mkdir(parents=True)
    words = [str(ROOT / "launch.sh"), str(write_config(folder, steps))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *words] if ranks == 1 else [*launcher, *words]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    samples: list[Sample] = []
    began = time.monotonic()
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(interval)
            try:
                own = list(descendants(process.pid))
                step = last_step(folder / "soak" / "metrics.jsonl")
                found = of_processes(own if ranks == 1 else own[1:])  # the launcher is not ours
                if step and len(own) >= ranks:
                    samples.append({"step": step, **found, **of_disk(folder / "soak")})
            except (FileNotFoundError, ProcessLookupError, KeyError):
                continue  # not begun yet, or just ended
    if process.returncode:
        raise SystemExit(f"the run ended with code {process.returncode}: see {folder / 'output.txt'}")
    seconds = round(time.monotonic() - began)
    record = {"steps": steps, "ranks": ranks, "seconds": seconds, "samples": samples}
    (folder / "samples.json").write_text(json.dumps(record))
    print(f"{steps} steps, {ranks} ranks, {seconds} s, {len(samples)} samples: {folder / 'samples.json'}")


def tenths(record: dict[str, Any], measure: str) -> list[float]:
    """Medians of ``measure`` over tenths of the steps after the warm-up."""
    steps = np.array([sample["step"] for sample in record["samples"]])
    values = np.array([sample[measure] for sample in record["samples"]])
    edges = np.linspace(record["steps"] * WARM_UP, record["steps"], TENTHS + 1)
    parts = [values[(steps > low) & (steps <= high)] for low, high in itertools.pairwise(edges)]
    if any(part.size == 0 for part in parts):
        raise SystemExit("too few samples: take more steps or a shorter --interval")
    return [float(np.median(part)) for part in parts]


def growth(record: dict[str, Any], measure: str) -> float:
    """The largest median of a later tenth over that of the first, minus one."""
    first, *later = tenths(record, measure)
    return max(later) / first - 1


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: first and last tenth, growth, and what was written a step."""
    lines = [
        "| run | | first tenth after warm-up | last tenth | largest growth of any tenth | largest sample |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        title = f"{record['steps']:,} steps, {record['ranks']} rank{'s' * (record['ranks'] > 1)}"
        for name, (words, unit) in MEASURES.items():
            medians = tenths(record, name)
            highest = max(s[name] for s in record["samples"] if s["step"] > record["steps"] * WARM_UP)
            shown = [f"{value:,.1f} {unit}" if unit else f"{value:,.0f}" for value in (medians[0], medians[-1], highest)]
            change = f"{100 * growth(record, name):+.2f} %"
            lines.append(f"| {title} | {words} | {shown[0]} | {shown[1]} | {change} | {shown[2]} |")
            title = ""
        early, late = (next(s for s in record["samples"] if s["step"] > record["steps"] * share) for share in (WARM_UP, 0.9))
        rate = 1024 * (late["logs"] - early["logs"]) / (late["step"] - early["step"])
        lines.append(f"| | logs, by design | {early['logs']:,.0f} KiB | {late['logs']:,.0f} KiB | {rate:,.0f} bytes a step | |")
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], picture: Path) -> None:
    """One panel per measure, one line per run, against the share of the steps that are done."""
    from megarewarm.report.figures.style import colour, new_figure, quiet_axes, style

    with style():
        figure = new_figure(9.0, 5.6)
        panels = figure.subplots(2, 2, sharex=True).flat
        for axes, (name, (words, unit)) in zip(panels, MEASURES.items(), strict=True):
            for i, record in enumerate(records):
                x = [100 * s["step"] / record["steps"] for s in record["samples"]]
                y = [s[name] for s in record["samples"]]
                label = f"{record['steps']:,} steps, {record['ranks']} rank{'s' * (record['ranks'] > 1)}"
                axes.plot(x, y, color=colour(i), linewidth=1.4, linestyle=("-", "--")[i % 2], label=label)
            axes.axvspan(0, 100 * WARM_UP, color="#f0f2f5", zorder=0)
            axes.set_title(f"{words}, {unit}" if unit else words)
            axes.set_ylim(0, 1.25 * max(s[name] for record in records for s in record["samples"]))
            axes.set_xlim(0, 100)
            quiet_axes(axes)
        for axes in figure.axes[2:]:
            axes.set_xlabel("steps done, %  (grey: warm-up, not judged)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(records), frameon=False)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.savefig(picture, dpi=110)


def main() -> None:
    """Measure one run, or show measured ones; showing ends with code 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="carry a run out and sample it")
    run.add_argument("folder", type=Path)
    run.add_argument("--steps", type=int, default=100_000)
    run.add_argument("--ranks", type=int, default=1)
    run.add_argument("--interval", type=float, default=1.0, help="seconds between samples")
    show = commands.add_parser("show", help="table, verdict and picture")
    show.add_argument("folders", type=Path, nargs="+")
    show.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        measure(arguments.folder, arguments.steps, arguments.ranks, arguments.interval)
        return
    records = [json.loads((folder / "samples.json").read_text()) for folder in arguments.folders]
    for record in records:  # a process that ends gives back what it holds
        record["samples"] = [sample for sample in record["samples"] if sample["step"] < record["steps"]]
    print(table(records))
    if arguments.picture is not None:
        draw(records, arguments.picture)
    grown = [name for record in records for name in MEASURES if growth(record, name) > TOLERANCE]
    print("nothing grows by more than 1 %" if not grown else f"GROWS: {', '.join(grown)}")
    raise SystemExit(bool(grown))


if __name__ == "__main__":
    main()
