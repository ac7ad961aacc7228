"""Long metrics files: how long the report and the live view take to read one, and the memory at its highest.

Each reader has a process of its own; the report's page is drawn as well. The numbers that are read don't depend on the way they
are read (``tests/record/test_run.py``).

    python benchmarks/report_reading.py [--lines 2_000_000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READERS = {
    "report, read": "from megarewarm.record.run import read_run; run = read_run(folder); assert run.steps == lines",
    "report, page": "from megarewarm.report.pages.run_page import report; report([folder], folder / 'page')",
    "live view": "from megarewarm.record.follow import Follower; f = Follower(folder / 'metrics.jsonl'); f.poll(); "
    "assert f.step == lines",
}
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
folder, lines = Path(sys.argv[1]), int(sys.argv[2])
import numpy, orjson, yaml, matplotlib.figure
import megarewarm.report.pages.run_page, megarewarm.record.follow
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
{body}
seconds = time.process_time() - began
print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def write(folder: Path, lines: int) -> int:
    """A run of as many train lines, with an evaluation every thousand. Returns the bytes."""
    with open(folder / "metrics.jsonl", "w") as file:
        file.write('{"event":"start","format":1,"time":0.0,"name":"long","folder":"x","from":"up","step":0}\n')
        for step in range(1, lines + 1):
            loss = 2 + 1 / math.sqrt(step) + 0.01 * math.sin(step)
            line = {
                "event": "train", "time": step * 0.1, "step": step, "tokens": step * 524288, "loss": loss, "lr": 3e-4,
                "grad_norm": 0.5 + 0.1 * math.cos(step), "tokens_per_second": 5242880.0, "data_wait": 0.001,
                "lr_sum": step * 3e-4, "annealing_area": 0.0,
            }  # fmt: skip
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            if step % 1000 == 0:
                for name, role in (("old", "upstream"), ("new", "downstream")):
                    told = {"event": "eval", "time": step * 0.1, "step": step, "tokens": step * 524288, "name": name}
                    file.write(json.dumps(told | {"role": role, "loss": loss, "over": 4096}, separators=(",", ":")) + "\n")
    return (folder / "metrics.jsonl").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, help="where the file is written; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        size = write(Path(name), arguments.lines)
        print(f"{arguments.lines:,} train lines, {size / 1e6:.0f} MB\n\n| reader | CPU seconds | MiB |\n|---|---|---|")
        for reader, body in READERS.items():
            command = [sys.executable, "-c", PROGRAM.format(body=body), name, str(arguments.lines)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            seconds, memory = json.loads(done.stdout)
            print(f"| {reader} | {seconds:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
