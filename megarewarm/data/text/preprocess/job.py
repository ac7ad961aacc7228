"""The whole way from text files to token files: planning, tokenising by shards, assembly, publication, and going on after a
crash.

Everything is made in the folder PREFIX.parts. The files get their names when they are whole, the manifest last. What is
written depends on the input, the tokenizer and the options alone, not on how many workers there were.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megarewarm.data.files.split import PARTS
from megarewarm.data.files.token_file import dtype_for
from megarewarm.data.text.hub_tokenizer import local_tokenizer
from megarewarm.data.text.preprocess import assembly, publication, workers
from megarewarm.data.text.preprocess.documents import BadInput
from megarewarm.data.text.preprocess.publication import Written
from megarewarm.data.text.preprocess.records import STDIN, input_files, spans_of
from megarewarm.data.text.preprocess.shard import Counts, Recipe, Shard, Tokenised, finished, progress_of, tokenise
from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer
from megarewarm.errors import UserError
from megarewarm.file_lock import FileLock
from megarewarm.files import PART, write_whole

_EXAMPLES = 5


class OtherTokens(UserError):
    """What is at the output's place was made of other input or with other options."""


@dataclass(frozen=True)
class Options:
    """What is done with the text. ``split``: shares of train, valid and test; ``shuffle``: the seed, None keeps the order.

    ``format``: "pair" is .bin and .idx, "raw" the .bin alone. ``dtype``: None takes uint16 for up to 65536 ids, else int32.
    ``max_documents``: only so many, the first ones of the input. ``strict``: the first broken record ends it all.
    """

    text_key: str = "text"
    eod_token: str | None = None
    merges: str | None = None
    append_eod: bool = True
    ftfy: bool = False
    format: Literal["pair", "raw"] = "pair"
    dtype: str | None = None
    split: tuple[float, ...] | None = None
    shuffle: int | None = None
    max_documents: int | None = None
    strict: bool = False


@dataclass(frozen=True)
class Progress:
    """What is being done, how many bytes of ``total`` are done, and what this run has tokenised so far."""

    doing: str
    done: int
    total: int
    documents: int = 0
    tokens: int = 0


Tell = Callable[[Progress], None]


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    prefix: str | Path,
    options: Options | None = None,
    *,
    worker_count: int | None = None,
    threads_only: bool = False,
    mpi: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    tell: Tell = lambda _: None,
) -> list[Written]:
    """Tokenise documents into PREFIX.bin and PREFIX.idx with a manifest PREFIX.json, or PREFIX_train, PREFIX_valid, ...

    ``worker_count``: processes, or threads where the input is in one piece (None: one per core). ``threads_only`` starts no
    process. ``mpi``: the ranks of an MPI job do the work; all of them call this, those that hand out nothing get an empty
    list. ``resume`` takes up what a run that was cut off has left in PREFIX.parts. Memory does not grow with the input: at
    most a shard's run of 64 MB and the tokenizer, per worker. Raises ``UserError``, after which no output has changed.
    """
    options = options or Options()
    prefix = Path(prefix)
    count = worker_count or workers.cores()
    if mpi:
        if any(str(given) == "-" for given in inputs):
            raise UserError("--mpi can't read stdin, which only one rank receives: give files")
        with workers.mpi() as ranks:
            if ranks is None:
                return []
            return _Job(inputs, tokenizer, prefix, options, overwrite, tell, resume).run(lambda _: _given(ranks), resume)
    job = _Job(inputs, tokenizer, prefix, options, overwrite, tell, resume)
    return job.run(lambda tasks: workers.local(count, 1 if threads_only else tasks), resume)


@contextmanager
def _given(ranks: workers.Workers) -> Iterator[workers.Workers]:
    yield ranks


class _Job:
    def __init__(
        self,
        inputs: Sequence[str | Path],
        tokenizer: str | Path,
        prefix: Path,
        options: Options,
        overwrite: bool,
        tell: Tell,
        resume: bool,
    ) -> None:
        if not prefix.name:
            raise UserError(f"--output '{prefix}': expected a prefix, as data/new_train, for files of that name")
        self.files = input_files(inputs)
        self.options = options
        self.prefix = prefix
        self.folder = prefix.with_name(prefix.name + ".parts")
        self.overwrite = overwrite
        self.tell = tell
        self._unneeded = False
        self._made: list[Path] = []
        tokenizer = local_tokenizer(tokenizer)
        self.tokenizer = load_tokenizer(tokenizer, eod_token=options.eod_token, merges=options.merges)
        shares = options.split or (1.0,)
        self.names = list(PARTS[: len(shares)]) if options.split else [""]
        self.recipe = Recipe(
            tokenizer=str(tokenizer.resolve()),
            fingerprint=self.tokenizer.fingerprint(),
            merges=options.merges,
            eod_token=options.eod_token,
            text_key=options.text_key,
            append_eod=options.append_eod,
            eod=self.tokenizer.eod_id if options.append_eod else None,
            ftfy=options.ftfy,
            dtype=_dtype(options, self.tokenizer).name,
            split=tuple(zip(self.names, shares, strict=True)),
            shuffle=options.shuffle,
            strict=options.strict,
        )
        self._check(resume)

    def _check(self, resume: bool) -> None:
        if self.options.ftfy and importlib.util.find_spec("ftfy") is None:
            raise UserError("--ftfy needs the package 'ftfy': pip install ftfy")
        if self.options.max_documents is not None and STDIN in self.files and len(self.files) > 1:
            raise UserError("--max-documents does not work with stdin beside other files: give it alone")
        may_exist = self.overwrite or (resume and (publication.is_prepared(self.folder) or self._is_finished()))
        for name in self.names:
            for suffix in (".bin", ".idx", ".json"):
                path = Path(f"{self._output(name)}{suffix}")
                if path.is_dir():
                    raise UserError(f"{path} is a folder: choose another name for the output")
                if path.exists() and not may_exist:
                    raise OtherTokens(f"{path} exists: remove it, choose another name, or add --overwrite")
                if any(path.resolve() == file.resolve() for file in self.files):
                    raise UserError(f"{path} is an input: choose another name for the output")

    def _output(self, part: str) -> str:
        return f"{self.prefix}{'_' * bool(part)}{part}"

    def _shards(self) -> list[Shard]:
        shards: list[Shard] = []
        for number, path in enumerate(self.files):
            # of both times, for copying often sets the first to an older one
            status = None if path == STDIN else path.stat()
            modified = (0, 0) if status is None else (status.st_mtime_ns, status.st_ctime_ns)
            for span in spans_of(path):
                shards.append(Shard(len(shards), number, span, modified, self.options.max_documents))
        return shards

    def run(self, start: Callable[[int], AbstractContextManager[workers.Workers]], resume: bool) -> list[Written]:
        if resume and (finished_before := self._finished_before()) is not None:
            return finished_before
        shards = self._shards()
        if resume and STDIN in self.files:
            raise UserError("--resume can't read stdin again from its beginning: give files, or leave out --resume")
        with self._removed_at_the_end(), self._work_folder(resume):
            try:
                with start(len(shards)) as hands:
                    done = self._tokenise(shards, hands, resume)
                    outputs = self._assemble(done, hands)
                    digests = self._digests(outputs, hands)
                self._prepare(done, outputs, digests)
            except UserError as error:
                if isinstance(error, BadInput) or not any(self.folder.glob("[0-9]*.json")):
                    self._unneeded = True  # nothing that could be resumed
                raise
            except OSError as error:
                if any(self.folder.glob("[0-9]*.json")):
                    kept = f". {self.folder} keeps what is finished: fix that and run the same command with --resume"
                else:
                    kept = ""
                    self._unneeded = True
                raise UserError(f"{error.filename or self.prefix}: {error.strerror or error}{kept}") from error
            return self._publish()

    def _finished_before(self) -> list[Written] | None:
        """The output of an earlier run with these settings, its publication completed; None if there is none."""
        if publication.is_prepared(self.folder):
            with self._removed_at_the_end(), self._work_folder(resume=True):
                return self._publish()
        if not self._is_finished():
            return None
        return [publication.written(prefix, self._notes()) for prefix in map(self._output, self.names)]

    def _is_finished(self) -> bool:
        """Whether the outputs are there as this job would make them, and nothing is left to do."""
        if self.folder.exists():
            return False
        for name in self.names:
            wanted = json.loads(json.dumps(self._manifest(name, Counts())))
            try:
                found = json.loads(Path(f"{self._output(name)}.json").read_bytes())
                # earlier versions say less of the tokenizer, and nothing of the end
                same = wanted.pop("tokenizer")["fingerprint"] == found["tokenizer"]["fingerprint"]
            except (OSError, ValueError, KeyError, TypeError):
                return False
            compared = wanted.keys() - asdict(Counts()).keys() - ({"eod"} - found.keys())
            if not same or any(found.get(key) != wanted[key] for key in compared):
                return False
        return True

    def _publish(self) -> list[Written]:
        found = publication.publish(self.folder, self._output, self._notes())
        self._unneeded = True
        return found

    def _notes(self) -> list[str]:
        return [*([f"{(of := self.tokenizer).path}: {of.end}"] if self.options.append_eod else []), *self.tokenizer.notes]

    @contextmanager
    def _removed_at_the_end(self) -> Iterator[None]:
        """Remove the work folder, with parents that this run made and left empty, once it holds nothing useful or open."""
        try:
            yield
        finally:
            if self._unneeded:
                # a worker may be about to report progress, and on some file systems an open file stays for a while
                for _ in range(50):
                    shutil.rmtree(self.folder, ignore_errors=True)
                    if not self.folder.exists():
                        break
                    time.sleep(0.1)
                for made in self._made:
                    with contextlib.suppress(OSError):
                        made.rmdir()

    @contextmanager
    def _work_folder(self, resume: bool) -> Iterator[None]:
        """PREFIX.parts, locked, with this job's settings in it; made from scratch unless ``resume``."""
        settings = json.loads(json.dumps(asdict(self.recipe)))
        path = self.folder / "job.json"
        was_there = self.folder.exists()
        self._made = [parent for parent in self.folder.parents if not parent.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
        except BlockingIOError as error:
            raise UserError(f"{self.folder} is in use by another run: wait for it, or choose another name") from error
        except OSError as error:
            raise UserError(f"{self.folder} can't be made: {error.strerror}: choose another place for the output") from error
        with lock:
            if was_there and not resume and not self.overwrite:
                raise UserError(
                    f"{self.folder} holds the work of a run that did not end: add --resume to continue, or --overwrite to "
                    f"start over"
                )
            before = _settings(path) if resume else None
            if before is not None and before != settings:
                key = next(key for key in {**settings, **before} if before.get(key) != settings.get(key))
                raise OtherTokens(
                    f"{self.folder} was started with {key} = {before.get(key)}, this run has {settings.get(key)}: give the "
                    f"same options, or --overwrite instead of --resume to start over"
                )
            for old in self.folder.iterdir():
                if not old.name.startswith("lock") and (before is None or old.suffix in (".progress", PART)):
                    old.unlink()
            write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())
            yield

    def _tokenise(self, shards: Sequence[Shard], hands: workers.Workers, resume: bool) -> list[Tokenised]:
        limit = self.options.max_documents
        kept = {shard.number: result for shard in shards if resume and (result := finished(self.folder, shard))}
        under_way: dict[int, Shard] = {}

        def begun() -> Iterator[Shard]:
            for shard in shards:
                if shard.number not in kept:
                    under_way[shard.number] = shard
                    yield shard

        function = functools.partial(tokenise, recipe=self.recipe, folder=self.folder, threads=hands.threads)
        for shard in shards:
            if shard.span.path == STDIN:  # other processes have another one
                with ThreadPoolExecutor(1) as here:
                    own = workers.Workers(here, 1, hands.threads)
                    watch = functools.partial(self._watch, shards, {shard.number: shard}, [], kept)
                    (kept[shard.number],) = workers.in_order(own, function, [shard], watch)
        fresh = workers.in_order(hands, function, begun(), lambda: self._watch(shards, under_way, done, kept))
        done: list[Tokenised] = []
        documents = 0
        for shard in shards:
            result = kept[shard.number] if shard.number in kept else next(fresh)
            if limit is not None and documents + result.documents > limit:
                again = [replace(shard, limit=limit - documents)]
                (result,) = workers.in_order(hands, function, again)
            under_way.pop(shard.number, None)
            done.append(result)
            documents += result.documents
            if documents == limit:
                break
        fresh.close()
        self._watch(shards, {}, done, kept)
        _, examples = _left_out(done)
        if not documents:
            broken = f" {examples[0]}" if examples else ""
            raise BadInput(f"{self.prefix}: there is no document to write.{broken or ' The input is empty'}")
        return done

    def _watch(
        self, shards: Sequence[Shard], under_way: dict[int, Shard], done: Sequence[Tokenised], kept: dict[int, Tokenised]
    ) -> None:
        total = sum(shard.span.size for shard in shards)
        numbers = {result.number for result in done} | set(kept)
        said = [progress_of(self.folder, number) for number in under_way]
        whole = [result for result in done if result.number not in kept]
        self.tell(
            Progress(
                "tokenising",
                sum(shards[number].span.size for number in numbers) + sum(each[0] for each in said),
                total,
                sum(result.documents for result in whole) + sum(each[1] for each in said),
                sum(result.tokens for result in whole) + sum(each[2] for each in said),
            )
        )

    def _assemble(self, done: Sequence[Tokenised], hands: workers.Workers) -> dict[str, assembly.Output]:
        outputs: dict[str, assembly.Output] = {}
        tasks: list[assembly.Piece] = []
        for name in self.names:
            counts = _total(done, name)
            if not counts.documents:
                raise UserError(
                    f"{self._output(name)} would be empty: none of the {sum(each.documents for each in done)} documents falls "
                    f"to it; give more documents, or another --split with --overwrite"
                )
            paths = [self.folder / f"whole{'.' * bool(name)}{name}.{suffix}" for suffix in ("bin", "idx")]
            index = paths[1] if self.options.format == "pair" else None
            outputs[name] = assembly.Output(paths[0], index, self.recipe.dtype, counts.documents, counts.tokens)
            assembly.create(outputs[name])
            sources = assembly.sources_of(self.folder, done, name)
            tasks += assembly.pieces(outputs[name], sources, shuffled=self.recipe.shuffle is not None)
        total, so_far = sum(piece.bytes for piece in tasks), 0
        for size in workers.in_order(hands, assembly.write, tasks):
            so_far += size
            self.tell(Progress("putting together", so_far, total))
        return outputs

    def _digests(self, outputs: dict[str, assembly.Output], hands: workers.Workers) -> dict[Path, str]:
        paths = [path for output in outputs.values() for path in (output.data, output.index) if path is not None]
        total, so_far = sum(path.stat().st_size for path in paths), 0
        digests = {}
        self.tell(Progress("checksums", 0, total))
        for path, digest in zip(paths, workers.in_order(hands, assembly.sha256, paths), strict=True):
            digests[path] = digest
            so_far += path.stat().st_size
            self.tell(Progress("checksums", so_far, total))
        return digests

    def _prepare(self, done: Sequence[Tokenised], outputs: dict[str, assembly.Output], digests: dict[Path, str]) -> None:
        """From here on the run can only be completed."""
        skipped, examples = _left_out(done)
        whole = []
        for name, output in outputs.items():
            manifest = self._manifest(name, _total(done, name)) | {"skipped": skipped, "examples": examples}
            manifest["sha256"] = {"bin": digests[output.data]} | ({"idx": digests[output.index]} if output.index else {})
            whole.append(publication.Whole(name, output.data, output.index, manifest))
        publication.prepare(self.folder, whole)

    def _manifest(self, part: str, counts: Counts) -> dict[str, Any]:
        options = self.options
        return asdict(counts) | {
            "dtype": self.recipe.dtype,
            "append_eod": options.append_eod,
            "eod": asdict(self.tokenizer.end) if options.append_eod else None,
            "tokenizer": {"vocab_size": self.tokenizer.vocab_size} | self.tokenizer.identity().model_dump(),
            "text_key": options.text_key,
            "ftfy": options.ftfy,
            "part": part or None,
            "split": list(options.split) if options.split else None,
            "shuffle_seed": options.shuffle,
            "max_documents": options.max_documents,
            "inputs": [{"file": str(file), "bytes": 0 if file == STDIN else file.stat().st_size} for file in self.files],
        }


def _dtype(options: Options, tokenizer: Tokenizer) -> np.dtype:
    if options.dtype is None:
        return dtype_for(tokenizer.vocab_size)
    if options.dtype == "uint32" and options.format != "raw":
        raise UserError("--dtype uint32 can't be stored in an .idx: use int32, or --format raw")
    most = int(np.iinfo(options.dtype).max)
    if tokenizer.vocab_size - 1 > most:
        raise UserError(f"--dtype {options.dtype} goes to {most}, {tokenizer.path} has {tokenizer.vocab_size} ids: use int32")
    return np.dtype(options.dtype)


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found


def _total(done: Sequence[Tokenised], part: str) -> Counts:
    parts = [result.parts[part] for result in done]
    return Counts(sum(c.documents for c in parts), sum(c.tokens for c in parts), sum(c.bytes for c in parts))


def _left_out(done: Sequence[Tokenised]) -> tuple[dict[str, int], list[str]]:
    counts: Counter[str] = Counter()
    examples: list[str] = []
    for result in done:
        counts.update(result.skipped)
        examples += result.examples
    return dict(sorted(counts.items())), examples[:_EXAMPLES]
