"""Reading torch.distributed.checkpoint's index of tensors, a pickle, without running code from it.

The unpickler makes inert records, of classes that live as long as one reading, because a pickle may set attributes of any
object it reaches. The index is rebuilt from the records, with every part checked.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megarewarm.checkpoint.own.misplaced_rows import Misplaced, mend
from megarewarm.checkpoint.own.slices import tile
from megarewarm.untrusted import is_name, one_line

_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "uint8", "int64")}
_MOST_VALUES = 2**56  # of a tensor: more than any disk holds, and no product of it overflows
_MOST_DIMENSIONS = 8
# All that an index of plain tensors is made of, by module.
_NEEDED = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *_DTYPES},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "builtins": {"getattr"},  # the form of enumeration members before Python 3.11.4
}
_MEMBERS = {"TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"}


class TensorIndexReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with the index read as above."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self.misplaced: Misplaced | None = None
        """The rows with wrong offsets in the index, which are read correctly."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises ``pickle.UnpicklingError`` for anything that is none, ``OSError`` where there is no file."""
        metadata, self.misplaced = _mended((self._folder / ".metadata").read_bytes())
        sizes: dict[str, float] = {info.relative_path: 0 for info in metadata.storage_data.values()}
        for name in sizes:
            file_of = self._folder / name
            sizes[name] = file_of.stat().st_size if file_of.is_file() else math.inf  # a missing one is reported by its name
        for info in metadata.storage_data.values():
            if info.offset + info.length > sizes[info.relative_path]:
                _refuse(f"a tensor lies past the end of {info.relative_path}")
        return replace(metadata, storage_meta=StorageMeta(load_id=self.load_id))


@lru_cache(maxsize=1)
def _mended(content: bytes) -> tuple[Metadata, Misplaced | None]:
    """The index, read-only. Cached, because a large one takes seconds and readers of single tensors ask for it each time."""
    metadata = read_index(io.BytesIO(content))
    return metadata, mend(metadata)


def read_index(file: Any) -> Metadata:
    """The index in an open file. Raises ``pickle.UnpicklingError`` for anything that is none."""
    try:
        content = file.read()
        _check_sizes(content)
        return _metadata(_Unpickler(io.BytesIO(content)).load())
    except OSError:
        raise
    except Exception as error:  # Python's unpickler raises all kinds of errors for bytes that are no pickle
        kind = "" if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: "
        raise pickle.UnpicklingError(f"{kind}{one_line(str(error))}") from error


def _check_sizes(content: bytes) -> None:
    """Python's unpickler allocates memory for memo numbers and text lengths before it checks them."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > len(content):
            _refuse(f"it numbers an object {argument}, in {len(content)} bytes")


class _IndexRecord:
    """An object of the file: what it was called with, and its state."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], type[_IndexRecord]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name not in _NEEDED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs; nothing of it was run")
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in self._classes:

            def new(cls: type[_IndexRecord], *arguments: Any) -> _IndexRecord:
                made = object.__new__(cls)
                made.arguments, made.state = arguments, None
                if name == "getattr":
                    _check_taken(*arguments)
                return made

            self._classes[module, name] = type(name, (_IndexRecord,), {"kind": name, "__new__": new})
        return self._classes[module, name]


# ---- from records to the index -----------------------------------------------------------------------------------------


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(what)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _IndexRecord) and type(value).kind == kind


def _state(value: Any, kind: str) -> dict[str, Any]:
    if not _is(value, kind) or not isinstance(value.state, dict):
        _refuse(f"expected a {kind}")
    return value.state


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_VALUES:
        _refuse(f"{str(value)[:40]} is no size or place of a tensor")
    return value


def _size(value: Any) -> torch.Size:
    if not _is(value, "Size") or len(value.arguments) != 1 or not isinstance(value.arguments[0], tuple):
        _refuse("expected a tensor's size")
    numbers = tuple(map(_number, value.arguments[0]))
    if math.prod(numbers) > _MOST_VALUES:
        _refuse(f"no tensor is as large as {numbers}")
    return torch.Size(numbers)


def _metadata(record: Any) -> Metadata:
    state = _state(record, "Metadata")
    entries, places = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        _refuse("its list of tensors or of their places is missing")
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in entries.items():
        if not isinstance(name, str):
            _refuse(f"a tensor has no name but {str(name)[:40]}")
        found[name] = BytesStorageMetadata() if _is(entry, "BytesStorageMetadata") else _tensor(entry, name)
    infos = {_index(index): _info(info) for index, info in places.items()}
    for name, item in found.items():
        if isinstance(item, TensorStorageMetadata):
            for chunk in item.chunks:
                info = infos.get(MetadataIndex(name, chunk.offsets))
                if info is None or info.length < math.prod(chunk.sizes) * item.properties.dtype.itemsize:
                    _refuse(f"a part of {name} has no place in the files, or too small a one")
    version = state.get("version")
    return Metadata(found, None, infos, StorageMeta(), version if isinstance(version, str) else None)


def _tensor(record: Any, name: str) -> TensorStorageMetadata:
    state = _state(record, "TensorStorageMetadata")
    properties, size, chunks = state.get("properties"), _size(state.get("size")), state.get("chunks")
    stated = properties.state if isinstance(properties, _IndexRecord) and _is(properties, "TensorProperties") else None
    if not isinstance(stated, tuple) or len(stated) != 5 or not isinstance(stated[0], torch.dtype):
        _refuse(f"{name} has no dtype")
    if not _is(stated[3], "_MEM_FORMAT_ENCODING") and not _is(stated[3], "getattr"):
        _refuse(f"{name} has no memory layout")
    if not isinstance(chunks, list):
        _refuse(f"{name} has no list of parts")
    parts = []
    for chunk in chunks:
        inner = _state(chunk, "ChunkStorageMetadata")
        part = ChunkStorageMetadata(_size(inner.get("offsets")), _size(inner.get("sizes")))
        ends = [begin + length for begin, length in zip(part.offsets, part.sizes, strict=False)]
        if not len(size) == len(part.offsets) == len(part.sizes) or any(end > n for end, n in zip(ends, size, strict=True)):
            _refuse(f"a part of {name} lies outside of it")
        parts.append(part)
    if len(size) > _MOST_DIMENSIONS or not tile(size, [(part.offsets, part.sizes) for part in parts]):
        _refuse(f"the parts of {name} are not the whole of it: some places are in none or in several of them")
    return TensorStorageMetadata(TensorProperties(dtype=stated[0]), size, parts)


def _check_taken(owner: Any, name: Any) -> None:
    """Raise ``pickle.UnpicklingError`` for the getattr of anything but a member of the one enumeration."""
    if not (isinstance(owner, type) and owner.__name__ == "_MEM_FORMAT_ENCODING" and name in _MEMBERS):
        shown = f"{str(name)[:40]!r} of {getattr(owner, '__name__', owner)!r}"
        _refuse(f"it takes {shown}, which no index of tensors needs; nothing of it was run")


def _index(record: Any) -> MetadataIndex:
    state = _state(record, "MetadataIndex")
    name, offset, hint = state.get("fqn"), state.get("offset"), state.get("index")
    if not isinstance(name, str):
        _refuse("a place belongs to no tensor")
    return MetadataIndex(name, None if offset is None else _size(offset), None if hint is None else _number(hint))


def _info(record: Any) -> _StorageInfo:
    state = _state(record, "_StorageInfo")
    if not is_name(state.get("relative_path")):
        _refuse(f"it names the file {str(state.get('relative_path'))[:80]!r}, which is none in its folder")
    if state.get("transform_descriptors"):
        _refuse("a tensor is compressed, which megarewarm's are not")
    return _StorageInfo(state["relative_path"], _number(state.get("offset")), _number(state.get("length")))
