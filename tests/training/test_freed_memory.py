"""What a run on the CPU frees is kept for its next step, and returned to the system after the run, counted in page faults."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

import megarewarm
from megarewarm.training.start.memory import keeps_freed_memory
from tests.support.tiny import mapping

PIECE = 40 << 20  # bytes, of which the system gives 10,240 pages


def faults() -> list[int]:
    """Page faults of an allocation, and of two like it."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * PIECE
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inside_a_run_and_after_it(tmp_path: Path, precision: str) -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("needs glibc")
    found: list[list[int]] = []

    def count(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            found.append(faults())

    settings = mapping(tmp_path, training={"budget": 2, "precision": precision, "device": "cpu"})
    assert megarewarm.train(megarewarm.load_config(settings), [count], quiet=True).exit_code == 0
    assert len(found) == 2 and all(min(counts) < 1_000 for counts in found)
    assert faults()[0] > 10_000, "also where a hole in the heap is large enough"


def test_of_many_parameters_in_fp32_it_is_returned() -> None:
    cpu, few = torch.device("cpu"), [torch.empty(60_000_000, device="meta"), torch.empty(40_000_000, device="meta")]
    many = [*few, torch.empty(1, device="meta")]
    assert keeps_freed_memory(few, cpu, "fp32") and not keeps_freed_memory(many, cpu, "fp32")
    assert keeps_freed_memory(many, cpu, "bf16") and not keeps_freed_memory(few, torch.device("cuda"), "bf16")
