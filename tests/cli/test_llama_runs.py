"""Runs from Hugging Face folders of Llama-like models, from the command line to the export and on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megarewarm.checkpoint.convert import ConvertOptions
from megarewarm.checkpoint.foreign.huggingface import HuggingFaceWeights
from megarewarm.checkpoint.merge import Merge, interpolation_shares, merge
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.cli import continue_run, evaluate, generate, inspect_checkpoint
from megarewarm.config.load import validate
from megarewarm.config.schema import RunConfig
from megarewarm.data.text.tokenizers import train_bpe
from megarewarm.errors import UserError
from megarewarm.main import main
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import read_run
from megarewarm.training.trainer import train
from tests.checkpoint.test_llama_folders import change, config_of, strictly
from tests.support.families import USUAL, random_model, saved
from tests.support.tiny import config, mapping, printed, quiet, write_tokens

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))
SHORT: dict[str, Any] = {
    "training": {"budget": 6},
    "checkpoint": {"every": 3},
    "evaluation": {"every": 3},
    "export": {"huggingface": True},
}


def tokens_below_61(place: Path) -> None:
    for name, seed in (("old", 1), ("new", 3)):
        write_tokens(place / name, seed, vocabulary=61)


@pytest.mark.parametrize("name", USUAL)
def test_a_chain_of_runs(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Start, stop, resume, a run from that run, exports that start again; merged, inspected."""
    saved(name, tmp_path / "hub" / "models--some--model" / "snapshots" / "abc")
    start = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    before = change(start, _name_or_path="x/y", eos_token_id=[2, 7])
    tokens_below_61(tmp_path)

    def settings(run: str, **changes: Any) -> Any:
        raw = mapping(tmp_path, **SHORT, folder=str(tmp_path / run), **changes)
        del raw["model"]
        return validate(RunConfig, raw, {})

    first = settings("first", start={"from": str(start)})
    whole = train(first, ALONE, quiet()).folder
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_6")
    shutil.rmtree(tmp_path / "cut/huggingface")
    again = train(settings("cut", start={"from": str(start)}), ALONE, quiet()).folder
    one, two = ((run / "huggingface/model.safetensors").read_bytes() for run in (whole, again))
    assert one == two
    second = train(settings("second", start={"from": str(again)}), ALONE, quiet()).folder
    third = train(settings("third", start={"from": str(second / "huggingface")}), ALONE, quiet()).folder
    for run, stages in ((whole, 2), (second, 3), (third, 2)):
        written = config_of(run / "huggingface")
        dtype = {"dtype": "float32", "torch_dtype": "float32"}
        assert {key: written[key] for key in before} == before | {key: dtype[key] for key in dtype if key in before}
        model = strictly(run / "huggingface", caplog)
        ours = OwnCheckpoint(run / "checkpoints/step_6").whole_model()
        tokens = torch.arange(40).view(2, 20)
        wanted = model(tokens).logits
        torch.testing.assert_close(ours.logits(tokens), wanted, rtol=0, atol=3e-6 * float(wanted.detach().abs().max()))
        card = ModelCard.load(run / "huggingface/README.md")
        assert card.data.tags is not None and written["model_type"] in card.data.tags and "GPT-NeoX" not in card.text
        assert len(OwnCheckpoint(run / "checkpoints/step_6").lineage.stages) == stages
        if run != third:
            assert card.data.base_model == "some/model" and f" {written['architectures'][0][:4]}" in card.text
    between = Merge([str(whole), str(second)], interpolation_shares(0.5), "half way")
    merge(between, tmp_path / "merged", ConvertOptions("hf"))
    strictly(tmp_path / "merged", caplog)
    assert {key: config_of(tmp_path / "merged").get(key) for key in ("model_type", "_name_or_path", "eos_token_id")} == {
        "model_type": before["model_type"],
        "_name_or_path": "x/y",
        "eos_token_id": [2, 7],
    }


def test_a_model_beside_the_start_that_contradicts_it(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "start")
    tokens_below_61(tmp_path)
    shape = open_checkpoint(str(tmp_path / "start")).model_config.model_dump()
    for changes, key in (
        ({"family": "llama", "qk_norm": "none"}, "family"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 6}, "head_dim"),
        ({"tie_embeddings": True}, "tie_embeddings"),
        ({"ffn_size": 50}, "ffn_size"),
        ({"vocab_size": 70}, "vocab_size"),
        ({"attention_bias": True}, "attention_bias"),
    ):
        run = config(tmp_path, folder=str(tmp_path / "run"), start={"from": str(tmp_path / "start")}, model=shape | changes)
        with pytest.raises(UserError, match=rf"model\.{key}: .* in the config, .* in the checkpoint"):
            train(run, ALONE, quiet())
    assert not (tmp_path / "run").exists()
    console = quiet()
    run = config(tmp_path, **SHORT, start={"from": str(tmp_path / "start")}, model=shape | {"rotary_base": 5e5})
    folder = train(run, ALONE, console).folder
    assert "context change 64 positions, base 10000 64 positions, base 500000" in " ".join(printed(console).split())
    assert config_of(folder / "huggingface")["rope_parameters"]["rope_theta"] == 5e5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of transformers with its tokenizer, and two folders of text."""
    folder = tmp_path_factory.mktemp("llama")
    texts = [path.read_text()[:3000] for path in sorted(ROOT.glob("docs/*.md"))]
    for kind, share in (("new", slice(0, None, 2)), ("old", slice(1, None, 2))):
        (folder / kind).mkdir()
        for number, text in enumerate(part for whole in texts[share] for part in whole.split("\n\n")):
            (folder / kind / f"{number}.txt").write_text(text)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=403,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    train_bpe(texts, 400, folder / "model" / "tokenizer.json")
    return folder


def ran(command: Any, words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert command.main([str(word) for word in words]) in (None, 0)
    return " ".join(capsys.readouterr().out.split())


def test_one_command_from_a_llama_to_a_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    words = [place / "model", "--on", place / "new", "--tokens", "3.2k", "--peak", "1e-2", "--output", out]
    ran(continue_run, [*words, "--replay", place / "old", "--replay-share", "10%"], capsys)
    run = read_run(out / "run")
    for role in ("downstream", "upstream"):
        start = run.start_loss(role)
        assert start is not None and run.curve(role).losses[-1] < start - 0.3, role
    assert "<html" in (out / "report" / "report.html").read_text()
    exported = out / "run" / "huggingface"
    strictly(exported, caplog)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("some words")["input_ids"]) == "some words"
    # the same loss and the same text from the run and from its export
    prefix = out / "data" / "new"
    losses = [ran(evaluate, [folder, "--on", prefix, "--tokens", 512], capsys) for folder in (out / "run", exported)]
    assert losses[0] == losses[1] and "perplexity" in losses[0]
    texts = [
        ran(generate, [folder, "The run", "--max-tokens", 8, "--temperature", 0], capsys) for folder in (out / "run", exported)
    ]
    assert texts[0] == texts[1] and texts[0].startswith("The run")
    shown = ran(inspect_checkpoint, [out / "run"], capsys)
    assert "llama, 2 layers, width 32, 4 heads on 2 of keys" in shown and "tied embeddings" in shown
    # the run file by itself: a dry run, and the same command resumes
    raw = yaml.safe_load((out / "run.yml").read_text())
    raw |= {"name": "again", "folder": str(tmp_path / "again")}
    (tmp_path / "again.yml").write_text(json.dumps(raw))
    assert main([str(tmp_path / "again.yml"), "--dry-run"]) == 0
    assert not (tmp_path / "again").exists() and "parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, None, "bfloat16"),
        (torch.bfloat16, "fp32", "float32"),
        (torch.float16, None, "float32"),
        (torch.float32, "fp16", "float16"),
    ],
)
def test_the_dtype_of_an_export(tmp_path: Path, stored: torch.dtype, asked: str | None, written: str) -> None:
    """The start's, where it is bf16, or what is asked for; the values are those of the run, rounded once."""
    model: Any = random_model("llama")
    model.to(stored).save_pretrained(tmp_path / "start")
    tokens_below_61(tmp_path)
    raw = mapping(tmp_path, training={"budget": 2}, start={"from": str(tmp_path / "start")})
    del raw["model"]
    raw["export"] = {"huggingface": True, "dtype": asked}
    folder = train(validate(RunConfig, raw, {}), ALONE, quiet()).folder
    found = config_of(folder / "huggingface")
    assert found["dtype"] == found["torch_dtype"] == written
    exported, run = HuggingFaceWeights(folder / "huggingface"), open_checkpoint(str(folder)).weights
    for name in run.describe():
        assert torch.equal(exported.read(name), run.read(name).to(getattr(torch, written))), name
