"""Finished files get their names: all of them or, after a crash in between, all of them by the next run with --resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarewarm.data.text.preprocess.shard import Counts
from megarewarm.files import move, write_whole

_PLAN = "publication.json"


@dataclass(frozen=True)
class Written:
    """A finished output: its prefix, what is in it, and what was left out of the input (of all parts together)."""

    prefix: Path
    counts: Counts
    skipped: dict[str, int]
    examples: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Whole:
    """A finished output in the work folder: its part of the split (or ""), its files, and what its manifest is to say."""

    part: str
    data: Path
    index: Path | None
    manifest: dict[str, Any]


def prepare(folder: Path, outputs: Sequence[Whole]) -> None:
    """Write the manifests and what gets which name into the work folder."""
    plan = []
    for output in outputs:
        path = folder / f"whole{'.' * bool(output.part)}{output.part}.manifest"
        # half surrogate pairs, of a key or a file's name, are no text: they are written as JSON's own escapes
        text = json.dumps(output.manifest, indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text.encode("utf-8", "backslashreplace"))
        files = {"bin": output.data.name, "json": path.name} | ({"idx": output.index.name} if output.index else {})
        plan.append({"part": output.part, "files": files})
    write_whole(folder / _PLAN, json.dumps(plan).encode())


def is_prepared(folder: Path) -> bool:
    """Whether ``prepare`` was completed there."""
    return (folder / _PLAN).is_file()


def publish(folder: Path, prefix_of: Callable[[str], str], notes: Sequence[str]) -> list[Written]:
    """Carry out what ``prepare`` has written, including the rest of an interrupted attempt; the folder is useless
    afterwards. ``prefix_of``: the output's prefix for a part of the split."""
    plan = [(prefix_of(item["part"]), item["files"]) for item in json.loads((folder / _PLAN).read_bytes())]
    # All that is old goes first: a crash leaves outputs that are not there yet, never old ones beside new ones. What is new of
    # them has left the folder.
    for prefix, files in plan:
        for suffix in ("json", "idx", "bin"):
            if suffix not in files or (folder / files[suffix]).exists():
                Path(f"{prefix}.{suffix}").unlink(missing_ok=True)
    for prefix, files in plan:
        for suffix in ("bin", "idx", "json"):
            if suffix in files and (folder / files[suffix]).exists():
                move(folder / files[suffix], Path(f"{prefix}.{suffix}"))
    return [written(prefix, notes) for prefix, _ in plan]


def written(prefix: str, notes: Sequence[str]) -> Written:
    """The contents of an output's manifest."""
    said = json.loads(Path(f"{prefix}.json").read_bytes())
    counts = Counts(said["documents"], said["tokens"], said["bytes"])
    return Written(Path(prefix), counts, said["skipped"], said["examples"], list(notes))
