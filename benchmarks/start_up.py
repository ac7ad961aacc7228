"""Start-up time and peak memory up to the first batch of the ``permuted`` order, out of 300 billion tokens.

The token file is sparse (a hole of 600 GB, which takes no space on the disk). Each case runs in a fresh process, timed
from before Python starts it: imports, opening, checks, blend and one global batch are included. Linux only.

    python benchmarks/start_up.py [--folder DIR] [--tokens 300e9] [--documents 150e6] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megarewarm.data.files.index_file import HEADER, MAGIC

SEQUENCE_LENGTH = 2048
GLOBAL_BATCH = 1024

_FIRST_BATCH = """
import re, sys
from megarewarm.config.data import DataConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.batches import build_training_batches
from megarewarm.data.mixture.phases import Phase
path, samples, length, batch = sys.argv[1], *map(int, sys.argv[2:])
data = DataConfig(sequence_length=length, train=[{"path": path, "split": None}])
batches = build_training_batches(TokenFiles(data, 50304), [Phase(0, data.train)], total_samples=samples)
rows = batches.rows(0, batch)
batches.fingerprint()
assert rows.shape == (batch, length + 1)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def write_sparse_tokens(path: Path, tokens: int) -> None:
    """A uint16 .bin of zeros that takes no space. Raises ``OSError`` where the file system has no such large files."""
    with open(path, "wb") as file:
        os.truncate(file.fileno(), 2 * tokens)


def write_index(path: Path, tokens: int, documents: int) -> None:
    """An .idx over ``tokens`` uint16 tokens in ``documents`` documents of nearly equal size."""
    size, longer = divmod(tokens, documents)

    def edges(first: int, last: int) -> np.ndarray:
        i = np.arange(first, last, dtype=np.int64)
        return i * size + np.minimum(i, longer)

    blocks = [(first, min(first + 2**22, documents)) for first in range(0, documents, 2**22)]
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for first, last in blocks:
            file.write(np.diff(edges(first, last + 1)).astype("<i4").tobytes())
        for first, last in blocks:
            file.write((2 * edges(first, last)).astype("<i8").tobytes())
        for first, last in blocks:
            file.write(np.arange(first, last, dtype="<i8").tobytes())
        file.write(np.array([documents], "<i8").tobytes())


def first_batch(path: Path, tokens: int) -> tuple[float, float]:
    """Seconds and peak memory in MB of a fresh process that reads the first batch of one epoch."""
    samples = (tokens - 1) // SEQUENCE_LENGTH // GLOBAL_BATCH * GLOBAL_BATCH
    arguments = [str(path), str(samples), str(SEQUENCE_LENGTH), str(GLOBAL_BATCH)]
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", _FIRST_BATCH, *arguments], capture_output=True, text=True, check=True, env=os.environ
    )
    return time.perf_counter() - start, int(result.stdout) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the files are made and removed again; needs 20 bytes per document")
    parser.add_argument("--tokens", type=float, default=300e9)
    parser.add_argument("--documents", type=float, default=150e6, help="documents of the largest index")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    tokens, most = int(arguments.tokens), int(arguments.documents)
    results = []
    if arguments.folder is not None:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cases = [("bare .bin", 0), ("150 k documents", 150_000), (f"{most / 1e6:g} M documents", most)]
        for name, documents in cases:
            prefix = Path(folder) / f"tokens_{documents}"
            write_sparse_tokens(prefix.with_suffix(".bin"), tokens)
            if documents:
                write_index(prefix.with_suffix(".idx"), tokens, documents)
            seconds, memory = first_batch(prefix.with_suffix(".bin"), tokens)
            results.append({"case": name, "tokens": tokens, "seconds": round(seconds, 3), "peak_mb": round(memory, 1)})
            for suffix in (".bin", ".idx"):
                prefix.with_suffix(suffix).unlink(missing_ok=True)
    print(f"first batch of {GLOBAL_BATCH} x {SEQUENCE_LENGTH} out of {tokens:,} tokens, order 'permuted'")
    print(f"{'index':<20}{'seconds':>10}{'peak MB':>10}")
    for result in results:
        print(f"{result['case']:<20}{result['seconds']:>10.2f}{result['peak_mb']:>10.0f}")
    text = json.dumps(results)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
