"""Foreign pickles are hostile: nothing in them runs, and what is harmless is read as records."""

from __future__ import annotations

import argparse
import builtins
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarewarm.checkpoint.foreign.pickles import InertRecord, read_pickle
from megarewarm.errors import UserError
from tests.support.neox_writer import foreign_classes


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Named:
    """Pickles as whatever ``module.name`` is on the machine that reads it, called with ``arguments``."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.module, self.name, self.arguments = module, name, arguments


def raw_pickle(value: Named) -> bytes:
    """Opcodes by hand, for names that can't be imported here."""
    arguments = b"".join(b"X" + len(a.encode()).to_bytes(4, "little") + a.encode() for a in value.arguments)
    return b"\x80\x02c" + value.module.encode() + b"\n" + value.name.encode() + b"\n(" + arguments + b"tR."


def write_zip(path: Path, data: bytes) -> None:
    """A zipped PyTorch file whose pickle is ``data``."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def attacks(marker: Path) -> dict[str, Any]:
    touch = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(builtins.eval, python),
        "exec": Call(builtins.exec, python),
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "open": Call(builtins.open, str(marker), "w"),
        "getattr and then a call": Call(builtins.getattr, Call(__import__, "os"), "system"),
        "a loader of loaders": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "torch.load": Call(torch.load, str(marker)),
        "torch.hub": Call(torch.hub.load_state_dict_from_url, "file://" + str(marker)),
        "numpy's runner": Named("numpy.testing._private.utils", "runstring", python, ""),
        "numpy.load": Named("numpy", "load", str(marker)),
        "deepspeed's launcher": Named("deepspeed.launcher.runner", "main", touch),
        "pathlib": Named("pathlib", "Path", str(marker)),
        "a module of ours": Named("megarewarm.main", "main", touch),
    }


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", attacks(Path("/")))
def test_nothing_runs(tmp_path: Path, name: str, form: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "hostile.pt"
    attack = attacks(marker)[name]
    data = raw_pickle(attack) if isinstance(attack, Named) else pickle.dumps({"model": attack}, protocol=2)
    if form == "zip":
        write_zip(file, data)
    else:
        file.write_bytes(data)
    before = set(sys.modules)
    try:
        read = read_pickle(file)
    except UserError as error:
        assert str(file) in str(error)
    else:
        # names on the list become records; they must not be the thing itself
        found = read["model"] if isinstance(read, dict) else read
        assert isinstance(found, InertRecord), f"{name} became {found!r}"
    assert not marker.exists()
    new = {module.split(".")[0] for module in set(sys.modules) - before}
    assert not new & {"deepspeed", "megatron", "subprocess"}


def test_the_refusal_says_what_it_was_and_that_nothing_ran(tmp_path: Path) -> None:
    torch.save({"model": Call(os.system, f"touch {tmp_path / 'ran'}")}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match=r"hostile\.pt: holds '(posix|os)\.system'.*nothing in it was run.*a source you trust"):
        read_pickle(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_before_zip_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps({"model": Call(os.system, "true")}, protocol=2))
    with pytest.raises(UserError, match=r"hostile\.pt: holds '(posix|os)\.system'.*nothing in it was run"):
        read_pickle(tmp_path / "hostile.pt")


def test_what_frameworks_pickle_is_read_as_records(tmp_path: Path) -> None:
    with foreign_classes() as (scaler, _):
        content = {
            "weights": torch.arange(6.0).view(2, 3),
            "scaler": scaler(),
            "args": argparse.Namespace(num_layers=2, nested=argparse.Namespace(deep=1)),
            "np_rng_state": np.random.get_state(),
            "path": Path("/somewhere"),
            "plain": {"a": [1, 2.5, None, True, "x"]},
        }
        torch.save(content, tmp_path / "harmless.pt")
    read = read_pickle(tmp_path / "harmless.pt")
    assert torch.equal(read["weights"], content["weights"]) and read["plain"] == content["plain"]
    assert read["scaler"].get("cur_scale") == 4096.0
    assert read["args"]["num_layers"] == 2 and read["args"]["nested"].get("deep") == 1 and read["args"].get("absent", 5) == 5
    assert isinstance(read["path"], InertRecord) and "read as a record" in repr(read["path"])


@pytest.mark.parametrize("harm", ["empty", "truncated", "text", "missing"])
def test_unreadable_files_are_named(tmp_path: Path, harm: str) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1000)}, file)
    if harm == "empty":
        file.write_bytes(b"")
    elif harm == "truncated":
        os.truncate(file, 2000)
    elif harm == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    else:
        file.unlink()
    with pytest.raises(UserError, match=str(file)) as caught:
        read_pickle(file)
    assert "\n" not in str(caught.value) and "copy" in str(caught.value)
