"""The command: files byte for byte, lists, the manifest, the page, stops and second starts, bad input, memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from megarewarm.cli import select_data
from megarewarm.data.files.document_table import read_table
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.files import sha256
from megarewarm.selection import desk as desk_module
from megarewarm.selection import output
from megarewarm.selection.desk import Desk
from megarewarm.selection.exact import Exact
from megarewarm.selection.near import Near
from megarewarm.selection.opening import identity, open_corpus
from megarewarm.selection.output import FORMAT
from megarewarm.selection.pipeline import select
from tests.checkpoint.test_convert import tool
from tests.support.selection import changed, contents, text, write_documents


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two inputs, a: documents 0 to 39, copies of 0 to 9; b: near copies of 10 to 19 and others; valid: 20 to 24."""
    random = np.random.default_rng(0)
    documents = [text(random, 120) for _ in range(40)]
    write_documents(tmp_path / "a", [*documents, *documents[:10]])
    write_documents(tmp_path / "b", [*(changed(ids, random, 2) for ids in documents[10:20]), *(text(random) for _ in range(9))])
    write_documents(tmp_path / "valid", documents[20:25])
    return tmp_path


def run(place: Path, *words: str, expect: int = 0) -> str:
    return tool("select_data", *words, expect=expect)


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_kept_documents_are_byte_identical(data: Path) -> None:
    before = files(data)
    said = run(
        data, f"{data}/a", f"{data}/b", "--output", f"{data}/out", "--exact", "--near", "0.8", "--unlike", f"{data}/valid"
    )
    assert "exact: dropped 10 documents" in said and "near: dropped 10 documents" in said and "unlike: dropped 5" in said
    kept = {name: contents(data / "out" / name) for name in ("a", "b")}
    for name, mine in kept.items():
        original = contents(data / name)
        assert [ids for ids in original if ids in mine] == [*mine, *[ids for ids in original[40:] if ids in mine]]
    assert len(kept["a"]) + len(kept["b"]) == 69 - 25 and not set(contents(data / "valid")) & set(kept["a"])
    manifest = json.loads((data / "out/a.json").read_text())
    assert manifest["eod"] == {"id": 0, "token": "<|endoftext|>"} and manifest["documents"] == len(kept["a"])
    assert manifest["sha256"]["bin"] == sha256(data / "out/a.bin")
    assert "its counts and checksums are those of the files" in tool("inspect_data", f"{data}/out/a", "--verify")
    after = files(data)
    assert {name: after[name] for name in before} == before and not (data / "out.work").exists()
    record = json.loads((data / "out.selection.json").read_text())
    assert [(step["name"], step["dropped_documents"], step["left_documents"]) for step in record["steps"]] == [
        ("exact", 10, 59),
        ("near", 10, 49),
        ("unlike", 5, 44),
    ]
    assert record["format"] == FORMAT and sum(each["documents"] for each in record["outputs"]) == 44
    assert record["steps"][1]["settings"]["similarity"] == 0.8 and record["libraries"]["rensa"]


def test_a_file_without_a_manifest_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "a.json").unlink()
    select_data.main([f"{data}/a", "--output", f"{data}/out", "--exact"])
    assert "a.bin: no manifest names a token that ends its documents; all tokens are content" in capsys.readouterr().err


def test_every_dropped_document_is_recorded(data: Path) -> None:
    run(data, f"{data}/a", "--output", f"{data}/out", "--exact", "--unlike", f"{data}/valid")
    with safe_open(f"{data}/out.dropped.safetensors", framework="numpy") as opened:
        rows = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        said = json.loads(opened.metadata()[FORMAT])
    assert said["steps"] == ["exact", "unlike"] and said["files"][0]["documents"] == 50
    assert rows["document"].tolist() == [*range(20, 25), *range(40, 50)]
    assert rows["step"].tolist() == [1] * 5 + [0] * 10 and rows["because"].tolist() == [-1] * 5 + list(range(10))
    assert (rows["score"] == 1).all()


def test_as_manifest_the_same_documents_are_a_list(data: Path) -> None:
    words = ["--exact", "--near", "0.8"]
    run(data, f"{data}/a", "--output", f"{data}/copied", *words)
    run(data, f"{data}/a", "--output", f"{data}/listed", *words, "--as-manifest")
    table = read_table(data / "listed", "list", open_tokens(data / "a"))
    every = contents(data / "a")
    assert [every[i] for i in table.values.tolist()] == contents(data / "copied")
    assert table.about["name"] == "selection" and "exact" in table.about and not (data / "listed.bin").exists()
    run(data, f"{data}/a", f"{data}/b", "--output", f"{data}/folder", *words, "--as-manifest")
    assert {path.name for path in (data / "folder").iterdir()} == {"a.safetensors", "b.safetensors"}


@pytest.mark.parametrize("first", [[], ["--as-manifest"]])
def test_no_selection_stays_beside_one_of_the_other_form(data: Path, first: list[str]) -> None:
    """Its files would still be read, and the new manifest would be taken for theirs."""
    words = [f"{data}/a", "--output", f"{data}/out", "--exact"]
    run(data, *words, *first)
    before = files(data)
    other = [] if first else ["--as-manifest"]
    said = run(data, *words, *other, "--overwrite", expect=2)
    assert f"{data}/out{'.safetensors' if first else '.bin'} exists and would stay beside" in said
    assert files(data) == before
    run(data, f"{data}/a", "--output", f"{data}/a", "--exact", "--as-manifest")  # beside its input it may be


def test_a_dry_run_writes_a_page_and_the_selection_goes_on_from_its_work(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{data}/a", f"{data}/b", "--output", f"{data}/out", "--exact", "--near", "0.8", "--unlike", f"{data}/valid"]
    before = files(data)
    said = run(data, *words, "--dry-run")
    new = {name for name in files(data) if name not in before}
    assert {name for name in new if not name.startswith("out.work/")} == {
        "out.selection.html"
    } and "no data were written" in said
    page = (data / "out.selection.html").read_text()
    assert page.count('<div class="pair">') == 4 + 10 + 5 and "<script" not in page
    assert "similarity 1.000" in page and "there: " in page and "Documents are shown as ids" in page
    marks = re.findall(r"<mark>(\d+)</mark>", page)
    assert len(marks) >= 20  # the changed ids of near copies
    run(data, *words, "--dry-run")  # replaces its own page
    monkeypatch.setattr(desk_module, "_append", None)  # nothing is computed again
    run(data, *words)
    assert (data / "out/a.bin").is_file() and not (data / "out.work").exists()


def test_a_second_start_after_a_kill_gives_the_same_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    documents = [text(random, 60) for _ in range(6000)]
    documents += [changed(ids, random, 1) for ids in documents[::3]] + documents[::7]
    write_documents(tmp_path / "x", documents)
    words = [f"{tmp_path}/x", "--exact", "--near", "0.7"]
    run(tmp_path, *words, "--output", f"{tmp_path}/once")
    kills = 0
    command = [sys.executable, "-m", "megarewarm", "select-data", *words, "--output", f"{tmp_path}/again"]
    for wanted in ("signatures", "groups", "new"):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if list((tmp_path / "again.work").glob(f"{wanted}*")):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        kills += process.returncode == -signal.SIGKILL
        process.communicate()
    run(tmp_path, *words, "--output", f"{tmp_path}/again", *["--overwrite"] * (kills < 3))
    assert kills >= 2
    for suffix in ("bin", "idx", "dropped.safetensors"):
        assert (tmp_path / f"again.{suffix}").read_bytes() == (tmp_path / f"once.{suffix}").read_bytes()
    one, other = (json.loads((tmp_path / f"{name}.selection.json").read_text()) for name in ("once", "again"))
    assert one["steps"] == other["steps"]


def test_a_kill_while_files_get_their_names_is_made_good(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{data}/a", f"{data}/b", "--output", f"{data}/out", "--exact"]
    real = output.move
    moved: list[Path] = []

    def move(source: Path, target: Path) -> None:
        if len(moved) == 4:
            raise OSError(28, "No space left on device", str(target))
        moved.append(target)
        real(source, target)

    monkeypatch.setattr(output, "move", move)
    assert "No space left on device" in run(data, *words, expect=2)
    assert (data / "out/a.bin").exists() and not (data / "out.selection.json").exists()
    monkeypatch.setattr(output, "move", real)
    run(data, *words)
    assert len(contents(data / "out/a")) == 40 and len(contents(data / "out/b")) == 19
    assert "exists" in run(data, *words, expect=2)


def test_ctrl_c_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Exact, "choose", interrupted)
    assert select_data.main([f"{data}/a", "--output", f"{data}/out", "--exact"]) == 130
    assert capsys.readouterr().err == f"stopped; the same command continues from {data}/out.work\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "--output", "out"], "nothing is to be selected: give --exact, --near,"),
        (["a", "--output", "out", "--near", "1.5"], "'1.5' is not a similarity from 0.1 to 1, such as 0.8"),
        (["a", "--output", "out", "--near", "most"], "'most' is not a similarity"),
        (["a", "--output", "out", "--semantic", "0", "--embed", "x"], "'0' keeps nothing"),
        (["a", "--output", "out", "--semantic", "0.5"], "--semantic and --diverse need --embed CHECKPOINT"),
        (["a", "--output", "out", "--exact", "--embed", "x"], "--embed: belongs to --semantic or --diverse"),
        (["a", "--output", "out", "--score", "loss", "--drop-easiest", "3%"], "--score loss needs --by CHECKPOINT"),
        (["a", "--output", "out", "--score", "loss", "--by", "x"], "--score needs one of --drop-easiest"),
        (["a", "--output", "out", "--exact", "--by", "x"], "--by: belongs to --score loss"),
        (["a", "--output", "out", "--exact", "--tokenizer", "x"], "--tokenizer: belongs to --dry-run"),
        (["a", "--output", "out", "--exact", "--dropeasiest", "3%"], "did you mean '--drop-easiest'?"),
        (["a", "--output", "a", "--exact"], "is the input"),
        (["a", "--output", "b", "--exact"], "b.bin exists: remove it, choose another name, or add --overwrite"),
        (["a", "--output", "a", "--exact", "--overwrite"], "nothing is changed in place"),
        (["a", "a", "--output", "out", "--exact"], "is named twice"),
        (["a", "sub/a", "--output", "out", "--exact"], "two inputs are called a"),
        (["nowhere", "--output", "out", "--exact"], "nowhere.bin does not exist"),
        (["bare.bin", "--output", "out", "--exact"], "has no .idx with the type of its ids"),
        (["empty", "--output", "out", "--exact"], "has no documents"),
        (["valid", "--output", "out", "--unlike", "a"], "--unlike: nothing is left of 5 documents"),
        (["a", "--output", "out", "--unlike", "nowhere"], "nowhere.bin does not exist"),
        (["a", "--output", "out", "--unlike-lineage", "nowhere"], "nowhere"),
        (["a", "--output", "out", "--unlike-lineage", "x", "--lineage-path", "y"], "expected NAME=PREFIX"),
        (["a", "--output", "out", "--unlike", "b", "--overlap", "2"], "is not a share"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    data: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(data)
    (data / "sub").mkdir()
    write_documents(data / "sub/a", [[1, 2]])
    (data / "bare.bin").write_bytes(b"\1\0\2\0")
    write_documents(data / "empty", [])
    before = files(data)
    shown = run(data, *words, expect=2)
    assert said in shown and "Traceback" not in shown
    assert files(data) == before and not (data / "out.work").exists()


def test_other_tokenizers_are_refused(data: Path) -> None:
    for name, fingerprint in (("a", "one"), ("b", "other"), ("valid", "other")):
        said = json.loads((data / f"{name}.json").read_text())
        (data / f"{name}.json").write_text(json.dumps(said | {"tokenizer": {"fingerprint": fingerprint, "file": name}}))
    assert "gives other ids" in run(data, f"{data}/a", f"{data}/b", "--output", f"{data}/out", "--exact", expect=2)
    said = run(data, f"{data}/a", "--output", f"{data}/out", "--unlike", f"{data}/valid", expect=2)
    assert "gives other ids" in said and not (data / "out.work").exists()


@pytest.mark.parametrize(("package", "step"), [("rensa", ["--near", "0.8"]), ("sklearn", ["--diverse", "0.5", "--embed", "x"])])
def test_a_missing_package_is_named_with_its_extra(
    data: Path, monkeypatch: pytest.MonkeyPatch, package: str, step: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    shown = run(data, f"{data}/a", "--output", f"{data}/out", "--exact", *step, expect=2)
    assert shown == f"the package {package} is not installed; pip install 'megarewarm[select]'\n"
    assert not (data / "out.work").exists()


def test_two_processes_do_not_make_one_selection(data: Path) -> None:
    from megarewarm.file_lock import FileLock

    (data / "out.work").mkdir()
    with FileLock(data / "out.work/lock"):
        said = run(data, f"{data}/a", "--output", f"{data}/out", "--exact", expect=2)
    assert "another process is making this selection" in said
    run(data, f"{data}/a", "--output", f"{data}/out", "--exact")


class Anonymous:
    """The most memory of this process, but for mapped files, while the block runs, above that at its begin. Bytes."""

    def __enter__(self) -> Anonymous:
        self.most, self._begin, self._done = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self) -> int:
        return 1024 * int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, self._now() - self._begin)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """200,000 small documents, a third of them copies: signatures alone are 72 MB, and stay on the disk."""
    random = np.random.default_rng(2)
    base = random.integers(1, 30_000, (140_000, 12)).astype(np.uint16)
    with TokenFileWriter(tmp_path / "x", np.uint16) as writer:
        for rows in (base, base[:60_000]):
            writer.add_documents(rows.reshape(-1), np.full(len(rows), 12))
    corpus = open_corpus([f"{tmp_path}/x"])
    desk = Desk(tmp_path / "work", identity(corpus))
    select(corpus, [Exact()], desk)  # what is imported and cached once
    with Anonymous() as first:
        selection = select(corpus, [Exact(), Near(0.8)], desk)
    assert int(selection.kept.sum()) == 140_000
    assert os.path.getsize(next((tmp_path / "work").glob("signatures-*.bin"))) == 140_000 * 512
    assert first.most < 250e6
    tracemalloc.start()
    select(corpus, [Exact(), Near(0.8)], desk)  # all blocks are on the disk: the arrays of numbers alone
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000 * 100
