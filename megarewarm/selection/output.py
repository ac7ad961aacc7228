"""What a selection writes: token files or lists of documents, its manifest, and a record of every dropped document.

Everything is made in the work folder and then gets its name. A second start after a kill in between replaces what the first one
has published, and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from megarewarm import __version__
from megarewarm.data.files.document_table import DocumentTable, table_path, write_table
from megarewarm.data.files.file_identity import identity_of
from megarewarm.data.files.manifest import manifest_of
from megarewarm.data.files.token_file import TokenFile, TokenFileWriter
from megarewarm.errors import UserError
from megarewarm.files import move, sha256, write_whole
from megarewarm.selection.desk import ShowProgress
from megarewarm.selection.pipeline import Selection

FORMAT = "megarewarm.selection.1"
_LIBRARIES = ("numpy", "rensa", "scikit-learn", "torch")
_PUBLISHED = "published.json"


@dataclass(frozen=True)
class Destination:
    """Where a selection goes: ``output`` is a prefix for one input, a folder for several; ``lists``: as lists of documents."""

    output: Path
    names: tuple[str, ...]
    lists: bool
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """The folder for what is not finished."""
        return Path(f"{self.output}.work")

    @property
    def manifest(self) -> Path:
        return Path(f"{self.output}.selection.json")

    @property
    def dropped(self) -> Path:
        return Path(f"{self.output}.dropped.safetensors")

    @property
    def page(self) -> Path:
        return Path(f"{self.output}.selection.html")

    def prefix(self, index: int) -> Path:
        """Of the files that input ``index`` becomes."""
        return self.output if len(self.names) == 1 else self.output / self.names[index]

    def files(self) -> list[Path]:
        """All that will be written."""
        mine = self._named((".safetensors",) if self.lists else (".bin", ".idx", ".json"))
        return [*mine, self.dropped, self.manifest]

    def _named(self, suffixes: Sequence[str]) -> list[Path]:
        return [Path(f"{self.prefix(index)}{suffix}") for index in range(len(self.names)) for suffix in suffixes]

    def check(self, inputs: Sequence[TokenFile]) -> None:
        """Raise ``UserError`` where the output is an input, or exists and may not be replaced."""
        if not self.output.name:
            raise UserError(f"--output '{self.output}': expected a name, as data/selected")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"two inputs are called {twice}, and each keeps its name in {self.output}: rename one of them")
        places = {path.resolve() for path in self.files()}
        for file in inputs:
            if file.path.resolve() in places:
                raise UserError(f"--output {self.output}: is the input {file.path}; nothing is changed in place, name another")
        other = (".bin",) if self.lists else (".safetensors",)
        for path in self._named(other):
            if path.exists() and path.resolve() not in {file.path.resolve() for file in inputs}:
                raise UserError(f"{path} exists and would stay beside the new selection: remove it, or choose another name")
        ours = self._published()
        for path in self.files():
            if path.exists() and not self.overwrite and str(path) not in ours:
                raise UserError(f"{path} exists: remove it, choose another name, or add --overwrite")

    def _published(self) -> list[str]:
        try:
            return list(json.loads((self.work / _PUBLISHED).read_bytes()))
        except (OSError, ValueError, TypeError):
            return []


def write(selection: Selection, destination: Destination, show: ShowProgress) -> list[Path]:
    """Write all of it, and remove the work folder. Returns the new files. Raises ``UserError`` as ``check``."""
    corpus = selection.corpus
    destination.check(corpus.files)
    new = destination.work / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    outputs = []
    for index, file in enumerate(corpus.files):
        numbers = corpus.members(selection.kept, index) - int(corpus.firsts[index])
        if destination.lists:
            about = dict([("name", "selection"), *((taken.step.name, taken.step.words) for taken in selection.taken)])
            write_table(new / str(index), DocumentTable("list", numbers, about), file)
        else:
            _write_tokens(selection, index, new / str(index), destination, show)
        outputs.append(
            {
                "path": str(table_path(destination.prefix(index)) if destination.lists else destination.prefix(index)),
                "documents": len(numbers),
                "tokens": int(corpus.sizes[numbers + int(corpus.firsts[index])].sum()),
            }
        )
    write_whole(new / "dropped", _dropped(selection))
    write_whole(new / "manifest", (json.dumps(_said(selection, outputs), indent=1) + "\n").encode())
    _publish(new, destination)
    shutil.rmtree(destination.work)
    return destination.files()


def _publish(new: Path, destination: Destination) -> None:
    files = destination.files()
    write_whole(destination.work / _PUBLISHED, json.dumps([str(path) for path in files]).encode())
    for path in files:  # old ones go first: never old files beside new ones
        path.unlink(missing_ok=True)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(len(destination.names)):
        for suffix in (".safetensors",) if destination.lists else (".bin", ".idx", ".json"):
            move(new / f"{index}{suffix}", Path(f"{destination.prefix(index)}{suffix}"))
    move(new / "dropped", destination.dropped)
    move(new / "manifest", destination.manifest)


def _write_tokens(selection: Selection, index: int, prefix: Path, destination: Destination, show: ShowProgress) -> None:
    """The kept documents of a file as a token file, with a manifest that carries over what its manifest says."""
    corpus, file = selection.corpus, selection.corpus.files[index]
    kept = corpus.members(selection.kept, index)
    total, done = corpus.bytes_of(kept), 0
    narrow = file.dtype.itemsize <= 2 and file.dtype.kind == "u"
    with TokenFileWriter(prefix, np.uint16 if narrow else np.int32) as writer:
        for block in corpus.blocks(kept):
            writer.add_documents(block.ids, corpus.sizes[block.documents])
            done += block.ids.nbytes
            show(f"writing {destination.names[index]}", done, total)
        counts = writer.num_documents, writer.num_tokens
    before = manifest_of(file.path) or {}
    said: dict[str, Any] = {
        "documents": counts[0],
        "tokens": counts[1],
        "dtype": writer.dtype.name,
        **{key: before[key] for key in ("tokenizer", "eod") if key in before},
        "selected": {"from": str(file.path), "manifest": destination.manifest.name},
        "sha256": {suffix: sha256(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")},
    }
    write_whole(Path(f"{prefix}.json"), (json.dumps(said, indent=2) + "\n").encode())


def _dropped(selection: Selection) -> bytes:
    """The dropped documents, ascending: number through all files, step, the kept document of which it is a duplicate or -1,
    and the score that decided."""
    taken = selection.taken
    documents = np.concatenate([np.empty(0, np.int64), *(each.chosen.dropped for each in taken)])
    order = np.argsort(documents)
    steps = np.repeat(np.arange(len(taken), dtype=np.uint8), [each.documents for each in taken])
    tensors = {
        "document": documents[order],
        "step": steps[order],
        "because": np.concatenate([np.empty(0, np.int64), *(each.chosen.because for each in taken)])[order],
        "score": np.concatenate([np.empty(0), *(each.chosen.score for each in taken)])[order],
    }
    said = {"steps": [each.step.name for each in taken], "files": _inputs(selection)}
    return save(tensors, metadata={FORMAT: json.dumps(said, sort_keys=True)})


def _said(selection: Selection, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest: everything that is needed to make the selection again."""
    return {
        "format": FORMAT,
        "megarewarm": __version__,
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
        "inputs": _inputs(selection),
        "steps": [
            {
                "name": each.step.name,
                "why": each.step.words,
                "dropped_documents": each.documents,
                "dropped_tokens": each.tokens,
                "left_documents": each.left[0],
                "left_tokens": each.left[1],
                "notes": list(each.chosen.notes),
                "settings": dict(each.step.settings),
            }
            for each in selection.taken
        ],
        "outputs": outputs,
    }


def _inputs(selection: Selection) -> list[dict[str, Any]]:
    corpus = selection.corpus
    return [
        {
            **identity_of(file).model_dump(),
            "first_document": int(corpus.firsts[index]),
            "documents": file.num_documents,
            "tokens": file.total_tokens,
            "eod": corpus.ends[index],
        }
        for index, file in enumerate(corpus.files)
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
