"""The fast path of byte-level BPE gives the ids of 'tokenizers', or steps aside and says why."""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.data.text import fast_bpe
from megarewarm.data.text.fast_bpe import FastBPE, NotCovered, first_difference
from megarewarm.data.text.tokenizers import load_tokenizer, train_bpe
from megarewarm.errors import UserError

SENTENCES = [
    "def f(x):\n    return x  # the value, it's 42\n\n\n\treturn\r\n" * 3,
    "Zoë naïvely re-warms 10 learning-rates; don't!" * 3,
]
RUNS = 24


def neox_like(path: Path, runs: int = RUNS) -> Path:
    """A small tokenizer with the structure of GPT-NeoX's: NFC, runs of spaces as added tokens, special tokens."""
    train_bpe(SENTENCES, 300, path)
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "NFC"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    size = len(content["model"]["vocab"])
    content["added_tokens"] += [
        {"id": size + i, "content": " " * length} | flags for i, length in enumerate(range(runs, 1, -1))
    ]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[FastBPE, tokenizers.Tokenizer]:
    path = neox_like(tmp_path_factory.mktemp("neox") / "tokenizer.json")
    return FastBPE(json.loads(path.read_text())), tokenizers.Tokenizer.from_file(str(path))


def ids_of(library: tokenizers.Tokenizer, text: str) -> np.ndarray:
    return np.array(library.encode(text, add_special_tokens=False).ids, np.uint32)


FRAGMENTS = [
    *(" ", "  ", "   ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\x85", "\u200b", "\ufeff", "\0"),
    *("a", "return", "Zoë", "1", "42", "²", "!", "...", "'ll", "'s", "'", "’s", "_", "日本", "ß", "İ", "🦙", "👩‍👩‍👧"),
    *("e\u0301", "\u0301", "a\u0323\u0307", "\u07fd", "<|endoftext|>", "<|padding|>", "<|endof", ">\u0338"),
]
PIECES = st.sampled_from(FRAGMENTS) | st.integers(2, 60).map(lambda n: " " * n) | st.characters(exclude_categories=["Cs"])


@settings(deadline=None, max_examples=400)
@given(st.lists(PIECES, max_size=20).map("".join))
def test_any_text_gets_the_ids_of_the_library(pair: tuple[FastBPE, tokenizers.Tokenizer], text: str) -> None:
    fast, library = pair
    assert np.array_equal(fast.encode(text), ids_of(library, text))


@pytest.mark.parametrize("above", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character_in_company(pair: tuple[FastBPE, tokenizers.Tokenizer], above: int) -> None:
    """Code points of Unicode beside letters, digits, spaces and themselves: the two divide words alike. All of the scripts
    below the Chinese characters, and every ``above``-th beyond."""
    fast, library = pair
    points = [chr(c) for c in (*range(0x3400), *range(0x3400, 0x110000, above)) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 20_000):
        text = "".join(f"a{c}1 {c}!" for c in points[start : start + 20_000])
        assert np.array_equal(fast.encode(text), ids_of(library, text)), hex(start)


@pytest.fixture(scope="module")
def published() -> list[Path]:
    folder = os.environ.get("MEGAREWARM_TEST_DATA")
    if not folder:
        pytest.skip("set MEGAREWARM_TEST_DATA to the folder that holds 20B_tokenizer.json")
    return [Path(folder) / name for name in ("20B_tokenizer.json", "gpt2_tokenizer.json")]


@pytest.mark.slow
def test_published_tokenizers_on_real_text(published: list[Path]) -> None:
    """The sources of Python's library, as they are and shuffled together with other fragments."""
    sources = [path.read_text() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]]
    chance = random.Random(3)
    mixed = ["".join(chance.choice([*FRAGMENTS, " " * chance.randint(2, 60)]) for _ in range(12)) for _ in range(3000)]
    for path in published:
        library = tokenizers.Tokenizer.from_file(str(path))
        tokenizer = load_tokenizer(path)
        for text, ids in zip([*sources, *mixed], tokenizer.encode_batch([*sources, *mixed]), strict=True):
            assert np.array_equal(ids, ids_of(library, text)), text[:60]
        assert tokenizer.notes == [], "the fast path was taken"
        assert first_difference(FastBPE(json.loads(path.read_text())), partial(ids_of, library), library.get_vocab()) is None


def _change(path: Path, act: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(neox_like(path).read_text())
    act(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "no added space"),
        (lambda c: c["model"].update(byte_fallback=True), "byte_fallback True"),
        (lambda c: c["added_tokens"][-1].update(lstrip=True), "with conditions"),
        (lambda c: c["added_tokens"].pop(5), "runs of 2, 3, 4"),
    ],
)
def test_other_tokenizers_are_left_to_the_library(tmp_path: Path, act: Callable[[dict[str, Any]], None], reason: str) -> None:
    path = _change(tmp_path / "tokenizer.json", act)
    with pytest.raises(NotCovered, match=reason):
        FastBPE(json.loads(path.read_text()))
    tokenizer = load_tokenizer(path)
    library = tokenizers.Tokenizer.from_file(str(path))
    for text, ids in zip(SENTENCES, tokenizer.encode_batch(SENTENCES), strict=True):
        assert np.array_equal(ids, ids_of(library, text))
    assert len(tokenizer.notes) == 1 and reason in tokenizer.notes[0]


def test_a_fast_path_with_other_ids_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = neox_like(tmp_path / "tokenizer.json")
    wrong = FastBPE.encode
    monkeypatch.setattr(FastBPE, "encode", lambda self, text: wrong(self, text)[::-1])
    tokenizer = load_tokenizer(path)
    library = tokenizers.Tokenizer.from_file(str(path))
    assert np.array_equal(tokenizer.encode_batch(SENTENCES)[0], ids_of(library, SENTENCES[0]))
    assert "gives other ids for" in tokenizer.notes[0]


def test_a_text_too_long_for_the_pattern_is_left_to_the_library(tmp_path: Path) -> None:
    path = neox_like(tmp_path / "tokenizer.json")
    tokenizer, slow = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    text = "a" + "\n" * 600_000 + "b"
    assert tokenizer.notes == []
    (ids,) = tokenizer.encode_batch([text])
    assert ids.tolist() == slow.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab '\u00e9\u0301\n\n\r\t\u2028 1.s", max_size=60), size=st.integers(1, 9))
def test_pieces_of_a_long_text_give_the_ids_of_the_whole(pair, text: str, size: int) -> None:
    fast, slow = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_bpe, "_PIECE", size)
        assert np.array_equal(fast.encode(text), ids_of(slow, text))


# ---- any tokenizer.json: covered and equal, or left to the library -----------------------------------------------------

LETTERS = "ab\u00e9 1"
NORMALIZERS = [
    *(None, None, {"type": "NFC"}, {"type": "NFC"}, {"type": "NFKC"}, {"type": "NFD"}, {"type": "Lowercase"}),
    *({"type": "Strip", "strip_left": True, "strip_right": False}, {"type": "Prepend", "prepend": "a"}),
    *({"type": "Sequence", "normalizers": [{"type": "NFC"}]}, {"type": "Sequence", "normalizers": []}),
    {"type": "Replace", "pattern": {"String": " "}, "content": "b"},
]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = [
    *[BYTE_LEVEL] * 6,
    *(BYTE_LEVEL | {"add_prefix_space": True}, BYTE_LEVEL | {"use_regex": False}, BYTE_LEVEL | {"trim_offsets": False}),
    {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": False}]},
]
TOKENS = [
    "ab",
    "a b",
    " a",
    "b ",
    "abab",
    "\u2126",
    "\ufb01",
    "e\u0301",
    "\u00e9",
    "<x>",
    "<x><x>",
    "A",
    "\u1e9b\u0323",
    "\u0301",
    "  ",
    "   ",
]
ADDED = st.fixed_dictionaries(
    {"content": st.sampled_from(TOKENS), "normalized": st.booleans(), "special": st.booleans()},
    optional={flag: st.just(True) for flag in ("lstrip", "rstrip", "single_word")},
)
CHANGES = st.sampled_from([{}] * 8 + [{"ignore_merges": True}, {"byte_fallback": True}, {"fuse_unk": True}, {"dropout": 0.0}])
MERGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6)
PLAIN = st.lists(st.sampled_from([*TOKENS, *LETTERS, "\n", "\u0323", "x", ">", "\u03a9", "fi"]), max_size=14).map("".join)


@settings(deadline=None, max_examples=250)
@given(
    normalizer=st.sampled_from(NORMALIZERS),
    before=st.sampled_from(PRE_TOKENIZERS),
    added=st.lists(ADDED, max_size=4, unique_by=lambda token: token["content"]),
    change=CHANGES,
    pairs=MERGES,
    texts=st.lists(PLAIN, min_size=1, max_size=4),
)
def test_any_tokenizer_gives_the_ids_of_the_library(
    small: dict[str, Any], normalizer, before, added, change, pairs, texts
) -> None:
    """Normalisers, pre-tokenizers, added tokens and their conditions, settings of the model, and merges appended by hand."""
    content = json.loads(json.dumps(small))
    model = content["model"]
    model |= change
    names = list(model["vocab"])
    for i, j in pairs:  # of tokens that are there, so that some are never reached as the file says
        token = names[-1 - i] + names[-1 - j]
        if token not in model["vocab"]:
            model["vocab"][token] = len(model["vocab"])
            model["merges"].append([names[-1 - i], names[-1 - j]])
            names.append(token)
    content |= {"normalizer": normalizer, "pre_tokenizer": before}
    for token in added:
        flags = {"single_word": False, "lstrip": False, "rstrip": False} | token
        known = model["vocab"].get(token["content"])
        content["added_tokens"].append(
            {"id": len(model["vocab"]) + len(content["added_tokens"]) if known is None else known} | flags
        )
    text = json.dumps(content)
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception:
        return  # not a tokenizer
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(text)
        file.flush()
        try:
            found = load_tokenizer(file.name).encode_batch(texts)
        except UserError as error:  # an added token that ends within a character after NFC, say
            assert re.search("'tokenizers' itself fails|leaves nothing of the added token", str(error))
            return
    for each, ids in zip(texts, found, strict=True):
        assert np.array_equal(ids, ids_of(library, each)), each


def test_an_added_token_of_which_the_normalizer_leaves_nothing_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    """The library would look for it without end: 'a ba \u03a9abab' with these two."""
    flags = {"lstrip": True, "rstrip": True, "special": True, "normalized": True}
    path = tmp_path / "tokenizer.json"
    for normalized in (False, True):
        added = [{"content": "a b", "single_word": False}, {"content": "  ", "single_word": True}]
        last = len(small["added_tokens"]) + len(small["model"]["vocab"])
        more = [{"id": last + i} | flags | token | {"normalized": normalized} for i, token in enumerate(added)]
        strip = {"type": "Strip", "strip_left": True, "strip_right": False}
        path.write_text(json.dumps(small | {"normalizer": strip, "added_tokens": [*small["added_tokens"], *more]}))
        if normalized:
            with pytest.raises(UserError, match="its normalizer leaves nothing of the added token '  '"):
                load_tokenizer(path)
        else:
            library = tokenizers.Tokenizer.from_file(str(path))
            (ids,) = load_tokenizer(path).encode_batch(["abab  a"])
            assert np.array_equal(ids, ids_of(library, "abab  a"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    train_bpe(["abab a b ab\u00e9 ba1 aab \u03a9 fi <x> " * 9], 270, path)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda c: c.update(encoder={"type": "new"}), "encoder, which is not known here"),
        (lambda c: c["model"].update(cache=True), r"model\.cache, which is not known"),
        (lambda c: c["pre_tokenizer"].update(behaviour="new"), r"pre_tokenizer\.behaviour"),
        (lambda c: c["pre_tokenizer"].pop("add_prefix_space"), "no added space"),
        (lambda c: c["added_tokens"][0].update(mode=1), "mode, which is not known"),
        (lambda c: c.update(normalizer={"type": "NFC", "form": 2}), "normalizer NFC"),
        (
            lambda c: c["added_tokens"].append(c["added_tokens"][1] | {"id": 900, "content": "\u2126", "normalized": True}),
            "NFC changes",
        ),
        (lambda c: c["model"]["merges"].append(c["model"]["merges"][0]), "listed twice"),
    ],
)
def test_what_is_not_known_is_not_covered(tmp_path: Path, act: Callable[[dict[str, Any]], None], reason: str) -> None:
    path = _change(tmp_path / "tokenizer.json", act)
    with pytest.raises(NotCovered, match=reason):
        FastBPE(json.loads(path.read_text()))


def test_a_merge_that_is_never_reached_is_not_covered(small: dict[str, Any]) -> None:
    """tiktoken would merge 'a' and 'bc' to 'abc' though the file merges 'ab' and 'c' only."""
    content = json.loads(json.dumps(small))
    content["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    content["model"]["vocab"] |= {"bc": 400, "ab": 401, "abc": 402}
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert library.encode("abc").ids == [content["model"]["vocab"]["a"], 400]
    with pytest.raises(NotCovered, match="make of other parts"):
        FastBPE(content)
