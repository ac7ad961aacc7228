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
        ({"neon": True, "bf16": False, "sve_bf16": False}, "bf16", "cpu", 1),
        ({"neon": True, "bf16": True}, "bf16", "cpu", 0),
        ({"avx512_bf16": False}, "fp32", "cpu", 0),
        ({"avx512_bf16": False}, "bf16", "cuda", 0),
        ({}, "bf16", "cpu", 0),
    ],
)
def test_a_cpu_without_bf16_is_reported(
    found: dict[str, bool], precision: str, device: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    told = about_precision(precision, precision, torch.device(device), 10**9)
    assert len(told) == lines and all("this CPU has no bf16 arithmetic" in line for line in told)


@pytest.mark.parametrize(
    ("found", "wanted", "parameters", "lines"),
    [
        ({"avx512_bf16": True}, "auto", 14_000_000, 1),
        ({"bf16": True}, "auto", 14_000_000, 1),
        ({"avx512_bf16": True}, "fp32", 14_000_000, 0),
        ({"avx512_bf16": True}, "auto", 1_300_000, 1),
        ({"avx512_bf16": True}, "auto", 50_000, 0),
        ({"avx512_bf16": False}, "auto", 14_000_000, 0),
    ],
)
def test_bf16_is_offered_where_auto_leaves_it_idle(
    found: dict[str, bool], wanted: str, parameters: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    told = about_precision(wanted, "fp32", torch.device("cpu"), parameters)
    assert len(told) == lines and all(line.endswith("set bf16") for line in told)
