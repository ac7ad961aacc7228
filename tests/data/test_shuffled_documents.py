"""Where a token of shuffled documents lies, against the plain running sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.data.files import shuffled_documents
from megarewarm.data.files.shuffled_documents import ShuffledDocuments

sizes_of = st.lists(
    st.one_of(st.integers(0, 5), st.just(0), st.integers(2**16 - 3, 2**16 + 3), st.just(2**31 - 1)), min_size=1, max_size=300
).filter(sum)


@settings(max_examples=200, deadline=None)
@given(
    sizes=sizes_of,
    epochs=st.integers(1, 3),
    first=st.integers(0, 1000),
    seed=st.integers(0, 99),
    block=st.sampled_from([64, 128]),
)
def test_every_place_is_that_of_the_running_sum(sizes: list[int], epochs: int, first: int, seed: int, block: int) -> None:
    random = np.random.default_rng(seed)
    order = np.tile(np.arange(first, first + len(sizes), dtype=np.int32), epochs)
    random.shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffled_documents, "_BLOCK", block)
        documents = ShuffledDocuments(ShuffledDocuments.arrays_of(order, np.array(sizes, np.int32), first))
    shuffled = np.array(sizes, np.int64)[order - first]
    ends = np.cumsum(shuffled)
    assert documents.sizes(np.arange(len(order))).tolist() == shuffled.tolist()
    edges = np.concatenate([ends - 1, ends, ends - shuffled, random.integers(0, ends[-1], 50)])
    tokens = edges[(edges >= 0) & (edges < ends[-1])]
    rows = np.searchsorted(ends, tokens, side="right")
    found, offsets = documents.locate(tokens)
    assert np.array_equal(found, rows)
    assert np.array_equal(offsets, tokens - (ends[rows] - shuffled[rows]))
    assert (offsets < shuffled[found]).all()
    length = int(random.integers(1, min(ends[-1], 2**17) + 1))
    firsts = tokens[tokens + length <= ends[-1]]
    parts, begins, lengths = documents.pieces(firsts, length)
    assert lengths.sum() == len(firsts) * length and (begins + lengths <= shuffled[parts]).all()
    flat = (ends[parts] - shuffled[parts] + begins)[lengths > 0]
    expected = np.concatenate(
        [[first, *ends[(ends > first) & (ends < first + length) & (shuffled > 0)]] for first in firsts] or [[]]
    )
    assert np.array_equal(flat, expected)
