"""Reading ``.pt`` files of other programs without running code from them.

PyTorch's restricted unpickler builds tensors and plain containers only. Other objects that training frameworks pickle (loss
scalers, argument namespaces, random states) become inert records of their values; any other name in the file is refused, so
a file can't choose what runs.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from megarewarm.checkpoint.weights import unreadable
from megarewarm.errors import UserError

# What GPT-NeoX, DeepSpeed and Megatron-LM pickle: by module, or by module and name. Nothing of theirs is imported.
_RECORDS = (
    "deepspeed.",
    "megatron.",
    "argparse.Namespace",
    "numpy.",
    "_codecs.encode",
    "types.SimpleNamespace",
    "pathlib.",
    "__builtin__.getattr",
    "builtins.getattr",
    "enum.",
    "signal.Signals",
    "torch.torch_version.TorchVersion",
)
# torch's wording of a refused name
_NAMED_IN_ERROR = re.compile(r"(?:GLOBAL|class|function|global) ['`]?([A-Za-z_][\w.]*\.\w+)")


class InertRecord:
    """An object of another program as plain values: ``values`` if it was an object, ``arguments`` if it was a call."""

    name = "?"

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]}
        self.values = dict(state) if isinstance(state, dict) else {"state": state}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value ``key`` that the object had, as of a mapping."""
        return self.values.get(key, default)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.name} read as a record>"


def _record(name: str) -> type[InertRecord]:
    # a new class for every name: the unpickler makes objects of it, by a call or without one
    def make(cls: type[InertRecord], *arguments: Any) -> InertRecord:
        made = object.__new__(cls)
        made.arguments, made.values = arguments, {}
        return made

    return type("InertRecord", (InertRecord,), {"name": name, "__new__": make})


def read_pickle(path: Path) -> Any:
    """The mapping that ``torch.load`` gives, on the CPU and mapped into memory where the format allows it; foreign objects as
    ``InertRecord``.

    Raises ``UserError`` for a file that is missing or damaged, and for one that names anything which is not on the list.
    """
    names: set[str] = set()
    try:
        zipped = zipfile.is_zipfile(path)
        names |= set(_globals(path)) if zipped else set()
        records = [(_record(name), name) for name in sorted(names) if name.startswith(_RECORDS)]
        with _only(records):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, yet others of its checkpoint are there; copy it as well") from error
    except UnpicklingError as error:
        strange = sorted(name for name in names if not name.startswith((*_RECORDS, "torch.", "collections.")))
        strange = strange or _NAMED_IN_ERROR.findall(str(error))
        if not strange:
            raise unreadable(path, "PyTorch file", _first_line(error)) from error
        what = ", ".join(f"'{name}'" for name in strange[:3])
        raise UserError(
            f"{path}: holds {what}, which no checkpoint of GPT-NeoX, DeepSpeed or Megatron-LM needs; nothing in it was run. "
            f"Get the file from a source you trust"
        ) from error
    except Exception as error:  # unpicklers raise all kinds of errors for bytes that are no pickle
        raise unreadable(path, "PyTorch file", _first_line(error)) from error
    if not isinstance(loaded, Mapping):
        raise unreadable(path, "PyTorch file", f"it holds no mapping but a {type(loaded).__name__}")
    return loaded


@contextmanager
def _only(records: list[tuple[type[InertRecord], str]]) -> Iterator[None]:
    """A context in which torch accepts ``records`` only, not what other libraries (transformers, DeepSpeed) have registered
    as safe."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(records)  # type: ignore[arg-type]
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _globals(path: Path) -> Iterator[str]:
    """Every 'module.name' that the pickle in a zipped PyTorch file refers to; reads opcodes, executes none."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise zipfile.BadZipFile("parts of it are compressed, which PyTorch never does: a few bytes may become gigabytes")
        member = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if member is None:
            return
        data = archive.read(member)
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            yield f"{strings[-2]}.{strings[-1]}"
        elif isinstance(argument, str):
            strings.append(argument)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
