"""A blend of thousands of sources: how long it takes to lay out, the memory at its highest, and the files that are open.

Every source is an .idx/.bin pair of one document. Weights are 1, 2 and 3 in turn, which has a short period, or all different,
for which the blend is worked out for as many samples as the run has. The process may have 1,024 files open.

    python benchmarks/many_sources.py [--sources 3000] [--samples 100_000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, os, resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from megarewarm.config.data import DataConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.mixture import build_mixture
from megarewarm.data.mixture.phases import Phase
order, kind, count, samples = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
weight = (lambda i: 1 + i % 3) if kind == "few" else (lambda i: 1 + i / 977)
sources = [{"path": f"{sys.argv[1]}/{i:05d}", "max_epochs": None, "weight": weight(i)} for i in range(count)]
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
data = DataConfig.model_validate({"sequence_length": 16, "order": order, "train": sources})
mixture = build_mixture(TokenFiles(data, 64), [Phase(0, data.train)], total_samples=samples)
laid_out = time.process_time()
rows = min(samples, 20_000)
for first in range(0, rows, 1000):
    mixture.rows.read(first, 1000)
ended = time.process_time()
print(json.dumps([laid_out - began, rows / (ended - laid_out), len(os.listdir("/proc/self/fd")),
                  (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def write(folder: Path, count: int) -> None:
    """Pairs of one document of 1,000 ids."""
    from megarewarm.data.files.index_file import HEADER, MAGIC

    index = HEADER.pack(MAGIC, 1, 8, 1, 2) + b"".join(np.array(v, k).tobytes() for v, k in ((1000, "<i4"), (0, "<i8")))
    index += np.array([0, 1], "<i8").tobytes()
    for i in range(count):
        (folder / f"{i:05d}.idx").write_bytes(index)
        (folder / f"{i:05d}.bin").write_bytes(np.full(1000, i % 64, "<u2").tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sources", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        write(Path(name), arguments.sources)
        print("| order | weights | laid out, CPU s | rows a CPU second | open files | MiB |\n|---|---|---|---|---|---|")
        for order in ("permuted", "neox"):
            for kind in ("few", "different"):
                words = [name, order, kind, str(arguments.sources), str(arguments.samples)]
                done = subprocess.run(
                    [sys.executable, "-c", PROGRAM, *words], check=True, capture_output=True, text=True, cwd=ROOT
                )
                seconds, rate, files, memory = json.loads(done.stdout)
                print(f"| {order} | {kind} | {seconds:.1f} | {rate:,.0f} | {files} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
