"""PyTorch's own files (``.pt``) written one tensor at a time: ``torch.save`` wants all of a file's tensors in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def write_streaming(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor]
) -> None:
    """Write ``path``, for which ``torch.load`` gives ``{name: read(name)}``. ``shapes``: shape and dtype of each.

    The file is laid out without the tensors' bytes first (memory that is asked for and never touched takes none), then each
    is written where it belongs. The archive's checksums of those members stay zero; ``torch.load`` does not look at them.
    """
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}, path)
    with zipfile.ZipFile(path) as archive:
        members = {Path(info.filename).name: info for info in archive.infolist() if "/data/" in info.filename}
    with open(path, "r+b") as file:
        for number, (name, (shape, dtype)) in enumerate(shapes.items()):
            tensor = read(name).to(dtype).contiguous()
            assert tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, announced as {shape}"
            # a local header: 26 bytes, the lengths of the name and of the extra field, then those two
            file.seek(members[str(number)].header_offset + 26)
            lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
            file.seek(lengths, 1)
            file.flush()
            tensor.flatten().view(torch.uint8).numpy().tofile(file)
