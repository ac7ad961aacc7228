"""Tokenizers: trained ones give back every text, loaded ones give the ids of the libraries themselves."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer, train_bpe, train_sentencepiece
from megarewarm.errors import UserError

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"),
    *("while", "learning", "rates", "warm", "up", "and", "decay", "again"),
)
TEXTS = ["\n".join(f"def {a}_{b}(x):\n    return x  # the {b} of {a}" for a in WORDS for b in WORDS[i::4]) for i in range(4)]
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(TEXTS, 330, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(TEXTS, 330, tmp_path_factory.mktemp("pieces") / "sp.model")


@settings(deadline=None, max_examples=150)
@given(st.lists(CHARACTERS, min_size=1, max_size=4))
def test_bpe_gives_back_every_text(bpe: Tokenizer, texts: list[str]) -> None:
    library = tokenizers.Tokenizer.from_file(str(bpe.path))
    for text, ids in zip(texts, bpe.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint32
        assert bpe.decode(ids) == text
        assert ids.tolist() == library.encode(text).ids


@settings(deadline=None, max_examples=150)
@given(st.lists(CHARACTERS, min_size=1, max_size=4))
@example(["\N{LOWER ONE EIGHTH BLOCK}", "a\N{LOWER ONE EIGHTH BLOCK}b c"])
def test_sentencepiece_gives_back_every_text(pieces: Tokenizer, texts: list[str]) -> None:
    """But for the character that sentencepiece itself writes for a space, which comes back as one."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(pieces.path))
    for text, ids in zip(texts, pieces.encode_batch(texts), strict=True):
        assert pieces.decode(ids) == text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ") == library.decode(library.encode(text))
        assert ids.tolist() == library.encode(text)


def test_trained_vocabularies_are_laid_out_as_neox(bpe: Tokenizer, pieces: Tokenizer) -> None:
    content = json.loads(bpe.path.read_text())
    assert content["model"]["vocab"]["<|endoftext|>"] == 0
    assert content["model"]["vocab"]["<|padding|>"] == 1
    assert content["normalizer"] is None
    assert sorted(content["model"]["vocab"].values()) == list(range(330))
    for tokenizer in (bpe, pieces):
        assert (tokenizer.vocab_size, tokenizer.eod_id) == (330, 0)
    assert bpe.encode_batch(["a<|endoftext|>"])[0][-1] == 0
    decomposed = "e\N{COMBINING ACUTE ACCENT}"
    assert bpe.decode(bpe.encode_batch([decomposed])[0]) == decomposed


def test_training_is_deterministic(bpe: Tokenizer, pieces: Tokenizer, tmp_path: Path) -> None:
    """In other processes, with other hash seeds and numbers of threads."""
    script = (
        "import sys, json; from pathlib import Path; from megarewarm.data.text.tokenizers import *; "
        "texts = json.load(sys.stdin); folder = Path(sys.argv[1]); "
        "train_bpe(texts, 330, folder / 'tokenizer.json'); train_sentencepiece(texts, 330, folder / 'sp.model')"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-c", script, str(tmp_path)]
        subprocess.run(command, input=json.dumps(TEXTS).encode(), env=environment, check=True)
        assert (tmp_path / "tokenizer.json").read_bytes() == bpe.path.read_bytes()
        assert (tmp_path / "sp.model").read_bytes() == pieces.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sp.model", "tokenizer.json"]


def test_the_libraries_are_imported_when_needed() -> None:
    script = "import sys, megarewarm.data.text.tokenizers; print('tokenizers' in sys.modules, 'sentencepiece' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_stored_truncation_and_padding_do_not_apply(bpe: Tokenizer, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(bpe.path))
    library.enable_truncation(4)
    library.enable_padding(length=4)
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    texts = ["x", TEXTS[0]]
    assert [ids.tolist() for ids in loaded.encode_batch(texts)] == [ids.tolist() for ids in bpe.encode_batch(texts)]
    assert loaded.fingerprint() == bpe.fingerprint()


def test_fingerprint_follows_the_ids_not_the_file(bpe: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(bpe.path.read_text())
    path = tmp_path / "tokenizer.json"

    def fingerprint() -> str:
        path.write_text(json.dumps(content))
        return load_tokenizer(path).fingerprint()

    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["model"]["byte_fallback"]
    assert fingerprint() == bpe.fingerprint()
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    assert fingerprint() != bpe.fingerprint()
    merges[0], merges[1] = merges[1], merges[0]
    assert fingerprint() == bpe.fingerprint()
    content["normalizer"] = {"type": "NFC"}
    assert fingerprint() != bpe.fingerprint()


def test_sentencepiece_fingerprint_is_that_of_the_model(pieces: Tokenizer) -> None:
    assert pieces.fingerprint() == hashlib.sha256(pieces.path.read_bytes()).hexdigest()


def test_known_ids_of_published_tokenizers(golden: Path) -> None:
    neox = load_tokenizer(golden.parent / "20B_tokenizer.json")
    assert (neox.vocab_size, neox.eod_id) == (50277, 0)
    assert neox.encode_batch(["a" + 24 * " "])[0].tolist()[-1] == 50254  # the longest of its tokens of spaces
    gpt2 = load_tokenizer(golden.parent / "gpt2_tokenizer.json")
    assert (gpt2.vocab_size, gpt2.eod_id) == (50257, 50256)
    assert gpt2.encode_batch(["Hello world!"])[0].tolist() == [15496, 995, 0]
    piece = load_tokenizer(golden.parent / "sp_test_model.model")
    assert (piece.vocab_size, piece.eod_id) == (1000, 2)
    assert piece.decode(piece.encode_batch(["Hello world."])[0]) == "Hello world."


def test_tokens_are_shown_as_text(tmp_path: Path, pieces: Tokenizer) -> None:
    umlauts = train_bpe(["f\xfcr \xfcber " * 40], 264, tmp_path / "tokenizer.json")
    by_id = {number: umlauts.shown(number) for number in range(umlauts.vocab_size)}
    for text in ("\xfc", " \xfc", "f\xfcr"):
        (number,) = umlauts.encode_batch([text])[0].tolist()
        assert by_id[number] == repr(text) != repr(umlauts.token(number))
    assert "'\xc3'" in by_id.values(), "a part of a character stays as the vocabulary writes it"
    assert umlauts.shown(10_000) is None
    assert all(pieces.shown(number) == repr(pieces.token(number)) for number in range(pieces.vocab_size))


def test_what_ends_a_document(bpe: Tokenizer, pieces: Tokenizer, tmp_path: Path) -> None:
    assert load_tokenizer(bpe.path, eod_token="<|padding|>").eod_id == 1
    assert load_tokenizer(pieces.path, eod_token="<|padding|>").eod_id == 1
    with pytest.raises(UserError, match=r"no token '<\|endoftxt\|>', did you mean '<\|endoftext\|>'"):
        load_tokenizer(bpe.path, eod_token="<|endoftxt|>")
    with pytest.raises(UserError, match="no piece 'nothing'"):
        load_tokenizer(pieces.path, eod_token="nothing")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    library.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(tmp_path)
    assert plain.encode_batch(["ab"])[0].tolist() == [0, 1]
    with pytest.raises(UserError, match="say which token ends a document"):
        _ = plain.eod_id


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "x.model").write_text("no model")
    (tmp_path / "x.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("tokenizer.json", "not a tokenizer.json"),
        ("x.model", "not a sentencepiece model"),
        ("x.txt", "of no known kind"),
        ("absent.json", "does not exist"),
        ("empty", "holds no tokenizer.json, tokenizer.model or vocab.json"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / name)


def test_a_vocabulary_the_text_can_not_fill_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="need 258"):
        train_bpe(["text"], 257, path)
    with pytest.raises(UserError, match=r"gives .* tokens, not 5000"):
        train_bpe(["only a few words"], 5000, path)
    with pytest.raises(UserError, match="vocabulary of 5000"):
        train_sentencepiece(["only a few words"], 5000, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())
