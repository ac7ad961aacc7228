"""Tests on tasks: the numbers that transformers and lm-eval give of the exported model, in every layout; and the training
stays as it is without them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megarewarm.api import load_model
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.token_file import TokenFileWriter
from megarewarm.data.tasks.items import Item, read_tasks
from megarewarm.data.tasks.score import from_text, transitions
from megarewarm.data.text.tokenizers import train_bpe
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.report.live.frame import frame
from megarewarm.report.live.watch import Watch
from megarewarm.report.pages.run_page import report
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.stopping import stop_amid
from tests.support.tiny import config, events, printed, quiet
from tests.training.test_resume import losses, tensors_of

ALONE = Ranks(0, 1, torch.device("cpu"))
WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "one", "dog", "ran"),
    *("to", "his", "old", "house", "by", "the", "sea", "where", "three", "men", "ate", "fish"),
]
POSITIONS = 48


def _sentence(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


def world(place: Path, items: int = 12) -> Path:
    """A tokenizer, a token file and a task file in ``place``; returns the task file. Some items have contexts that end in
    spaces, or none, and letters of several bytes; some are continuations alone."""
    random = np.random.default_rng(0)
    texts = [_sentence(random, 60) + ". Grüße, é!" for _ in range(60)]
    tokenizer = train_bpe(texts, 300, place / "tokenizer.json")
    for name in ("old", "new"):
        with TokenFileWriter(place / name, np.uint16) as writer:
            for ids in tokenizer.encode_batch(texts):
                writer.add_document(ids)
    lines: list[dict[str, Any]] = []
    for number in range(items):
        context = ("", "the cat sat on", "the dog  ", "Grüße, é! the", "a mat and\n")[number % 5]
        choices = [
            " " * (number % 3 == 0) + _sentence(random, int(random.integers(1, 5))) + "é" * (i == 1)
            for i in range(2 + number % 3)
        ]
        lines.append({"context": context, "choices": choices, "answer": int(random.integers(len(choices)))})
    lines += [{"context": "the cat sat", "continuation": f" {word}"} for word in ("on", "the", "fish")]
    path = place / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_config(place: Path, **changes: Any) -> RunConfig:
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300, "max_positions": POSITIONS}
    base: dict[str, Any] = {
        "model": model,
        "data": {"tokenizer": str(place / "tokenizer.json")},
        "evaluation": {"tasks": [str(place / "words.jsonl")], "tasks_every": "50%"},
        "training": {"budget": 10},
    }
    return config(
        place,
        **{
            key: {**base.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in {**base, **changes}.items()
        },
    )


def task_events(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in events(folder, "task")]


def by_hand(folder: Path, path: Path, truncate: int = POSITIONS) -> tuple[list[list[float]], list[bool]]:
    """(log-likelihoods of each item's choices, whether the answer is what the model would say) from transformers, a choice at
    a time, cut as lm-eval cuts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found, greedy = [], []
    for line in map(json.loads, path.read_text().splitlines()):
        choices = line.get("choices", [line.get("continuation")])
        each, said = [], []
        for choice in choices:
            context = line["context"]
            spaces = len(context) - len(context.rstrip())
            if spaces:
                context, choice = context[:-spaces], context[-spaces:] + choice
            before = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
            after = tokenizer.encode(context + choice)[len(before) :] if context else tokenizer.encode(choice)
            ids = torch.tensor([(before + after)[-(truncate + 1) :]])
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits[0, -len(after) :].log_softmax(-1)
            wanted = torch.tensor(after)
            each.append(float(logits.gather(1, wanted[:, None]).sum()))
            said.append(bool((logits.argmax(-1) == wanted).all()))
        found.append(each)
        greedy.append(said[line.get("answer", 0)])
    return found, greedy


def test_scores_are_those_of_the_exported_model(tmp_path: Path) -> None:
    path = world(tmp_path)
    outcome = train(run_config(tmp_path, export={"huggingface": True}, evaluation={"every": 5}), ALONE, quiet())
    found = task_events(outcome.folder)
    assert [(line["step"], line["name"]) for line in found] == [(0, "words"), (5, "words"), (10, "words")]
    likelihoods, greedy = by_hand(outcome.folder / "huggingface", path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    right, normalised, bits, size = [], [], 0.0, 0
    for line, own, said in zip(lines, likelihoods, greedy, strict=True):
        texts = line.get("choices", [line.get("continuation")])
        lengths = [len(text.encode()) for text in texts]
        answer = line.get("answer", 0)
        right.append(int(np.argmax(own)) == answer if len(own) > 1 else said)
        normalised.append(int(np.argmax(np.array(own) / lengths)) == answer if len(own) > 1 else said)
        bits, size = bits - own[answer] / np.log(2), size + lengths[answer]
    last = found[-1]
    assert last["right"] == "".join(str(int(each)) for each in right)
    assert last["right_bytes"] == "".join(str(int(each)) for each in normalised)
    assert last["accuracy"] == pytest.approx(np.mean(right)) and last["accuracy_bytes"] == pytest.approx(np.mean(normalised))
    assert last["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    first = found[0]["right"]
    again, _ = load_model(outcome.folder, device="cpu").test(str(path))
    assert again["words"].right.tolist() == [each == "1" for each in last["right"]]
    assert again["words"].bits_per_byte == pytest.approx(last["bits_per_byte"], rel=1e-6)
    page = report([outcome.folder], tmp_path / "report").read_text()
    lost = round(last["lost"] * last["items"])
    assert "<h2>Tasks</h2>" in page and f"<td>{lost}</td>" in page and (tmp_path / "report/abilities.png").is_file()
    told = "\n".join(line.plain for line in frame(Watch(outcome.folder).look(), 80))
    assert f"words {100 * last['accuracy']:.1f} %, lost {lost}, won" in told
    assert last["lost"] == pytest.approx(np.mean([a == "1" and b == "0" for a, b in zip(first, last["right"], strict=True)]))
    assert found[0]["lost"] == 0 == found[0]["won"]


def test_a_context_that_is_cut_is_counted_once_not_for_each_choice(tmp_path: Path) -> None:
    path = world(tmp_path, items=20)
    long = {"context": "the cat saw " * 40, "choices": [" fish", " one old dog"], "answer": 0}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    console = Console(file=io.StringIO(), width=500)
    train(run_config(tmp_path, evaluation={"tasks": [str(path)], "tasks_truncate": True}), ALONE, console)
    assert "the beginning of 1 context is dropped" in console.file.getvalue()  # type: ignore[attr-defined]


def test_lm_eval_gives_the_same_numbers(tmp_path: Path) -> None:
    """Also of contexts that are too long, whose beginning both drop."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    path = world(tmp_path, items=20)
    long = {"context": "the cat saw " * 40, "choices": [" fish", " one old dog"], "answer": 0}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    changes = {"tasks": [str(path)], "tasks_truncate": True}
    outcome = train(run_config(tmp_path, export={"huggingface": True}, evaluation=changes), ALONE, quiet())
    (task,) = read_tasks([str(path)])
    harness = HFLM(pretrained=str(outcome.folder / "huggingface"), device="cpu", dtype="float32", batch_size=3)
    pairs = [(item, pair) for item in task.items for pair in item.pairs]
    asked = [Instance("loglikelihood", {}, pair, i) for i, (_, pair) in enumerate(pairs)]
    answers = iter(harness.loglikelihood(asked))
    right, normalised, bits, size = 0, 0, 0.0, 0
    for item in task.items:
        own, greedy = zip(*(next(answers) for _ in item.pairs), strict=True)
        best = int(np.argmax(own)) == item.answer if len(own) > 1 else greedy[0]
        right += best
        normalised += int(np.argmax(np.array(own) / item.sizes)) == item.answer if len(own) > 1 else best
        bits, size = bits - own[item.answer] / np.log(2), size + item.sizes[item.answer]
    last, count = task_events(outcome.folder)[-1], len(task.items)
    assert last["accuracy"] == pytest.approx(right / count, abs=1e-4)
    assert last["accuracy_bytes"] == pytest.approx(normalised / count, abs=1e-4)
    assert last["bits_per_byte"] == pytest.approx(bits / size, abs=1e-4)


@pytest.mark.slow
def test_training_does_not_notice_and_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world(tmp_path)
    plain = train(run_config(tmp_path, folder=str(tmp_path / "plain"), evaluation={"tasks": []}), ALONE, quiet())
    whole = train(run_config(tmp_path, folder=str(tmp_path / "whole")), ALONE, quiet())
    stop_amid(monkeypatch, 3, 7)
    parts = run_config(tmp_path, folder=str(tmp_path / "parts"))
    while train(parts, ALONE, quiet()).exit_code:
        pass
    assert losses(plain.folder) == losses(whole.folder) == losses(tmp_path / "parts")
    end = tensors_of(plain.folder / "checkpoints/step_10")
    assert all(torch.equal(value, tensors_of(whole.folder / "checkpoints/step_10")[name]) for name, value in end.items())
    assert task_events(whole.folder) == task_events(tmp_path / "parts")


def _trained(ranks: Ranks, place: str, name: str, parallel: dict[str, Any], training: dict[str, Any]) -> None:
    train(run_config(Path(place), folder=f"{place}/{name}", parallel=parallel, training=training), ranks, quiet())


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {}),
        pytest.param(2, {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2, "tensor": 2, "sequence": False}, marks=pytest.mark.slow),
        pytest.param(4, {"sharding": "zero3"}, marks=pytest.mark.slow),
    ],
)
def test_every_layout_gives_the_same(tmp_path: Path, ranks: int, parallel: dict[str, Any]) -> None:
    world(tmp_path)
    alone = train(run_config(tmp_path, folder=str(tmp_path / "alone"), training={"budget": 4}), ALONE, quiet())
    run_ranks(_trained, ranks, str(tmp_path), "many", parallel, {"budget": 4, "micro_batch": 2 if ranks > 2 else 4})
    expected, found = task_events(alone.folder), task_events(tmp_path / "many")
    # before the first step the weights are the same, and where a rank computes whole rows so are all bits
    if not parallel:
        assert found[0] == expected[0]
    for line, other in zip(expected, found, strict=True):
        assert other["right"] == line["right"] and other["right_bytes"] == line["right_bytes"]
        assert other["bits_per_byte"] == pytest.approx(line["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"choices": [" a", " b"], "answer": 0}, "line 2: no 'context'"),
        ({"context": "a", "choices": [" a", " b"]}, "line 2: no 'answer'"),
        ({"context": "a", "choices": [" a", " b"], "answer": 2}, "line 2: answer 2: expected 0 to 1"),
        ({"context": "a", "choices": [" a", " b"], "answer": True}, "line 2: answer True"),
        ({"context": "a", "choices": [" a"], "answer": 0}, "line 2: 1 choice; give at least two"),
        ({"context": "a", "choices": [" a", ""], "answer": 0}, "line 2: 'choices': expected"),
        (
            {"context": "a", "choices": [" b", " a", " b"], "answer": 2},
            "line 2: choices 0 and 2 are equal, and one is the answer",
        ),
        ({"context": 3, "continuation": " a"}, "line 2: 'context' is 3"),
        ({"context": "a", "continuation": " a", "choices": []}, "line 2: both"),
        ({"context": "the cat saw " * 40, "continuation": " a"}, "tokens with its context, the model has 48 positions"),
        ({"context": "a", "continuation": " the cat saw" * 40}, "line 2: the continuation has"),
        ({"context": "a", "continuation": "a", "delimeter": " "}, "line 2: unknown key 'delimeter', did you mean 'delimiter'"),
        (
            {"context": "a", "choices": [" a", " b"], "answer": 0, "label": 7},
            "line 2: unknown key 'label'; a line has",
        ),
        ({"context": "a", "continuation": " a", "answer": 0}, "line 2: unknown key 'answer'; a line has context, continuation"),
        ("{", "line 2: not JSON"),
        ([1], "line 2: expected an object"),
        (None, "no items"),
    ],
)
def test_bad_task_files_are_refused_before_training(tmp_path: Path, line: Any, told: str) -> None:
    path = world(tmp_path)
    text = "" if line is None else "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n"
    path.write_text(text)
    with pytest.raises(UserError, match=told.replace("(", r"\(")) as raised:
        train(run_config(tmp_path), ALONE, quiet())
    assert str(path) in str(raised.value) and not (tmp_path / "tiny" / "metrics.jsonl").exists()


def _item_of(choices: int) -> Item:
    return Item(1, (("a", " b"),) * choices, (2,) * choices)


def test_changes_by_chance_are_those_of_the_paper() -> None:
    """Against the formula in create_csv.py of github.com/post-forget/post-forget, and against guessing."""
    before, now = from_text("1111100000"), from_text("1100011000")
    found = transitions([_item_of(5)] * 10, before, now)
    acc_before, acc_after, num_choices = 0.5, 0.4, 5
    adjustment_term = ((1 - acc_before) * (1 - acc_after)) / (num_choices - 1)
    assert (found.lost, found.won) == (0.3, 0.2) and found.by_chance == pytest.approx(adjustment_term)
    assert found.lost_beyond == pytest.approx(0.3 - adjustment_term)
    random, count = np.random.default_rng(0), 100_000
    choices = np.repeat([2, 4, 1], count)
    before, now = (random.random(3 * count) < np.where(choices > 1, 1 / choices, 0.5) for _ in range(2))
    guessed = transitions([_item_of(int(k)) for k in choices], before, now)
    assert guessed.by_chance == pytest.approx((1 / 4 + 3 / 16) / 3, abs=2e-3)  # a continuation alone is no guess
    few = choices > 1
    assert guessed.by_chance == pytest.approx((before & ~now)[few].sum() / len(few), abs=2e-3)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    path = world(tmp_path)
    other = tmp_path / "sub" / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="both called 'words'"):
        read_tasks([str(path), str(other)])


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    world(tmp_path)
    with pytest.raises(UserError, match=r"evaluation.tasks: no tokenizer is known"):
        train(run_config(tmp_path, data={"tokenizer": None}), ALONE, quiet())


def test_a_complete_run_says_which_tasks_it_was_not_tested_on(tmp_path: Path) -> None:
    path = world(tmp_path)
    other = shutil.copy(path, tmp_path / "other.jsonl")
    first, again, console = quiet(), quiet(), quiet()
    train(run_config(tmp_path, training={"budget": 2}), ALONE, first)
    train(run_config(tmp_path, training={"budget": 2}), ALONE, again)
    assert "already complete" in printed(again) and "not tested" not in printed(again)
    train(run_config(tmp_path, training={"budget": 2}, evaluation={"tasks": [str(path), str(other)]}), ALONE, console)
    said = " ".join(printed(console).split())
    assert f"evaluation.tasks has {other}, on which the run was not tested" in said and "--tasks FILE" in said
