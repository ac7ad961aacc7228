"""Split strings against the two trainers' rules written out step by step, and against recorded index maps."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megarewarm.data.files.split import Part, Rule, split_documents
from megarewarm.errors import UserError


def neox_bounds(shares: list[float], size: int) -> list[int]:
    total = sum(shares)
    index = [0]
    for share in shares:
        index.append(index[-1] + round(share / total * float(size)))
    difference = index[-1] - size
    for k in (1, 2, 3):
        index[k] -= difference
    return index


def megatron_bounds(shares: list[float], size: int) -> list[int]:
    weights = np.array(shares, np.float64)
    edges = [0.0]
    for fraction in (weights / weights.sum()).tolist():
        edges.append(edges[-1] + fraction)
    return [round(edge * float(size)) for edge in edges]


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3), st.integers(1, 10**9), st.sampled_from(",/"))
def test_rules(shares, size, separator):
    assume(sum(shares))
    text = separator.join(map(str, shares))
    theirs: dict[Rule, list[int]] = {"neox": neox_bounds(shares, size), "megatron": megatron_bounds(shares, size)}
    for rule, bounds in theirs.items():
        if min(bounds) < 0:
            with pytest.raises(UserError, match="negative length"):
                split_documents(text, size, rule)
            continue
        parts = split_documents(text, size, rule)
        assert list(parts) == ["train", "valid", "test"]
        assert [*(first for first, _ in parts.values()), parts["test"][1]] == bounds


def test_banker_rounding_and_the_shift_of_neox():
    # 137 + 8 + 8 = 153 documents are one too many: all boundaries move down, the first as well.
    assert split_documents("900,50,50", 152) == {"train": (0, 136), "valid": (136, 144), "test": (144, 152)}
    assert split_documents("900,50,50", 152, "megatron") == {"train": (0, 137), "valid": (137, 144), "test": (144, 152)}
    assert split_documents("1,1", 5) == {"train": (0, 3), "valid": (3, 5), "test": (5, 5)}  # 2.5 -> 2, then shifted


def test_parts_of_the_recorded_runs(golden):
    from megarewarm.data.files.token_file import open_tokens

    for name in "AB":
        parts = split_documents("900,50,50", open_tokens(golden / f"{name}_text_document").num_documents)
        for part, samples in (("train", 160), ("valid", 24), ("test", 8)):
            map_name = f"{name}_text_document_{part}_indexmap_{samples}ns_64sl_1234s_packedpi_ac_doc_idx.npy"
            documents = np.load(golden / "indexmaps" / map_name)
            assert parts[cast(Part, part)] == (documents.min(), documents.max() + 1)


def test_left_out_shares_are_zero():
    assert split_documents(" 969, 30, 1 ", 1000) == {"train": (0, 969), "valid": (969, 999), "test": (999, 1000)}
    assert split_documents("1", 7) == {"train": (0, 7), "valid": (7, 7), "test": (7, 7)}
    assert split_documents("0.9,.1", 10)["valid"] == (9, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list of shares"),
        ("90,x", "not a list of shares"),
        ("90,-1", "not a list of shares"),
        ("90,nan,1", "not a list of shares"),
        ("90;10", "not a list of shares"),
        ("1,2,3,4", "has 4 shares"),
        ("0,0,0", "gives nothing"),
    ],
)
def test_bad_splits(text, message):
    with pytest.raises(UserError, match=message):
        split_documents(text, 100)
