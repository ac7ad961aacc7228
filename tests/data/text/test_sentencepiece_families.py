"""Llama 2's and Mistral's tokenizers: tokenizer.model and the forms of tokenizer.json, each with the ids of its library."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer

LINES = [
    "the learning rate warms up again, and the model's loss falls; it's 2026",
    "def f(x):    return x['the']  # Zoë naïvely  re-warms 10 rates",
    "学习率在第1000步之后再次升高 模型继续训练",
    "Скорость обучения снова растёт и падает",
]
NORMALIZERS: dict[str, dict[str, Any]] = {
    "legacy": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
    },
    "metaspace": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    },
    "metaspace_always": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    },
}


def trained(normalization: str) -> bytes:
    """A model with the settings of Llama 2's: BPE, byte fallback, digits apart, a space before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 9),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=normalization != "identity",
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def as_json(model: bytes, form: str) -> dict[str, Any]:
    """The tokenizer.json of transformers' converter: pieces in their order, all ways to make one of two."""
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    known = {piece for i, piece in enumerate(pieces) if not library.is_control(i) and not library.is_byte(i)}
    merges = []
    for piece in sorted(known, key=pieces.index):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [pair for pair in pairs if known.issuperset(pair)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings = {"dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i]} | flags for i in range(3)],
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges} | settings,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    } | NORMALIZERS[form]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sentencepiece")
    for normalization in ("identity", "nmt_nfkc"):
        (place / f"{normalization}.model").write_bytes(trained(normalization))
    for form in NORMALIZERS:
        (place / form).mkdir()
        (place / form / "tokenizer.json").write_text(json.dumps(as_json((place / "identity.model").read_bytes(), form)))
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Tokenizer]:
    names = ["identity.model", "nmt_nfkc.model", *NORMALIZERS]
    return {name: load_tokenizer(folder / name) for name in names}


FRAGMENTS = [
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "▁",
        "\u200b",
        "the",
        " the",
        "learning",
        "'s",
        "1000",
        "Zoë",
        "学习率",
    ),
    *("Скорость", "🦙", "\ufb01", "\u212b", "e\u0301", "½", "\x7f", "<0x0A>"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=15).map("".join)


@settings(max_examples=200)
@given(text=TEXTS)
def test_each_form_has_the_ids_of_its_library(folder: Path, loaded: dict[str, Tokenizer], text: str) -> None:
    for name, tokenizer in loaded.items():
        (ids,) = tokenizer.encode_batch([text], threads=1)
        if name.endswith(".model"):
            assert ids.tolist() == sentencepiece.SentencePieceProcessor(model_file=str(folder / name)).encode(text), name
        else:
            library = tokenizers.Tokenizer.from_file(str(folder / name / "tokenizer.json"))
            assert ids.tolist() == library.encode(text, add_special_tokens=False).ids, name


@settings(max_examples=200)
@given(text=TEXTS)
def test_tokenizer_json_has_the_ids_of_the_model(loaded: dict[str, Tokenizer], text: str) -> None:
    """Up to what the forms do differently: byte tokens written out, and a text that begins with a space under Metaspace."""
    if not text or "<0x" in text or "\0" in text:
        return
    (expected,) = loaded["identity.model"].encode_batch([text])
    for form in NORMALIZERS:
        if form == "legacy" or not text.startswith((" ", "▁")):
            assert loaded[form].encode_batch([text])[0].tolist() == expected.tolist(), form


def test_tokenizer_json_is_left_to_the_library_which_a_note_says(folder: Path) -> None:
    for form, reason in (("legacy", "normalizer Sequence"), ("metaspace", "pre-tokenizer Metaspace, expected")):
        tokenizer = load_tokenizer(folder / form)
        tokenizer.encode_batch(["a"])
        (note,) = tokenizer.notes
        assert "encoded by 'tokenizers' itself" in note and reason in note and "\n" not in note


def test_a_document_gets_its_end_and_no_beginning(folder: Path, loaded: dict[str, Tokenizer]) -> None:
    for name, tokenizer in loaded.items():
        assert (tokenizer.end.token, tokenizer.eod_id) == ("</s>", 2), name
        assert 1 not in tokenizer.encode_batch(["the rate"])[0].tolist(), "<s>"


def test_a_token_that_is_written_out(loaded: dict[str, Tokenizer]) -> None:
    """tokenizer.json finds special tokens in a text, the model doesn't find its control symbols."""
    assert 2 in loaded["legacy"].encode_batch(["the</s>rate"])[0].tolist()
    assert 2 not in loaded["identity.model"].encode_batch(["the</s>rate"])[0].tolist()


def test_a_folder_with_both_forms_gives_the_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folder / "identity.model").read_bytes())
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"
    (tmp_path / "tokenizer.json").write_bytes((folder / "legacy" / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"
    ids = [load_tokenizer(tmp_path / name).encode_batch(["the rate"])[0] for name in ("tokenizer.json", "tokenizer.model")]
    assert np.array_equal(ids[0], ids[1])
