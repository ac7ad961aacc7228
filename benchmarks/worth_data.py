#!/usr/bin/env python3
"""The data of configs/experiments/worth_mini.yml, in runs/worth_data: python benchmarks/worth_data.py make | select

make      real text that is on every machine with torch as token files (prose, code, C++ headers), a spoiled source, one that is
          there ten times, and pools for selection
select    what of these is read, by megarewarm score-data and select-data; needs the runs 'upstream' of the experiment

docs/worth.md has the commands in their order. Files that are there are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megarewarm.config.experiment import Experiment, load_experiment
from megarewarm.config.load import read_configs
from megarewarm.console import make_console
from megarewarm.data.files.document_table import DocumentTable, table_path, write_table
from megarewarm.data.files.manifest import manifest_of
from megarewarm.data.files.token_file import TokenFile, TokenFileWriter, open_tokens
from megarewarm.lab.experiment import prepare

CONFIG = ROOT / "configs/experiments/worth_mini.yml"
HEADERS_MB = 5.0
SIZES = {
    "code": 120_000,
    "spoiled": 120_000,
    "tenfold": 4_000,
    "diet": 240_000,
    "other": 210_000,
    "often": 30_000,
    "pool": 900_000,
}
"""Tokens that each takes of the pieces of code_train, one after another."""
PIECE = 256
"""Tokens of a document: whole files of code are few and long, and selection is about many documents."""
COPIES = 10
DROPPED = (1, 3, 5, 10)
KEPT = (75, 50, 25)


def make(experiment: Experiment) -> None:
    folder = Path(experiment.config.data_folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "headers.jsonl").exists():
        with open(folder / "headers.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in headers())
    prepare(experiment, make_console())
    files = open_tokens(folder / "code_train")
    write(folder / "pieces", pieces(files), files)
    code = open_tokens(folder / "pieces")
    parts, first = {}, 0
    for name, size in SIZES.items():
        last = int(np.searchsorted(code.offsets, code.offsets[first] + size))
        parts[name], first = np.arange(first, last), last
        if last > code.num_documents:
            raise SystemExit(f"{code.path} has {code.total_tokens:,} tokens, too few: raise prepare.corpora.code.limit_mb")
    random = np.random.default_rng(23)
    if not table_path(folder / "code").exists():
        write_table(folder / "code", DocumentTable("list", parts["code"], {"name": "one of five sources"}), code)
    write(folder / "spoiled", [shuffled(code.document(int(i)), random) for i in parts["spoiled"]], code)
    write(folder / "tenfold", documents(code, np.tile(parts["tenfold"], COPIES)), code)
    write(folder / "diet", documents(code, parts["diet"]), code)
    write(folder / "pool", documents(code, parts["pool"]), code)
    # half of the copies are near duplicates: one token in two hundred is another one
    once = np.concatenate([parts["other"], parts["often"]])
    copies = [document for k in range(COPIES - 1) for document in documents(code, parts["often"], random if k % 2 else None)]
    everything = [*documents(code, once), *copies]
    write(folder / "mix", [everything[i] for i in random.permutation(len(everything))], code)
    write(folder / "clean", documents(code, once), code)


def headers() -> Iterator[str]:
    """C++ of torch's headers, the files in the order of their hashed names."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    include = Path(spec.submodule_search_locations[0], "include")
    size = 0.0
    for path in sorted(include.rglob("*.h"), key=lambda path: hash_of(str(path.relative_to(include)))):
        text = path.read_text(encoding="utf-8", errors="replace")
        if size < HEADERS_MB * 1e6:
            size += len(text.encode())
            yield text


def pieces(files: TokenFile) -> Iterator[np.ndarray]:
    """The documents cut into pieces, each with the end of its document after it."""
    for number in range(files.num_documents):
        ids = files.document(number)
        for first in range(0, len(ids) - 1, PIECE):
            yield np.concatenate([ids[:-1][first : first + PIECE], ids[-1:]])


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def documents(
    file: TokenFile, numbers: npt.NDArray[np.int64], random: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """The documents ``numbers`` of ``file``; ``random`` draws one token in two hundred again, from the same document."""
    for number in numbers.tolist():
        ids = file.document(number)
        if random is not None and len(ids) > 2:
            ids = ids.copy()
            places = np.flatnonzero(random.random(len(ids) - 1) < 0.005)
            ids[places] = ids[random.integers(len(ids) - 1, size=len(places))]
        yield ids


def shuffled(ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The tokens of a document in a random order, its end where it was."""
    return np.concatenate([random.permutation(ids[:-1]), ids[-1:]])


def write(prefix: Path, texts: Iterator[np.ndarray] | list[np.ndarray], like: TokenFile) -> None:
    """A token file with a manifest that says the tokenizer, as that of ``like``."""
    if prefix.with_suffix(".idx").exists():
        return
    with TokenFileWriter(prefix, like.dtype) as writer:
        for ids in texts:
            writer.add_document(ids)
    said = manifest_of(like.path) or {}
    counts = {"documents": writer.num_documents, "tokens": writer.num_tokens, "dtype": writer.dtype.name}
    manifest = counts | {key: said[key] for key in ("tokenizer", "eod") if key in said}
    prefix.with_suffix(".json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    print(f"{prefix}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens")


def select(experiment: Experiment) -> None:
    folder = Path(experiment.config.data_folder)
    model = Path(experiment.folder) / "seed_1/upstream"
    command("score-data", folder / "diet", "--with", model, made=folder / "diet.loss")
    for share in DROPPED:
        for end in ("easiest", "hardest"):
            out = folder / f"diet_{end}_{share}"
            how = "--score", folder / "diet.loss", f"--drop-{end}", f"{share}%"
            command("select-data", folder / "diet", "--output", out, *how, "--as-manifest", made=out)
        at_random(folder / "diet", folder / f"diet_random_{share}", share)
    for share in KEPT:
        out = folder / f"pool_d4_{share}"
        steps = ["--semantic", "75%", *([] if share == 75 else ["--diverse", f"{share / 75:.6f}"])]
        command("select-data", folder / "pool", "--output", out, *steps, "--embed", model, "--as-manifest", made=out)
    out = folder / "mix_selected"
    command("select-data", folder / "mix", "--output", out, "--exact", "--near", "0.8", "--as-manifest", made=out)


def at_random(path: Path, out: Path, share: int) -> None:
    """A list of all documents but ``share`` percent, drawn at random."""
    if not table_path(out).exists():
        file = open_tokens(path)
        order = np.random.default_rng(share).permutation(file.num_documents)
        kept = np.sort(order[round(file.num_documents * share / 100) :])
        write_table(out, DocumentTable("list", kept, {"name": "at random"}), file)


def command(*words: object, made: Path) -> None:
    """A command of megarewarm, unless its result is there."""
    if not table_path(made).exists():
        print("megarewarm", *words, flush=True)
        subprocess.run([sys.executable, "-m", "megarewarm", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "select"))
    experiment = load_experiment(*read_configs([str(CONFIG)]))
    {"make": make, "select": select}[parser.parse_args().what](experiment)


if __name__ == "__main__":
    main()
