"""A checkpoint's losses and states of documents against transformers' model, which reads one document after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from megarewarm.data.files.token_file import TokenFile, TokenFileWriter, open_tokens
from megarewarm.errors import UserError
from megarewarm.selection.scoring_model import ScoringModel, blocks
from megarewarm.selection.windows import cut
from tests.support import families

VOCABULARY, POSITIONS = families.VOCABULARY, families.POSITIONS
SIZES = (0, 1, 2, 3, POSITIONS, POSITIONS + 1, POSITIONS + 2, 5 * POSITIONS + 7, 17, 17, 40)


def neox(folder: Path, seed: int = 0) -> PreTrainedModel:
    """transformers' GPT-NeoX of an odd vocabulary, in ``folder``."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 44}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def write(prefix: Path, documents: list[np.ndarray]) -> TokenFile:
    with TokenFileWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids)
    return open_tokens(prefix)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    random = np.random.default_rng(1)
    documents = [random.integers(0, VOCABULARY, size) for size in SIZES]
    return write(tmp_path_factory.mktemp("data") / "a", documents)


@pytest.fixture(scope="module", params=["neox", "llama", "mistral"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """(a folder, transformers' model in it); Mistral's has a window of attention."""
    folder = tmp_path_factory.mktemp("model")
    return folder, neox(folder) if request.param == "neox" else families.saved(request.param, folder)


def by_transformers(model: PreTrainedModel, ids: np.ndarray, length: int) -> tuple[float, np.ndarray]:
    """(mean loss, mean state) of one document, window by window in float64."""
    model = model.double()
    losses, states = [], []
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        for first in range(0, len(ids), length):
            states.append(model.base_model(tokens[None, first : first + length]).last_hidden_state[0])
            inputs, targets = tokens[first : first + length], tokens[first + 1 : first + length + 1]
            logits = model(inputs[None]).logits[0, : len(targets)]
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
    return float(torch.cat(losses).mean()), torch.cat(states).mean(0).numpy()


@pytest.mark.parametrize(("length", "micro_batch"), [(None, 1), (None, 4), (13, 1), (1, 7), (POSITIONS - 1, 100)])
def test_document_by_document_as_transformers(both, file: TokenFile, length: int | None, micro_batch: int) -> None:
    folder, theirs = both
    ours = ScoringModel(str(folder), device="cpu", sequence_length=length, micro_batch=micro_batch)
    starts, sizes = file.document_starts(0, file.num_documents), file.sizes
    losses, states = ours.losses(file, starts, sizes), ours.embeddings(file, starts, sizes)
    assert np.isnan(losses[:2]).all() and not states[0].any()
    for document in range(1, file.num_documents):
        loss, state = by_transformers(theirs, file.document(document), length or POSITIONS)
        if sizes[document] > 1:
            assert losses[document] == pytest.approx(loss, rel=2e-6)
        np.testing.assert_allclose(states[document], state, atol=3e-5)


def test_a_document_does_not_depend_on_its_neighbours(both, file: TokenFile) -> None:
    """Nor on the order in which they are asked for."""
    ours = ScoringModel(str(both[0]), device="cpu")
    starts, sizes = file.document_starts(0, file.num_documents), file.sizes
    together, order = ours.losses(file, starts, sizes), np.random.default_rng(3).permutation(len(sizes))
    np.testing.assert_allclose(ours.losses(file, starts[order], sizes[order]), together[order], rtol=2e-6)
    for document in (2, 6, 8):
        chosen = slice(document, document + 1)
        np.testing.assert_allclose(ours.losses(file, starts[chosen], sizes[chosen]), together[chosen], rtol=2e-6)


def test_bf16_is_near_and_is_another_identity(tmp_path: Path, file: TokenFile) -> None:
    neox(tmp_path)
    models = [ScoringModel(str(tmp_path), device="cpu", precision=precision) for precision in ("fp32", "bf16")]
    exact, rounded = (each.losses(file, file.document_starts(0, file.num_documents), file.sizes) for each in models)
    np.testing.assert_allclose(rounded[2:], exact[2:], rtol=0.03)
    assert np.abs(rounded[2:] - exact[2:]).max() > 1e-5, "autocast is on"
    assert models[0].identity != models[1].identity


def test_other_weights_are_another_identity(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("same", 0)):
        neox(tmp_path / name, seed)
    found = {name: ScoringModel(str(tmp_path / name), device="cpu").identity["weights"] for name in ("a", "b", "same")}
    assert found["a"] == found["same"] != found["b"]


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 70), max_size=30), length=st.integers(1, 40), tokens=st.integers(1, 200))
def test_windows_are_every_token_once(sizes: list[int], length: int, tokens: int) -> None:
    counts = np.array(sizes, np.int64)
    starts = np.cumsum(counts) - counts
    windows = cut(starts, counts, length)
    seen = np.zeros(counts.sum(), np.int64)
    for batch in windows.batches(tokens):
        longest = int(batch.lengths.max())
        assert len(batch.lengths) == 1 or len(batch.lengths) * longest <= tokens
        assert longest <= length
        for document, start, size in zip(batch.documents, batch.starts, batch.lengths, strict=True):
            assert starts[document] <= start and start + size <= starts[document] + counts[document]
            seen[start : start + size] += 1
    assert (seen == 1).all()


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 50), max_size=30), tokens=st.integers(1, 100))
def test_blocks_are_the_same_from_wherever_a_second_start_begins(sizes: list[int], tokens: int) -> None:
    whole = list(blocks(np.array(sizes, np.int64), tokens=tokens))
    assert [document for block in whole for document in range(*block)] == list(range(len(sizes)))
    for number, (first, _) in enumerate(whole):
        assert list(blocks(np.array(sizes, np.int64), first, tokens)) == whole[number:]


def test_ids_outside_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    neox(tmp_path / "model")
    other = write(tmp_path / "b", [np.array([1, 2, VOCABULARY])])
    ours = ScoringModel(str(tmp_path / "model"), device="cpu")
    with pytest.raises(UserError, match=rf"can't read .*b\.bin.*id {VOCABULARY}, outside of the model's vocabulary"):
        ours.check_reads(other)
    with pytest.raises(UserError, match=rf"can't read .*b\.bin.*id {VOCABULARY}, outside of the model's vocabulary"):
        ours.losses(other, np.zeros(1, np.int64), other.sizes)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        ScoringModel(str(tmp_path / "nowhere"))
    neox(tmp_path / "model")
    for length in (0, POSITIONS + 1):
        with pytest.raises(UserError, match=f"--sequence-length {length}: expected 1 to {POSITIONS}"):
            ScoringModel(str(tmp_path / "model"), sequence_length=length)
