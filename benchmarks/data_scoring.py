#!/usr/bin/env python3
"""The cost of scoring and embedding documents against an evaluation of the same tokens, on one device, in CPU seconds (or, on a
GPU, seconds).

Prediction, written first: both are one forward pass, so the losses cost as much as an evaluation; short documents save
attention, and padding (below a quarter) costs about as much. The embedding leaves out the head.

    python benchmarks/data_scoring.py [--tokens 60000] [--model neox|llama] [--device cpu]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megarewarm.api import load_model
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.selection.scoring_model import ScoringModel, blocks

VOCABULARY = 2048
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--model", choices=("neox", "llama"), default="neox")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write_model(given.model, place / "model")
        _write_tokens(place / "data", given.tokens)
        evaluated = load_model(place / "model", device=given.device)
        scoring, file = ScoringModel(str(place / "model"), device=given.device), open_tokens(place / "data")
        starts, sizes = file.document_starts(0, file.num_documents), file.sizes
        parts = list(blocks(sizes))
        todo = {
            "evaluate": lambda: evaluated.evaluate(place / "data"),
            "losses": lambda: [scoring.losses(file, starts[a:b], sizes[a:b]) for a, b in parts],
            "embeddings": lambda: [scoring.embeddings(file, starts[a:b], sizes[a:b]) for a, b in parts],
        }
        scoring.losses(file, starts[:4], sizes[:4])
        for number in range(given.rounds):
            seconds = {}
            for name, work in todo.items():
                began = clock()
                work()
                seconds[name] = clock() - began
            speeds = ", ".join(f"{name} {file.total_tokens / spent:,.0f} tokens/s" for name, spent in seconds.items())
            losses, whole = seconds["evaluate"] / seconds["losses"], seconds["embeddings"] / seconds["losses"]
            print(
                f"{given.model}, round {number + 1}: {speeds}; losses / evaluate {losses:.2f}, cost of embeddings / losses "
                f"{whole:.2f}",
                flush=True,
            )


def _write_model(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    if kind == "neox":
        GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=1024)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, intermediate_size=640)).save_pretrained(folder)


def _write_tokens(prefix: Path, tokens: int) -> None:
    """Documents of lengths as text has them: log-normal, of 250 tokens at the median."""
    random, written = np.random.default_rng(0), 0
    with TokenFileWriter(prefix, np.uint16) as writer:
        while written < tokens:
            size = max(1, round(random.lognormal(np.log(250), 1)))
            writer.add_document(random.integers(0, VOCABULARY, size))
            written += size


if __name__ == "__main__":
    main()
