"""Losses in bits per byte: against transformers' model and the bytes of the text itself, and in every reader."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from megarewarm.api import LoadedModel, load_model
from megarewarm.cli import evaluate
from megarewarm.config.data import ValidationSet
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.data.text.byte_lengths import ByteLengths
from megarewarm.data.text.preprocess.job import Options, preprocess
from megarewarm.data.text.tokenizers import load_tokenizer, train_bpe, train_sentencepiece
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.lines import Evaluation
from megarewarm.record.run import APART, BITS, NATS, RecordedRun, in_one_unit
from megarewarm.report.live.frame import frame
from megarewarm.report.live.watch import Watch
from megarewarm.report.pages.run_page import report
from megarewarm.training.start.plan import make_plan
from megarewarm.training.start.text_bytes import SetBytes
from megarewarm.training.start.texts import settle_texts
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, quiet, write_tokens

DOCUMENTS = [f"Übung {i}: häßlich, 你好 und \U0001f600; the learning rate warms up again. " * (1 + i % 3) for i in range(40)]
"""Of characters of 1 to 4 bytes, most of which a small vocabulary cuts into single bytes."""


def lengths(path: Path) -> ByteLengths:
    found = load_tokenizer(path).byte_lengths()
    assert found is not None
    return found


def prepared(place: Path, vocabulary: int, append_eod: bool = True) -> tuple[Path, Path]:
    """(token files of DOCUMENTS, their tokenizer)."""
    name = f"{vocabulary}{'' if append_eod else '_open'}"
    texts = place / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    tokenizer = train_bpe(DOCUMENTS, vocabulary, place / f"tok{name}.json").path
    preprocess([texts], tokenizer, place / f"text{name}", Options(append_eod=append_eod), worker_count=1, threads_only=True)
    return place / f"text{name}", tokenizer


def settings(place: Path, name: str, prefix: Path, vocabulary: int, **changes: Any) -> RunConfig:
    source = [{"path": str(prefix), "max_epochs": 99}]
    sets = [{"name": "text", "role": "upstream", "tokens": 480, "sources": [{"path": str(prefix)}]}]
    return config(
        place,
        name=name,
        folder=str(place / name),
        model={"vocab_size": vocabulary},
        data={"train": source, "validation": sets, **changes},
        training={"budget": 4},
        evaluation={"every": 2},
        export={"huggingface": True},
    )


def trained(place: Path, name: str, prefix: Path, vocabulary: int, **changes: Any) -> Path:
    return train(settings(place, name, prefix, vocabulary, **changes), Ranks(0, 1, torch.device("cpu")), quiet()).folder


@pytest.mark.parametrize("append_eod", [True, False])
def test_bits_per_byte_are_the_code_length_of_transformers_over_the_bytes_of_the_text(tmp_path: Path, append_eod: bool) -> None:
    """Windows of 16 tokens begin and end anywhere in documents and characters."""
    prefix, tokenizer = prepared(tmp_path, 300, append_eod)
    folder = trained(tmp_path, "run", prefix, 300)
    ids = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64)
    model = AutoModelForCausalLM.from_pretrained(folder / "huggingface").double()
    event = events(folder, "eval")[-1]
    letters = {number: token for token, number in tokenizers.Tokenizer.from_file(str(tokenizer)).get_vocab().items()}
    run = config(tmp_path, model={"vocab_size": 300})
    windows = ValidationWindows(
        ValidationSet.model_validate({"name": "text", "role": "upstream", "tokens": 480, "sources": [{"path": str(prefix)}]}),
        TokenFiles(run.data, 300),
    )
    (rows,) = windows.slice(0).micro_batches(0, 1, 99)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows[:, :-1])).logits
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows[:, 1:]).flatten(), reduction="sum")
    # independent of the table: each text's byte-level form has one letter for each byte
    count = sum(len(letters[i]) for i in rows[:, 1:].flatten().tolist() if letters[i] != "<|endoftext|>")
    assert event["bytes"] == count
    assert event["bits_per_byte"] == pytest.approx(float(nats) / math.log(2) / count, rel=1e-5)
    assert event["loss"] == pytest.approx(float(nats) / 480, rel=1e-5)
    # all of the file is all of the text
    whole = sum(int(lengths(tokenizer).lengths[i]) for i in ids.tolist() if i != 0)
    assert whole == sum(len(document.encode()) for document in DOCUMENTS)
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    assert whole == manifest["bytes"]


@pytest.mark.parametrize("mask", [False, True])
def test_a_loaded_checkpoint_is_measured_in_the_bits_of_its_run(
    tmp_path: Path, mask: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, _ = prepared(tmp_path, 300)
    folder = trained(tmp_path, "run", prefix, 300, **({"mask_eod_loss": True, "eod": 0} if mask else {}))
    event = events(folder, "eval")[-1]
    found = load_model(folder).evaluate(prefix, tokens=480, sequence_length=16)
    assert found.loss == pytest.approx(event["loss"], rel=1e-6)
    assert found.bits_per_byte == pytest.approx(event["bits_per_byte"], rel=1e-6)
    evaluate.main([str(folder), "--on", str(prefix), "--tokens", "480", "--sequence-length", "16"])
    assert f", {event['bits_per_byte']:.4f} bits per byte, {found.tokens} tokens" in capsys.readouterr().out
    prefix.with_suffix(".json").unlink()  # whose tokenizer is then not known
    assert load_model(folder).evaluate(prefix, tokens=480, sequence_length=16).bits_per_byte is None
    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "evaluate", lambda *given, **named: (1000.0, 1, None))
        evaluate.main([str(folder), "--on", str(prefix)])
    assert f"{prefix}: loss 1000.0000, perplexity inf, 1 token\n" in capsys.readouterr().out
    evaluate.main([str(folder), "--on", str(prefix), "--tokens", "480", "--sequence-length", "16"])
    assert "bits per byte" not in capsys.readouterr().out
    write_tokens(tmp_path / "ends", 0, vocabulary=1)
    if mask:
        with pytest.raises(UserError, match=r"ends: .* mask_eod_loss .* leaves no loss to measure"):
            load_model(folder).evaluate(tmp_path / "ends", sequence_length=16)


def test_bits_per_byte_of_a_mean_are_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer that the manifest names is gone: the model's own is the same, and without it a mean is left."""
    prefix, tokenizer = prepared(tmp_path, 300)
    folder = trained(tmp_path, "run", prefix, 300)
    exact = events(folder, "eval")[-1]["bits_per_byte"]
    tokenizer.unlink()
    found = load_model(folder / "huggingface").evaluate(prefix, tokens=480, sequence_length=16)
    assert found.bits_per_byte == pytest.approx(exact, rel=1e-6) and not caplog.records
    found = load_model(folder).evaluate(prefix, tokens=480, sequence_length=16)
    assert found.bits_per_byte == pytest.approx(exact, rel=0.1)
    assert "bits per byte follow from the mean bytes per token of the whole file" in caplog.text


def test_pieces_of_sentencepiece_and_of_llama_2_are_the_bytes_of_the_text(tmp_path: Path) -> None:
    path = train_sentencepiece(DOCUMENTS, 400, tmp_path / "own.model").path
    table = lengths(path)
    for text in [*DOCUMENTS[:5], " two  spaces "]:
        (ids,) = load_tokenizer(path).encode_batch([text])
        assert int(table.lengths[ids].sum()) == len(text.encode()) and table.leading is None
    model = sentencepiece.SentencePieceTrainer
    with open(tmp_path / "llama.model", "wb") as file:  # with the space before each text
        model.train(
            sentence_iterator=iter(DOCUMENTS), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    table = lengths(tmp_path / "llama.model")
    (ids,) = load_tokenizer(tmp_path / "llama.model").encode_batch([DOCUMENTS[1]])
    assert table.leading is not None and table.leading[ids[0]]
    assert int(table.lengths[ids].sum()) == len(DOCUMENTS[1].encode()) + 1


def test_a_tokenizer_that_changes_the_text_has_no_bytes(tmp_path: Path) -> None:
    path = train_bpe(DOCUMENTS, 300, tmp_path / "tok.json").path
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}))
    assert load_tokenizer(path).byte_lengths() is None
    word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    word.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    word.save(str(tmp_path / "words.json"))
    assert load_tokenizer(tmp_path / "words.json").byte_lengths() is None


def test_the_space_before_a_text_and_masked_positions_are_no_bytes() -> None:
    table = ByteLengths(np.array([0, 3, 4, 1]), np.array([False, False, True, False]))
    rows = np.array([[1, 0, 2, 3, 2]])  # an end, then a piece with the tokenizer's own space, ..., the text's own
    counted = SetBytes(Path("x"), (0,), (), mask=False)
    assert counted._of(rows, table) == 0 + 3 + 1 + 4
    assert SetBytes(Path("x"), (0,), (), mask=True)._of(rows, table) == 0 + 1 + 4
    assert SetBytes(Path("x"), (), (), mask=False)._of(np.array([[0, 7]]), table) is None


def test_without_the_tokenizer_the_manifest_gives_the_mean_and_without_it_nothing_is_said(tmp_path: Path) -> None:
    prefix, tokenizer = prepared(tmp_path, 300)
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    tokenizer.unlink()
    folder = trained(tmp_path, "mean", prefix, 300)
    (event, *_) = events(folder, "eval")
    assert event["bytes"] == round(480 * manifest["bytes"] / manifest["tokens"])
    assert any("mean bytes per token" in note for note in events(folder, "start")[0]["notes"])
    prefix.with_suffix(".json").unlink()
    assert "bytes" not in events(trained(tmp_path, "nothing", prefix, 300), "eval")[0]


def test_runs_of_two_tokenizers_are_in_one_figure_in_bits_per_byte(tmp_path: Path) -> None:
    (small, _), (large, _) = prepared(tmp_path, 280), prepared(tmp_path, 340)
    runs = tmp_path / "runs"
    folders = [trained(runs, "small", small, 280), trained(runs, "large", large, 340)]
    page = report(folders, tmp_path / "report").read_text()
    assert "in bits per byte of text" in page and "bits per byte on fixed" in page and "perplexity" not in page
    table = json.loads((tmp_path / "report/table.json").read_text())
    assert [row["upstream_after"] for row in table] == [events(folder, "eval")[-1]["bits_per_byte"] for folder in folders]
    alone = json.loads((report(folders[:1], tmp_path / "alone").parent / "table.json").read_text())
    assert alone[0]["upstream_after"] == events(folders[0], "eval")[-1]["loss"]
    overview = Watch(runs).look()
    assert overview.unit == BITS and overview.runs[0].upstream.newest == events(folders[0], "eval")[-1]["bits_per_byte"]
    assert all(len(line.plain) <= 80 for line in frame(overview, 80)) and "bits per byte" in frame(overview, 80)[-1].plain


def test_where_no_manifest_names_the_tokenizer_data_tokenizer_tells_runs_apart(tmp_path: Path) -> None:
    """Token files of other programs have none."""
    prefix, tokenizer = prepared(tmp_path, 280)
    said = settle_texts(make_plan(settings(tmp_path, "a", prefix, 280))).tokenizer
    prefix.with_suffix(".json").unlink()
    assert settle_texts(make_plan(settings(tmp_path, "a", prefix, 280))).tokenizer is None
    named = make_plan(settings(tmp_path, "a", prefix, 280, tokenizer=str(tokenizer)))
    assert settle_texts(named).tokenizer == said is not None


def test_losses_that_lack_their_bytes_stay_and_are_called_incomparable() -> None:
    def run(tokenizer: str | None, bits: float | None) -> RecordedRun:
        start = {} if tokenizer is None else {"tokenizer": tokenizer}
        return RecordedRun(Path("x"), {}, start, {}, [Evaluation(0, 0.0, "a", "upstream", 2.0, bits)], [])

    assert [each.unit for each in in_one_unit([run("a", 1.0), run("b", None)])] == [APART, APART]
    assert [each.unit for each in in_one_unit([run("a", 1.0), run(None, None)])] == [NATS, NATS]
    both = in_one_unit([run("a", 1.0), run("b", 1.5)])
    assert [each.evaluations[0].loss for each in both] == [1.0, 1.5] and {each.unit for each in both} == {BITS}
    assert dataclasses.replace(both[0], unit=NATS).unit == NATS
