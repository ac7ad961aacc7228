"""From a checkpoint and a folder of text to a re-warmed model: what is written, trained, exported, resumed and refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from megarewarm.cli import continue_run
from megarewarm.config.load import read_configs, validate
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.split import split_documents
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.text.tokenizers import load_tokenizer, train_bpe
from megarewarm.errors import UserError
from megarewarm.main import main as train
from megarewarm.record.run import read_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of transformers with its tokenizer, and two folders of text."""
    folder = tmp_path_factory.mktemp("continue")
    texts = {kind: [path.read_text()[:3000] for path in sorted(ROOT.glob(f"{kind}/*.md"))] for kind in ("docs",)}
    for kind, share in (("new", slice(0, None, 2)), ("old", slice(1, None, 2))):
        (folder / kind).mkdir()
        for number, text in enumerate(part for whole in texts["docs"][share] for part in whole.split("\n\n")):
            (folder / kind / f"{number}.txt").write_text(text)
    train_bpe(texts["docs"], 400, folder / "tokenizer.json")
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=403,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    GPTNeoXForCausalLM(shape).save_pretrained(folder / "model")
    shutil.move(folder / "tokenizer.json", folder / "model")
    return folder


def words(place: Path, out: Path, *more: str) -> list[str]:
    return [str(place / "model"), "--on", str(place / "new"), "--tokens", "6.4k", "--peak", "1e-2", "--output", str(out), *more]


def test_the_whole_way(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = words(place, out, "--replay", str(place / "old"), "--replay-share", "10%")
    assert continue_run.main(command) == 0
    shown = capsys.readouterr().out
    assert "held out for validation set 'new'" in shown and "200 steps" in shown
    run = read_run(out / "run")
    assert run.steps == 200 and run.tokens == 6400 and run.peak_lr == pytest.approx(1e-2)
    for role in ("downstream", "upstream"):
        start = run.start_loss(role)
        assert start is not None and run.curve(role).losses[-1] < start - 0.5, role
    model = AutoModelForCausalLM.from_pretrained(out / "run" / "huggingface")
    assert model.config.vocab_size == 403 and (out / "run" / "huggingface" / "tokenizer.json").is_file()
    assert "<html" in (out / "report" / "report.html").read_text()
    # what is held out is in no training document, and the tokens are those of the checkpoint's tokenizer
    file = open_tokens(str(out / "data" / "new"))
    source = yaml.safe_load((out / "run.yml").read_text())["data"]["validation"][0]["sources"][0]
    parts = split_documents(source["split"], file.num_documents, "neox")
    assert parts["train"][1] == parts["valid"][0] < parts["valid"][1] == file.num_documents
    tokenizer = load_tokenizer(place / "model" / "tokenizer.json")
    texts = {path.read_text() for path in (place / "new").iterdir()}
    assert {tokenizer.decode(file.document(n)[:-1]) for n in range(file.num_documents)} == {text for text in texts if text}
    # the YAML is the run's: loaded by itself it is the same run, which is complete
    before = (out / "run.yml").read_bytes()
    assert continue_run.main(command) == 0 and (out / "run.yml").read_bytes() == before
    assert "already complete" in capsys.readouterr().out
    config = validate(RunConfig, *read_configs([str(out / "run.yml")]))
    assert config.replay is not None and config.replay.fraction == 0.1
    with pytest.raises(UserError, match="made by another command"):
        continue_run.main(words(place, out))
    edited = [str(out / "run.yml"), "name=lower", "schedule.max_lr=5e-3"]
    assert train([*edited, "--dry-run"]) == 2
    assert "give this run another 'folder'" in capsys.readouterr().err
    assert train([*edited, f"folder={out / 'lower'}", "--dry-run"]) == 0
    # the same command reports the run that the file now names
    (out / "run.yml").write_text(before.decode().replace(str(out / "run"), str(out / "moved")))
    capsys.readouterr()
    assert continue_run.main(command) == 0
    shown = capsys.readouterr().out
    assert f"model for transformers: {out / 'moved' / 'huggingface'}" in shown.replace("\n", "")


def test_a_dry_run_trains_nothing_and_can_be_followed_by_the_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert continue_run.main(words(place, out, "--dry-run", "--tokens", "6.41k")) == 0
    assert (out / "run.yml").is_file() and not (out / "run").exists()
    shown = capsys.readouterr().out
    assert "forgetting is not measured" in shown
    assert "32 tokens: 200 steps" in shown and "steps       200 of 32 tokens" in shown, "rounded as the run rounds"


def test_text_that_changed_is_not_taken_for_the_old(place: Path, tmp_path: Path) -> None:
    """The tokens of an interrupted command are used again only for the same text."""
    out = tmp_path / "out"
    shutil.copytree(place / "new", tmp_path / "texts")
    command = [str(place / "model"), "--on", str(tmp_path / "texts"), "--tokens", "6.4k", "--output", str(out), "--dry-run"]
    assert continue_run.main(command) == 0
    (out / "run.yml").unlink()
    assert continue_run.main(command) == 0
    (out / "run.yml").unlink()
    next((tmp_path / "texts").iterdir()).write_text("other words " * 50)
    with pytest.raises(UserError, match=r"holds tokens of other text.*remove .*, or give a new --output$"):
        continue_run.main(command)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sequence-length", "64"], "--sequence-length 64: expected 1 to 32"),
        (["--tokens", "10"], "--tokens 10: expected at least one sequence of 32 tokens"),
        (["--tokens", "1e30"], "--tokens 1,0.*: expected at most 1,000,000,000,000,000$"),
        (["--replay-tokens", "nowhere"], "nowhere"),
    ],
)
def test_what_is_refused(place: Path, tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        continue_run.main(words(place, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "run.yml").exists()
    assert more[0] == "--replay-tokens" or not (tmp_path / "out" / "data").exists(), "refused before the text is tokenised"


def test_too_little_text_and_no_tokenizer(place: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("one document only " * 40)
    with pytest.raises(UserError, match=r"1 document .* are too few for a validation set"):
        continue_run.main(
            [str(place / "model"), "--on", str(tmp_path / "one"), "--tokens", "1k", "--output", str(tmp_path / "o")]
        )
    shutil.copytree(place / "model", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="comes without a tokenizer; give --tokenizer"):
        continue_run.main(
            [str(tmp_path / "bare"), "--on", str(place / "new"), "--tokens", "1k", "--output", str(tmp_path / "p")]
        )


@pytest.mark.parametrize(
    ("text", "count"), [("50M", 50_000_000), ("1_000", 1000), ("2.5B tokens", 2_500_000_000), ("1e6", 10**6)]
)
def test_numbers_of_tokens(text: str, count: int) -> None:
    assert continue_run.command_line().parse_args(["x", "--on", "y", "--tokens", text]).tokens == count


@pytest.mark.parametrize("text", ["0", "many", "-5", "5%", "M"])
def test_what_is_no_number_of_tokens(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        continue_run.command_line().parse_args(["x", "--on", "y", f"--tokens={text}"])
    assert f"'{text}' is not a number of tokens" in capsys.readouterr().err
