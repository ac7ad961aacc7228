"""``inspect_data.py --verify``: token files in every form, against their manifests, or without one."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.errors import UserError
from tests.checkpoint.test_convert import tool

DOCUMENTS = [[1, 2, 3], [], [70, 5], [6, 7, 8, 9], [400]]
IDS = [token for document in DOCUMENTS for token in document]
CUTS = {"whole": [], "equal shards": [8, 16], "unequal shards": [3, 4, 13], "an empty shard": [0, 6, 6]}  # bytes of 20


def lay_down(folder: Path, cuts: list[int], *, index: bool, manifest: bool = True) -> Path:
    """The documents under the name x; returns what names them."""
    prefix = folder / "x"
    with TokenFileWriter(prefix, np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    if manifest:
        sums = {suffix: hashlib.sha256((folder / f"x.{suffix}").read_bytes()).hexdigest() for suffix in ("bin", "idx")}
        said = {"documents": len(DOCUMENTS), "tokens": len(IDS), "dtype": "uint16", "sha256": sums}
        (folder / "x.json").write_text(json.dumps(said))
    data = (folder / "x.bin").read_bytes()
    if cuts:
        (folder / "x.bin").unlink()
        parts = [data[first:last] for first, last in pairwise([0, *cuts, len(data)])]
        for k, part in enumerate(parts):
            (folder / f"x-{k:05}-of-{len(parts):05}.bin").write_bytes(part)
    if index:
        return prefix
    (folder / "x.idx").unlink()
    return folder / "x.bin"


def change(folder: Path, **other: object) -> None:
    """What the manifest says, with ``other`` values."""
    path = folder / "x.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | other))


def verified(name: Path, *more: str, expect: int = 0) -> str:
    said = " ".join(tool("inspect_data", name, "--verify", *more, expect=expect).split())
    assert expect == 0 or str(name.parent) in said
    return said


@pytest.mark.parametrize("index", [True, False], ids=["index", "bare"])
@pytest.mark.parametrize("form", CUTS)
def test_whole_files_and_what_a_damaged_id_is_known_by(tmp_path: Path, form: str, index: bool) -> None:
    name = lay_down(tmp_path, CUTS[form], index=index)
    said = verified(name)
    assert "10 tokens fill the file exactly" in said and "its counts and checksums are those of the files" in said
    assert "the largest id is 400" in said
    for path in tmp_path.glob("x*.bin"):
        whole = path.read_bytes()
        if whole:
            path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
            assert "x.bin: its SHA-256 is not the one in x.json" in verified(name, expect=2)
            path.write_bytes(whole[:-2])
            assert re.search(r"truncated|not a multiple|x\.json: says 10 tokens", verified(name, expect=2))
            path.write_bytes(whole)
    (tmp_path / "x.json").unlink()
    assert "x.json: is not there, so nothing says which ids the file should hold" in verified(
        name, *[] if index else ["--dtype", "uint16"]
    )


@pytest.mark.parametrize("form", CUTS)
def test_a_manifest_that_disagrees(tmp_path: Path, form: str) -> None:
    pair, sums = lay_down(tmp_path, CUTS[form], index=True), json.loads((tmp_path / "x.json").read_text())["sha256"]
    change(tmp_path, documents=6)
    assert "x.json: says 6 documents and 10 tokens, the files hold 5 and 10: it belongs to other files" in verified(
        pair, expect=2
    )
    change(tmp_path, documents=5, tokens=11)
    assert "says 5 documents and 11 tokens, the files hold 5 and 10" in verified(pair, expect=2)
    change(tmp_path, tokens=10, sha256=sums | {"idx": "0" * 64})
    assert "x.idx: its SHA-256 is not the one in x.json" in verified(pair, expect=2)
    change(tmp_path, sha256=sums | {"bin": "0" * 64})
    assert "x.bin: its SHA-256 is not the one in x.json" in verified(pair, expect=2)


@pytest.mark.parametrize(
    "content", ["", '{"documents": 5, "tok', "[1, 2]", '{"documents": "many", "tokens": 10, "sha256": {}}', "{}"]
)
def test_what_is_no_manifest_is_not_taken_for_one(tmp_path: Path, content: str) -> None:
    name = lay_down(tmp_path, [], index=True)
    (tmp_path / "x.json").write_text(content)
    assert "x.json: is no whole manifest of preprocessing: the files were not compared with it" in verified(name)


@pytest.mark.parametrize("form", CUTS)
def test_the_type_of_bare_ids_is_what_the_manifest_says(tmp_path: Path, form: str) -> None:
    """Ids of 32 bits read as 16 are ids of the vocabulary, half of them 0; nothing but the manifest knows."""
    name = lay_down(tmp_path, CUTS[form], index=False)
    assert open_tokens(name).read(0, 10).tolist() == IDS == open_tokens(name, vocab_size=10**6).read(0, 10).tolist()
    for path in tmp_path.glob("x*.bin"):
        path.unlink()
    np.array(IDS, np.uint32).tofile(name)
    with pytest.raises(UserError, match=r"x\.json: says 10 tokens of uint16, 20 bytes; x\.bin has 40: it is too long"):
        open_tokens(name, vocab_size=512)
    change(tmp_path, dtype="uint32")
    for vocabulary in (512, 10**6):
        assert open_tokens(name, vocab_size=vocabulary).read(0, 10).tolist() == IDS
    assert open_tokens(name, dtype="int32").read(0, 10).tolist() == IDS
    with pytest.raises(UserError, match=r"x\.bin: according to its manifest the ids are uint32, 'dtype' is uint16"):
        open_tokens(name, dtype="uint16")
