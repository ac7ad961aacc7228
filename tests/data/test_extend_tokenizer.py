"""Merges continued: against the trainer of 'tokenizers', by brute force, and through the tokenizers of all families."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megarewarm.data.text import word_counts
from megarewarm.data.text.continued_merges import NextMerge, continue_merges
from megarewarm.data.text.extended_tokenizer import Base, Extended, files_of, library, pieces_of, prune
from megarewarm.data.text.tokenizers import HuggingFaceTokenizer, load_tokenizer, train_bpe
from megarewarm.errors import UserError
from tests.data.test_fast_bpe import FRAGMENTS, neox_like
from tests.data.test_fast_bpe_families import FAMILIES, TEXTS, byte_level, of_family

ROOT = Path(__file__).parents[2]
GERMAN = [
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.\n\n",
    "Jeder hat das Recht auf die freie Entfaltung seiner Persönlichkeit, soweit er nicht die Rechte anderer verletzt.\r\n",
    "aaaaaaa ababababab    !!!!!!!! 2024 20242024 naïve Zoë, <|endoftext|>der Rechte des Menschen   <|im_end|>",
    "学习学习 Menschenrechte: Verpflichtung! Verpflichtungen?\n\tdef recht(x):\n        return x  # Rechte\n",
]


# ---- the merges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [300, 420])
def test_from_bytes_they_are_those_of_the_trainer_of_tokenizers(size: int) -> None:
    """The same pairs in the same order, ties and runs of one letter included."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([*GERMAN * 3, *TEXTS], trainer)
    model = json.loads(trained.to_str())["model"]
    words = Counter(word for text in [*GERMAN * 3, *TEXTS] for word, _ in trained.pre_tokenizer.pre_tokenize_str(text))
    strings = {number: token for token, number in model["vocab"].items() if number < 256}
    ids = {token: number for number, token in strings.items()}
    merges = continue_merges(
        [[ids[letter] for letter in word] for word in words], list(words.values()), strings, 256, size - 256
    )
    for number, merge in enumerate(merges, 256):
        strings[number] = strings[merge.left] + strings[merge.right]
    assert [[strings[merge.left], strings[merge.right]] for merge in merges] == model["merges"]


def slowly(words: Sequence[Sequence[int]], counts: Sequence[int], first: int, most: int, least: int) -> list[NextMerge]:
    """All pairs counted again before each merge."""
    rows, merges = [list(word) for word in words], list[NextMerge]()
    made: dict[tuple[int, ...], int] = {(i,): i for i in range(first)}
    spelled: dict[int, tuple[int, ...]] = {i: (i,) for i in range(first)}
    while len(merges) < most:
        pairs = Counter[tuple[int, int]]()
        for row, count in zip(rows, counts, strict=True):
            for pair in pairwise(row):
                pairs[pair] += count
        open_pairs = [
            (-count, pair)
            for pair, count in pairs.items()
            if count >= least and spelled[pair[0]] + spelled[pair[1]] not in made
        ]
        if not open_pairs:
            break
        times, (left, right) = min(open_pairs)
        new = first + len(merges)
        spelled[new] = spelled[left] + spelled[right]
        made[spelled[new]] = new
        merges.append(NextMerge(left, right, -times))
        for row in rows:
            i = 0
            while i < len(row) - 1:
                if row[i : i + 2] == [left, right]:
                    row[i : i + 2] = [new]
                i += 1
    return merges


@settings(max_examples=80, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(0, 3), max_size=14), max_size=8),
    most=st.integers(0, 12),
    least=st.integers(1, 3),
    data=st.data(),
)
def test_any_words_against_counting_again(words: list[list[int]], most: int, least: int, data: st.DataObject) -> None:
    """Three or four letters, so that runs and overlaps are everywhere; empty words too."""
    counts = data.draw(st.lists(st.integers(1, 5), min_size=len(words), max_size=len(words)))
    strings = {i: chr(97 + i) for i in range(4)}
    assert continue_merges(words, counts, strings, 4, most, least) == slowly(words, counts, 4, most, least)


def test_a_token_that_exists_is_not_made_again() -> None:
    merges = continue_merges([[0, 1, 2]] * 2, [5, 5], {0: "a", 1: "b", 2: "c", 3: "ab"}, 4, 9)
    assert merges == [NextMerge(1, 2, 10), NextMerge(0, 4, 10)]


def test_leaves_that_are_not_used_go_and_then_their_parts() -> None:
    pairs = [("a", "b"), ("ab", "c"), ("x", "y"), ("xy", "z")]
    kept, pruned = prune(pairs, {"xyz"})
    assert kept == pairs[2:] and pruned == ["abc", "ab"]


# ---- the tokenizers ------------------------------------------------------------------------------------------------------

KINDS = ["gpt-neox", "gpt2", *FAMILIES]


def base_of(kind: str, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    folder.mkdir(exist_ok=True)
    if kind == "gpt-neox":
        return neox_like(path)
    if kind == "gpt2":
        model = json.loads(train_bpe(TEXTS * 2, 300, path).path.read_text())["model"]
        path.unlink()
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        return folder / "vocab.json"
    path.write_text(json.dumps(of_family(kind) | {"decoder": byte_level(True)}))
    return path


Made = tuple[HuggingFaceTokenizer, HuggingFaceTokenizer, Extended, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Made]:
    """By kind: the tokenizer before and after, with 60 merged tokens and a special one."""
    found = {}
    for kind in KINDS:
        place = tmp_path_factory.mktemp(kind)
        base = Base(base_of(kind, place / "base"), ["<|de|>"])
        extended = base.extended(base.words(GERMAN * 2), 60, 2)
        folder = place / "tok"
        folder.mkdir()
        for name, data in files_of(base.tokenizer, extended, folder).items():
            (folder / name).write_bytes(data)
        after = load_tokenizer(folder)
        assert isinstance(after, HuggingFaceTokenizer)
        found[kind] = base.tokenizer, after, extended, folder
    return found


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_follow(made: Mapping[str, Made], kind: str) -> None:
    before, after, extended, folder = made[kind]
    assert before.vocabulary.items() <= after.vocabulary.items()
    new = set(after.vocabulary) - set(before.vocabulary)
    assert {after.vocabulary[token] for token in new} == set(range(before.vocab_size, after.vocab_size))
    assert (
        len(extended.merged) + len(extended.pruned) == 60
        and new == {*extended.merged, "<|de|>"}
        and extended.size == after.vocab_size
    )
    slow = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert slow.get_vocab() == after.vocabulary
    old_special = {token["content"]: token["id"] for token in json.loads(before.content)["added_tokens"]}
    assert all(ids_of(slow, token) == [number] for token, number in [*old_special.items(), ("<|de|>", after.vocab_size - 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_token_is_reached_by_the_text(made: Mapping[str, Made], kind: str) -> None:
    """Each is a token of the text, or the part of one that is."""
    _, after, extended, folder = made[kind]
    slow = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    used = {number for text in GERMAN for number in ids_of(slow, text)}
    merges = [tuple(pair) for pair in json.loads(after.content)["model"]["merges"]]
    parts = {part for pair in merges[-len(extended.merged) - 9 :] for part in pair}
    unused = [token for token in extended.merged if after.vocabulary[token] not in used]
    assert len(unused) == extended.parts and set(unused) <= parts and not {*extended.pruned} & {*after.vocabulary}
    # and alone, where its bytes are a text that is divided into words as one
    for token in extended.merged:
        assert [each.value for each in slow.model.tokenize(token)] == [token]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=40), st.lists(st.sampled_from([*FRAGMENTS, *GERMAN, "Rechte", "<|de|>"]), max_size=8).map("".join)
    )
)
def test_any_text_has_the_same_ids_everywhere_and_comes_back(made: Mapping[str, Made], kind: str, text: str) -> None:
    before, after, extended, folder = made[kind]
    slow = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert after.fast is not None
    ids = after.fast.encode(text)
    assert ids.tolist() == ids_of(slow, text)
    if slow.normalizer is not None:
        text = slow.normalizer.normalize_str(text)
    assert after.decode(ids) == text
    # with new tokens taken apart it is the old tokenizer's text
    pieces = pieces_of(before, after, range(extended.first, extended.size))
    apart = [
        piece for number in ids.tolist() for piece in ([number] if number < extended.first else pieces[number - extended.first])
    ]
    if "<|de|>" not in text:
        assert apart == ids_of(library(json.loads(before.content)), text)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_with_these_ids(made: Mapping[str, Made], kind: str) -> None:
    _, after, _, folder = made[kind]
    loaded: Any = AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == after.vocab_size
    for text in [*GERMAN, *TEXTS, "a <|de|> b"]:
        assert loaded(text, add_special_tokens=False)["input_ids"] == after.encode_batch([text])[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["20B_tokenizer.json", "gpt2_tokenizer.json"])
def test_published_tokenizers_on_german(name: str, tmp_path: Path) -> None:
    """GPT-NeoX's and GPT-2's on the civil code: at most 70 % of the tokens, and the ids of 'tokenizers' on every document."""
    folder = Path(os.environ.get("MEGAREWARM_TEST_DATA", ""))
    if not (folder / name).is_file():
        pytest.skip(f"set MEGAREWARM_TEST_DATA to the folder that holds {name}")
    texts, english = (
        [json.loads(line)["text"] for line in (folder / "neox_golden" / file).read_text().splitlines()]
        for file in ("B.jsonl", "A.jsonl")
    )
    base = Base(folder / name)
    extended = base.extended(base.words(texts), 2000, 2)
    files = files_of(base.tokenizer, extended, tmp_path)
    after, slow = HuggingFaceTokenizer(tmp_path, files["tokenizer.json"], None), library(extended.content)
    assert after.fast is not None and base.tokenizer.vocabulary.items() <= after.vocabulary.items()
    for text in [*texts, *english]:
        assert after.fast.encode(text).tolist() == ids_of(slow, text)
    used = {number for text in texts for number in ids_of(slow, text)}
    assert sum(number not in used for number in range(extended.first, extended.size)) == extended.parts
    before, now = (sum(map(len, each.encode_batch(texts))) for each in (base.tokenizer, after))
    assert now < 0.7 * before


def test_words_that_become_two_parts_are_listed(tmp_path: Path) -> None:
    """Llama 3 has tokens that only whole words are; continued merges may bring their halves side by side, which tiktoken then
    joins: the file lists these merges, so that 'tokenizers' joins them too."""
    content = of_family("llama3") | {"added_tokens": [], "post_processor": None}
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġxqzxqz"] = len(vocabulary)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    base = Base(path)
    extended = base.extended(base.words([" xqz xqzq xqzw xqzxqzu zxqz "] * 4), 4, 2)
    files = files_of(base.tokenizer, extended, tmp_path / "tok")
    after = HuggingFaceTokenizer(path, files["tokenizer.json"], None)
    assert after.fast is not None and after.notes == []
    assert ["Ġxqz", "xqz"] in extended.content["model"]["merges"]
    text = " xqzxqz xqzxqzu xqzxqz"
    assert after.fast.encode(text).tolist() == ids_of(library(extended.content), text)


def test_the_same_text_gives_the_same_files(tmp_path: Path) -> None:
    base = Base(base_of("qwen", tmp_path / "base"))
    files = [files_of(base.tokenizer, base.extended(base.words(texts), 40), tmp_path) for texts in (GERMAN, GERMAN[::-1])]
    assert files[0] == files[1]


def test_counting_in_little_memory_leaves_rare_words_out(tmp_path: Path) -> None:
    base = Base(base_of("qwen", tmp_path / "base"))
    texts = [f" recht recht recht {''.join(chr(97 + int(digit)) for digit in str(i))}x" for i in range(300)]
    whole = base.words(texts)
    fast, pre_tokenizer = base._fast, library(base.content).pre_tokenizer
    little = word_counts.count_words(texts, fast, pre_tokenizer, most=50)
    assert whole.left_out == 0 and len(whole.counts) == 301 and whole.bytes == sum(len(text) for text in texts)
    assert len(little.counts) <= 50 and little.counts["Ġrecht"] == 900
    assert little.left_out + sum(little.counts.values()) == sum(whole.counts.values())


# ---- by the command line -------------------------------------------------------------------------------------------------


def command(*words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/extend_tokenizer.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    train_bpe(TEXTS * 2, 300, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>", "model_max_length": 7})
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "new.txt").write_text("".join(GERMAN * 3))
    (folder / "old.txt").write_text("".join(TEXTS))
    (folder / "special.txt").write_bytes(b"\xef\xbb\xbf<|de|>\r\n<|en|>\r\n")  # as some editors on Windows write it
    return folder


def test_the_command(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "tok"
    done = command(
        place, place / "new.txt", "--add", 50, "--output", out, "--old", place / "old.txt", "--tokens", place / "special.txt"
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "352 ids, 52 of them new (300-351)" in said and "'<|de|>' 350, '<|en|>' 351" in said
    tokenizer = load_tokenizer(out)
    base = load_tokenizer(place)
    for name, file in (("new text", "new.txt"), ("old text", "old.txt")):
        text = (place / file).read_bytes().decode()
        numbers = [len(np.flatnonzero(each.encode_batch([text])[0] != 0)) for each in (base, tokenizer)]  # 0: <|endoftext|>
        size = len(text.replace("<|endoftext|>", "").encode())
        assert f"{name} {size:,} {numbers[0]:,} {numbers[1]:,} {size / numbers[0]:.3f} {size / numbers[1]:.3f}" in said
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 7}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}" and tokenizer.eod_id == 0


def test_special_tokens_alone(place: Path, tmp_path: Path) -> None:
    done = command(place / "tokenizer.json", "--tokens", place / "special.txt", "--output", tmp_path / "tok")
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(tmp_path / "tok").encode_batch(["a<|en|>"])[0][-1] == 301


def test_bad_input_is_one_line_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    """Through the library where the command adds nothing."""
    out = tmp_path / "tok"
    done = command(place, place / "new.txt", "--add", 100_000, "--output", out)
    assert (
        done.returncode == 2 and "or --add" in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not out.exists()
    )
    from megarewarm.cli import extend_tokenizer

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "twice.txt").write_text("<a>\n<a>\n")
    (tmp_path / "known.txt").write_text("<|endoftext|>\n")
    (tmp_path / "spaced.txt").write_text("<a>\n<b> \n")
    new = str(place / "new.txt")
    for words, says in (
        ([place, "--output", out], "nothing to add"),
        ([place, "--add", 5, "--output", out], "no new text"),
        ([place, new, "--tokens", place / "special.txt", "--output", out], "read for --add only"),
        ([place, new, "--add", 5, "--output", place], "exists"),
        ([place, tmp_path / "none.txt", "--add", 5, "--output", out], "none.txt"),
        ([place, "--tokens", tmp_path / "empty.txt", "--output", out], "empty"),
        ([place, "--tokens", tmp_path / "twice.txt", "--output", out], "listed twice"),
        ([place, "--tokens", tmp_path / "known.txt", "--output", out], "a token of"),
        ([place, "--tokens", tmp_path / "spaced.txt", "--output", out], "'<b> ' is empty or has spaces around it"),
        ([tmp_path / "nothing.json", new, "--add", 5, "--output", out], "does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            extend_tokenizer.main(list(map(str, words)))
    assert not out.exists()


def test_other_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    content = of_family("qwen") | {"normalizer": {"type": "NFKC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"normalizer NFKC.*can be extended"):
        Base(tmp_path)
    from megarewarm.data.text.tokenizers import train_sentencepiece

    train_sentencepiece(TEXTS * 4, 420, tmp_path / "m.model")
    with pytest.raises(UserError, match="a sentencepiece model can't be extended"):
        Base(tmp_path / "m.model")
