"""From text to token files: reading of .jsonl and .txt files (plain, .gz, .zst), taking Python sources apart into prose
and code, and writing of .bin/.idx with a manifest beside them."""

from __future__ import annotations

import ast
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megarewarm.data.token_file import TokenFileWriter, dtype_for
from megarewarm.data.tokenizers import END_OF_DOCUMENT, Tokenizer, write_atomically
from megarewarm.errors import UserError

_CHUNK = 2**20  # bytes of a file in memory at a time
_BATCH = 2**21  # characters that are encoded together
_EXAMPLES = 5  # broken records that are described
_HOPELESS = 100  # broken records before the first good one at which reading stops


class Documents:
    """The documents in text files, an iterable that can be read more than once.

    .jsonl (or .json): one JSON object per line, its text under ``text_key``. .txt: documents are divided by lines that
    read ``<|endoftext|>``; without such a line the whole file is one document. Both may be compressed (.gz, .zst).
    Memory: one document and a few MB.

    A record that isn't valid (UTF-8, JSON, a text under the key) is left out and counted. Attributes, set by the latest
    reading: ``broken`` (records), ``examples`` (``file:line: reason`` of the first ones), ``empty`` (documents without
    a character and blank lines, left out too), ``bytes_read`` (of ``total_bytes`` on the disk). Raises ``UserError``
    for a file that does not exist, is of another kind or ends amid its compressed data, and where no record is valid.
    """

    def __init__(self, paths: Sequence[str | Path], text_key: str = "text") -> None:
        self.paths = [Path(path) for path in paths]
        self.text_key = text_key
        self.total_bytes = 0
        self.broken = self.empty = self.bytes_read = 0
        self.examples: list[str] = []
        for path in self.paths:
            if _kind(path) not in (".jsonl", ".json", ".txt"):
                raise UserError(f"{path} is of no known kind: expected .jsonl or .txt, also with .gz or .zst added")
            if not path.is_file():
                raise UserError(f"{path} does not exist: give the name of a text file")
            self.total_bytes += path.stat().st_size

    def __iter__(self) -> Iterator[str]:
        self.broken = self.empty = self.bytes_read = 0
        self.examples = []
        good = 0
        for path in self.paths:
            plain = _kind(path) == ".txt"
            for line, data in self._divided(path) if plain else enumerate(self._lines(path), 1):
                try:
                    text = _decode(data) if plain else _json_text(data, self.text_key)
                except ValueError as error:
                    self._count_broken(f"{path}:{line}: {error}", hopeless=not good)
                    continue
                if text:
                    good += 1
                    yield text
                else:
                    self.empty += 1
        if self.broken and not good:
            raise UserError(f"no document is valid. {self.examples[0]}")

    def _count_broken(self, example: str, hopeless: bool) -> None:
        self.broken += 1
        if self.broken <= _EXAMPLES:
            self.examples.append(example)
        if hopeless and self.broken == _HOPELESS:
            raise UserError(f"none of the first {_HOPELESS} documents is valid. {self.examples[0]}")

    def _divided(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """(first line, content) of the documents of a .txt."""
        divider = END_OF_DOCUMENT.encode()
        first = 1
        lines: list[bytes] = []
        for number, line in enumerate(self._lines(path), 1):
            if line.strip() == divider:
                yield first, b"".join(lines)
                first, lines = number + 1, []
            else:
                lines.append(line)
        if lines:
            yield first, b"".join(lines)

    def _lines(self, path: Path) -> Iterator[bytes]:
        """Lines with their ends. Only b"\\n" ends a line: other separators may stand inside of JSON text."""
        pieces: list[bytes] = []
        for chunk in self._chunks(path):
            lines = chunk.split(b"\n")
            pieces.append(lines[0])
            for line in lines[1:]:
                yield b"".join(pieces) + b"\n"
                pieces = [line]
        if rest := b"".join(pieces):
            yield rest

    def _chunks(self, path: Path) -> Iterator[bytes]:
        before = self.bytes_read
        with open(path, "rb") as file:
            for chunk in _decompressed(path, file):
                self.bytes_read = before + file.tell()
                yield chunk
        self.bytes_read = before + path.stat().st_size


def first_bytes(documents: Iterable[str], limit: int, progress: Callable[[int], None] | None = None) -> Iterator[str]:
    """The documents up to the one that reaches ``limit`` bytes of UTF-8; ``progress`` gets the bytes so far."""
    done = 0
    for text in documents:
        yield text
        done += len(text.encode())
        if progress:
            progress(min(done, limit))
        if done >= limit:
            break


@dataclass
class Counts:
    """What has been written: documents, tokens (ends of documents included), bytes of text (UTF-8)."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def prepare(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    append_eod: bool = True,
    overwrite: bool = False,
    progress: Callable[[Counts], None] | None = None,
) -> Counts:
    """Tokenise documents into PREFIX.bin and PREFIX.idx, and describe them in PREFIX.json, written last.

    ``append_eod`` ends each document with ``tokenizer.eod_id``. Empty texts are left out. ``progress`` is called after
    each batch of about 2 MB of text, which is also what is held in memory (or one document, if that is longer). Killed
    or failed, nothing is left under the files' names. Raises ``UserError`` where the files exist and ``overwrite`` is
    False, and where there is no document at all.
    """
    prefix = Path(prefix)
    manifest = prefix.with_name(prefix.name + ".json")
    if manifest.exists() and not overwrite:
        raise UserError(f"{manifest} exists: remove it, choose another name or ask to overwrite it")
    end = np.array([tokenizer.eod_id] if append_eod else [], np.uint32)
    dtype = dtype_for(tokenizer.vocab_size)
    counts = Counts()
    with TokenFileWriter(prefix, dtype, overwrite=overwrite) as writer:
        for batch in _batches(documents):
            for ids in tokenizer.encode_batch(batch):
                writer.add_document(np.concatenate([ids, end]))
            counts.documents, counts.tokens = writer.num_documents, writer.num_tokens
            counts.bytes += sum(len(text.encode()) for text in batch)
            if progress:
                progress(counts)
        if not counts.documents:
            raise UserError(f"{prefix}: there is no document to write: the input is empty")
        manifest.unlink(missing_ok=True)
    description: dict[str, Any] = asdict(counts) | {
        "dtype": dtype.name,
        "append_eod": append_eod,
        "tokenizer": {
            "file": str(tokenizer.path),
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint(),
        },
    }
    if isinstance(documents, Documents):
        description |= {"broken": documents.broken, "empty": documents.empty, "text_key": documents.text_key}
        description["inputs"] = [{"file": str(path), "bytes": path.stat().st_size} for path in documents.paths]
    write_atomically(manifest, (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode())
    return counts


def split_source(source: str) -> tuple[list[str], str]:
    """(docstrings, the source without them). What is left is valid Python. Raises what ``ast.parse`` does."""
    data = source.encode()
    line_starts = [0]
    for line in data.split(b"\n"):
        line_starts.append(line_starts[-1] + len(line) + 1)
    docstrings: list[str] = []
    pieces: list[bytes] = []
    end = 0
    for node in _owners(ast.parse(source)):
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        docstrings.append(docstring)
        # All strings that open the body, or the second would be the docstring of what is left.
        count = next((i for i, item in enumerate(node.body) if not _is_text(item)), len(node.body))
        first, last = node.body[0], node.body[count - 1]
        assert last.end_lineno is not None and last.end_col_offset is not None
        start = line_starts[first.lineno - 1] + first.col_offset
        stop = line_starts[last.end_lineno - 1] + last.end_col_offset
        pieces.append(data[end:start])
        end = stop
        if count == len(node.body) and not isinstance(node, ast.Module):
            pieces.append(b"pass")
            continue
        if semicolon := re.compile(rb"[ \t]*;[ \t]*").match(data, stop):
            end = semicolon.end()
        line_end = re.compile(rb"[ \t]*(\n|\Z)").match(data, end)
        margin = data[line_starts[first.lineno - 1] : start]
        if line_end and not margin.strip():
            pieces[-1] = pieces[-1][: len(pieces[-1]) - len(margin)]
            end = line_end.end()
    pieces.append(data[end:])
    return docstrings, b"".join(pieces).decode()


def strip_doctests(text: str) -> str:
    """``text`` without its interactive examples: from ``>>>`` to the next blank line, as ``doctest`` sees them."""
    kept = []
    inside = False
    for line in text.split("\n"):
        bare = line.strip()
        inside = bare.startswith(">>>") or (inside and bool(bare))
        if not inside:
            kept.append(line)
    return re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", "\n".join(kept)).strip()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        if not text:
            continue
        if batch and size + len(text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _json_text(line: bytes, key: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no key '{key}', known: {', '.join(list(record)[:10])}")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"'{key}' is not a text but {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair, which is no character") from None
    return text


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start} of the document") from None


def _decompressed(path: Path, file: Any) -> Iterator[bytes]:
    """The content of an opened file in pieces. Raises ``UserError`` where compressed data are damaged or end early."""
    try:
        if path.suffix == ".zst":
            yield from _unzstd(path, file)
            return
        source = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        while chunk := source.read(_CHUNK):
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not whole: {error}: make or copy it again") from error


def _unzstd(path: Path, file: Any) -> Iterator[bytes]:
    """By hand, because ``zstandard``'s stream reader takes a file that is cut off for one that ends."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path} needs the package 'zstandard': pip install zstandard") from error
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    while data := file.read(_CHUNK // 8):
        while data:
            try:
                yield decompressor.decompress(data)
            except zstandard.ZstdError as error:
                raise UserError(f"{path} is not a whole .zst file: {error}: make or copy it again") from error
            inside, data = not decompressor.eof, decompressor.unused_data
            if not inside:
                decompressor = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise UserError(f"{path} is not a whole .zst file: it ends in the middle of its data: make or copy it again")


def _owners(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """All that can have a docstring, in the order of the source. Expressions are not entered: they hold none."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for name in ("finalbody", "orelse", "handlers", "cases", "body"):
            stack.extend(reversed(getattr(node, name, ())))


def _is_text(item: ast.stmt) -> bool:
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)
