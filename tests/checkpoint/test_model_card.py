"""Model cards of exports: what the hub reads of them, and what they say of the model's history."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from megarewarm.checkpoint.export.model_card import model_card
from megarewarm.checkpoint.export.tokenizer_files import ExportedTokenizer
from megarewarm.checkpoint.foreign.card import read_card
from megarewarm.checkpoint.lineage import Lineage, Stage, StatedTerms
from megarewarm.config.model import ModelConfig
from megarewarm.data.files.tokenizer_identity import TokenizerIdentity
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.checkpoint.test_convert import tool
from tests.support.tiny import config, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=16, max_positions=8)
NO_TOKENIZER = ExportedTokenizer({}, {"eos": 3})
FRONT = """---
language:
- en
- de
tags: [pytorch, pythia]
license: apache-2.0
datasets: [EleutherAI/pile]
---

# A card with license: mit in its text
"""


def test_licence_and_languages_are_handed_down_and_the_history_is_shown(tmp_path: Path) -> None:
    small: dict[str, Any] = {"training": {"budget": 4}, "checkpoint": {"every": 4}, "export": {"huggingface": True}}
    first = train(config(tmp_path, **small, folder=str(tmp_path / "first")), ALONE, quiet()).folder
    scratch = ModelCard.load(first / "huggingface" / "README.md")
    assert scratch.data.license is None and scratch.data.base_model is None and "not recorded; add `license`" in scratch.text
    base = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(first / "huggingface", base)
    (base / "README.md").write_text(FRONT)
    start = str(base)
    for name in ("second", "third"):
        start = str(train(config(tmp_path, **small, folder=str(tmp_path / name), start={"from": start}), ALONE, quiet()).folder)
    tool("convert_checkpoint", start, str(tmp_path / "converted"), "--to", "hf")
    for folder in (tmp_path / "third/huggingface", tmp_path / "converted"):
        card = ModelCard.load(folder / "README.md")
        assert (card.data.license, card.data.language, card.data.base_model) == ("apache-2.0", ["en", "de"], "some/model")
        assert card.data.pipeline_tag == "text-generation" and card.data.metrics == ["perplexity"]
        assert card.text.count("| moments | reset |") == 2 and card.text.count("| validation set | loss | perplexity |") == 2
        assert "1. `" in card.text and "2. **tiny**: rewarm" in card.text and "3. **tiny**: rewarm" in card.text


def test_the_hub_reads_the_block_as_it_was_written() -> None:
    stages = [
        Stage(
            run="a/b@main",
            intent="foreign checkpoint (huggingface)",
            card=StatedTerms(license="mit", languages=["en"], base_model="a/b"),
        ),
        Stage(
            run="mine",
            intent="rewarm",
            started_from="a/b@main",
            steps=2,
            tokens=32,
            losses={"pile": 2.0, "new": math.nan},
            tokenizers=[TokenizerIdentity(fingerprint="f" * 64)],
        ),
    ]
    text = model_card("mine", SMALL, Lineage(stages=stages), ExportedTokenizer({"tokenizer.json": b"{}"}, {"eos": 0}))
    read = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert ModelCardData(**read).to_dict() == read == yaml.safe_load(text.split("---")[1])
    validate_repo_id(read["base_model"])
    assert "| pile | 2.0000 | 7.39 |" in text and "| new | nan | - |" in text
    assert "`tokenizer.json` in this folder, id 0 ends a text, fingerprint `ffffffffffffffff`" in text


def test_lineages_of_earlier_versions() -> None:
    for run, intent, base in [
        ("EleutherAI/pythia-70m@step3", "foreign checkpoint (huggingface)", "EleutherAI/pythia-70m"),
        ("neox/global_step3", "foreign checkpoint (gpt-neox)", None),
        ("mine", "scratch", None),
    ]:
        text = model_card("mine", SMALL, Lineage(stages=[Stage(run=run, intent=intent)]), NO_TOKENIZER)
        assert ModelCard(text).data.to_dict().get("base_model") == base
    assert "Nothing is recorded." in model_card("mine", SMALL, Lineage(), NO_TOKENIZER)


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("", StatedTerms()),
        ("license: mit\n", StatedTerms()),
        ("---\nlicense: mit\n---\n", StatedTerms(license="mit")),
        (
            "---\nlicense: 'mit'\nlanguage: en\nbase_model: a/b\n---\n",
            StatedTerms(license="mit", languages=["en"], base_model="a/b"),
        ),
        ("---\nlanguage: [en, pt-BR]\n---\n", StatedTerms(languages=["en", "pt-BR"])),
        ("---\nlicense: &a [*a]\nlanguage: {en: *x}\nbase_model: ../../etc/passwd\n---\n", StatedTerms()),
        ("---\nlicense: mit|injected\nlanguage: '`en`'\n---\n", StatedTerms()),
        ("---\nlicense:\nlanguage: de\n---\n", StatedTerms(languages=["de"])),
    ],
)
def test_cards_from_elsewhere(tmp_path: Path, text: str, card: StatedTerms) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(str(tmp_path), tmp_path) == card


def test_the_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_card("a/b@step3", tmp_path).base_model == "a/b"
    (tmp_path / "runs/hf").mkdir(parents=True)
    assert read_card("runs/hf", tmp_path / "runs/hf").base_model is None  # a folder of that form
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n" + b"x" * 10**6)
    assert read_card("a/b", tmp_path) == StatedTerms(base_model="a/b")


@pytest.mark.parametrize(
    ("written", "read"), [("muon", "muon"), ("[adamw]", "adamw"), ("lion", None), ("'muon, $(x)'", "muon")]
)
def test_the_optimizer_of_an_export_is_read_back(tmp_path: Path, written: str, read: str | None) -> None:
    """Only kinds that there are: another program's card may say anything under this key."""
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\noptimizer: {written}\n---\n")
    assert read_card(str(tmp_path), tmp_path).optimizer == read
    lineage = Lineage(
        stages=[Stage(run="a", intent="scratch", steps=3, optimizer="adamw"), Stage(run="b", intent="x", optimizer="muon")]
    )
    card = ModelCard(model_card("mine", SMALL, lineage, NO_TOKENIZER))
    assert card.data.to_dict()["optimizer"] == "muon" and "3 steps, 0 tokens, adamw." in card.text
