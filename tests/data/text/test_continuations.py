"""Task files made of documents: what each item holds, found again in the documents; and the command."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.cli import make_task as command
from megarewarm.data.tasks.items import read_tasks
from megarewarm.data.text.continuations import Continuations, make_task
from megarewarm.errors import UserError
from megarewarm.spelling import counted

ASKED = Continuations(items=20, choices=4, context_bytes=30, continuation_bytes=12, seed=1)


def documents(count: int, alphabet: str = "abcdefgh", words: int = 30) -> list[str]:
    source = random.Random(count)
    return [" ".join("".join(source.choices(alphabet, k=source.randint(1, 9))) for _ in range(words)) for _ in range(count)]


def items(texts: list[str], asked: Continuations = ASKED) -> list[dict[str, Any]]:
    return [json.loads(line) for line in make_task(texts, asked, "x").lines.splitlines()]


def check(found: list[dict[str, Any]], texts: list[str], asked: Continuations) -> None:
    """Each right choice is what a document says after the context, the others are of other documents and of its size."""
    for item in found:
        right = item["choices"].pop(item["answer"])
        own = [number for number, text in enumerate(texts) if item["context"] + right in text]
        size = len(right.encode())
        assert asked.continuation_bytes - 3 <= size <= asked.continuation_bytes
        assert 0 < len(item["context"].encode()) <= asked.context_bytes
        assert len(item["choices"]) == asked.choices - 1 == len({*item["choices"], right}) - 1
        for wrong in item["choices"]:
            assert len(wrong.encode()) == size
            assert any(wrong in text for number, text in enumerate(texts) if own != [number])
            assert wrong[0].isspace() == right[0].isspace()
        assert own
    assert len({item["context"] for item in found}) == len(found) == asked.items


def test_items_are_what_documents_say() -> None:
    texts = documents(40)
    found = items(texts)
    assert {item["answer"] for item in found} == {0, 1, 2, 3}
    starts = [item["context"] for item in found]
    assert all(f" {start}" in text or text.startswith(start) for start in starts for text in texts if start in text)
    assert all(choice[0] == " " and choice[1] != " " for item in found for choice in item["choices"])
    check(found, texts, ASKED)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["äöüß", "中文字符测试", "aé中😀", "abcé"]), st.integers(4, 25), st.booleans())
def test_letters_of_several_bytes(alphabet: str, size: int, spaced: bool) -> None:
    asked = Continuations(items=5, choices=3, context_bytes=20, continuation_bytes=size, seed=7)
    texts = documents(30, alphabet)
    texts = texts if spaced else ["".join(text.split()) * 3 for text in texts]
    check(items(texts, asked), texts, asked)


def test_the_same_documents_and_seed_give_the_same_file() -> None:
    texts = documents(300)
    made = make_task(texts, ASKED, "x")
    again = make_task([*reversed(texts), *texts[:5]], ASKED, "x")
    assert made == again and made.documents == 300
    assert make_task(texts, Continuations(20, 4, 30, 12, seed=2), "x").lines != made.lines


def test_too_few_documents_are_refused() -> None:
    texts = [*documents(19), "short"]
    with pytest.raises(UserError, match=r"x: 20 items of 4 choices need as many different documents .* 19 .* of 20,"):
        items(texts)
    alike = [f"{number:0>30} the same endings" for number in range(30)]  # two continuations for all
    with pytest.raises(UserError, match="30 such documents of 30, which give 0"):
        items(alike)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"choices": 1}, "choices 1: .* at least 2"),
        ({"continuation_bytes": 3}, "continuation_bytes 3: .* at least 4"),
    ],
)
def test_what_makes_no_task_is_refused(changes: dict[str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Continuations(**{"items": 5, "choices": 4, "context_bytes": 30, "continuation_bytes": 12, "seed": 1, **changes})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "held_out.jsonl", tmp_path / "prose.jsonl"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents(30)) + "{\n")
    words = [str(source), "--text-key", "body", "--items", "9", "--context-bytes", "30", "--continuation-bytes", "12"]
    command.main([*words, "--output", str(output)])
    told = capsys.readouterr()
    assert told.out.startswith(f"{output}: 9 items of 4 choices, 25.0 % by guessing; 30 of 30") and "1 broken" in told.err
    (task,) = read_tasks([str(output)])
    assert task.name == "prose" and [len(item.pairs) for item in task.items] == [4] * 9
    with pytest.raises(SystemExit, match="2"):
        command.main([*words, "--output", str(output)])
    with pytest.raises(SystemExit, match="2"):
        command.main([*words, "--output", str(tmp_path / "prose.txt")])


def test_the_command_counts_one_item_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(6)) + "{\n")
    command.main([str(tmp_path / "a.jsonl"), "--items", "1", "--context-bytes", "30", "--output", str(tmp_path / "task.jsonl")])
    said = capsys.readouterr()
    assert "task.jsonl: 1 item of 4 choices" in said.out and "left out: 1 broken record, the first" in said.err
    assert [counted(number, "item") for number in (0, 1, 2, 1000)] == ["0 items", "1 item", "2 items", "1,000 items"]
