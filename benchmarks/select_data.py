"""Speed and memory of the steps of select-data that need no model, each alone, on a token file.

    python benchmarks/select_data.py data/new_train --unlike data/validation

MB/s are bytes of token ids per second of CPU time (one thread) and per second of the clock. Memory: the most that the process
holds besides mapped files. The work folder is made beside the file and removed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megarewarm.selection.desk import Desk
from megarewarm.selection.exact import Exact
from megarewarm.selection.near import Near
from megarewarm.selection.opening import identity, open_corpus
from megarewarm.selection.pipeline import select
from megarewarm.selection.step import Step
from megarewarm.selection.unlike import Unlike


class Memory(threading.Thread):
    """Watches the memory of this process until ``stop``."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.005):
            found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
            self.most = max(self.most, 1024 * int(found[1]) if found else 0)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix")
    parser.add_argument("--unlike", required=True, metavar="PREFIX")
    arguments = parser.parse_args()
    corpus = open_corpus([arguments.prefix])
    size = corpus.files[0].total_tokens * corpus.files[0].dtype.itemsize
    print(f"{arguments.prefix}: {corpus.num_documents:,} documents, {size / 1e6:.1f} MB of ids")
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} processors, numpy {version('numpy')}, rensa {version('rensa')}\n"
    )
    print("| step | documents dropped | MB/s of CPU time | MB/s | memory, MB |\n|---|---|---|---|---|")
    steps: list[Step] = [Exact(), Near(0.8), Unlike([arguments.unlike], 0.2, corpus)]
    work = Path(f"{arguments.prefix}.benchmark_work")
    for step in steps:
        shutil.rmtree(work, ignore_errors=True)
        memory, cpu, began = Memory(), time.process_time(), time.perf_counter()
        dropped = select(corpus, [step], Desk(work, identity(corpus))).taken[0].documents
        cpu, clock = time.process_time() - cpu, time.perf_counter() - began
        speeds = f"{size / cpu / 1e6:.1f} | {size / clock / 1e6:.1f}"
        print(f"| {step.name} | {dropped:,} | {speeds} | {memory.stop() / 1e6:.0f} |", flush=True)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
