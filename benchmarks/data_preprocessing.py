"""Preprocessing a large input from end to end: speed, and memory of all its processes together.

The input is made of the sources of Python and of the installed packages, again and again until it has the size asked for, as
.jsonl; the tool is run as a user would. Memory is the sum of the proportional set sizes (shared pages once), asked four times
a second.

    python benchmarks/data_preprocessing.py --tokenizer 20B_tokenizer.json --folder DIR [--gigabytes 3] [-- --shuffle]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "preprocess_data.py"


def write_input(path: Path, gigabytes: float) -> int:
    """Write the .jsonl. Returns its bytes."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])]
    sources = sorted({path for root in roots for path in root.rglob("*.py")})
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources]
    size = number = 0
    with open(path, "wb") as file:
        while size < gigabytes * 1e9:
            line = {"text": f"# {number}\n{texts[number % len(texts)]}"}
            size += file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            number += 1
    return size


def memory(root: int) -> int:
    """Bytes of a process and all below it."""
    total, left = 0, [root]
    while left:
        process = left.pop()
        try:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{process}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for input and output, which are removed")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("options", nargs="*", help="passed on to the tool, after --")
    arguments = parser.parse_args()
    folder = arguments.folder / "preprocess-benchmark"
    folder.mkdir(parents=True)
    try:
        size = write_input(folder / "input.jsonl", arguments.gigabytes)
        began = time.monotonic()
        command = [sys.executable, TOOL, folder / "input.jsonl", "--tokenizer", arguments.tokenizer]
        command += ["--output", folder / "out", *arguments.options]
        running = subprocess.Popen([os.fspath(part) for part in command])
        most = 0
        while running.poll() is None:
            most = max(most, memory(running.pid))
            time.sleep(0.25)
        if running.returncode:
            sys.exit(running.returncode)
        seconds = time.monotonic() - began
        print(f"{size / 1e9:.2f} GB in {seconds:.0f} s: {size / seconds / 1e6:.1f} MB/s; most memory {most / 2**20:.0f} MiB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
