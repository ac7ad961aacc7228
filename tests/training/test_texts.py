"""One tokenizer for all that a run reads and starts from, its end of documents, and its export: before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config, pipeline

from megarewarm.checkpoint.convert import ConvertOptions, convert
from megarewarm.checkpoint.merge import Merge, merge
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.experiment import load_experiment
from megarewarm.config.load import validate
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.tokenizer_identity import TokenizerIdentity
from megarewarm.data.text.tokenizers import load_tokenizer, train_bpe
from megarewarm.errors import UserError
from megarewarm.lab.dry_run import show_experiment, show_run
from megarewarm.lab.experiment import run_experiment
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.start import texts
from megarewarm.training.trainer import train
from tests.support import tiny

TEXT = ["the learning rate is warmed up again, and then decays over the new data; " * 9]
ALONE = Ranks(0, 1, torch.device("cpu"))
ALONE_LAUNCH = Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none")
ROWS = 300  # of the model: more than the tokenizer's ids


def tokenizer(path: Path, special: tuple[str, ...] = ("<unk>", "<s>", "</s>"), text: str = TEXT[0], **changes: Any) -> Path:
    """A byte-level BPE of 270 ids with other special tokens than ours."""
    path.parent.mkdir(exist_ok=True)
    train_bpe([text], 262, path)
    made = tokenizers.Tokenizer.from_file(str(path))
    content = json.loads(made.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {token: i + len(special) for token, i in content["model"]["vocab"].items() if i > 1}
    content["model"]["vocab"] = {token: i for i, token in enumerate(special)} | {t: i - 2 for t, i in vocabulary.items()}
    content["added_tokens"] = [{"id": i, "content": token} | flags for i, token in enumerate(special)]
    path.write_text(json.dumps(content | changes))
    return path


def said(prefix: Path, path: Path, eod: int | None = 2) -> None:
    """A manifest for a token file, as preprocessing writes it."""
    identity = load_tokenizer(path).identity().model_dump()
    manifest = {"tokenizer": identity, "eod": None if eod is None else {"id": eod, "token": "</s>", "why": "a test"}}
    prefix.with_suffix(".json").write_text(json.dumps(manifest))


def config(place: Path, /, **changes: Any) -> RunConfig:
    base = {
        "model": {"vocab_size": ROWS, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 64},
        "training": {"budget": 2},
        "evaluation": {"every": 2, "at_start": False},
        "logging": {"tensorboard": False, "dynamics": None},
    }
    return validate(RunConfig, tiny.merge(tiny.mapping(place, **base), changes), {})


def run(config: RunConfig) -> str:
    console = tiny.quiet()
    assert train(config, ALONE, console).exit_code == 0
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def dry(config: RunConfig) -> str:
    console = tiny.quiet()
    show_run(config, console, ALONE_LAUNCH)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def refused(config: RunConfig, message: str) -> None:
    """By the dry run and by the start, before anything is written."""
    for act in (dry, run):
        with pytest.raises(UserError, match=message):
            act(config)
    assert not Path(config.run_folder, "metrics.jsonl").exists()


def check_export(folder: Path, path: Path, eos: str) -> None:
    """transformers gives the ids of 'tokenizers', all ids agree, and generation stops at the end."""
    theirs, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    own = tokenizers.Tokenizer.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    for text in ("the rate decays", f"a{eos}b", " \u00e9e\u0301  ", "x" * 300):
        assert theirs(text).input_ids == own.encode(text).ids
    wanted = own.token_to_id(eos)
    assert (theirs.eos_token, theirs.eos_token_id) == (eos, wanted)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == wanted
    assert model.config.bos_token_id == model.generation_config.bos_token_id == theirs.bos_token_id
    assert model.config.pad_token_id == theirs.pad_token_id
    assert len(theirs) == own.get_vocab_size() <= model.config.vocab_size
    assert theirs.model_max_length == model.config.max_position_embeddings
    generated = pipeline("text-generation", model=model, tokenizer=theirs)("the", max_new_tokens=3, do_sample=False)
    assert generated[0]["generated_text"].startswith("the")


# ---- what belongs together ---------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(place, tokenizer, another one): the token files 'old' and 'new' are there, without manifests."""
    tiny.mapping(tmp_path)
    return tmp_path, tokenizer(tmp_path / "a.json"), tokenizer(tmp_path / "b.json", text="other words altogether " * 20)


@pytest.mark.parametrize("other", ["validation", "replay", "switch", "data.tokenizer", "train"])
def test_files_of_another_tokenizer_are_refused_by_name(two: tuple[Path, Path, Path], other: str) -> None:
    place, a, b = two
    said(place / "new", a)
    said(place / "old", b)
    old = {"path": str(place / "old"), "max_epochs": None}
    new = {"path": str(place / "new"), "max_epochs": 9}
    data: dict[str, Any] = {"data": {"validation": []}}
    names = (
        r"old\.bin was made with the tokenizer .*b\.json, .*new\.bin was made with the tokenizer .*a\.json, which gives other"
    )
    match other:
        case "validation":
            data = {}
        case "replay":
            data["replay"] = {"fraction": 0.25, "sources": [old]}
        case "switch":
            data["data"]["switches"] = [{"at": 1, "train": [old]}]
        case "train":
            data["data"]["train"] = [new, old]
        case "data.tokenizer":
            data["data"]["tokenizer"] = str(b)
            names = r"new\.bin was made with the tokenizer .*a\.json, data\.tokenizer is .*b\.json, which gives other"
    refused(config(place, **data), names)


def test_the_start_has_the_same_tokenizer(two: tuple[Path, Path, Path]) -> None:
    place, a, b = two
    for name in ("new", "old"):
        said(place / name, a)
    often = {"every": 1}
    first = config(
        place, export={"huggingface": True}, folder=str(place / "first"), data={"tokenizer": str(a)}, checkpoint=often
    )
    run(first)
    for name in ("new", "old"):
        said(place / name, b)
    again = {"model": None, "folder": str(place / "second")}
    refused(
        config(place, start={"from": str(place / "first")}, **again),
        r"tiny, in the history of .* ids of the tokenizer .*a\.json",
    )
    refused(config(place, start={"from": str(place / "first/huggingface")}, **again), r"huggingface comes with the tokenizer")
    fresh = {"from": str(place / "first/huggingface"), "weights": "initialise"}
    assert "which gives other ids" not in dry(config(place, start=fresh, **again))
    # its own run, too: a held-out file made anew in the meantime
    shutil.rmtree(place / "first/checkpoints/step_2")
    refused_again = config(place, folder=str(place / "first"), checkpoint=often)
    with pytest.raises(UserError, match="which gives other ids"):
        dry(refused_again)
    with pytest.raises(UserError, match=r"in the history of .*, which gives other ids"):
        said(place / "new", b), said(place / "old", b)
        run(config(place, folder=str(place / "third"), data={"tokenizer": str(b)}))
        merge(
            Merge([str(place / "first"), str(place / "third")], [0.5, 0.5], "mean"),
            place / "merged",
            ConvertOptions("megarewarm"),
        )


def test_what_is_not_known_is_said_once(two: tuple[Path, Path, Path]) -> None:
    place, a, _ = two
    said(place / "new", a)
    shown = run(config(place, data={"tokenizer": str(a)}))
    assert shown.count("no manifest beside 1 token file") == 1 and "old" in shown
    (start,) = tiny.events(place / "tiny", "start")
    assert any("no manifest" in note for note in start["notes"])
    (place / "new.json").write_text(
        json.dumps({"tokens": 3, "dtype": "uint16", "tokenizer": {"fingerprint": "of another file"}})
    )
    with pytest.raises(UserError, match=r"new\.json: says 3 tokens of uint16, 6 bytes; new\.bin has \d+: it is too long"):
        dry(config(place, data={"tokenizer": str(a)}, folder=str(place / "fresh")))


def test_other_forms_and_added_tokens_are_the_same_tokenizer(golden: Path, tmp_path: Path) -> None:
    whole = golden.parent / "gpt2_tokenizer.json"
    model = json.loads(whole.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    one, other = load_tokenizer(whole).identity(), load_tokenizer(tmp_path / "vocab.json").identity()
    assert one.fingerprint != other.fingerprint and one.agrees_with(other) and other.agrees_with(one)

    def changed(**changes: Any) -> TokenizerIdentity:
        content = json.loads((golden / "tiny_tokenizer.json").read_text())
        for key, value in changes.items():
            content[key] = value(content[key])
        (tmp_path / "t.json").write_text(json.dumps(content))
        return load_tokenizer(tmp_path / "t.json").identity()

    plain = changed()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = {"id": 512, "content": "<|im_start|>"} | flags
    assert changed(added_tokens=lambda tokens: [*tokens, more]).agrees_with(plain)
    assert changed(
        post_processor=lambda _: None, pre_tokenizer=lambda p: {"type": "Sequence", "pretokenizers": [p]}
    ).agrees_with(plain)
    more_at = [
        changed(added_tokens=lambda tokens, i=i: [*tokens, more | i]) for i in ({}, {"content": "<x>"}, {"lstrip": True})
    ]
    assert not more_at[0].agrees_with(more_at[1])  # the same id for two tokens
    assert not more_at[0].agrees_with(more_at[2])  # the same token, taking spaces with it
    assert not changed(normalizer=lambda _: {"type": "NFKC"}).agrees_with(plain)
    assert not changed(model=lambda m: m | {"merges": [m["merges"][1], m["merges"][0], *m["merges"][2:]]}).agrees_with(plain)
    # a manifest of earlier versions has the fingerprint alone
    assert TokenizerIdentity(fingerprint=plain.fingerprint).agrees_with(plain)
    assert not TokenizerIdentity(fingerprint="another").agrees_with(plain)


# ---- what ends a document ----------------------------------------------------------------------------------------------


def test_ends_of_documents_agree(two: tuple[Path, Path, Path]) -> None:
    place, a, _ = two
    for name in ("new", "old"):
        said(place / name, a)
    refused(config(place, data={"eod": 5}), r"data\.eod: 5, but the documents of .*new end with id 2")
    assert "end with" not in dry(config(place, data={"eod": 2}))
    said(place / "old", a, eod=0)
    both = [{"path": str(place / name), "max_epochs": None} for name in ("new", "old")]
    assert "end with different ids (2 in" in dry(config(place, data={"train": both, "validation": []}))


# ---- the export --------------------------------------------------------------------------------------------------------

EXPORT = {"huggingface": True}


def test_the_tokenizer_is_the_named_one_the_starts_or_that_of_the_files(two: tuple[Path, Path, Path]) -> None:
    place, a, _ = two
    shown = run(config(place, export=EXPORT, data={"tokenizer": str(a)}))  # named
    assert "the export will have the tokenizer" in shown and "in which id 2 ends a text" in shown
    check_export(place / "tiny/huggingface", a, "</s>")
    # a start folder with more than a tokenizer.json, and contradictions in it
    start = place / "tiny/huggingface"
    template = {
        "chat_template": "{{ messages }}",
        "eos_token": "<s>",
        "auto_map": {"AutoTokenizer": "x.Y"},
        "tokenizer_class": "GPTNeoXTokenizer",
    }
    (start / "tokenizer_config.json").write_text(json.dumps(template | {"model_max_length": 10**30, "pad_token": "<unk>"}))
    (start / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>", "bos_token": "<s>"}))
    (start / "chat_template.jinja").write_text("{{ messages }}")
    content = json.loads((start / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (start / "tokenizer.json").write_text(json.dumps(content | {"truncation": cut}))
    for name in ("new", "old"):
        said(place / name, a)
    shown = run(config(place, export=EXPORT, model=None, start={"from": str(start)}, folder=str(place / "second")))
    assert "says that '<s>' ends a text; exported is '</s>' (id 2)" in shown
    check_export(place / "second/huggingface", start / "tokenizer.json", "</s>")
    written = json.loads((place / "second/huggingface/tokenizer_config.json").read_text())
    assert (
        written["chat_template"]
        and written["pad_token"] == "<unk>"
        and written["bos_token"] == "<s>"
        and "auto_map" not in written
    )
    assert (place / "second/huggingface/chat_template.jinja").exists()
    assert json.loads((place / "second/huggingface/special_tokens_map.json").read_text())["eos_token"] == "</s>"
    # from scratch, without a name: that of the token files
    run(config(place, export=EXPORT, folder=str(place / "third")))
    check_export(place / "third/huggingface", a, "</s>")
    # a chain, and the tools
    run(config(place, export=EXPORT, model=None, start={"from": str(place / "second")}, folder=str(place / "fourth")))
    check_export(place / "fourth/huggingface", a, "</s>")
    for form, name in (("hf", "five"), ("megarewarm", "six"), ("neox", "seven")):
        convert(open_checkpoint(str(place / "fourth")), place / name, ConvertOptions(form))
    convert(open_checkpoint(str(place / "six")), place / "eight", ConvertOptions("hf"))
    convert(open_checkpoint(str(place / "seven")), place / "nine", ConvertOptions("hf"))
    for name in ("five", "eight", "nine"):
        check_export(place / name, a, "</s>")
    merge(Merge([str(place / "second"), str(place / "fourth")], [0.5, 0.5], "mean"), place / "ten", ConvertOptions("hf"))
    check_export(place / "ten", a, "</s>")


@pytest.mark.parametrize("beside", [True, False], ids=["with a tokenizer", "without"])
@pytest.mark.parametrize("begin", [None, 2, 1], ids=str)
def test_the_export_of_a_model_whose_texts_begin_with_no_token_keeps_it_so(
    two: tuple[Path, Path, Path], begin: int | None, beside: bool
) -> None:
    """As OLMo 2's, and Qwen's, whose config.json names a token that its tokenizer doesn't put before texts."""
    place, a, _ = two
    start = place / "start"
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ids: dict[str, Any] = {"bos_token_id": begin, "eos_token_id": 2, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(Olmo2Config(vocab_size=ROWS, **shape, **ids)).save_pretrained(start)
    if beside:
        (start / "tokenizer.json").write_bytes(a.read_bytes())
        (start / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": None}))
    run(config(place, export=EXPORT, model=None, start={"from": str(start)}))
    exported = place / "tiny/huggingface"
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (start, exported))
        assert [after.get(key) for key in ids] == [before.get(key) for key in ids], name
    if beside:
        assert AutoTokenizer.from_pretrained(exported).bos_token is None


def test_a_conversion_to_fewer_rows_says_why_it_has_no_tokenizer(two: tuple[Path, Path, Path]) -> None:
    place, a, _ = two
    run(config(place, data={"tokenizer": str(a)}, export=EXPORT))
    for form in ("hf", "neox"):
        notes = convert(open_checkpoint(str(place / "tiny/huggingface")), place / form, ConvertOptions(form, vocab_size=100))
        (why,) = [note for note in notes if "no tokenizer is in the export" in note]
        assert "the model has 100 rows" in why and "none is named" not in why
        assert not (place / form / "tokenizer.json").exists()


def test_an_export_asked_for_later_is_checked_too(two: tuple[Path, Path, Path]) -> None:
    place, a, _ = two
    run(config(place))
    shown = run(config(place, export=EXPORT))
    assert "no tokenizer is in the export" in shown and "eos_token_id is null" in shown
    model = AutoModelForCausalLM.from_pretrained(place / "tiny/huggingface")
    assert model.config.eos_token_id is None and not (place / "tiny/huggingface/tokenizer.json").exists()
    other = config(place, folder=str(place / "second"))
    run(other)
    with pytest.raises(UserError, match=r"nowhere\.json: no such tokenizer file or folder, which data\.tokenizer names"):
        run(config(place, folder=str(place / "second"), export=EXPORT, data={"tokenizer": "nowhere.json"}))
    run(config(place, folder=str(place / "second"), export=EXPORT, data={"tokenizer": str(a)}))
    check_export(place / "second/huggingface", a, "</s>")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no such tokenizer file"),
        ("sentencepiece", "a sentencepiece model can't be exported"),
        ("large", "has ids up to .*, the model has 64 rows"),
        ("choice", "several special tokens that could end a document"),
        ("eod", "data.eod: 299 is no token of"),
    ],
)
def test_what_cant_be_exported_is_refused_before_the_first_step(tmp_path: Path, how: str, message: str) -> None:
    tiny.mapping(tmp_path)
    changes: dict[str, Any] = {"export": EXPORT, "data": {"tokenizer": str(tmp_path / "a.json")}}
    if how != "missing":
        tokenizer(tmp_path / "a.json", ("</s>", "<|endoftext|>") if how == "choice" else ("<unk>", "</s>"))
    if how == "sentencepiece":
        from megarewarm.data.text.tokenizers import train_sentencepiece

        changes["data"]["tokenizer"] = str(train_sentencepiece(TEXT, 290, tmp_path / "a.model").path)
    if how == "large":
        changes["model"] = {"vocab_size": 64}
    if how == "eod":
        changes["data"]["eod"] = 299
    refused(config(tmp_path, **changes), message)


# ---- what holds less than was asked for --------------------------------------------------------------------------------


def test_a_short_validation_set_is_said_everywhere(tmp_path: Path) -> None:
    tiny.mapping(tmp_path)
    sets = [{"name": "old", "role": "upstream", "tokens": 2_000_000, "sources": [{"path": str(tmp_path / "old")}]}]
    made = config(tmp_path, data={"validation": sets})
    note = "tokens, not on the 2,000,000 asked for: its sources hold no more"
    assert note in dry(made) and note in run(made)
    (start,) = tiny.events(tmp_path / "tiny", "start")
    assert any(note in each for each in start["notes"])
    from megarewarm.report.pages.run_page import report

    page = report([tmp_path / "tiny"], tmp_path / "report").read_text()
    assert "Notes at the start" in page and "2,000,000" in page
    assert "torch " + start["versions"]["torch"] in page and "megarewarm " + start["versions"]["megarewarm"] in page
    moving = dry(
        config(
            tmp_path,
            data={"validation": [sets[0] | {"sources": [{"path": str(tmp_path / "old"), "max_epochs": None}]}]},
            evaluation={"windows": "moving"},
            folder=str(tmp_path / "moving"),
        )
    )
    assert "reads its sources" in moving


def test_what_is_logged_far_below_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that can't be written: said in the run's notes, not to a handler that nobody has installed."""
    tiny.mapping(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("megarewarm.data.files.shuffled_documents.CACHED_FROM", 0, raising=False)
    run(config(tmp_path, data={"order": "neox"}))
    (start,) = tiny.events(tmp_path / "tiny", "start")
    import megarewarm.data.order.array_cache as array_cache
    from megarewarm.training.output.notes import logged_notes

    with logged_notes() as notes:
        array_cache.cached({"a": 1}, lambda: {"x": np.zeros(1)})
        array_cache.cached({"a": 1}, lambda: {"x": np.zeros(1)})
    assert len(notes) == 1 and "can't keep the order of samples" in notes[0]
    assert isinstance(start["notes"], list)


def test_a_chain_of_two_tokenizers_is_refused_before_its_first_run(two: tuple[Path, Path, Path]) -> None:
    place, a, b = two
    said(place / "old", a)
    said(place / "new", b)
    base = config(place).model_dump(mode="json", by_alias=True, exclude_unset=True)
    data = {name: {"train": [{"path": str(place / name), "max_epochs": None}], "validation": []} for name in ("old", "new")}
    del base["name"], base["folder"]
    stages = [
        {"name": "first", "data": data["old"]},
        {"name": "second", "model": None, "data": data["new"], "start": {"from": "${folder}/first", "intent": "rewarm"}},
    ]
    mapping = {"experiment": "chain", "folder": str(place / "chain"), "base": base, "runs": stages}
    experiment = load_experiment(mapping, {}, quick=False)
    for act in (
        lambda: show_experiment(experiment, tiny.quiet(), ALONE_LAUNCH),
        lambda: run_experiment(experiment, ALONE, tiny.quiet()),
    ):
        with pytest.raises(UserError, match=r"old\.bin was made with .*, .*new\.bin was made|new\.bin was .*, .*old\.bin was"):
            act()
    assert not list(place.glob("chain/*/checkpoints"))


def test_what_is_not_checked_of_large_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path)
    train(run, ALONE, tiny.quiet())
    (start,) = tiny.events(Path(run.run_folder), "start")
    assert not any("only samples" in note for note in start["notes"])
    monkeypatch.setattr(texts, "SCAN_WHOLE", 1)
    again = run.model_copy(update={"name": "again", "folder": str(tmp_path / "again")})
    train(again, ALONE, tiny.quiet())
    (start,) = tiny.events(tmp_path / "again", "start")
    (said,) = [note for note in start["notes"] if "of their ids only samples are checked now" in note]
    assert run.data.train[0].path.removesuffix(".bin") in said
