"""Corpora for experiments: documents, divided into training and validation, tokenised with a tokenizer trained on them.

Two corpora with a real shift between them are on every machine that has torch: the documentation of installed Python
packages (``installed_prose``) and their code (``installed_code``). Others are read from the user's own text files.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from megarewarm.data.text.continuations import Continuations, make_task
from megarewarm.data.text.preprocess.documents import Documents, first_bytes
from megarewarm.data.text.preprocess.job import preprocess
from megarewarm.data.text.preprocess.python_source import split_source, strip_doctests
from megarewarm.data.text.preprocess.records import EMPTY
from megarewarm.data.text.preprocess.shard import Counts
from megarewarm.data.text.steps import PreparedSteps
from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer, train_bpe
from megarewarm.errors import UserError, nearest
from megarewarm.files import NewFile, write_whole

PROSE = "installed_prose"
CODE = "installed_code"
PACKAGES = ("torch", "sympy", "numpy", "networkx")  # torch requires the other three
PARTS = ("train", "validation")
MIN_CHARACTERS = 200  # shorter texts are not taken for documents

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much it is in all)"""

Corpus = tuple[str | Sequence[str | Path], float | None]
"""(source, limit): ``installed_prose``, ``installed_code`` or a list of .jsonl and .txt files; megabytes (10^6 bytes of
UTF-8) of text at most, of files the first ones, None: all of it."""

_FORMAT = 1  # to be raised whenever the same parameters give other documents
_LEFT_OUT = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_TEST_FILE = re.compile(r"test_.*\.py|.*_tests?\.py|conftest\.py")


@dataclass
class Prepared:
    """The contents of the folder. ``outputs``: counts by name (``prose_train`` ...); ``notes``: lines to be shown."""

    tokenizer: Path
    vocab_size: int
    outputs: dict[str, Counts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def prepare_corpora(
    folder: str | Path,
    corpora: Mapping[str, Corpus],
    *,
    vocab_size: int,
    train_on: str,
    sample_mb: float = 8.0,
    validation_fraction: float = 0.02,
    tasks: Mapping[str, tuple[str, Continuations]] | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Make FOLDER/tokenizer.json and, for each corpus, FOLDER/NAME_train and FOLDER/NAME_validation (.bin/.idx/.json).

    ``tasks``: by name (corpus, items), task files FOLDER/NAME.jsonl of the held-out text.

    A byte-level BPE of ``vocab_size`` ids is trained on the first ``sample_mb`` of the training text of ``train_on``.
    Exact duplicates are removed within a corpus; then the hash of a document decides whether it is held out, so the two
    parts are disjoint and the same on every machine that has the same text. The text stays in FOLDER/text.

    Each step is recorded in FOLDER/prepared.json with its parameters when it is complete; files with the same
    parameters are kept. Files of the user that have changed are read again. Installed packages are not: all runs of
    an experiment see the same data, though torch may be upgraded in between. To be called by one process at a time.
    Raises ``UserError``.
    """
    folder = Path(folder)
    progress = progress or (lambda description, done, total: None)
    tasks = tasks or {}
    _check(corpora, train_on, tasks)
    record = PreparedSteps(folder)
    _write_texts(record, corpora, validation_fraction, progress)

    texts = {name: record.steps[f"text/{name}"] for name in corpora}
    tokenizer = _tokenizer(record, texts[train_on], train_on, vocab_size, int(sample_mb * 1e6), progress)
    prepared = Prepared(tokenizer.path, tokenizer.vocab_size)
    for name in corpora:
        prepared.notes += [f"{name}: {note}" for note in texts[name]["notes"]]
        for part in PARTS:
            prepared.outputs[f"{name}_{part}"] = _tokenised(record, name, part, texts[name][part], tokenizer, progress)
    for name, (corpus, asked) in tasks.items():
        _task(record, name, corpus, texts[corpus]["validation"]["sha256"], asked)
    return prepared


class InstalledText:
    """(kind, document) pairs from the sources of the installed packages: ``installed_prose`` and ``installed_code``.

    Prose are docstrings without their doctests and the topics of Python's help; code are the files without their
    docstrings. Tests are left out. The order is that of hashed file names, with the packages mixed in proportion to
    their sizes all along, so what a limit leaves is a fair sample. Files are parsed once, by several processes, and not
    before they are needed. Attributes: ``bytes_read`` of ``total_bytes``, ``unparsed`` (files that aren't Python).
    """

    def __init__(self, folders: Mapping[str, Path] | None = None) -> None:
        """``folders``: the packages' folders by name; None: the standard library and ``PACKAGES``."""
        self._units = _units(folders or _package_folders())
        self.total_bytes = sum(size for _, _, size in self._units)
        self.bytes_read = self.unparsed = 0

    def __iter__(self) -> Generator[tuple[str, str], None, None]:
        self.bytes_read = self.unparsed = 0
        with closing(_parse_files([content for _, content, _ in self._units if isinstance(content, Path)])) as parsed:
            for _, content, size in self._units:
                self.bytes_read += size
                result = next(parsed) if isinstance(content, Path) else ([content], "")
                if result is None:
                    self.unparsed += 1
                    continue
                prose, code = result
                for text in map(strip_doctests, prose):
                    if len(text) > MIN_CHARACTERS:
                        yield PROSE, text
                if len(code) > MIN_CHARACTERS:
                    yield CODE, code


def _package_folders() -> dict[str, Path]:
    folders = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # finds a package without running it
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{PROSE} and {CODE} read the package '{package}', which is not installed: pip install it")
        folders[package] = Path(spec.submodule_search_locations[0])
    return folders


def _units(folders: Mapping[str, Path]) -> list[tuple[str, Path | str, int]]:
    """(package, file or text, bytes) in the order of reading: each package is spread evenly over the whole list."""
    contents: dict[str, list[tuple[str, Path | str, int]]] = {
        "pydoc_data": [(name, text, len(text.encode())) for name, text in topics.items()]
    }
    for package, root in folders.items():
        contents[package] = [(str(path.relative_to(root)), path, path.stat().st_size) for path in _source_files(root)]
    placed = []
    for package, items in contents.items():
        total, before = sum(size for _, _, size in items), 0
        for _, content, size in sorted(items, key=lambda item: _digest(f"{package}/{item[0]}".encode())):
            placed.append(((before + size / 2) / max(total, 1), package, content, size))
            before += size
    return [unit[1:] for unit in sorted(placed, key=lambda unit: unit[:2])]


def _source_files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _LEFT_OUT]
        for file in files:
            if file.endswith(".py") and not _TEST_FILE.fullmatch(file):
                yield Path(folder, file)


def _parse_files(paths: Sequence[Path]) -> Generator[tuple[list[str], str] | None, None, None]:
    """``split_source`` of each file in order, or None. Reads ahead no further than the pipes of the processes hold. Separate
    programs rather than forks: the caller may hold threads and a GPU, and may not be importable as a module."""
    processes = min(len(os.sched_getaffinity(0)), 8)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()"]
    with ExitStack() as stack:
        workers = []
        for _ in range(processes):
            worker = subprocess.Popen(  # noqa: S603 - this Python with this very module
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C is for the caller, which ends them
            )
            stack.enter_context(worker)
            stack.callback(worker.kill)
            workers.append(worker)
        for i, worker in enumerate(workers):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps([os.fspath(path) for path in paths[i::processes]]).encode())
            worker.stdin.close()
        for i in range(len(paths)):
            worker = workers[i % processes]
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line.endswith(b"\n"):
                raise RuntimeError(f"a process that parses sources ended with code {worker.wait()}")
            yield json.loads(line)


def _serve() -> None:
    """The program of one parsing process: paths come in on stdin as JSON, a line of it per path goes out on stdout."""
    gc.disable()  # syntax trees hold no cycles, and the collector takes a third of the time
    warnings.simplefilter("ignore")
    try:
        for path in json.loads(sys.stdin.buffer.read()):
            try:
                result = split_source(importlib.util.decode_source(Path(path).read_bytes()))
            except Exception:  # anything can be met in a stranger's file; the caller counts and shows them
                result = None
            sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
            sys.stdout.buffer.flush()
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # the reader is gone or going, and a normal exit would complain about the pipe


class _Text:
    """One corpus on its way to FOLDER/text: without duplicates, up to its limit, divided into the two parts."""

    def __init__(self, folder: Path, name: str, corpus: Corpus, validation_fraction: float) -> None:
        source, limit = corpus
        self.name = name
        self.kind = source if isinstance(source, str) else ""
        self.full = False
        self._limit = None if limit is None else int(limit * 1e6)
        self._threshold = int(validation_fraction * 2**64)
        self._seen: set[int] = set()
        self.bytes = self.duplicates = 0
        self.paths = [_text_file(folder, name, part) for part in PARTS]
        self._files = [NewFile(path) for path in self.paths]
        self._hashes = [hashlib.sha256() for _ in PARTS]
        self._counts = [{"documents": 0, "bytes": 0} for _ in PARTS]

    @property
    def share(self) -> float:
        """How much of the limit is reached, 0 where there is none."""
        return 1.0 if self.full else self.bytes / self._limit if self._limit else 0.0

    def add(self, text: str) -> None:
        data = text.encode()
        digest = _digest(data)
        if digest in self._seen:
            self.duplicates += 1
            return
        if self._limit is not None and self.bytes + len(data) > self._limit:
            self.full = True
            return
        self._seen.add(digest)
        self.bytes += len(data)
        part = int(digest < self._threshold)
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        self._files[part].file.write(line)
        self._hashes[part].update(line)
        self._counts[part]["documents"] += 1
        self._counts[part]["bytes"] += len(data)

    def publish(self) -> dict[str, dict[str, Any]]:
        for part, counts in zip(PARTS, self._counts, strict=True):
            if not counts["documents"]:
                total = sum(counts["documents"] for counts in self._counts)
                raise UserError(
                    f"corpus '{self.name}': none of its {total} documents ({self.bytes} bytes) falls to {part}: give "
                    f"more documents (a .txt is divided by lines '<|endoftext|>') or another validation_fraction"
                )
        for file in self._files:
            file.publish()
        digests = [{"sha256": digest.hexdigest()} for digest in self._hashes]
        return {part: self._counts[i] | digests[i] for i, part in enumerate(PARTS)}

    def close(self) -> None:
        for file in self._files:
            file.close()


def _write_texts(record: PreparedSteps, corpora: Mapping[str, Corpus], fraction: float, progress: Progress) -> None:
    keys = {name: _text_key(corpus, fraction) for name, corpus in corpora.items()}
    missing = {name: corpus for name, corpus in corpora.items() if not record.stands(f"text/{name}", keys[name])}
    (record.folder / "text").mkdir(parents=True, exist_ok=True)
    for name in missing:
        record.forget(f"text/{name}")
    installed = [name for name, (source, _) in missing.items() if isinstance(source, str)]
    groups = [installed] if installed else []  # these share one reading
    for names in groups + [[name] for name in missing if name not in installed]:
        with ExitStack() as stack:
            texts = [stack.enter_context(closing(_Text(record.folder, name, corpora[name], fraction))) for name in names]
            source, _ = corpora[names[0]]
            if isinstance(source, str):
                scan = InstalledText()
                _fill(texts, iter(scan), scan, "reading installed packages", progress)
                notes = [f"{scan.unparsed} files are not valid Python and are left out"] if scan.unparsed else []
                facts: dict[str, Any] = {"packages": _versions()}
            else:
                documents = Documents(source)
                _fill(texts, (("", text) for text in documents), documents, f"reading {names[0]}", progress)
                skipped = documents.skipped
                empty = skipped.counts[EMPTY]
                notes = [f"{empty} documents are empty and are left out"] if empty else []
                if skipped.broken:
                    notes.append(f"{skipped.broken} records are broken and are left out: {skipped.examples[0]}")
                facts = {"inputs": [str(path) for path in documents.paths]}
            for text in texts:
                parts = text.publish()
                facts |= parts | {"duplicates": text.duplicates, "notes": notes}
                record.finish(f"text/{text.name}", keys[text.name], text.paths, facts)


def _fill(
    texts: list[_Text],
    source: Generator[tuple[str, str], None, None],
    reader: InstalledText | Documents,
    description: str,
    progress: Progress,
) -> None:
    """Read until the source ends or all ``texts`` are full. The bar shows the one that is furthest behind."""
    total = max(reader.total_bytes, 1)
    shown = -1
    with closing(source):
        for kind, document in source:
            for text in texts:
                if text.kind == kind and not text.full:
                    text.add(document)
            if all(text.full for text in texts):
                break
            done = reader.bytes_read / total
            behind = min(max(done, text.share) for text in texts)
            if int(behind * 500) > shown:
                shown = int(behind * 500)
                progress(description, int(behind * total), total)
    progress(description, total, total)


def _tokenizer(
    record: PreparedSteps, text: Mapping[str, Any], train_on: str, vocab_size: int, sample_bytes: int, progress: Progress
) -> Tokenizer:
    path = record.folder / "tokenizer.json"
    key = _key(vocab_size, sample_bytes, text["train"]["sha256"])
    if record.stands("tokenizer", key):
        return load_tokenizer(path)
    record.forget("tokenizer")
    sample = Documents([_text_file(record.folder, train_on, "train")])
    size = min(sample_bytes, text["train"]["bytes"])
    texts = first_bytes(sample, size, lambda done: progress("training the tokenizer", done, size))
    tokenizer = train_bpe(texts, vocab_size, path)
    record.finish("tokenizer", key, [path], {"vocab_size": vocab_size, "train_on": train_on, "sample_bytes": size})
    return tokenizer


def _tokenised(
    record: PreparedSteps, name: str, part: str, text: Mapping[str, Any], tokenizer: Tokenizer, progress: Progress
) -> Counts:
    step = f"{name}_{part}"
    key = _key(text["sha256"], tokenizer.fingerprint())
    if not record.stands(step, key):
        record.forget(step)
        (written,) = preprocess(
            [_text_file(record.folder, name, part)],
            tokenizer.path,
            record.folder / step,
            threads_only=True,  # the caller may hold a GPU, and may not be importable as a module
            overwrite=True,
            tell=lambda done: progress(f"{done.doing} {step}", done.done, done.total),
        )
        files = [record.folder / f"{step}.{suffix}" for suffix in ("bin", "idx", "json")]
        record.finish(step, key, files, asdict(written.counts))
    facts = record.steps[step]
    return Counts(facts["documents"], facts["tokens"], facts["bytes"])


def _task(record: PreparedSteps, name: str, corpus: str, digest: str, asked: Continuations) -> None:
    step, key, path = f"task/{name}", _key(digest, asdict(asked)), record.folder / f"{name}.jsonl"
    if not record.stands(step, key):
        record.forget(step)
        text = _text_file(record.folder, corpus, "validation")
        write_whole(path, make_task(Documents([text]), asked, f"task '{name}': {text}").lines)
        record.finish(step, key, [path], {"corpus": corpus})


def _check(corpora: Mapping[str, Corpus], train_on: str, tasks: Mapping[str, tuple[str, Continuations]]) -> None:
    if train_on not in corpora:
        raise UserError(f"the tokenizer trains on '{train_on}', which is no corpus{nearest(train_on, corpora)}")
    for name, (corpus, _) in tasks.items():
        if corpus not in corpora:
            raise UserError(f"task '{name}': from '{corpus}', which is no corpus{nearest(corpus, corpora)}")
    for name in (*corpora, *tasks):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"corpus or task '{name}': a name consists of letters, digits, '_' and '-'")
    for name, (source, _) in corpora.items():
        if isinstance(source, str) and source not in (PROSE, CODE):
            hint = nearest(source, (PROSE, CODE)) or "; files are given as a list"
            raise UserError(f"corpus '{name}': '{source}' is neither {PROSE} nor {CODE}{hint}")


def _text_key(corpus: Corpus, fraction: float) -> str:
    source, limit = corpus
    if isinstance(source, str):
        return _key(_FORMAT, source, limit, fraction)
    paths = Documents(source).paths  # refuses missing files
    known = [(path.resolve(), path.stat()) for path in paths]
    # with the time of change beside that of the contents, which copying often sets to an older one
    files = [(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns) for path, status in known]
    return _key(_FORMAT, files, limit, fraction)


def _text_file(folder: Path, name: str, part: str) -> Path:
    return folder / "text" / f"{name}_{part}.jsonl"


def _key(*parameters: Any) -> str:
    return hashlib.sha256(json.dumps(parameters).encode()).hexdigest()


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
