"""Ids that are put before a prompt or a task's context, against transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from megarewarm.data.text.tokenizers import load_tokenizer, train_bpe
from megarewarm.errors import UserError

TEXTS = ["the cat sat on the mat and looked at the dog", "bees are not cats, they are bees"] * 40


def prompt(path: Path, text: str) -> list[int]:
    tokenizer = load_tokenizer(path)
    return [*tokenizer.added_before(), *tokenizer.encode_batch([text])[0].tolist()]


@pytest.mark.parametrize("begins", [True, False])
def test_a_tokenizer_json_says_itself_whatever_its_config_says(begins: bool, tmp_path: Path) -> None:
    train_bpe(TEXTS, 270, tmp_path / "tokenizer.json")
    if begins:  # as in Llama 3
        file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        file.post_processor = TemplateProcessing(single="<|padding|> $A", special_tokens=[("<|padding|>", 1)])
        file.save(str(tmp_path / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|padding|>", "add_bos_token": not begins}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert prompt(tmp_path, "the cat") == theirs.encode("the cat")
    assert load_tokenizer(tmp_path).added_before() == (1,) * begins


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("names", [{}, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}])
def test_a_sentencepiece_model_begins_texts_where_its_config_says_so(
    said: bool | None, names: dict[str, str], tmp_path: Path
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", **names}
    if said is not None:
        config["add_bos_token"] = said
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs: Any = LlamaTokenizer.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("the cat") == theirs.encode("the cat")
    assert prompt(tmp_path, "the cat") == theirs.encode("the cat")
    assert load_tokenizer(tmp_path).added_before() == (1,) * bool(said)
    if said:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<nothing>"}))
        with pytest.raises(UserError, match=r"add_bos_token, and .*tokenizer.model has no token that begins texts"):
            load_tokenizer(tmp_path).added_before()
