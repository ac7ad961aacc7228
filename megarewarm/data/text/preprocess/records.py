"""The records of input files: which files there are, how they are divided for parallel work, and the text of each record."""

from __future__ import annotations

import codecs
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson

from megarewarm.data.text.end_of_document import END_OF_DOCUMENT
from megarewarm.data.text.preprocess.streams import COMPRESSED, lines_between, lines_of
from megarewarm.errors import UserError

KINDS = (".jsonl", ".json", ".txt", ".parquet")
_IN_FOLDERS = (".jsonl", ".txt", ".parquet")  # a .json in a folder is more often a manifest
STDIN = Path("-")
SPAN = 2**26  # bytes of a file in one piece of work

# Why a record is left out.
BAD_JSON, BAD_UTF8, NO_TEXT, EMPTY = "not valid JSON", "not valid UTF-8", "no text under the key", "empty"

_KINDS = {str: "a text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}

_ROWS = 1024  # of a .parquet in memory at a time


@dataclass(frozen=True)
class Span:
    """A part of an input file that can be read without the rest. [start, stop) are bytes of a plain .jsonl (the lines that
    begin there), row groups of a .parquet; stop None: to the end. ``size``: bytes on the disk, 0 for stdin."""

    path: Path
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True)
class Record:
    """One record. ``place``: a number that is its own within its file, however that is divided (a byte, or a row). ``text``
    is None if the record can't be used: ``reason`` is then one of those above and ``detail`` says more."""

    place: int
    line: int
    text: str | None
    reason: str = ""
    detail: str = ""


class _Unusable(ValueError):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


def kind_of(path: Path) -> str:
    """.jsonl for a.jsonl.zst."""
    if path == STDIN:
        return ".jsonl"
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def input_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files that names, patterns, folders (with all below them) and ``-`` (stdin, .jsonl) stand for, each sorted.

    Raises ``UserError`` for a name or pattern without a file, a folder without one of a known kind, a file of another
    kind, and a file that is named twice.
    """
    found: list[Path] = []
    for given in map(str, inputs):
        path = Path(given)
        if path == STDIN:
            found.append(path)
        elif not given:
            raise UserError("an input's name is empty: give files, folders, patterns or -")
        elif path.is_dir():
            found += _files_in(path)
        elif path.is_file():
            found.append(path)
        elif glob.has_magic(given):
            names = sorted(glob.glob(given, recursive=True))
            # with ** what lies in a folder matches as well, and must not come twice
            folders = [] if "**" in given else [Path(name) for name in names if os.path.isdir(name)]
            matches = [Path(name) for name in names if os.path.isfile(name)]
            if not matches and not folders:
                raise UserError(f"{given} matches no file: check the pattern")
            for match in sorted([*matches, *folders]):
                found += _files_in(match) if match in folders else [match]
        else:
            raise UserError(f"{path.absolute()} does not exist: give the name of a text file, a folder or a pattern")
    for path in found:
        if kind_of(path) not in KINDS or (kind_of(path) == ".parquet" and path.suffix in COMPRESSED):
            raise UserError(f"{path} is of no known kind: expected .jsonl, .txt (also with .gz or .zst added) or .parquet")
    seen: dict[Path, Path] = {}
    for path in found:
        place = path if path == STDIN else path.resolve()
        if place in seen:
            same = "" if seen[place] == path else f" (as {seen[place]} too)"
            raise UserError(f"{path} is given twice{same}: name each file once")
        seen[place] = path
    return found


def _files_in(folder: Path) -> list[Path]:
    inside = sorted(file for file in folder.rglob("*") if file.is_file() and kind_of(file) in _IN_FOLDERS)
    if not inside:
        raise UserError(f"{folder} holds no file that ends in {', '.join(_IN_FOLDERS)} (or .gz, .zst after that)")
    return inside


def spans_of(path: Path, size: int = SPAN) -> list[Span]:
    """The parts into which a file is divided: of about ``size`` bytes where it can be, else the whole of it."""
    if path == STDIN:
        return [Span(path, 0, None, 0)]
    total = path.stat().st_size
    if path.suffix in (".jsonl", ".json"):
        starts = range(0, max(total, 1), size)
        return [Span(path, start, min(start + size, total), min(start + size, total) - start) for start in starts]
    if path.suffix == ".parquet":
        return list(_parquet_spans(path, size))
    return [Span(path, 0, None, total)]


def records(span: Span, text_key: str, read: Callable[[int], None] = lambda _: None) -> Iterator[Record]:
    """The records of a part, in the order of the file; ``read`` gets the bytes of the part that have been read so far.
    Raises ``UserError`` for a file that can't be read as what its name says."""
    if span.path.suffix == ".parquet":
        yield from _parquet_records(span, text_key, read)
    elif span.path == STDIN:
        yield from _json_records(lines_of(span.path, sys.stdin.buffer, read), text_key)
    elif span.path.suffix in (".jsonl", ".json"):
        yield from _json_records(_told(lines_between(span.path, span.start, span.stop), span, read), text_key)
    else:
        with open(span.path, "rb") as file:
            lines = lines_of(span.path, file, read)
            yield from _text_records(lines) if kind_of(span.path) == ".txt" else _json_records(lines, text_key)
    read(span.size)


def place_in_words(span: Span, record: Record) -> str:
    """``file:line`` of a record, or its row."""
    if span.path == STDIN:
        return f"stdin:{record.line}"
    if span.path.suffix == ".parquet":
        return f"{span.path}: row {record.place}"
    before = 0
    if span.start:
        with open(span.path, "rb") as file:
            left = record.place
            while left and (chunk := file.read(min(left, 2**20))):
                before, left = before + chunk.count(b"\n"), left - len(chunk)
        return f"{span.path}:{before + 1}"
    return f"{span.path}:{record.line}"


def _told(lines: Iterable[tuple[int, bytes]], span: Span, read: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    for offset, line in lines:
        read(min(offset - span.start, span.size))
        yield offset, line


def _json_records(lines: Iterable[tuple[int, bytes]], text_key: str) -> Iterator[Record]:
    for number, (offset, line) in enumerate(lines, 1):
        try:
            text = _json_text(line, text_key)
        except _Unusable as error:
            yield Record(offset, number, None, error.reason, str(error))
        else:
            yield Record(offset, number, text or None, "" if text else EMPTY)


def _text_records(lines: Iterable[tuple[int, bytes]]) -> Iterator[Record]:
    divider = END_OF_DOCUMENT.encode()
    first, start, document = 1, 0, bytearray()
    for number, (offset, line) in enumerate(lines, 1):
        length = len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip() != divider:
            document += line
            continue
        yield _text_record(start, first, bytes(document))
        first, start, document = number + 1, offset + length, bytearray()
    if document:
        yield _text_record(start, first, bytes(document))


def _text_record(start: int, first_line: int, data: bytes) -> Record:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Record(start, first_line, None, BAD_UTF8, f"not valid UTF-8 at byte {error.start} of the document")
    return Record(start, first_line, text or None, "" if text else EMPTY)


def _json_text(line: bytes, key: str) -> str:
    """The text of a line, "" of a blank one."""
    if not line.strip():
        return ""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _lenient(line)
    if not isinstance(record, dict):
        raise _Unusable(NO_TEXT, f"expected a JSON object, found {_KINDS.get(type(record), 'a number')}")
    text = _under(record, key)
    if not isinstance(text, str):
        raise _Unusable(NO_TEXT, f"'{key}' is not a text but {_KINDS.get(type(text), 'a number')}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Unusable(BAD_UTF8, "the text holds half of a surrogate pair, which is no character") from None
    return text


def _lenient(line: bytes) -> Any:
    """What orjson refuses and Python writes, such as NaN, or the reason why a line can't be used."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise _Unusable(BAD_JSON, "JSON nested too deeply") from None
    except UnicodeDecodeError:
        wide = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line
        raise _Unusable(BAD_UTF8, f"{BAD_UTF8}, but perhaps UTF-16: convert the file" if wide else "") from None
    except json.JSONDecodeError as error:
        raise _Unusable(BAD_JSON, f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _Unusable(BAD_JSON, f"not valid JSON: {error}") from None


def _shown(name: str) -> str:
    """A key as a terminal takes it: no more of it than tells it apart, nothing that isn't a sign."""
    return "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in name[:40])


def _under(record: dict[str, Any], key: str) -> Any:
    """The value under a key, or under a path of keys divided by dots."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _Unusable(NO_TEXT, f"no key '{key}', known: {', '.join(_shown(name) for name in list(record)[:10])}")
        value = value[part]
    return value


def _parquet(path: Path) -> tuple[ModuleType, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path} needs the package 'pyarrow': pip install pyarrow") from error
    try:
        return pyarrow, parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole .parquet file: {error}: make or copy it again") from error


def _parquet_spans(path: Path, size: int) -> Iterator[Span]:
    _, file = _parquet(path)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    bytes_of = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    first, held = 0, 0
    for i, count in enumerate(bytes_of):
        held += count
        if held >= size or i + 1 == len(groups):
            yield Span(path, first, i + 1, held)
            first, held = i + 1, 0


def _parquet_records(span: Span, key: str, read: Callable[[int], None]) -> Iterator[Record]:
    pyarrow, file = _parquet(span.path)
    known = [".".join(file.schema.column(i).path.split(".")) for i in range(len(file.schema))]
    if key not in known:
        raise UserError(f"{span.path} has no column '{key}', known: {', '.join(known[:10])}: say which holds the text")
    metadata = file.metadata
    last = metadata.num_row_groups if span.stop is None else span.stop
    row = sum(metadata.row_group(i).num_rows for i in range(span.start))
    rows = max(sum(metadata.row_group(i).num_rows for i in range(span.start, last)), 1)
    first = row
    try:
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=range(span.start, last), columns=[key]):
            for value in _values(batch.column(0)):
                yield _parquet_record(row, value, key)
                row += 1
            read(span.size * (row - first) // rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{span.path} is not a whole .parquet file: {error}: make or copy it again") from error


def _values(column: Any) -> Sequence[Any]:
    try:
        values: Sequence[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:  # one by one, to find which
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _parquet_record(row: int, value: Any, key: str) -> Record:
    if isinstance(value, UnicodeDecodeError):
        return Record(row, row, None, BAD_UTF8, "not valid UTF-8")
    if isinstance(value, dict):
        try:
            value = _under({key.split(".", 1)[0]: value}, key)
        except _Unusable as error:
            return Record(row, row, None, error.reason, str(error))
    if not isinstance(value, str):
        return Record(row, row, None, NO_TEXT, f"'{key}' is not a text but {type(value).__name__}")
    return Record(row, row, value or None, "" if value else EMPTY)
