"""Rows that were never trained: found by brute force too, shown with their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megarewarm.checkpoint.untrained_rows import UntrainedRows, _of, _ranges
from megarewarm.data.text.tokenizers import train_bpe
from tests.checkpoint.test_convert import tool
from tests.support.families import saved


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["own", "zero", "tiny", "a", "b"]), min_size=9, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_by_brute_force(kinds: list[str], dtype: torch.dtype) -> None:
    kinds = [*kinds, *["own"] * (len(kinds) + 1)]  # as in any model, most rows are trained
    generator = torch.Generator().manual_seed(len(kinds))
    like = {"zero": torch.zeros(7), "tiny": torch.full((7,), 1e-4), "a": torch.ones(7), "b": torch.arange(7.0)}
    rows = torch.stack([like.get(kind, torch.randn(7, generator=generator)) for kind in kinds]).to(dtype)
    expected = {}
    if small := [i for i, kind in enumerate(kinds) if kind in ("zero", "tiny")]:
        expected["near zero", small[0]] = small
    for kind in ("a", "b"):
        if len(same := [i for i, other in enumerate(kinds) if other == kind]) > 1:
            expected["equal", same[0]] = same
    assert {(each.why, each.ids[0]): each.ids for each in _of("head", rows)} == expected


def test_equal_to_every_bit_only() -> None:
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    rows[11] = rows[3]
    rows[12] = rows[3] * (1 + 1e-6)
    assert _of("embedding", rows) == [UntrainedRows("embedding", "equal", [3, 11])]
    rows[5:9] = 0
    assert _ranges([2, 5, 6, 7, 9]) == "2, 5-7, 9" and _of("embedding", rows)[0].ids == [5, 6, 7, 8]
    rows[20], rows[30] = torch.nan, torch.arange(8) * 1e-6
    assert _of("embedding", rows)[0].ids == [5, 6, 7, 8, 30], "a row that is no number hides no other"


@pytest.mark.parametrize("tied", [False, True])
def test_they_are_shown_with_their_tokens(tmp_path: Path, tied: bool) -> None:
    saved("qwen2" if tied else "llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    shown = " ".join(tool("inspect_checkpoint", tmp_path / "model", "--rows").split())
    assert "no row of the vocabulary looks untrained" in shown
    rows = model.get_output_embeddings().weight
    with torch.no_grad():
        rows[40:61] = 1e-7
        rows[[4, 9]] = rows[7].clone()
    model.save_pretrained(tmp_path / "model")
    if not tied:
        train_bpe(["[red] herring, red, herd " * 50], 261, tmp_path / "model/tokenizer.json")
    shown = " ".join(tool("inspect_checkpoint", tmp_path / "model", "--rows").split())
    matrix = "embedding" if tied else "head"
    assert f"{matrix} near zero 21 40-60" in shown and f"{matrix} equal 3 4, 7, 9" in shown
    assert shown.count("near zero") == 1 and shown.count(" equal ") == 2  # the other in the caption
    assert ("'I', 'J', 'K'" in shown) != tied  # a tokenizer of bytes
