"""What a folder of gpu_session.py holds, as one page and one picture: called by it after each call.

python benchmarks/gpu_summary.py OUT                     (writes OUT/summary.md and OUT/summary.png)
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKENS = 8 * 2048
"""Of a step that says nothing of its batch; train_step.py's default."""


def states(folder: Path) -> dict[str, dict[str, Any]]:
    """By call, in the order in which they ran."""
    found = {
        path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if not path.name.endswith(".result.json")
    }
    found = {name: state for name, state in found.items() if "state" in state}
    return dict(sorted(found.items(), key=lambda item: item[1]["at"]))


def result(folder: Path, call: str) -> Any:
    """What a call wrote itself, or None."""
    path = folder / f"{call}.result.json"
    return json.loads(path.read_text()) if path.exists() else None


def steps(folder: Path) -> dict[str, dict[str, Any]]:
    """By side: the times of all rounds, and of the first one with a profile its memory, shares and what computed it."""
    found: dict[str, dict[str, Any]] = {}
    for call in states(folder):
        if re.fullmatch(r"step_[a-z_]+_\d", call) and "batch" not in call:
            for side, rounds in (result(folder, call) or {}).items():
                entry = found.setdefault(side, {**rounds[0], "times": []})
                entry["shares"] = entry["shares"] or rounds[0]["shares"]
                entry["times"] = entry["times"] + [t for each in rounds for t in each["times"]]
    return found


def batches(folder: Path) -> dict[str, dict[int, tuple[float, float]]]:
    """By side and sequences of a step: (tokens/s, peak GiB)."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for call in states(folder):
        if named := re.fullmatch(r"step_[a-z]+_batch_(\d+)", call):
            for side, rounds in (result(folder, call) or {}).items():
                seconds = statistics.median(rounds[0]["times"])
                size = int(named[1])
                found.setdefault(side, {})[size] = (size * 2048 / seconds, rounds[0]["memory"])
    for side, entry in steps(folder).items():
        if side in found:
            found[side][8] = (TOKENS / statistics.median(entry["times"]), entry["memory"])
    return {side: dict(sorted(points.items())) for side, points in found.items()}


def page(folder: Path) -> Iterator[str]:
    """Lines of Markdown."""
    yield "# What was measured\n"
    yield "| call | state | s | last line |\n|---|---|---|---|"
    for call, state in states(folder).items():
        yield f"| {call} | {state['state']} | {state['seconds']:.0f} | {state['last'].replace('|', '/')} |"
    sides = steps(folder)
    if sides:
        yield "\n| a step of 8 x 2048 | ms, median | tokens/s | peak, GiB | last loss |\n|---|---|---|---|---|"
        for side, entry in sides.items():
            seconds = statistics.median(entry["times"])
            cells = f"{1e3 * seconds:.2f} | {TOKENS / seconds:,.0f} | {entry['memory']:.2f} | {entry['losses'][-1]:.4f}"
            yield f"| {side} | {cells} |"
        kinds = sorted({kind for entry in sides.values() for kind in entry["shares"]})
        if kinds:
            yield f"\n| ms by class of kernel | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}"
            for side, entry in sides.items():
                if entry["shares"]:
                    times = [f"{entry['shares'].get(kind, 0.0):.2f}" for kind in kinds]
                    yield f"| {side} | {' | '.join(times)} |"
    for side, points in batches(folder).items():
        yield f"\n{side}, sequences a step: tokens/s, peak GiB: " + "; ".join(
            f"{size}: {rate:,.0f}, {memory:.1f}" for size, (rate, memory) in points.items()
        )
    for call in ("kernels", "table_products", "table_attention", "table_loss"):
        if (path := folder / f"{call}.txt").exists():
            yield f"\n## {call}\n\n{path.read_text(errors='replace').strip()}"
    if states(folder).get("curves", {}).get("state") == "done":
        lines = (folder / "curves.txt").read_text(errors="replace").strip().splitlines()
        yield "\n## curves\n\n" + "\n".join(lines[-2:])


def draw(folder: Path) -> None:
    """Steps by class of kernel, tokens/s by batch, operations' shares of their ceilings, and those of the products."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 10))
    sides = steps(folder)
    kinds = sorted({kind for entry in sides.values() for kind in entry["shares"]} - {"step under the profiler"})
    for place, entry in enumerate(sides.values()):
        left = 0.0
        for number, kind in enumerate(kinds):
            width = entry["shares"].get(kind, 0.0)
            axes[0, 0].barh(place, width, left=left, color=f"C{number}", label=kind if place == 0 else None)
            left += width
        axes[0, 0].plot(1e3 * statistics.median(entry["times"]), place, "kD")
    axes[0, 0].set_yticks(range(len(sides)), list(sides), fontsize=8)
    axes[0, 0].set_xlim(left=0)
    axes[0, 0].set_xlabel("ms of a step: measured (diamond), profiled by class of kernel")
    for side, points in batches(folder).items():
        axes[0, 1].plot(list(points), [rate for rate, _ in points.values()], "o-", label=side)
    axes[0, 1].set_xscale("log", base=2)
    axes[0, 1].set_xlabel("sequences of 2048 a step")
    axes[0, 1].set_ylabel("tokens/s")
    bars(axes[1, 0], result(folder, "kernels"), lambda row: f"{row['operation']}: {row['side']}")
    bars(axes[1, 1], result(folder, "table_products"), lambda row: f"{row['product']}: {row['way']}")
    for each in (axes[0, 0], axes[0, 1]):
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "summary.png", dpi=120)


def bars(axes: Any, found: Any, name: Any) -> None:
    """Shares of the ceilings."""
    rows = list(reversed((found or {}).get("rows", [])))
    axes.barh(range(len(rows)), [100 * row["share"] for row in rows], color="#0072B2")
    axes.set_yticks(range(len(rows)), [name(row) for row in rows], fontsize=4 if len(rows) > 30 else 7)
    axes.set_xlabel("% of the ceiling measured in the same run")


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "summary.md").write_text("\n".join(page(folder)) + "\n")
    if "--picture" in sys.argv[2:]:
        try:
            draw(folder)
        except ImportError:
            print("no matplotlib: no picture")


if __name__ == "__main__":
    main()
