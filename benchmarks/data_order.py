"""The order of samples of a very large corpus: time to the first batch and peak memory, against megatron-core.

The corpus is an .idx of as many documents, with lengths at random around 2000 tokens, and a .bin that takes no room on the
disk. Each order is made in a process of its own, one epoch less one sample of 2048 tokens; then 64 samples are read. Both sides
keep what they have made on the disk, where a second start of ours finds it.

    python benchmarks/data_order.py --folder DIR [--documents 150_000_000]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megarewarm.data.files.index_file import HEADER, MAGIC

S, SEED, BATCH = 2048, 1234, 64
ORDERS = ("permuted", "neox", "megatron", "megatron-core")


def write_corpus(prefix: Path, documents: int) -> int:
    """Write the pair. Returns its tokens."""
    sizes = np.random.default_rng(0).geometric(1 / 2000, documents).astype(np.int32)
    total = 0
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        sizes.tofile(file)
        for first in range(0, documents, 2**22):
            ends = total + np.cumsum(sizes[first : first + 2**22], dtype=np.int64)
            np.concatenate([[total], ends[:-1]]).astype("<i8").__imul__(2).tofile(file)
            total = int(ends[-1])
        for first in range(0, documents + 1, 2**22):
            np.arange(first, min(first + 2**22, documents + 1), dtype="<i8").tofile(file)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(total * 2)
    return total


def peak_memory() -> float:
    """MiB of this process since it began (not since its parent did, as getrusage would say)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def ours(prefix: Path, order: str) -> None:
    """Make the order and read a batch."""
    from megarewarm.data.files.token_file import open_tokens
    from megarewarm.data.order.samples import MegatronSamples, NeoxSamples, PermutedSamples, Samples

    view = open_tokens(prefix).view()
    wanted = (view.num_tokens - 1) // S - 1
    samples: Samples
    if order == "permuted":
        samples = PermutedSamples(view, S, SEED)
    else:
        samples = (NeoxSamples if order == "neox" else MegatronSamples)(view, S, SEED, wanted)
    samples.fill(np.arange(BATCH), np.empty((BATCH, S + 1), np.int64))


def gpt_dataset(prefix: Path) -> Any:
    """megatron-core's GPTDataset of the same samples."""
    import warnings

    warnings.simplefilter("ignore")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, pad, eod, eos = 70_000, -1, -2, -2
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=S,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend=([str(prefix)], None),
        split="1",
    )
    low = GPTDataset.build_low_level_dataset(str(prefix), config)
    tokens = int(low.sequence_lengths.sum(dtype=np.int64))
    indices = np.arange(len(low), dtype=np.int32)
    return GPTDataset(low, str(prefix), indices, (tokens - 1) // S - 1, Split.train, config)


def theirs(prefix: Path) -> None:
    """The same by megatron-core."""
    samples = gpt_dataset(prefix)
    for i in range(BATCH):
        samples[i]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the corpus, 20 bytes for each document; removed")
    parser.add_argument("--documents", type=int, default=150_000_000)
    parser.add_argument("--only", choices=ORDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prefix = arguments.folder / "order-benchmark" / "corpus"
    if arguments.only:
        if arguments.only == "megatron-core":
            import megatron.core.datasets.gpt_dataset  # noqa: F401  # its start-up is not the order's
        else:
            import megarewarm.data.order.samples  # noqa: F401
        base = peak_memory()
        began = time.perf_counter()
        theirs(prefix) if arguments.only == "megatron-core" else ours(prefix, arguments.only)
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, peak_memory(), base]))
        return
    prefix.parent.mkdir(parents=True)
    try:
        tokens = write_corpus(prefix, arguments.documents)
        print(f"{arguments.documents:,} documents, {tokens:,} tokens, samples of {S}")
        environment = os.environ | {"MEGAREWARM_CACHE": os.fspath(prefix.parent / "cache")}
        for order in ("permuted", "neox", "neox", "megatron", "megatron-core"):
            again = order == "neox" and (prefix.parent / "cache").exists()
            command = [sys.executable, os.fspath(__file__), "--folder", os.fspath(arguments.folder), "--only", order]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            seconds, peak, base = json.loads(done.stdout.splitlines()[-1])
            name = f"{order}, started again" if again else order
            print(f"{name}: {seconds:.1f} s, peak {peak:,.0f} MiB, of which {base:,.0f} MiB were there before", flush=True)
    finally:
        shutil.rmtree(prefix.parent)


if __name__ == "__main__":
    main()
