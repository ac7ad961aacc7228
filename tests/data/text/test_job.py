"""Text files to token files: one result whoever does the work, what each option writes, and what a crash leaves behind."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarewarm.data.files.split import parse_split
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.text.preprocess import assembly, job, records, shard
from megarewarm.data.text.preprocess.job import Options, preprocess
from megarewarm.data.text.preprocess.records import BAD_JSON, EMPTY, NO_TEXT, input_files
from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer, train_bpe
from megarewarm.errors import UserError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = " ".join(f"word{i} the quick brown fox" for i in range(300))
    return train_bpe([words], 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def texts_of(seed: int, count: int) -> list[str]:
    random = np.random.default_rng(seed)
    words = ["the", "fox", "wörd", "日本", "x" * 30, "brown\n", "  ", "word7"]
    return [f"{seed}.{i} " + " ".join(random.choice(words, random.integers(0, 40))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    pack: Any = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def ids_of(bpe: Tokenizer, texts: list[str], end: bool = True) -> list[tuple[int, ...]]:
    """What the library itself says."""
    library = tokenizers.Tokenizer.from_file(str(bpe.path))
    last: list[Any] = [library.token_to_id(END)] if end else []
    return [(*library.encode(text).ids, *last) for text in texts]


def documents_of(prefix: Path) -> list[tuple[int, ...]]:
    file = open_tokens(prefix)
    return [tuple(file.document(i).tolist()) for i in range(file.num_documents)]


def tool(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def files(folder: Path, suffixes: tuple[str, ...] = (".bin", ".idx", ".json")) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in suffixes}


def test_token_files_hold_what_the_tokenizers_library_says(tmp_path: Path, bpe: Tokenizer) -> None:
    texts = ["héllo wörld", "a\u2028b\nsecond line\n", "   ", "x" * 5000, "日本語 text"]
    (written,) = preprocess([write_jsonl(tmp_path / "a.jsonl", texts)], bpe.path, tmp_path / "out")
    assert documents_of(tmp_path / "out") == ids_of(bpe, texts)
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["tokens"] == written.counts.tokens == np.fromfile(tmp_path / "out.bin", np.uint16).size
    assert manifest["bytes"] == sum(len(text.encode()) for text in texts) and manifest["documents"] == 5
    for suffix in ("bin", "idx"):
        assert manifest["sha256"][suffix] == hashlib.sha256((tmp_path / f"out.{suffix}").read_bytes()).hexdigest()
    assert manifest["tokenizer"]["fingerprint"] == bpe.fingerprint()
    assert not (tmp_path / "out.parts").exists()


def mixed_inputs(folder: Path) -> tuple[list[Path], list[str]]:
    """Files of every kind, and their texts in order."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    groups = [texts_of(i, 60) for i in range(4)]
    folder.mkdir()
    paths = [
        write_jsonl(folder / "a.jsonl", groups[0]),
        write_jsonl(folder / "b.jsonl.gz", groups[1]),
        folder / "c.parquet",
        write_jsonl(folder / "d.jsonl.zst", groups[3]),
    ]
    parquet.write_table(pyarrow.table({"n": list(range(60)), "text": groups[2]}), paths[2], row_group_size=7)
    return paths, [text for group in groups for text in group]


VARIANTS = {
    "plain": Options(),
    "split": Options(split=parse_split("6,2,2")),
    "shuffle": Options(shuffle=7),
    "shuffle-split": Options(shuffle=7, split=parse_split("0.5,0.5")),
    "some": Options(max_documents=130),
    "some-shuffled": Options(max_documents=130, shuffle=1),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_one_result_however_the_work_is_divided(
    tmp_path: Path, bpe: Tokenizer, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, texts = mixed_inputs(tmp_path / "in")
    results = []
    # whole files on one thread; small spans, runs and pieces on two processes; still smaller ones on threads
    for number, (span, run, piece, count) in enumerate([(2**26, 2**25, 2**26, 1), (700, 300, 900, 2), (61, 50, 150, 2)]):
        monkeypatch.setattr(records.spans_of, "__defaults__", (span,))
        monkeypatch.setattr(shard, "_RUN", run)
        monkeypatch.setattr(assembly, "_PIECE", piece)
        folder = tmp_path / str(number)
        threads = number == 2
        preprocess([tmp_path / "in"], bpe.path, folder / "out", options, worker_count=count, threads_only=threads)
        results.append(files(folder))
    assert results[0] == results[1] == results[2]
    names = [name.removesuffix(".bin") for name in results[0] if name.endswith(".bin")]
    found = [documents_of(tmp_path / "0" / name) for name in sorted(names)]
    expected = ids_of(bpe, texts[: options.max_documents])
    together = [document for part in found for document in part]
    assert Counter(together) == Counter(expected)
    if options == VARIANTS["plain"] or options == VARIANTS["some"]:
        assert together == expected
    if options.shuffle is not None and options.split is None:
        moved = sum(a != b for a, b in zip(together, expected, strict=True))
        assert moved > 0.9 * len(expected)
    for part in found:
        assert part, "each part of the split has documents"


def test_a_shuffle_is_uniform_enough_and_its_seed_counts(tmp_path: Path, bpe: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(400)])
    orders = []
    for seed in (1, 2):
        preprocess([source], bpe.path, tmp_path / f"out{seed}", Options(shuffle=seed))
        orders.append([int(bpe.decode(document[:-1])) for document in documents_of(tmp_path / f"out{seed}")])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(400)) and orders[0] != orders[1]
    for order in orders:
        # of the first half's places about half are held by documents of the second; the spread is 5 of 200
        assert 70 < sum(number >= 200 for number in order[:200]) < 130
        assert abs(np.corrcoef(order, range(400))[0, 1]) < 0.2


def test_the_split_goes_by_content_and_stays_when_data_are_added(tmp_path: Path, bpe: Tokenizer) -> None:
    old, new = texts_of(1, 150), texts_of(2, 50)
    sides = []
    for name, texts in (("a", old), ("b", [*new, *old])):
        preprocess([write_jsonl(tmp_path / f"{name}.jsonl", texts)], bpe.path, tmp_path / name, Options(split=(0.7, 0.3)))
        sides.append({part: Counter(documents_of(tmp_path / f"{name}_{part}")) for part in ("train", "valid")})
    assert all(sides[0][part] <= sides[1][part] for part in ("train", "valid"))
    assert 0.15 < sides[0]["valid"].total() / 150 < 0.45


@pytest.mark.parametrize("split", ["nan,1,0.5", "inf,1", "1,0", "1", "a,b", "1,-1"])
def test_shares_that_are_none(split: str) -> None:
    with pytest.raises(UserError, match="--split"):
        parse_split(split)


def test_mpi_ranks_write_the_same_bytes(tmp_path: Path, bpe: Tokenizer) -> None:
    pytest.importorskip("mpi4py")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("mpiexec is not in this environment: pip install mpich")
    _, texts = mixed_inputs(tmp_path / "in")
    options = ["--tokenizer", bpe.path, "--split", "0.6,0.4", "--shuffle"]
    alone = tool(tmp_path / "in", *options, "--output", tmp_path / "alone" / "out", "--workers", 1)
    assert alone.returncode == 0, alone.stderr
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPICH_INTERFACE_HOSTNAME": "localhost"}
    command = [mpiexec, "-n", 3, sys.executable, TOOL, tmp_path / "in", *options, "--mpi", "--output", tmp_path / "mpi" / "out"]
    ranks = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout.count("documents") == 2, "one rank speaks for all"
    assert files(tmp_path / "mpi") == files(tmp_path / "alone")
    assert sum(len(documents_of(tmp_path / "mpi" / f"out_{part}")) for part in ("train", "valid")) == len(texts)
    command[command.index("--mpi")] = "--strict"
    command.append("--mpi")
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "good"}\n{broken\n')
    refused = subprocess.run(
        [*map(str, command), "--overwrite"], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert refused.returncode == 2 and "a.jsonl:2: not valid JSON" in refused.stderr and "Traceback" not in refused.stderr


def test_stdin_nested_keys_raw_format_and_types(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = texts_of(3, 20)
    lines = "".join(json.dumps({"meta": {"body": text}, "score": float("nan")}) + "\n" for text in texts)
    done = tool("-", "--tokenizer", bpe.path, "--text-key", "meta.body", "--format", "raw", "--dtype", "uint32", "--output",
                tmp_path / "out", "--no-eod", input=lines)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out.idx").exists()
    strict = tool("-", "--tokenizer", bpe.path, "--text-key", "meta.body", "--strict", "--output", tmp_path / "strict",
                  input=lines + "not json\n")  # fmt: skip
    assert strict.returncode == 2 and "stdin:21: not valid JSON" in strict.stderr
    flat = [token for document in ids_of(bpe, texts, end=False) for token in document]
    assert np.fromfile(tmp_path / "out.bin", np.uint32).tolist() == flat
    preprocess([write_jsonl(tmp_path / "a.jsonl", texts)], bpe.path, tmp_path / "wide", Options(dtype="int32"))
    assert open_tokens(tmp_path / "wide").dtype == np.int32 and documents_of(tmp_path / "wide") == ids_of(bpe, texts)


def test_ftfy_mends_text_before_it_is_tokenised(tmp_path: Path, bpe: Tokenizer) -> None:
    ftfy = pytest.importorskip("ftfy")
    broken = "schÃ¶n â€œquotedâ€\x9d"
    assert ftfy.fix_text(broken) != broken
    preprocess([write_jsonl(tmp_path / "a.jsonl", [broken])], bpe.path, tmp_path / "out", Options(ftfy=True))
    assert documents_of(tmp_path / "out") == ids_of(bpe, [ftfy.fix_text(broken)])


def test_gpt2_vocabulary_and_merges(tmp_path: Path, bpe: Tokenizer) -> None:
    model = json.loads(bpe.path.read_text())["model"]
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "gpt2-merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    loaded = load_tokenizer(tmp_path / "gpt2-vocab.json")
    texts = [*texts_of(5, 20), f"a{END}b"]
    assert [tuple(ids.tolist()) for ids in loaded.encode_batch(texts)] == ids_of(bpe, texts, end=False)
    assert loaded.eod_id == bpe.eod_id and loaded.notes == [], "the fast path covers it"
    (tmp_path / "gpt2-merges.txt").unlink()
    with pytest.raises(UserError, match=r"gpt2-merges\.txt does not exist"):
        load_tokenizer(tmp_path / "gpt2-vocab.json")


def test_what_is_left_out_is_counted_by_reason_and_strict_stops_at_it(tmp_path: Path, bpe: Tokenizer) -> None:
    lines = ['{"text": "good"}', "{no json", '{"other": 1}', '{"text": ""}', "", '{"text": "more"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (written,) = preprocess([tmp_path / "a.jsonl"], bpe.path, tmp_path / "out")
    assert written.skipped == {EMPTY: 2, NO_TEXT: 1, BAD_JSON: 1} == json.loads((tmp_path / "out.json").read_text())["skipped"]
    assert [example.split(": ")[0] for example in written.examples] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:3"]
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON.*--strict"):
        preprocess([tmp_path / "a.jsonl"], bpe.path, tmp_path / "out", Options(strict=True), overwrite=True)
    assert files(tmp_path) == before


def test_strict_names_the_line_also_in_a_later_part_of_a_file(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts_of(1, 50))
    with open(path, "a") as file:
        file.write('{"text": 5}\n')
    monkeypatch.setattr(records.spans_of, "__defaults__", (1000,))
    with pytest.raises(UserError, match=r"a\.jsonl:51: 'text' is not a text but a number"):
        preprocess([path], bpe.path, tmp_path / "out", Options(strict=True), threads_only=True)


def test_a_killed_run_leaves_nothing_that_looks_complete_and_goes_on(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [write_jsonl(tmp_path / f"{i}.jsonl", texts_of(i, 3000)) for i in range(12)]
    options = ["--tokenizer", bpe.path, "--shuffle", "--split", "0.9,0.1", "--workers", "2"]
    assert tool(*inputs, *options, "--output", tmp_path / "whole" / "out").returncode == 0
    command = [sys.executable, str(TOOL), *map(str, inputs), *map(str, options), "--output", str(tmp_path / "cut" / "out")]
    work = tmp_path / "cut" / "out.parts"
    # killed after the first shard, and again after some more, which is known by what lies in the work folder
    for wanted in (1, 5):
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(work.glob("0*.json"))) < wanted and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not files(tmp_path / "cut"), "no file has its name"
        time.sleep(0.2)  # the workers end with their parent
        if "--resume" not in command:
            refused = tool(*command[2:])
            assert refused.returncode == 2 and "--resume" in refused.stderr and len(refused.stderr.splitlines()) == 1
            command.append("--resume")
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("0*.json")}
    assert kept
    seen: list[int] = []
    original = job.finished
    monkeypatch.setattr(job, "finished", lambda folder, part: ((result := original(folder, part)) and seen.append(1)) or result)
    preprocess(
        inputs, bpe.path, tmp_path / "cut" / "out", Options(shuffle=1234, split=(0.9, 0.1)), resume=True, threads_only=True
    )
    assert len(seen) == len(kept), "what was finished is not made again"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not work.exists()


def test_resuming_with_other_options_or_a_changed_input(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [write_jsonl(tmp_path / f"{i}.jsonl", texts_of(i, 40)) for i in range(3)]

    def pulled_out(*_: object) -> None:
        raise OSError(28, "No space left on device", "out.parts/whole.bin")

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "create", pulled_out)
        with pytest.raises(UserError, match=r"whole\.bin: No space left on device.*--resume"):
            preprocess(inputs, bpe.path, tmp_path / "out", threads_only=True)
    with pytest.raises(UserError, match=r"was started with append_eod = True, this run has False"):
        preprocess(inputs, bpe.path, tmp_path / "out", Options(append_eod=False), resume=True)
    changed = texts_of(9, 30)
    write_jsonl(inputs[1], changed)
    preprocess(inputs, bpe.path, tmp_path / "out", resume=True, threads_only=True)
    assert documents_of(tmp_path / "out") == ids_of(bpe, [*texts_of(0, 40), *changed, *texts_of(2, 40)])


BAD_CALLS = {
    "folder": (["empty"], [], "holds no file"),
    "pattern": (["*.nothing"], [], "matches no file"),
    "missing": (["nothing.jsonl"], [], "does not exist"),
    "kind": (["a.csv"], [], "no known kind"),
    "twice": (["a.jsonl", "./a.jsonl"], [], "given twice"),
    "split": (["a.jsonl"], ["--split", "0.9,x"], "--split 0.9,x"),
    "split-one": (["a.jsonl"], ["--split", "1"], "two or three shares"),
    "dtype": (["a.jsonl"], ["--dtype", "uint32"], "--format raw"),
    "key": (["a.jsonl"], ["--text-key", "body"], "no key 'body', known: text"),
    "parquet": (["a.parquet"], [], "not a whole .parquet file"),
    "column": (["b.parquet"], ["--text-key", "body"], "no column 'body', known: text"),
    "tokenizer": (["a.jsonl"], ["--merges", "none.txt"], "none.txt does not exist"),
    "tiny": (["a.jsonl"], ["--split", "0.999999,0.000001"], "would be empty"),
    "stdin": (["-"], ["--resume"], "can't read stdin again"),
    "output": (["a.jsonl", "out.json"], ["--overwrite"], "is an input"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named_in_one_line(tmp_path: Path, bpe: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a.jsonl"), ["one", "two"])
    Path("empty").mkdir()
    Path("a.csv").write_text("x")
    Path("a.parquet").write_bytes(b"PAR1 nothing")
    parquet.write_table(pyarrow.table({"text": ["x"]}), "b.parquet")
    if name == "output":
        write_jsonl(Path("out.json"), ["one"])
    inputs, more, words = BAD_CALLS[name]
    done = tool(*inputs, "--tokenizer", bpe.path, "--output", "out", *more, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if words in line]
    assert len(said) == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*.bin"))


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=3),
    max_leaves=6,
)
letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
any_line = st.one_of(
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b" ")),
    letters.map(lambda text: json.dumps({"text": text}).encode()),
    anything.map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(any_line, max_size=12), size=st.integers(1, 200))
def test_any_bytes_are_read_as_records_once_however_they_are_divided(tmp_path: Path, lines: list[bytes], size: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    whole = list(records.records(records.Span(path, 0, None, path.stat().st_size), "text"))
    divided = [record for span in records.spans_of(path, size) for record in records.records(span, "text")]
    plain = [(record.place, record.text, record.reason) for record in whole]
    assert plain == [(record.place, record.text, record.reason) for record in divided]
    assert len(whole) == sum(1 for _ in io.BytesIO(path.read_bytes()))
    for record, line in zip(whole, io.BytesIO(path.read_bytes()), strict=True):
        try:
            parsed = json.loads(line)
            expected = parsed.get("text") if isinstance(parsed, dict) else None
            expected = expected if isinstance(expected, str) and expected.encode("utf-8", "replace") else None
            if isinstance(expected, str) and any(0xD800 <= ord(letter) < 0xE000 for letter in expected):
                expected = None
        except ValueError:
            expected = None
        assert record.text == expected
        assert (record.text is None) == bool(record.reason)


def test_stdin_beside_files_is_read_whatever_the_number_of_workers(tmp_path: Path, bpe: Tokenizer) -> None:
    piped, filed = texts_of(4, 30), texts_of(5, 25)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in piped)
    write_jsonl(tmp_path / "a.jsonl", filed)
    for workers in (1, 2):
        words = ["-", tmp_path / "a.jsonl", "--tokenizer", bpe.path, "--output", tmp_path / f"o{workers}", "--workers", workers]
        done = tool(*words, input=lines)
        assert done.returncode == 0, done.stderr
        assert documents_of(tmp_path / f"o{workers}") == ids_of(bpe, [*piped, *filed])
    refused = tool("-", "--mpi", "--tokenizer", bpe.path, "--output", tmp_path / "m", input=lines)
    assert refused.returncode == 2 and "--mpi can't read stdin" in refused.stderr


def test_a_key_that_is_no_text_is_told_of_in_the_manifest(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"\\ud800": 1}\n')
    done = tool(tmp_path / "a.jsonl", "--tokenizer", bpe.path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["documents"] == 1 and "known: \\ud800" in said["examples"][0] and "a.jsonl:2" in done.stdout


@pytest.mark.parametrize("shares", [None, (0.5, 0.3, 0.2)])
def test_a_kill_while_files_get_their_names_is_made_good_by_resume(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...] | None
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts_of(6, 60))
    options = Options(split=shares)
    preprocess([source], bpe.path, tmp_path / "whole", options, threads_only=True)
    names = sorted(path.name.removeprefix("whole") for path in tmp_path.glob("whole*"))
    rename = os.replace
    for killed_at in range(3 * len(shares or "x") + 1):
        calls = itertools.count()

        def replace_or_die(source, target, killed_at=killed_at, calls=calls):
            if Path(target).parent == tmp_path and next(calls) == killed_at:
                raise KeyboardInterrupt
            rename(source, target)

        # an older output of the same name, which must not be mixed with the new one
        preprocess(
            [source], bpe.path, tmp_path / "out", Options(split=shares, append_eod=False), threads_only=True, overwrite=True
        )
        monkeypatch.setattr(os, "replace", replace_or_die)
        ended = False
        try:
            preprocess([source], bpe.path, tmp_path / "out", options, threads_only=True, overwrite=True)
            ended = True
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", rename)
        assert ended == (killed_at == 3 * len(shares or "x"))
        (written, *_) = preprocess([source], bpe.path, tmp_path / "out", options, threads_only=True, resume=True)
        assert written.counts.documents and sorted(p.name.removeprefix("out") for p in tmp_path.glob("out*")) == names
        for name in names:
            assert (tmp_path / f"out{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()


def test_resume_of_a_finished_run_says_so_and_of_another_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts_of(6, 20))
    first = preprocess([source], bpe.path, tmp_path / "out", threads_only=True)
    again = preprocess([source], bpe.path, tmp_path / "out", threads_only=True, resume=True)
    assert [each.counts for each in again] == [each.counts for each in first]
    with pytest.raises(UserError, match=r"out\.bin exists"):
        preprocess([source], bpe.path, tmp_path / "out", Options(append_eod=False), threads_only=True, resume=True)


def test_strict_leaves_nothing_behind(tmp_path: Path, bpe: Tokenizer) -> None:
    good, bad = write_jsonl(tmp_path / "a.jsonl", texts_of(6, 20)), tmp_path / "b.jsonl"
    bad.write_text('{"text": "x"}\nnot json\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2: not valid JSON"):
        preprocess([good, bad], bpe.path, tmp_path / "new/deep/out", Options(strict=True), threads_only=True)
    assert not (tmp_path / "new").exists()
    bad.write_text('{"text": "x"}\n{"text": ""}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2: the document is empty"):
        preprocess([good, bad], bpe.path, tmp_path / "new/deep/out", Options(strict=True), threads_only=True)
    bad.write_text("")
    with pytest.raises(UserError, match="no document to write"):
        preprocess([bad], bpe.path, tmp_path / "new/out", threads_only=True)
    assert not (tmp_path / "new").exists()


def test_frames_with_long_windows_are_unpacked(tmp_path: Path, bpe: Tokenizer) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts_of(7, 10)).encode()
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(lines) + packer.flush())
    preprocess([tmp_path / "a.jsonl.zst"], bpe.path, tmp_path / "out", threads_only=True)
    assert documents_of(tmp_path / "out") == ids_of(bpe, texts_of(7, 10))


def test_folders_that_a_pattern_matches_and_files_that_are_named_twice(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("in/a.jsonl", "in/sub/b.jsonl", "in/sub/c.txt"):
        write_jsonl(tmp_path / name, ["x"])
    assert input_files([f"{tmp_path}/in/*"]) == input_files([tmp_path / "in"])
    assert input_files([f"{tmp_path}/in/su*"]) == input_files([tmp_path / "in/sub"])
    assert len(input_files([f"{tmp_path}/in/**"])) == 3
    with pytest.raises(UserError, match="is given twice"):
        input_files([tmp_path / "in/a.jsonl", f"{tmp_path}/in/../in/a.jsonl"])
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match="no known kind"):
        input_files([tmp_path / "x.parquet.gz"])
    with pytest.raises(UserError, match="name is empty"):
        input_files([""])


@pytest.mark.parametrize("output", ["a.jsonl/x", ".", ""])
def test_outputs_that_can_t_be(tmp_path: Path, bpe: Tokenizer, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", texts_of(6, 2))
    done = tool("a.jsonl", "--tokenizer", bpe.path, "--output", output)
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_other_encodings(tmp_path: Path, bpe: Tokenizer) -> None:
    marked = tmp_path / "a.txt"
    marked.write_bytes(b"\xef\xbb\xbf<|endoftext|>\none\n<|endoftext|>\ntwo\n")
    preprocess([marked], bpe.path, tmp_path / "out", threads_only=True)
    assert documents_of(tmp_path / "out") == ids_of(bpe, ["one\n", "two\n"])
    wide = tmp_path / "b.jsonl"
    wide.write_text('{"text": "x"}\n' * 3, encoding="utf-16")
    with pytest.raises(UserError, match="perhaps UTF-16"):
        preprocess([wide], bpe.path, tmp_path / "wide", Options(strict=True), threads_only=True)
