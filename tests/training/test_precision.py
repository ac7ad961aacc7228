"""What a run says of its precision."""

from __future__ import annotations

import pytest
import torch

from megarewarm.training.start.inputs import about_precision


@pytest.mark.parametrize(
    ("found", "precision", "device", "lines"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "bf16", "cpu", 1),
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16", "cpu", 0),
        ({"avx512_bf16": False}, "fp32", "cpu", 0),
        ({"avx512_bf16": False}, "bf16", "cuda", 0),
        ({}, "bf16", "cpu", 0),
    ],
)
def test_a_cpu_without_bf16_is_reported(
    found: dict[str, bool], precision: str, device: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    told = about_precision(precision, torch.device(device))
    assert len(told) == lines and all("this CPU has no bf16 arithmetic" in line for line in told)
