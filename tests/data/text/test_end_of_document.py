"""Which token ends a document: what published tokenizers look like in it, and what is refused because it is a choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.text.preprocess.job import preprocess
from megarewarm.data.text.tokenizers import load_tokenizer
from megarewarm.errors import UserError


def folder_of(
    place: Path, special: list[str], ordinary: tuple[str, ...] = (), settings: dict[str, Any] | None = None, file: str = ""
) -> Path:
    """A folder with a tokenizer.json of that kind, and ``settings`` as ``file`` (tokenizer_config.json) beside it."""
    place.mkdir()
    vocabulary = {token: i for i, token in enumerate([*special, *ordinary, "a", "b"])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "added_tokens": [{"id": vocabulary[token], "content": token} | flags for token in special],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (place / "tokenizer.json").write_text(json.dumps(content))
    if settings is not None:
        (place / (file or "tokenizer_config.json")).write_text(json.dumps(settings))
    return place


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OLMO2 = ["|||IP_ADDRESS|||", "<|fim_prefix|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "<|pad|>"]
KINDS: dict[str, tuple[list[str], tuple[str, ...], dict[str, Any] | None, str]] = {
    "gpt2": (["<|endoftext|>"], (), None, "<|endoftext|>"),
    "neox": (["<|endoftext|>", "<|padding|>"], (), {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
    "gemma": (["<pad>", "<eos>", "<bos>", "<unk>"], ("</s>",), None, "<eos>"),
    "gemma_it": (["<pad>", "<eos>", "<end_of_turn>"], ("</s>",), {"eos_token": {"content": "<eos>"}}, "<eos>"),
    "llama2": (["<unk>", "<s>", "</s>"], (), {"eos_token": {"content": "</s>", "lstrip": False}}, "</s>"),
    "llama3": (LLAMA3, (), {"eos_token": "<|end_of_text|>"}, "<|end_of_text|>"),
    "llama3_bare": (LLAMA3, (), None, "<|end_of_text|>"),
    "qwen": (QWEN, (), {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
    "qwen_bare": (QWEN, (), None, "<|endoftext|>"),
    "olmo2": (OLMO2, (), {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
    "olmo2_bare": (OLMO2, (), None, "<|endoftext|>"),
    "smollm2": ([*QWEN, "<repo_name>"], (), {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
    "smollm3": ([*LLAMA3, "<|im_start|>", "<|im_end|>"], (), {"eos_token": "<|end_of_text|>"}, "<|end_of_text|>"),
    "mistral": (["<unk>", "<s>", "</s>", "[INST]"], (), {"eos_token": "</s>"}, "</s>"),
    "mistral_bare": (["<unk>", "<s>", "</s>"], (), None, "</s>"),
    "phi3": (["<|endoftext|>", "<|end|>"], ("</s>",), {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
    "t5": (["<pad>", "</s>", "<unk>"], (), {"eos_token": "</s>"}, "</s>"),
    "deepseek": (["<\uff5cend\u2581of\u2581sentence\uff5c>"], ("</s>",), None, "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    "own_name": (["<END>"], ("</s>",), {"eos_token": "<END>"}, "<END>"),
    "said_so": (["</s>", "<|endoftext|>"], (), {"eos_token": "</s>"}, "</s>"),
    "in_the_decoder": (["<s>"], ("</s>",), {"added_tokens_decoder": {"1": {"content": "</s>", "special": True}}}, "</s>"),
}
REFUSED: dict[str, tuple[list[str], tuple[str, ...], dict[str, Any] | None, str]] = {
    "qwen_chat": (QWEN, (), {"eos_token": "<|im_end|>"}, r"several special tokens .*'<\|im_end\|>', '<\|endoftext\|>'"),
    "llama3_chat": (LLAMA3, (), {"eos_token": "<|eot_id|>"}, "several special tokens"),
    "smollm2_chat": (QWEN, (), {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, "several special tokens"),
    "two_bare": (["</s>", "<|endoftext|>"], (), None, "several special tokens"),
    "bert": (["[PAD]", "[CLS]", "[SEP]"], (), None, r"no special token .*\(special are '\[CLS\]', '\[PAD\]', '\[SEP\]'\)"),
    "ordinary": (["<unk>"], ("</s>",), None, "'</s>' is an ordinary token"),
    "elsewhere": (["</s>"], (), {"eos_token": "<none>"}, "'<none>' ends a text, which is no token of it"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_is_one_that_the_tokenizer_calls_special(tmp_path: Path, kind: str) -> None:
    special, ordinary, settings, wanted = KINDS[kind]
    folder = folder_of(tmp_path / kind, special, ordinary, settings)
    end = load_tokenizer(folder).end
    assert (end.token, end.id) == (wanted, [*special, *ordinary].index(wanted))
    assert load_tokenizer(folder / "tokenizer.json").eod_id == end.id  # the file named by itself


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_a_choice_is_refused(tmp_path: Path, kind: str) -> None:
    special, ordinary, settings, message = REFUSED[kind]
    folder = folder_of(tmp_path / kind, special, ordinary, settings)
    with pytest.raises(UserError, match=message + ".*say which token ends a document .--eod-token"):
        _ = load_tokenizer(folder).eod_id
    for token in [*special, *ordinary]:
        assert load_tokenizer(folder, eod_token=token).end.why == "as asked"


def test_special_tokens_map_speaks_where_nothing_else_does(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", ["<END>", "<x>"], (), {"eos_token": "<END>"}, "special_tokens_map.json")
    assert load_tokenizer(folder).end.why == "special_tokens_map.json says so"
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not readable as JSON"):
        _ = load_tokenizer(folder).end


def test_sentencepiece_has_an_end_of_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("\n".join("the quick brown fox jumps over a lazy dog" for _ in range(40)))
    options: dict[str, Any] = {"input": str(text), "vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    with_end: dict[str, Any] = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>", user_defined_symbols=["</s>"])
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "gemma"), **options, **with_end)
    assert load_tokenizer(tmp_path / "gemma.model").end.token == "<eos>"
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "none"), **options, eos_id=-1, bos_id=-1)
    with pytest.raises(UserError, match="no special token"):
        _ = load_tokenizer(tmp_path / "none.model").end
    (tmp_path / "gemma.model").rename(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    with pytest.raises(UserError, match="several special tokens"):
        _ = load_tokenizer(tmp_path / "tokenizer.model").end


def test_preprocessing_writes_it_and_says_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "gemma", ["<pad>", "<eos>"], ("</s>",))
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n')
    (written,) = preprocess([tmp_path / "a.jsonl"], folder, tmp_path / "a", threads_only=True)
    assert open_tokens(tmp_path / "a").document(0).tolist() == [3, 4, 1]
    assert "'<eos>' (id 1) ends a document: a special token of tokenizer.json" in written.notes[0]
    assert json.loads((tmp_path / "a.json").read_text())["eod"]["id"] == 1
