"""A run small enough for tests: a token file of a learnable pattern and a configuration that trains in seconds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megarewarm.config.load import merge, validate
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.token_file import TokenFileWriter

VOCABULARY = 64


def write_tokens(prefix: Path, seed: int, documents: int = 40, vocabulary: int = VOCABULARY) -> str:
    """Documents of a noisy successor pattern, a different one for every seed. Returns the prefix."""
    random = np.random.default_rng(seed)
    step = 2 * seed + 1
    with TokenFileWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            length = int(random.integers(50, 200))
            ids = (random.integers(vocabulary) + step * np.arange(length)) % vocabulary
            noise = random.random(length) < 0.1
            writer.add_document(np.where(noise, random.integers(vocabulary, size=length), ids))
    return str(prefix)


def mapping(place: Path, /, **changes: Any) -> dict[str, Any]:
    """The configuration as a mapping; token files are made in ``place`` on first use."""
    for name, seed in (("old", 1), ("new", 3)):
        if not (place / f"{name}.idx").exists():
            write_tokens(place / name, seed)
    base = {
        "name": "tiny",
        "folder": str(place / "tiny"),
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": VOCABULARY, "max_positions": 16},
        "data": {
            "sequence_length": 16,
            "train": [{"path": str(place / "new"), "max_epochs": 9}],
            "validation": [
                {"name": "old", "role": "upstream", "tokens": 256, "sources": [{"path": str(place / "old")}]},
                {"name": "new", "role": "downstream", "tokens": 256, "sources": [{"path": str(place / "new")}]},
            ],
        },
        "schedule": {"curve": "cosine", "max_lr": 1e-2, "min_lr": 1e-3, "warmup": "10%"},
        "training": {"budget": 20, "global_batch": 8, "micro_batch": 4},
        "evaluation": {"every": 5},
        "checkpoint": {"every": 5, "keep_last": 9},
        "logging": {"tensorboard": False},
    }
    return merge(base, changes)


def config(place: Path, /, **changes: Any) -> RunConfig:
    """The validated configuration with ``changes`` merged in."""
    return validate(RunConfig, mapping(place, **changes), {})


def quiet() -> Console:
    """A console that keeps what is printed in its ``file``."""
    return Console(file=io.StringIO(), width=140)


def printed(console: Console) -> str:
    """What was printed on a console of ``quiet``."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def events(run_folder: Path, event: str) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl of one kind, in order."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def faults(run_folder: Path) -> list[dict[str, Any]]:
    """The alarms of a run but for those of slow steps and ranks, which a busy machine raises."""
    return [line for line in events(run_folder, "alarm") if line["kind"] not in ("slow_step", "slow_rank")]
