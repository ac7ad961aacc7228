"""Reading torch.distributed.checkpoint's index of tensors, a pickle, without running anything that it names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, StorageMeta

# All that an index of plain tensors is made of, by module.
_NEEDED = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "uint8", "int64"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


def _member(owner: Any, name: str) -> Any:
    """What Python before 3.11.4 writes an enumeration's member as: the getattr of its class, here of nothing but that."""
    if owner is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it takes '{name}' of {owner!r}, which no index of tensors needs; nothing of it was run")
    return _MEM_FORMAT_ENCODING[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _NEEDED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs; nothing of it was run")
        return super().find_class(module, name)


class TensorIndexReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with the restriction above."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises ``pickle.UnpicklingError`` for one that names anything else, ``OSError`` where there is none."""
        with open(self._folder / ".metadata", "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
