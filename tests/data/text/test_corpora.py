"""Corpora of an experiment: disjoint parts, the same everywhere, prepared once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megarewarm.data.text import corpora
from megarewarm.data.text.continuations import Continuations
from megarewarm.data.text.corpora import CODE, PROSE, InstalledText, prepare_corpora
from megarewarm.data.text.tokenizers import load_tokenizer
from megarewarm.errors import UserError


def write_stories(path: Path, count: int, start: int = 0) -> Path:
    with path.open("w") as file:
        for i in range(start, start + count):
            file.write(json.dumps({"text": f"Story {i}: " + " ".join(f"word{(i * 7 + k) % 97}" for k in range(60))}) + "\n")
    return path


def texts(folder: Path, name: str, part: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "text" / f"{name}_{part}.jsonl").read_text().splitlines()]


def prepare_stories(folder: Path, source: Path, **options: Any) -> corpora.Prepared:
    return prepare_corpora(
        folder, {"stories": ([source], None)}, vocab_size=300, train_on="stories", validation_fraction=0.2, **options
    )


def test_the_parts_are_disjoint_complete_and_without_duplicates(tmp_path: Path) -> None:
    source = write_stories(tmp_path / "a.jsonl", 200)
    source.write_text(source.read_text() * 2)  # every document twice
    prepared = prepare_stories(tmp_path / "out", source)
    train, validation = texts(tmp_path / "out", "stories", "train"), texts(tmp_path / "out", "stories", "validation")
    assert len(set(train) | set(validation)) == len(train) + len(validation) == 200
    assert 20 <= len(validation) <= 60, "about a fifth"
    tokenizer = load_tokenizer(prepared.tokenizer)
    expected = sum(len(ids) + 1 for ids in tokenizer.encode_batch(train))
    assert prepared.outputs["stories_train"].tokens == expected


def test_a_document_stays_in_its_part_when_others_are_added(tmp_path: Path) -> None:
    prepare_stories(tmp_path / "few", write_stories(tmp_path / "a.jsonl", 100))
    prepare_stories(tmp_path / "more", write_stories(tmp_path / "b.jsonl", 150))
    assert set(texts(tmp_path / "few", "stories", "validation")) <= set(texts(tmp_path / "more", "stories", "validation"))
    assert set(texts(tmp_path / "few", "stories", "train")) <= set(texts(tmp_path / "more", "stories", "train"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_stands_is_kept_and_what_is_missing_is_made_again(tmp_path: Path) -> None:
    source = write_stories(tmp_path / "a.jsonl", 100)
    out = tmp_path / "out"
    prepare_stories(out, source)
    before = snapshot(out)
    done: list[str] = []
    prepare_stories(out, source, progress=lambda what, *_: done.append(what))
    assert snapshot(out) == before and not done
    (out / "stories_train.bin").unlink()
    (out / "stories_validation.bin.123.part").write_bytes(b"left by a killed run")
    prepare_stories(out, source, progress=lambda what, *_: done.append(what))
    after = snapshot(out)
    assert {what.split()[-1] for what in done} == {"stories_train"} and "tokenising stories_train" in done
    assert after[str(out / "stories_train.bin")][1] == before[str(out / "stories_train.bin")][1]


def test_changed_input_is_read_again(tmp_path: Path) -> None:
    source = write_stories(tmp_path / "a.jsonl", 100)
    first = prepare_stories(tmp_path / "out", source)
    write_stories(source, 120)
    second = prepare_stories(tmp_path / "out", source)
    assert second.outputs["stories_train"].documents > first.outputs["stories_train"].documents


def test_installed_text_divides_packages_into_prose_and_code(tmp_path: Path) -> None:
    sentence = "A sentence that explains what this function is for. " * 6
    for package in ("one", "two"):
        (tmp_path / package / "tests").mkdir(parents=True)
        for i in range(5):
            body = f'def f{i}():\n    """{sentence}{package} {i}"""\n' + "".join(f"    x{k} = {i} + {k}\n" for k in range(40))
            (tmp_path / package / f"m{i}.py").write_text(body)
        (tmp_path / package / "tests" / "test_m.py").write_text("secret = 1\n" * 100)
    (tmp_path / "two" / "broken.py").write_text("def (:\n")
    scan = InstalledText({"one": tmp_path / "one", "two": tmp_path / "two"})
    found = [(kind, text) for kind, text in scan if sentence[:20] in text or " = " in text]
    prose = [text for kind, text in found if kind == PROSE and sentence[:20] in text and len(text) < 400]
    code = [text for kind, text in found if kind == CODE]
    assert len(prose) == 10 and len(code) == 10 and scan.unparsed == 1
    assert not any(sentence[:20] in text for text in code) and not any("secret" in text for _, text in found)


def test_task_files_are_made_of_the_held_out_text(tmp_path: Path) -> None:
    source, out = write_stories(tmp_path / "a.jsonl", 200), tmp_path / "out"
    asked = Continuations(items=10, choices=3, context_bytes=80, continuation_bytes=30, seed=3)
    prepare_stories(out, source, tasks={"go_on": ("stories", asked)})
    held_out = texts(out, "stories", "validation")
    for item in map(json.loads, (out / "go_on.jsonl").read_text().splitlines()):
        assert all(any(choice in text for text in held_out) for choice in item["choices"])
        assert any(item["context"] + item["choices"][item["answer"]] in text for text in held_out)
    before = snapshot(out)
    prepare_stories(out, source, tasks={"go_on": ("stories", asked)})
    assert snapshot(out) == before
    prepare_stories(out, source, tasks={"go_on": ("stories", dataclasses.replace(asked, seed=4))})
    assert (out / "go_on.jsonl").read_bytes() != before[str(out / "go_on.jsonl")][1]
    with pytest.raises(UserError, match="task 'x': from 'story', which is no corpus, did you mean 'stories'"):
        prepare_stories(out, source, tasks={"x": ("story", asked)})


def test_limits_and_bad_requests(tmp_path: Path) -> None:
    source = write_stories(tmp_path / "a.jsonl", 200)
    prepared = prepare_corpora(tmp_path / "out", {"s": ([source], 0.02)}, vocab_size=300, train_on="s", validation_fraction=0.2)
    assert 15_000 < sum(counts.bytes for counts in prepared.outputs.values()) <= 20_000
    refused: list[tuple[dict[str, Any], str]] = [
        ({"s": (PROSE + "x", None)}, r"neither installed_prose nor installed_code.*did you mean"),
        ({"a b": ([source], None)}, "letters, digits"),
        ({"other": ([source], None)}, "trains on 's', which is no corpus"),
        ({"s": ([tmp_path / "missing.txt"], None)}, "does not exist"),
    ]
    for wanted, message in refused:
        with pytest.raises(UserError, match=message):
            prepare_corpora(tmp_path / "bad", wanted, vocab_size=300, train_on="a b" if "a b" in wanted else "s")
    (tmp_path / "one.txt").write_text("a single document " * 50)
    with pytest.raises(UserError, match=r"none of its 1 documents .* falls to"):
        prepare_corpora(tmp_path / "single", {"s": ([tmp_path / "one.txt"], None)}, vocab_size=300, train_on="s")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    prepare_stories(tmp_path / "out", write_stories(tmp_path / "a.jsonl", 60))
    (tmp_path / "out" / "prepared.json").write_text("{")
    with pytest.raises(UserError, match=r"prepared\.json is damaged"):
        prepare_stories(tmp_path / "out", tmp_path / "a.jsonl")
