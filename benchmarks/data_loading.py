"""Reading samples at random places, in one process, page cache warm: our orders against megatron-core's GPTDataset.

One file of random ids, documents of about 2000 tokens, samples of 2048; both sides read samples in the order they have made, in
turns.

    python benchmarks/data_loading.py --folder DIR [--gigabytes 1] [--turns 3]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from data_order import SEED, S, gpt_dataset

from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.data.order.samples import MegatronSamples, PermutedSamples

BATCH = 64


def write_corpus(prefix: Path, gigabytes: float) -> None:
    """Write a pair of that size."""
    random = np.random.default_rng(0)
    with TokenFileWriter(prefix, np.uint16) as writer:
        while writer.num_tokens * 2 < gigabytes * 1e9:
            sizes = random.geometric(1 / 2000, 2000)
            writer.add_documents(random.integers(0, 50_000, sizes.sum(), np.uint16), sizes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the corpus, which is removed")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    prefix = arguments.folder / "loading-benchmark" / "corpus"
    prefix.parent.mkdir(parents=True)
    try:
        write_corpus(prefix, arguments.gigabytes)
        view = open_tokens(prefix).view()
        count = (view.num_tokens - 1) // S - 1
        peer = gpt_dataset(prefix)
        orders = {"megatron": MegatronSamples(view, S, SEED, count), "permuted": PermutedSamples(view, S, SEED)}
        out = np.empty((BATCH, S + 1), np.int64)
        same = np.append(peer[5]["tokens"].numpy(), int(peer[5]["labels"][-1]))
        assert np.array_equal(orders["megatron"].sample(5), same), "not the same samples"

        def of_ours(name: str) -> Callable[[int], None]:
            return lambda first: orders[name].fill(np.arange(first, first + BATCH), out)

        def of_theirs(first: int) -> None:
            for i in range(first, first + BATCH):
                peer[i]

        ways: dict[str, Callable[[int], None]] = {name: of_ours(name) for name in orders} | {"megatron-core": of_theirs}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        wanted = min(count, 20_000) // BATCH * BATCH
        for turn in range(arguments.turns + 1):  # the first one warms the cache
            for name, read in ways.items():
                began = time.perf_counter()
                for first in range(0, wanted, BATCH):
                    read(first)
                if turn:
                    speeds[name].append(wanted / (time.perf_counter() - began))
        print(f"{view.num_tokens:,} tokens, {view.num_documents:,} documents, {wanted:,} samples of {S}")
        base = statistics.median(speeds["megatron-core"])
        for name, values in speeds.items():
            speed = statistics.median(values)
            print(f"{name}: {speed:,.0f} samples/s, {speed / base:.1f} times megatron-core")
    finally:
        shutil.rmtree(prefix.parent)


if __name__ == "__main__":
    main()
