"""The fast path on the tokenizers of Llama 3, Qwen, OLMo 2 and SmolLM: their pre-tokenizers, added tokens and post-processors
as in their files, with vocabularies trained here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from megarewarm.data.text import byte_ranks, fast_bpe
from megarewarm.data.text.fast_bpe import FastBPE, NotCovered
from megarewarm.data.text.tokenizers import load_tokenizer

TEXTS = [
    "def f(x):\n    return x['the'] # it's 42, WE'LL see 123456\n\n\treturn None;\r\n  }\r\n\r\n" * 4,
    "Zoë naïvely re-warms 10 learning-rates; DON'T! I’ve 3.14159 (of them)... don't\n \n  she'd\n" * 4,
    "学习率在第1000步之后再次升高。模型继续训练!\nСкорость обучения снова растёт, 2026 год.\n" * 4,
    "शिक्षण दर फिर से बढ़ती है। معدل التعلم ١٢٣٤\n" * 4,
    "🦙👩‍👩‍👧 🦙\n𝔘𝔫𝔦 ½ Ⅻ ²³ e\u0301\u0323 가각 각\n" * 4,
]
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = GPT4.replace("{1,3}", "")
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)), "<|eot_id|>"]
SPECIAL = {
    "llama3": LLAMA3_SPECIAL,
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "olmo2": ["|||IP_ADDRESS|||", "<|extra_id_0|>", "<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|im_end|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<gh_stars>", "<empty_output>"],
}
FAMILIES = list(SPECIAL)


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [part, byte_level(False)]}


PRE_TOKENIZERS = {
    "llama3": split(GPT4),
    "qwen": split(QWEN),
    "olmo2": split(GPT4, "Removed", True),
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)]},
}


def of_family(family: str) -> dict[str, Any]:
    """A small tokenizer.json as the family's is."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    content = json.loads(library.to_str())
    content["pre_tokenizer"] = PRE_TOKENIZERS[family]
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    first = SPECIAL[family] if family == "smollm" else []  # whose special tokens have the first ids, in the vocabulary
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=first
    )
    library.train_from_iterator(TEXTS, trainer)
    content = json.loads(library.to_str())
    model = content["model"]
    if family == "llama3":
        _as_from_tiktoken(model)
    if family == "qwen":
        content["normalizer"] = {"type": "NFC"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = [name for name in SPECIAL[family] if name not in model["vocab"]]
    content["added_tokens"] += [{"id": len(model["vocab"]) + i, "content": name} | flags for i, name in enumerate(names)]
    if family == "qwen":  # Qwen 3 has such tokens that are not special
        content["added_tokens"].append(
            {"id": len(model["vocab"]) + len(names), "content": "<think>"} | flags | {"special": False}
        )
    if family == "llama3":
        bos = names[0]
        template = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        tokens = {bos: {"id": bos, "ids": [len(model["vocab"])], "tokens": [bos]}}
        around = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": tokens}
        around["pair"] = [*template, {"Sequence": {"id": "B", "type_id": 1}}]
        content["post_processor"] = {"type": "Sequence", "processors": [byte_level(True), around]}
    return content


def _as_from_tiktoken(model: dict[str, Any]) -> None:
    """Merges as transformers' converter lists them: all ways to make a token of two, tokens in the order of their ids. Some
    tokens are whole words that merges don't reach, as Llama 3 has them."""
    vocabulary = model["vocab"]
    runs = [letter * length for letter in ("Ġ", "!", "ĉ", "Ċ") for length in (2, 3, 4, 6, 8)]
    for token in [*runs, "!!!!!?", "Ġlearning-", "åŃ¦ä¹ł", "#!", "!&", "#!!&"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = []
    for token in vocabulary:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    assert len({left + right for left, right in merges}) < len(merges), "tokens that are made in several ways"
    model |= {"merges": merges, "ignore_merges": True}


def of_neighbours(family: str, before_first: bool = True) -> dict[str, Any]:
    """The family's tokenizer, but any character becomes one token with what is before or after it in its word: ids show where
    words end. ``before_first``: which of the two it rather merges with."""
    letters = byte_ranks.letters()
    begins = [letter for byte, letter in letters.items() if byte < 0x80 or byte >= 0xC2]
    ends = [letter for byte, letter in letters.items() if byte < 0xC0]
    merges = [(letters[ord(before)], letter) for before in " a1!'\n\t" for letter in begins]
    others = [(letter, letters[ord(after)]) for after in " a1!'s\n" for letter in ends]
    merges = list(dict.fromkeys([*merges, *others] if before_first else [*others, *merges]))
    vocabulary = [*letters.values(), *(left + right for left, right in merges)]
    content = of_family(family)
    content["model"] |= {"vocab": {token: i for i, token in enumerate(vocabulary)}, "merges": merges}
    return content | {"added_tokens": [], "post_processor": None}


def ids_of(library: tokenizers.Tokenizer, text: str) -> np.ndarray:
    return np.array(library.encode(text, add_special_tokens=False).ids, np.uint32)


ORDERS = {" neighbours before": True, " neighbours after": False}
KINDS = [family + kind for family in FAMILIES for kind in ("", *ORDERS)]
Pair = tuple[FastBPE, tokenizers.Tokenizer]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    contents = {family: of_family(family) for family in FAMILIES}
    for kind, first in ORDERS.items():
        contents |= {f"{family}{kind}": of_neighbours(family, first) for family in FAMILIES}
    return {name: (FastBPE(c), tokenizers.Tokenizer.from_str(json.dumps(c))) for name, c in contents.items()}


FRAGMENTS = [
    *(
        " ",
        "  ",
        "   ",
        " " * 9,
        "\n",
        "\n\n",
        "\t",
        "\r",
        "\r\n",
        " \r\n ",
        "\u00a0",
        "\u2003",
        "\x85",
        "\u200b",
        "\x1c",
        "\0",
    ),
    *("a", "return", "Zoë", "1", "42", "1234567", "²", "Ⅻ", "١٢", "!", "...", "_", "日本", "ß", "İ", "🦙", "👩‍👩‍👧", "naïvely"),
    *(
        "'ll",
        "'LL",
        "'s",
        "'S",
        "'\u017f",
        "'",
        "’s",
        "’",
        "'Re",
        "'vE",
        "'d1",
        "\ra",
        "e\u0301",
        "\u0301",
        "a\u0323\u0307",
        "\u212b",
    ),
    *("'sa", "'Ta", "'rea", "'VEa", "'ma", "'lLa", "'Da", "'\u017fa", "'s1", "'lla", "!\na", "\n "),
    *("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|im_end|>", "<think>", "<|endof", "<", "|||IP_ADDRESS|||"),
]
PIECES = st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]) | st.integers(0, 10**9).map(str)
MIXED = st.lists(PIECES, max_size=20).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=MIXED)
def test_any_text_gets_the_ids_of_the_library(pairs: dict[str, Pair], kind: str, text: str) -> None:
    fast, library = pairs[kind]
    assert np.array_equal(fast.encode(text), ids_of(library, text))


@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_of_fragments(pairs: dict[str, Pair], kind: str) -> None:
    """Among them what the end of a text decides: white space after line breaks, before digits, before nothing."""
    fast, library = pairs[kind]
    texts = [a + b for a in FRAGMENTS for b in FRAGMENTS]
    expected = library.encode_batch_fast(texts, add_special_tokens=False)
    wrong = [text for text, right in zip(texts, expected, strict=True) if fast.encode(text).tolist() != right.ids]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=3000)
@given(text=MIXED)
def test_thousands_of_texts(pairs: dict[str, Pair], kind: str, text: str) -> None:
    fast, library = pairs[kind]
    assert np.array_equal(fast.encode(text), ids_of(library, text))


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "neighbours" in kind])
def test_every_character_in_company(pairs: dict[str, Pair], kind: str, step: int) -> None:
    """Every ``step``-th code point beside letters, digits, spaces, apostrophes and line breaks, and numbers of Unicode 17,
    which 'tokenizers' and tiktoken may know or not."""
    fast, library = pairs[kind]
    points = [
        *range(0x250),
        *range(0x250, 0x3400, min(step, 5)),
        *range(0x3400, 0x110000, step),
        *range(0x11DE0, 0x11DEA),
        *range(0x16FF4, 0x16FF7),
    ]
    texts = ["a{0}a {0}! 1{0}1\n{0}\n '{0}s\t{0} '{0}a!{0} ".format(chr(c)) for c in points if not 0xD800 <= c < 0xE000]
    for start in range(0, len(texts), 2_000):
        part = texts[start : start + 2_000]
        if not np.array_equal(fast.encode("".join(part)), ids_of(library, "".join(part))):
            assert [text for text in part if not np.array_equal(fast.encode(text), ids_of(library, text))] == []


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab '!.\u00e9\u0301\n\n\r\t\u2028 1s\u3002", max_size=60), size=st.integers(1, 9))
def test_pieces_of_a_long_text_give_the_ids_of_the_whole(pairs: dict[str, Pair], kind: str, text: str, size: int) -> None:
    fast, library = pairs[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_bpe, "_PIECE", size)
        assert np.array_equal(fast.encode(text), ids_of(library, text))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_is_taken_and_nothing_is_put_around(tmp_path: Path, family: str) -> None:
    """Long texts and special tokens in them, through the interface of all tokenizers; a document gets no <|begin_of_text|>."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(of_family(family)))
    tokenizer, library = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    chance = random.Random(5)
    texts = ["".join(chance.choice([*FRAGMENTS, *TEXTS]) for _ in range(30)) for _ in range(60)]
    texts += ["7" * 5000, " " * 5000 + "a", "!" + "\n" * 5000, "'s" * 900, " \n" * 900, "a\r\n" * 900, ""]
    for text, ids in zip(texts, tokenizer.encode_batch(texts, threads=1), strict=True):
        assert np.array_equal(ids, ids_of(library, text)), text[:60]
    assert tokenizer.notes == []
    special = SPECIAL[family][0]
    (ids,) = tokenizer.encode_batch([f"a{special}b"])
    assert [tokenizer.token(number) for number in ids.tolist()] == ["a", special, "b"]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_surrogate_pair_is_no_text_for_either(pairs: dict[str, Pair], family: str) -> None:
    fast, library = pairs[family]
    with pytest.raises(UnicodeEncodeError):
        fast.encode("a\ud83e b")
    with pytest.raises((UnicodeEncodeError, TypeError)):
        ids_of(library, "a\ud83e b")


@pytest.mark.parametrize("word", ["!!!!!?", "#!!&"])
def test_a_word_that_is_a_token_is_taken_whole(pairs: dict[str, Pair], word: str) -> None:
    """Llama 3's ignore_merges: merges don't make the token, the second in spite of one that is listed; the word alone is it,
    and in another word it is not made."""
    fast, library = pairs["llama3"]
    number = library.token_to_id(word)
    assert fast.encode(word).tolist() == [number]
    assert number not in fast.encode(word + "!").tolist()
    assert np.array_equal(fast.encode(word + "!"), ids_of(library, word + "!"))


def test_listed_merges_that_tiktoken_would_make_otherwise_are_not_covered() -> None:
    content = of_family("llama3")
    merges = content["model"]["merges"]
    with pytest.raises(NotCovered, match="which merges don't make of its bytes"):
        FastBPE(content | {"model": content["model"] | {"ignore_merges": False}})
    last_parts = next(i for i, (left, right) in enumerate(merges) if left + right == "!!!" and right == "!")
    with pytest.raises(NotCovered, match="make of other parts than the file's"):
        FastBPE(content | {"model": content["model"] | {"merges": merges[:last_parts] + merges[last_parts + 1 :]}})
    late = [*merges[:last_parts], *merges[last_parts + 1 :], merges[last_parts]]
    with pytest.raises(NotCovered, match="comes too early"):
        FastBPE(content | {"model": content["model"] | {"merges": late}})


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama3", split(GPT4 + "|x"), "Split with a pattern of its own"),
        ("llama3", split(GPT4, "Removed"), "Split with a pattern of its own"),
        ("llama3", split(GPT4, "MergedWithNext"), "Split with a pattern of its own"),
        ("qwen", {"type": "Sequence", "pretokenizers": [byte_level(False)]}, "pre-tokenizer ByteLevel, expected"),
        ("qwen", {"type": "Sequence", "pretokenizers": split(QWEN)["pretokenizers"] * 2}, r"Split \+ ByteLevel \+ Split"),
        ("smollm", {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}]}, "Digits, expected"),
    ],
)
def test_other_divisions_are_left_to_the_library(tmp_path: Path, family: str, change: dict[str, Any], reason: str) -> None:
    content = of_family(family) | {"pre_tokenizer": change}
    with pytest.raises(NotCovered, match=reason):
        FastBPE(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer, library = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert np.array_equal(ids, ids_of(library, text))
    assert len(tokenizer.notes) == 1 and "encoded by 'tokenizers' itself" in tokenizer.notes[0]
