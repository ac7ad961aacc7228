"""Tokenising with the Pythia tokenizer, against the library `tokenizers`.

The text is Python's own library and the installed packages, which every machine has; both sides get the same documents in
batches of 2 MB and as many threads as there are cores, in turns.

    python benchmarks/data_tokenising.py --tokenizer 20B_tokenizer.json [--megabytes 40] [--turns 3]
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Peer

from megarewarm.data.text.tokenizers import load_tokenizer

Encode = Callable[[Sequence[str]], list[npt.NDArray[np.uint32]]]


def documents(megabytes: float) -> list[str]:
    """Python sources of this installation, in order of their names, up to that many MB."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        found.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    return found


def batches(texts: list[str]) -> list[list[str]]:
    """Batches of about 2 MB, as preprocessing makes them."""
    result: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size + len(text) > 2**21 and result[-1]:
            result.append([])
            size = 0
        result[-1].append(text)
        size += len(text)
    return result


def timed(encode: Encode, parts: list[list[str]]) -> tuple[float, list[npt.NDArray[np.uint32]]]:
    """(seconds, ids of every document)."""
    began = time.perf_counter()
    ids = [each for part in parts for each in encode(part)]
    return time.perf_counter() - began, ids


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    parts = batches(documents(arguments.megabytes))
    size = sum(len(text.encode()) for part in parts for text in part) / 1e6
    ours, peer = load_tokenizer(arguments.tokenizer), Peer.from_file(arguments.tokenizer)

    def theirs(texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return [np.array(each.ids, np.uint32) for each in peer.encode_batch(list(texts), add_special_tokens=False)]

    ours.encode_batch(["once, to load it"])
    seconds: dict[str, list[float]] = {"megarewarm": [], "tokenizers": []}
    for _ in range(arguments.turns):
        mine, ids = timed(ours.encode_batch, parts)
        other, expected = timed(theirs, parts)
        seconds["megarewarm"].append(mine)
        seconds["tokenizers"].append(other)
        same = all(np.array_equal(a, b) for a, b in zip(ids, expected, strict=True))
        assert same, "the ids differ"
    speeds = {name: size / statistics.median(values) for name, values in seconds.items()}
    print(f"{size:.1f} MB, {sum(len(part) for part in parts):,} documents, ids identical{''.join(ours.notes)}")
    for name, speed in speeds.items():
        print(f"{name}: {speed:.1f} MB/s")
    print(f"ratio: {speeds['megarewarm'] / speeds['tokenizers']:.2f}")


if __name__ == "__main__":
    main()
