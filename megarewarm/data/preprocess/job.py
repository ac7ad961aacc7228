"""The whole way from text files to token files: planning, tokenising by shards, assembly, publication, and going on after a
crash.

Everything is made in the folder PREFIX.parts. The files get their names when they are whole, the manifest last. What is
written depends on the input, the tokenizer and the options alone, not on how many workers there were.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megarewarm.data.preprocess import assembly, workers
from megarewarm.data.preprocess.records import STDIN, input_files, spans_of
from megarewarm.data.preprocess.shard import Counts, Recipe, Shard, Tokenised, finished, progress_of, tokenise
from megarewarm.data.token_file import dtype_for
from megarewarm.data.tokenizers import Tokenizer, load_tokenizer, write_atomically
from megarewarm.errors import UserError

PARTS = ("train", "valid", "test")
_EXAMPLES = 5


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
    """What is being done, how many bytes of ``total`` are done, and what has been tokenised in this run so far."""

    doing: str
    done: int
    total: int
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Written:
    """A finished output: its prefix, what is in it, and what was left out of the input (of all parts together)."""

    prefix: Path
    counts: Counts
    skipped: dict[str, int]
    examples: list[str]
    notes: list[str]


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
        with workers.mpi() as ranks:
            if ranks is None:
                return []
            return _Job(inputs, tokenizer, prefix, options, overwrite, tell).run(lambda _: _given(ranks), resume)
    job = _Job(inputs, tokenizer, prefix, options, overwrite, tell)
    return job.run(lambda tasks: workers.local(count, 1 if threads_only else tasks), resume)


@contextmanager
def _given(ranks: workers.Workers) -> Iterator[workers.Workers]:
    yield ranks


def parse_split(text: str) -> tuple[float, ...]:
    """Shares of train, valid and test: "0.98,0.01,0.01". Raises ``UserError``."""
    try:
        shares = tuple(float(word) for word in text.split(","))
    except ValueError:
        shares = ()
    if not 2 <= len(shares) <= 3 or min(shares) <= 0:
        raise UserError(f"--split {text}: expected two or three shares above 0, as 0.98,0.01,0.01 (train, valid, test)")
    return tuple(share / sum(shares) for share in shares)


class _Job:
    def __init__(
        self, inputs: Sequence[str | Path], tokenizer: str | Path, prefix: Path, options: Options, overwrite: bool, tell: Tell
    ) -> None:
        self.files = input_files(inputs)
        self.options = options
        self.prefix = prefix
        self.folder = prefix.with_name(prefix.name + ".parts")
        self.overwrite = overwrite
        self.tell = tell
        self.tokenizer = load_tokenizer(tokenizer, eod_token=options.eod_token, merges=options.merges)
        shares = options.split or (1.0,)
        self.names = list(PARTS[: len(shares)]) if options.split else [""]
        self.recipe = Recipe(
            tokenizer=str(Path(tokenizer).resolve()),
            fingerprint=self.tokenizer.fingerprint(),
            merges=options.merges,
            eod_token=options.eod_token,
            text_key=options.text_key,
            append_eod=options.append_eod,
            ftfy=options.ftfy,
            dtype=_dtype(options, self.tokenizer).name,
            split=tuple(zip(self.names, shares, strict=True)),
            shuffle=options.shuffle,
            strict=options.strict,
        )
        self._check()

    def _check(self) -> None:
        if self.options.append_eod:
            _ = self.tokenizer.eod_id  # raises where none is known
        if self.options.ftfy and importlib.util.find_spec("ftfy") is None:
            raise UserError("--ftfy needs the package 'ftfy': pip install ftfy")
        for name in self.names:
            for suffix in (".bin", ".idx", ".json"):
                path = Path(f"{self._output(name)}{suffix}")
                if path.exists() and not self.overwrite:
                    raise UserError(f"{path} exists: remove it, choose another name or ask to overwrite it")
                if any(path.resolve() == file.resolve() for file in self.files):
                    raise UserError(f"{path} is an input: choose another name for the output")

    def _output(self, part: str) -> str:
        return f"{self.prefix}{'_' * bool(part)}{part}"

    def _shards(self) -> list[Shard]:
        shards: list[Shard] = []
        for number, path in enumerate(self.files):
            modified = 0 if path == STDIN else path.stat().st_mtime_ns
            for span in spans_of(path):
                shards.append(Shard(len(shards), number, span, modified, self.options.max_documents))
        return shards

    def run(self, start: Callable[[int], AbstractContextManager[workers.Workers]], resume: bool) -> list[Written]:
        shards = self._shards()
        if resume and STDIN in self.files:
            raise UserError("--resume can't read stdin again from its beginning: give files, or leave out --resume")
        with self._work_folder(resume):
            try:
                with start(len(shards)) as hands:
                    done = self._tokenise(shards, hands, resume)
                    outputs = self._assemble(done, hands)
                    digests = self._digests(outputs, hands)
            except UserError:
                if not any(self.folder.glob("[0-9]*.json")):
                    shutil.rmtree(self.folder)  # nothing that could be resumed
                raise
            except OSError as error:
                kept = f"{self.folder} keeps what is finished: run the same command with --resume when that is mended"
                raise UserError(f"{error.filename or self.prefix}: {error.strerror or error}. {kept}") from error
            written = self._publish(done, outputs, digests)
        shutil.rmtree(self.folder)
        return written

    @contextmanager
    def _work_folder(self, resume: bool) -> Iterator[None]:
        """PREFIX.parts, locked, with the settings of this job in it; made anew unless ``resume``."""
        settings = json.loads(json.dumps(asdict(self.recipe)))
        path = self.folder / "job.json"
        if self.folder.exists() and not resume and not self.overwrite:
            raise UserError(
                f"{self.folder} holds the work of a run that did not end: add --resume to go on, or --overwrite to begin again"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.folder} is in use by another run: wait for it, or choose another name") from error
            before = _settings(path) if resume else None
            if before is not None and before != settings:
                key = next(key for key in {**settings, **before} if before.get(key) != settings.get(key))
                raise UserError(
                    f"{self.folder} was begun with {key} = {before.get(key)}, this run has {settings.get(key)}: give the same "
                    f"options, or --overwrite instead of --resume to begin again"
                )
            for old in self.folder.iterdir():
                if old.name != "lock" and (before is None or old.suffix in (".progress", ".part")):
                    old.unlink()
            write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
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
            raise UserError(f"{self.prefix}: there is no document to write.{broken or ' The input is empty'}")
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

    def _publish(
        self, done: Sequence[Tokenised], outputs: dict[str, assembly.Output], digests: dict[Path, str]
    ) -> list[Written]:
        skipped, examples = _left_out(done)
        written = []
        for name, output in outputs.items():
            counts = _total(done, name)
            prefix = self._output(name)
            manifest = self._manifest(name, counts) | {"skipped": skipped, "examples": examples}
            manifest["sha256"] = {"bin": digests[output.data]} | ({"idx": digests[output.index]} if output.index else {})
            # A crash in between leaves a .bin without an index, which is refused, never an old index beside new tokens.
            for suffix in (".json", ".idx"):
                Path(f"{prefix}{suffix}").unlink(missing_ok=True)
            os.replace(output.data, f"{prefix}.bin")
            if output.index is not None:
                os.replace(output.index, f"{prefix}.idx")
            write_atomically(Path(f"{prefix}.json"), (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
            written.append(Written(Path(prefix), counts, skipped, examples, self.tokenizer.notes))
        return written

    def _manifest(self, part: str, counts: Counts) -> dict[str, Any]:
        options = self.options
        return asdict(counts) | {
            "dtype": self.recipe.dtype,
            "append_eod": options.append_eod,
            "tokenizer": {
                "file": str(self.tokenizer.path),
                "vocab_size": self.tokenizer.vocab_size,
                "fingerprint": self.tokenizer.fingerprint(),
            },
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
        raise UserError("--dtype uint32 has no code in an .idx: use int32, or --format raw")
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
