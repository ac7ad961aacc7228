"""Rows for new tokens against formulas by hand, transformers, and a float64 gradient; what the history knows of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from megarewarm.checkpoint.export.huggingface import ModelWeights
from megarewarm.checkpoint.extend_vocabulary import ExtendedVocabulary, NewTokens, new_tokens
from megarewarm.checkpoint.source import open_checkpoint, tokenizers_of
from megarewarm.checkpoint.token_distillation import TokenDistillation, distill, distillation_loss, snippets_of
from megarewarm.cli import extend_vocabulary
from megarewarm.data.text.extended_tokenizer import Base, files_of
from megarewarm.data.text.preprocess.job import preprocess
from megarewarm.data.text.tokenizers import HuggingFaceTokenizer, load_tokenizer
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD
from megarewarm.training.trainer import train
from tests.checkpoint.test_convert import ALONE, tool, weights_of
from tests.checkpoint.test_grow import KINDS, random_model
from tests.support.families import CONFIGS, USUAL
from tests.support.tiny import config, events, quiet

TEXT = "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt. " * 3
OLD, NEW = 280, 20


def old_tokenizer(folder: Path) -> Path:
    """280 ids, the special ones first."""
    from megarewarm.data.text.tokenizers import train_bpe

    folder.mkdir(parents=True, exist_ok=True)
    train_bpe(["to be, or not to be: that is the question " * 4, TEXT[:60]], OLD, folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old/, a tokenizer, tok/, the same with 20 merged tokens, and text.txt."""
    folder = tmp_path_factory.mktemp("place")
    base = Base(old_tokenizer(folder / "old"))
    extended = base.extended(base.words([TEXT]), NEW)
    (folder / "tok").mkdir()
    for name, data in files_of(base.tokenizer, extended, folder / "tok").items():
        (folder / "tok" / name).write_bytes(data)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def new(place: Path) -> NewTokens:
    before, after = load_tokenizer(place / "old"), load_tokenizer(place / "tok")
    assert isinstance(before, HuggingFaceTokenizer) and isinstance(after, HuggingFaceTokenizer)
    pieces = []
    for number in range(OLD, OLD + NEW):  # by the text of each token, which is a word here
        text = after.decode([number])
        pieces.append(before.encode_batch([text])[0].tolist() if "\ufffd" not in text else [5])
    return NewTokens(before, after, OLD, OLD + NEW, pieces)


def saved(kind: str, folder: Path, rows: int = OLD) -> Any:
    """transformers' model of the family, with random weights, in ``folder``."""
    from copy import deepcopy

    config = deepcopy(CONFIGS[kind])
    config.vocab_size = rows
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + float(parameter.dim() == 1))
    model.save_pretrained(folder)
    return model


# ---- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["mean", "weighted", "zero"])
def test_rows_by_hand(new: NewTokens, init: str) -> None:
    model = random_model(KINDS["neox, parallel"] | {"vocab_size": OLD})
    extended = ExtendedVocabulary(ModelWeights(model), model.config, new, init)
    for name, sign in ((EMBEDDING, 1), (HEAD, -1)):
        old, rows = model.get_parameter(name), extended.read(name)
        assert torch.equal(rows[:OLD], old) and rows.shape == (OLD + NEW, 32)
        for row, pieces in zip(rows[OLD:], new.pieces, strict=True):
            shares = {
                "mean": [1 / len(pieces)] * len(pieces),
                "weighted": [np.exp(2 * sign * i) for i in range(1, len(pieces) + 1)],
                "zero": [0.0] * len(pieces),
            }[init]
            total = sum(shares) if init == "weighted" else 1
            wanted = sum(share / total * old[piece] for share, piece in zip(shares, pieces, strict=True))
            torch.testing.assert_close(row, wanted + torch.zeros(32), rtol=1e-12, atol=1e-12)


def test_noise_has_the_old_rows_moments(new: NewTokens) -> None:
    model = random_model(KINDS["neox, parallel"] | {"vocab_size": OLD})
    old = model.get_parameter(EMBEDDING).detach() * torch.linspace(1, 3, 32) + 1
    many = NewTokens(new.old, new.new, OLD, OLD + 20_000, [])
    one, again, other = (
        ExtendedVocabulary(ModelWeights(model), model.config, many, "noise", seed).rows(EMBEDDING, old) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.testing.assert_close(one.mean(0), old.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(one.std(0), old.std(0, correction=0), rtol=0.03, atol=0)


def test_rows_that_the_padding_holds(place: Path, tmp_path: Path) -> None:
    """288 rows for 280 ids: 20 new ones take the 8 and 12 more; with 304 rows they are enough, and the rest stays."""
    for rows, says, after in ((288, "8 of them padding, became 300", 300), (304, "24 of them padding, are enough", 304)):
        saved("llama", tmp_path / f"in{rows}", rows)
        said = tool(
            "extend_vocabulary",
            *(tmp_path / f"in{rows}", tmp_path / f"out{rows}", "--tokenizer", place / "tok", "--to", "hf"),
            *("--old-tokenizer", place / "old"),
        )
        assert says in " ".join(said.split())
        before, extended = weights_of(tmp_path / f"in{rows}"), weights_of(tmp_path / f"out{rows}")
        for name in (EMBEDDING, HEAD):
            assert extended[name].shape[0] == after and torch.equal(extended[name][:OLD], before[name][:OLD])
            assert torch.equal(extended[name][300:], before[name][300:])


@pytest.mark.parametrize("kind", USUAL)
def test_every_family_gives_the_old_logits_in_transformers(place: Path, tmp_path: Path, kind: str) -> None:
    """On text in old tokens, on old ids: the same bits. transformers loads model and tokenizer; names of tensors stay."""
    old = saved(kind, tmp_path / "ckpt")
    said = tool(
        "extend_vocabulary",
        *(tmp_path / "ckpt", tmp_path / "out", "--tokenizer", place / "tok", "--old-tokenizer", place / "old", "--to", "hf"),
        *("--init", "weighted"),
    )
    assert "are the same, bit for bit; the new rows have " in " ".join(said.split())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    extended, loading = loaded
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert extended.config.vocab_size == OLD + NEW == len(tokenizer)
    ids = torch.randint(OLD, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = old(ids).logits, extended(ids).logits
    torch.testing.assert_close(after[..., :OLD], before, rtol=1e-5, atol=1e-5)
    mass = float(after.softmax(-1)[:, :-1, OLD:].sum(-1).mean())
    assert 0 < mass < 1
    assert tokenizer(TEXT)["input_ids"] == load_tokenizer(place / "tok").encode_batch([TEXT])[0].tolist()


def test_the_share_of_the_softmax(place: Path, tmp_path: Path) -> None:
    """Zero rows against transformers' softmax on the same tokens; the loss after counts them."""
    from megarewarm.data.files.token_file import TokenFileWriter

    model = saved("qwen3", tmp_path / "ckpt")
    ids = torch.randint(OLD, (4, 64), generator=torch.Generator().manual_seed(3))
    with TokenFileWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document(ids.flatten().numpy())
    said = tool(
        "extend_vocabulary",
        *(tmp_path / "ckpt", tmp_path / "out", "--tokenizer", place / "tok", "--old-tokenizer", place / "old"),
        *("--init", "zero", "--on", tmp_path / "data", "--tokens", 256),
    )
    with torch.no_grad():
        logits = model.double()(ids).logits
    wide = F.pad(logits, (0, NEW))
    mass = float(wide.softmax(-1)[:, :-1, OLD:].sum(-1).mean())
    losses = [float(F.cross_entropy(each[:, :-1].flatten(0, 1), ids[:, 1:].flatten())) for each in (logits, wide)]
    said = " ".join(said.split())
    assert f"the new rows have {mass:.2%} of the softmax; loss {losses[0]:.4f} before, {losses[1]:.4f} after" in said


def test_the_history_and_the_tokenizer_go_along(place: Path, tmp_path: Path) -> None:
    """An own checkpoint: its stage names the rows, its tokenizer is the new one, also for a second extension and an export."""
    model = saved("llama", tmp_path / "ckpt")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
    model.save_pretrained(tmp_path / "ckpt")
    for file in (place / "old").iterdir():
        (tmp_path / "ckpt" / file.name).write_bytes(file.read_bytes())
    said = tool("extend_vocabulary", tmp_path / "ckpt", tmp_path / "out", "--tokenizer", place / "tok")
    assert "near zero" in said
    source = open_checkpoint(str(tmp_path / "out"))
    stage = source.lineage.stages[-1]
    assert stage.new_rows == (OLD, OLD + NEW) and stage.grown and stage.started_from == str(tmp_path / "ckpt")
    assert source.lineage.grown_from == stage.started_from and source.training is None
    assert source.tokenizer.file == place / "tok" / "tokenizer.json"
    assert source.tokenizer.stated == {"bos": 1, "eos": 2, "pad": None}
    made = tokenizers_of(source)
    assert [each.tokenizer.fingerprint for each in made] == [load_tokenizer(place / "tok").fingerprint()]
    tool("convert_checkpoint", tmp_path / "out", tmp_path / "hf", "--to", "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (place / "tok" / "tokenizer.json").read_bytes()
    # a second extension goes on from it
    base = Base(place / "tok", ["<|de|>"])
    (tmp_path / "tok2").mkdir()
    for name, data in files_of(base.tokenizer, base.extended(base.words([TEXT]), 3), tmp_path / "tok2").items():
        (tmp_path / "tok2" / name).write_bytes(data)
    tool("extend_vocabulary", tmp_path / "out", tmp_path / "again", "--tokenizer", tmp_path / "tok2")
    again = open_checkpoint(str(tmp_path / "again"))
    assert again.lineage.stages[-1].new_rows == (OLD + NEW, OLD + NEW + 4) and len(again.lineage.of_vocabulary) == 1
    # where the new tokenizer is gone, the old one is not taken for it
    (tmp_path / "tok2" / "tokenizer.json").unlink()
    assert open_checkpoint(str(tmp_path / "again")).tokenizer.file is None


def test_bad_input_is_one_line_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    saved("llama", tmp_path / "ckpt")
    ckpt, out, tok, old = tmp_path / "ckpt", tmp_path / "out", place / "tok", place / "old"
    moved = json.loads((tok / "tokenizer.json").read_text())
    vocabulary = moved["model"]["vocab"]
    (a, one), (b, other) = [item for item in vocabulary.items() if item[1] in (40, 41)]
    vocabulary |= {a: other, b: one}
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "tokenizer.json").write_text(json.dumps(moved))
    vocabulary["<|far|>"] = OLD + NEW + 2
    for name, more in (("gap", {}), ("filled", {"<|in it|>": OLD + NEW, "<|new|>": OLD + NEW + 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(
            json.dumps(moved | {"model": moved["model"] | {"vocab": vocabulary | more}})
        )
    saved("llama", tmp_path / "wide", 400)
    (tmp_path / "small").mkdir()
    saved("llama", tmp_path / "small", 100)
    (tmp_path / "english.txt").write_text("zz qq 11")
    values = json.loads((ckpt / "config.json").read_text()) | {"eos_token_id": None}  # then the tokenizer must know the end
    (ckpt / "config.json").write_text(json.dumps(values))
    base, ends = Base(old, ["</s>"]), tmp_path / "ends"
    ends.mkdir()
    (ends / "tokenizer.json").write_bytes(
        files_of(base.tokenizer, base.extended(base.words([TEXT]), 2), ends)["tokenizer.json"]
    )
    for words, says in (
        ([ckpt, out, "--tokenizer", tok], "comes with no tokenizer"),
        ([ckpt, out, "--tokenizer", tmp_path / "moved", "--old-tokenizer", old], "old ids must stay"),
        (
            [tmp_path / "wide", out, "--tokenizer", tmp_path / "filled", "--old-tokenizer", tmp_path / "gap"],
            f"new token '<|in it|>' has id {OLD + NEW}, which",
        ),
        ([ckpt, out, "--tokenizer", old, "--old-tokenizer", tok], "another model's tokenizer"),
        ([ckpt, out, "--tokenizer", old, "--old-tokenizer", old], "no more than"),
        ([tmp_path / "small", out, "--tokenizer", tok, "--old-tokenizer", old], "another model's tokenizer"),
        ([ckpt, place, "--tokenizer", tok, "--old-tokenizer", old], "exists"),
        (
            [ckpt, out, "--tokenizer", ends, "--old-tokenizer", old, "--to", "hf", "--distill", "none.txt"],
            "several special tokens",
        ),
        ([ckpt, out, "--tokenizer", tmp_path / "none", "--old-tokenizer", old], "no such tokenizer"),
        ([ckpt, out, "--tokenizer", tok, "--old-tokenizer", old, "--distill-steps", 3], "without --distill"),
        (
            [ckpt, out, "--tokenizer", tok, "--old-tokenizer", old, "--distill", tmp_path / "english.txt"],
            "none of the new tokens",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(says)) as problem:
            extend_vocabulary.main(list(map(str, words)))
        assert "\n" not in str(problem.value)
    with pytest.raises(SystemExit) as left:
        extend_vocabulary.main([str(ckpt), str(out), "--tokenizer", str(tok), "--init", "magic"])
    assert left.value.code == 2 and not out.exists()


# ---- Token Distillation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["neox, parallel", "qwen3", "olmo2"])
def test_its_gradient_is_that_of_the_whole_model(new: NewTokens, kind: str) -> None:
    """In float64: against autograd of the extended model, whose states are compared position by position, and against finite
    differences."""
    model = random_model(KINDS[kind] | {"vocab_size": OLD, "max_positions": 64}).requires_grad_(False)
    table = model.get_parameter(EMBEDDING)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(NEW, table.shape[1], generator=generator, dtype=torch.float64).requires_grad_()
    batch = [np.array([3, 9, OLD + 4, 17, OLD, OLD + 19, 4]), np.array([OLD + 2, 5])]
    loss = distillation_loss(model, rows, new, batch)
    (gradient,) = torch.autograd.grad(loss, rows)
    whole = torch.cat([table, rows.detach()]).requires_grad_()
    squares, count = torch.zeros((), dtype=torch.float64), 0
    for ids in batch:
        apart = [new.pieces[token - OLD] if token >= OLD else [int(token)] for token in ids]
        with torch.no_grad():
            teacher = model(torch.tensor([[piece for each in apart for piece in each]]))[0]
        student = torch.func.functional_call(model, {EMBEDDING: whole}, (torch.tensor(ids)[None],))[0]
        end, begun = -1, False
        for position, pieces in enumerate(apart):
            end += len(pieces)
            begun |= bool(ids[position] >= OLD)
            if begun:
                squares = squares + (student[position] - teacher[end]).square().sum()
                count += student.shape[1]
    torch.testing.assert_close(loss, squares / count, rtol=1e-10, atol=0)
    (wanted,) = torch.autograd.grad(squares / count, whole)
    torch.testing.assert_close(gradient, wanted[OLD:], rtol=1e-8, atol=1e-12)
    direction = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    ahead, behind = (distillation_loss(model, rows + step * direction, new, batch) for step in (1e-5, -1e-5))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_only_new_rows_move_and_the_states_come_closer(new: NewTokens) -> None:
    model = random_model(KINDS["neox, parallel"] | {"vocab_size": OLD, "max_positions": 64}).float()
    weights = ModelWeights(model)
    asked = TokenDistillation(steps=40, lr=0.01, per_token=10, length=12, batch=8)
    snippets = snippets_of([TEXT] * 9, new, asked, 64)
    assert all(0 < len(each) <= 12 and (each >= OLD).any() for each in snippets)
    one, again = (distill(weights, model.config, new, "mean", snippets, asked) for _ in range(2))
    assert one.after < 0.5 * one.before and torch.equal(one.embeddings, again.embeddings) and one.held_out > 0
    extended = ExtendedVocabulary(weights, model.config, new, "mean", embeddings=one.embeddings)
    plain = ExtendedVocabulary(weights, model.config, new, "mean")
    for name in plain.describe():
        same = torch.equal(extended.read(name), plain.read(name))
        assert same == (name != EMBEDDING), name
    assert torch.equal(extended.read(EMBEDDING)[:OLD], plain.read(EMBEDDING)[:OLD])


def test_snippets_fit_the_positions_in_old_pieces(new: NewTokens) -> None:
    asked = TokenDistillation(per_token=3, length=50)
    found = snippets_of([TEXT] * 2, new, asked, 16)
    lengths = [sum(len(new.pieces[i - OLD]) if i >= OLD else 1 for i in each) for each in found]
    assert found and max(lengths) <= 16
    assert [each.tolist() for each in found] == [each.tolist() for each in snippets_of([TEXT] * 2, new, asked, 16)]


def test_distilled_by_the_command(place: Path, tmp_path: Path) -> None:
    saved("qwen2", tmp_path / "ckpt")  # tied
    said = tool(
        "extend_vocabulary",
        *(tmp_path / "ckpt", tmp_path / "out", "--tokenizer", place / "tok", "--old-tokenizer", place / "old"),
        *("--distill", place / "text.txt", "--distill-steps", 4, "--distill-lr", "1e-2"),
    )
    said = " ".join(said.split())
    assert "4 steps of 16, learning rate 0.01" in said and "the head is tied" in said
    assert "distilled" in open_checkpoint(str(tmp_path / "out")).lineage.stages[-1].intent


def test_pieces_are_those_of_the_old_tokenizer(place: Path, new: NewTokens, tmp_path: Path) -> None:
    saved("llama", tmp_path / "ckpt")
    found = new_tokens(open_checkpoint(str(tmp_path / "ckpt")), place / "tok", place / "old")
    whole = [i for i, pieces in enumerate(new.pieces) if pieces != [5]]
    assert len(whole) > 10 and [found.pieces[i] for i in whole] == [new.pieces[i] for i in whole]
    assert (found.first, found.stop) == (OLD, OLD + NEW)


# ---- training ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_new_tokenizer(place: Path, tmp_path: Path) -> None:
    """From a run on old ids: moments are gone and the table says why, old data are replayed, the export has the new
    tokenizer; token files of the old one beside new ones are refused."""
    (tmp_path / "text.txt").write_text(TEXT * 12)
    for name in ("old", "tok"):
        preprocess([tmp_path / "text.txt"], place / name, tmp_path / name, threads_only=True)
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": OLD, "max_positions": 16}
    data = lambda name: {"train": [{"path": str(tmp_path / name), "max_epochs": 99}], "validation": []}  # noqa: E731
    common = {"checkpoint": {"every": 5, "keep_last": 9}}
    first = train(config(tmp_path, model=shape, data=data("old"), training={"budget": 5}, **common), ALONE, quiet()).folder
    tool("extend_vocabulary", first, tmp_path / "out", "--tokenizer", place / "tok", "--old-tokenizer", place / "old")
    changed: dict[str, Any] = common | {"model": None, "training": {"budget": 3}, "start": {"from": str(tmp_path / "out")}}
    changed |= {"replay": {"fraction": 0.25, "of": "lineage", "max_epochs": 99}, "export": {"huggingface": True}}
    outcome = train(config(tmp_path, folder=str(tmp_path / "on"), data=data("tok"), **changed), ALONE, quiet())
    (begun,) = events(outcome.folder, "start")
    rows = {row["line"]: row for row in begun["reset"]}
    assert rows["moments"]["checkpoint_had"].startswith("none: grown from ")
    stages = open_checkpoint(str(outcome.folder)).lineage.stages
    assert [stage.new_rows for stage in stages] == [None, (OLD, OLD + NEW), None]
    assert [seen.name for seen in stages[-1].data] == ["tok", "replay of old"]
    (exported,) = outcome.folder.rglob("tokenizer.json")
    assert exported.read_bytes() == (place / "tok" / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="which gives other ids"):
        train(config(tmp_path, folder=str(tmp_path / "no"), data=data("old"), **changed), ALONE, quiet())
