"""One shard of the work: the documents of a part of an input file, tokenised into files of its own in the work folder.

For every part of the split the shard leaves ``STEM.bin`` (ids), ``STEM.ends`` (int64 (n,), tokens up to the end of each
document) and, where documents are to be shuffled, ``STEM.keys`` (uint64 (n,)). A shuffled shard is a row of runs, each of
about 64 MB of ids and sorted by key, which assembly merges. ``NUMBER.json``, written last, makes the shard complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megarewarm.data.order.permutation import derive_key, mix
from megarewarm.data.text.preprocess.documents import Skipped
from megarewarm.data.text.preprocess.records import Span, records
from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer
from megarewarm.errors import UserError
from megarewarm.files import sync, write_whole

_BATCH = 2**21  # characters that are encoded together
_BLOCK = 2**21  # tokens that are written together where order is kept
_RUN = 2**25  # tokens of a sorted run
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_EVERY = 0.5  # seconds between two progress reports

PROGRESS = struct.Struct("<QQQ")  # bytes read, documents, tokens


@dataclass(frozen=True)
class Recipe:
    """What is done with a document, wherever that happens. ``eod``: id of the token that ends each, None if nothing does;
    ``split``: the parts' shares by name, which sum to 1."""

    tokenizer: str
    fingerprint: str
    merges: str | None
    eod_token: str | None
    text_key: str
    append_eod: bool
    eod: int | None
    ftfy: bool
    dtype: str
    split: tuple[tuple[str, float], ...]
    shuffle: int | None
    strict: bool


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of the work: a span of input file ``file``, of which at most ``limit`` documents are wanted."""

    number: int
    file: int
    span: Span
    modified: tuple[int, int]
    limit: int | None = None

    def identity(self) -> dict[str, Any]:
        """What the result depends on, beside the recipe."""
        span = self.span
        place = {"path": str(span.path), "start": span.start, "stop": span.stop, "size": span.size}
        return {"file": self.file, **place, "modified": list(self.modified), "limit": self.limit}


@dataclass
class Counts:
    """What has been written: documents, tokens (ends of documents included), bytes of text (UTF-8)."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Tokenised:
    """A finished shard: ``parts`` and ``runs`` (documents of each run) by name of the part."""

    number: int
    parts: dict[str, Counts]
    runs: dict[str, list[int]]
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return sum(counts.documents for counts in self.parts.values())

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.parts.values())


def stem(folder: Path, number: int, part: str) -> Path:
    """The shard's files of a part, without suffix."""
    return folder / f"{number:06d}{'.' * bool(part)}{part}"


def finished(folder: Path, shard: Shard) -> Tokenised | None:
    """The shard's result where an earlier run has left it whole, with the same input."""
    path = folder / f"{shard.number:06d}.json"
    try:
        facts = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if facts.pop("identity") != shard.identity():
        return None
    facts["parts"] = {name: Counts(**counts) for name, counts in facts["parts"].items()}
    return Tokenised(**facts)


def progress_of(folder: Path, number: int) -> tuple[int, int, int]:
    """(bytes read, documents, tokens) of a shard that is being worked on, zeros before it has begun."""
    try:
        return PROGRESS.unpack((folder / f"{number:06d}.progress").read_bytes())
    except (FileNotFoundError, struct.error):
        return 0, 0, 0


def tokenise(shard: Shard, recipe: Recipe, folder: Path, threads: int) -> Tokenised:
    """Make the files of a shard. Raises ``UserError`` for an unreadable file, and with ``strict`` for a broken record."""
    tokenizer = _tokenizer(recipe.tokenizer, recipe.eod_token, recipe.merges, recipe.fingerprint)
    end = np.array([] if recipe.eod is None else [recipe.eod], recipe.dtype)
    # only at the very beginning of the input do a hundred broken records mean that the key or the file is wrong
    skipped = Skipped(strict=recipe.strict, may_be_hopeless=shard.number == 0)
    base = None if recipe.shuffle is None else derive_key(recipe.shuffle, shard.file)
    word = _Word(folder / f"{shard.number:06d}.progress")
    writers = {name: _Writer(stem(folder, shard.number, name), np.dtype(recipe.dtype), base) for name, _ in recipe.split}
    try:
        documents = tokens = 0
        for batch in _batches(shard, recipe, skipped, word):
            texts = [_fixed(text, recipe) for _, text in batch]
            for (place, text), ids in zip(batch, tokenizer.encode_batch(texts, threads), strict=True):
                data = text.encode()
                document = np.concatenate([ids.astype(recipe.dtype), end])
                writers[_part(data, recipe.split)].add(document, place, len(data))
                documents, tokens = documents + 1, tokens + document.size
            word.say(documents=documents, tokens=tokens)
        runs = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    parts = {name: writer.counts for name, writer in writers.items()}
    result = Tokenised(shard.number, parts, runs, dict(skipped.counts), skipped.examples)
    content = json.dumps({"identity": shard.identity(), **asdict(result)}).encode()
    write_whole(folder / f"{shard.number:06d}.json", content)
    word.done()
    return result


class _Word:
    """The shard's progress, for any process or machine that reads the work folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said = [0, 0, 0]
        self._next = 0.0

    def read(self, count: int) -> None:
        self._said[0] = count

    def say(self, documents: int, tokens: int) -> None:
        self._said[1:] = [documents, tokens]
        if time.monotonic() >= self._next:
            self._path.write_bytes(PROGRESS.pack(*self._said))
            self._next = time.monotonic() + _EVERY

    def done(self) -> None:
        """The last report, which stays: the shard may have to wait for those before it."""
        self._path.write_bytes(PROGRESS.pack(*self._said))


def _batches(shard: Shard, recipe: Recipe, skipped: Skipped, word: _Word) -> Iterator[list[tuple[int, str]]]:
    """(place, text) of the shard's documents, about 2 MB of them together."""
    batch: list[tuple[int, str]] = []
    size = good = 0
    for record in records(shard.span, recipe.text_key, word.read):
        if record.text is None:
            skipped.add(shard.span, record, good)
            continue
        if good == shard.limit:
            break
        good += 1
        if batch and size + len(record.text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append((record.place, record.text))
        size += len(record.text)
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, eod_token: str | None, merges: str | None, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(path, eod_token=eod_token, merges=merges)
    if tokenizer.fingerprint() != fingerprint:
        raise UserError(f"{path} has changed since the run began: run it again with --overwrite")
    return tokenizer


def _fixed(text: str, recipe: Recipe) -> str:
    if not recipe.ftfy:
        return text
    import ftfy

    fixed: str = ftfy.fix_text(text)
    return fixed


def _part(data: bytes, split: tuple[tuple[str, float], ...]) -> str:
    """The part of the split to which a document belongs, by its hash alone, so other documents don't matter."""
    if len(split) > 1:
        place = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2**64
        for name, share in split[:-1]:
            if place < share:
                return name
            place -= share
    return split[-1][0]


class _Writer:
    """The files of one part of a shard. ``base`` is the key of the shuffle, None keeps the order."""

    def __init__(self, path: Path, dtype: np.dtype, base: int | None) -> None:
        self.counts = Counts()
        self._dtype = dtype
        self._base = base
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for suffix in ("bin", "ends") if base is None else ("bin", "ends", "keys"):
            self._files[suffix] = self._stack.enter_context(open(f"{path}.{suffix}", "wb"))  # noqa: SIM115
        self._held: list[npt.NDArray[Any]] = []
        self._places: list[int] = []
        self._held_tokens = 0
        self._written = 0
        self._runs: list[int] = []

    def add(self, document: npt.NDArray[Any], place: int, size: int) -> None:
        if document.size > np.iinfo(np.int32).max:
            raise UserError(f"a document has {document.size} tokens, the most is 2147483647: split it")
        self._held.append(document)
        self._places.append(place)
        self._held_tokens += document.size
        self.counts.documents += 1
        self.counts.tokens += document.size
        self.counts.bytes += size
        if self._held_tokens >= (_BLOCK if self._base is None else _RUN):
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        documents = self._held
        if self._base is not None:
            places = np.array(self._places, np.uint64)
            keys = mix(places * _GOLDEN + np.uint64(self._base))
            order = np.argsort(keys, kind="stable")
            documents = [documents[i] for i in order]
            self._files["keys"].write(keys[order].astype("<u8").tobytes())
            self._runs.append(len(documents))
        ends = self._written + np.cumsum([document.size for document in documents], dtype=np.int64)
        self._files["ends"].write(ends.astype("<i8").tobytes())
        for document in documents:
            self._files["bin"].write(document.data)
        self._written = int(ends[-1])
        self._held, self._places, self._held_tokens = [], [], 0

    def finish(self) -> list[int]:
        """Sync everything to the disk. Returns the documents of each run."""
        self._flush()
        for file in self._files.values():
            sync(file)
        return self._runs

    def close(self) -> None:
        self._stack.close()
