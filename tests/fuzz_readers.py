"""Coverage-guided fuzzing of the readers of untrusted files: token files (.idx, .bin), text (.jsonl, .txt, .gz, .zst), and
those of hostile.py: index, checkpoint, safetensors, pickles, config, neox.

Any bytes are read rightly or refused in one clear line; anything else ends the run and leaves the input beside it. Not part of
the tests: needs the package atheris, and as much time as it is given.

    pip install atheris && python tests/fuzz_readers.py KIND [-max_total_time=600] [CORPUS_FOLDER]
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

with atheris.instrument_imports(include=["megarewarm"]):
    import zstandard

    from megarewarm.data.text.preprocess.records import Record, records, spans_of
    from megarewarm.errors import UserError
    from tests.data.test_fuzz import attempt, pair_of
    from tests.support import hostile

SUFFIXES = (".jsonl", ".txt", ".jsonl.gz", ".jsonl.zst", ".txt.gz")


def token_files(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """Two bytes say where the .idx ends and the .bin begins."""

    def test(data: bytes) -> None:
        cut = 2 + int.from_bytes(data[:2], "little") % (len(data) + 1)
        attempt(folder, data[2:cut], data[cut:])

    seeds = []
    for sizes, code, itemsize in (([], 8, 2), ([3, 0, 2], 8, 2), ([1, 9], 4, 4), ([5] * 5, 1, 1), ([2], 5, 8)):
        index, content = pair_of(sizes, code, itemsize)
        seeds.append(len(index).to_bytes(2, "little") + index + content[: sum(sizes) * itemsize])
    return test, seeds


def text(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """The first byte chooses the kind of file, the second the size of the parts that it is read in."""

    def read(path: Path, size: int) -> list[Record] | str:
        try:
            return [record for span in spans_of(path, size) for record in records(span, "text")]
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), str(error)
            return str(error)

    def test(data: bytes) -> None:
        if len(data) < 2:
            return
        path = folder / f"x{SUFFIXES[data[0] % len(SUFFIXES)]}"
        path.write_bytes(data[2:])
        whole, parts = read(path, 2**26), read(path, 1 + data[1])
        if isinstance(whole, str) or isinstance(parts, str):
            assert whole == parts
            return
        assert all((record.text is None) == bool(record.reason) for record in whole)
        assert [(record.place, record.text, record.reason) for record in parts] == [
            (record.place, record.text, record.reason) for record in whole
        ]

    lines = b'{"text": "a\\u00e9"}\n{"text": ""}\nnot json\n{"other": 1}\n\xff\xfe\n{"text": "\\ud800"}\n'
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    seeds = []
    for i, suffix in enumerate(SUFFIXES):
        pack = packed.get(Path(f"x{suffix}").suffix, lambda content: content)
        seeds.append(bytes([i, 40]) + pack(lines))
    return test, seeds


def of_hostile(kind: str) -> Callable[[Path], tuple[Callable[[bytes], object], list[bytes]]]:
    """A reader of hostile.py; what is worth putting into files comes as further seeds."""

    def begin(folder: Path) -> tuple[Callable[[bytes], object], list[bytes]]:
        os.chdir(folder)
        reader = hostile.READERS[kind]
        right = hostile.seeds()[kind]
        small = [seed for seed in right if len(seed) < 4000]
        return lambda data: reader(folder, data), [*small, *(right[0][:40] + word for word in hostile.WORDS)]

    return begin


KINDS = {"token_files": token_files, "text": text, **{kind: of_hostile(kind) for kind in hostile.READERS}}


def main() -> None:
    """Fuzz until the time is over or something is found."""
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        sys.exit(str(__doc__))
    kind = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        (folder / "work").mkdir()
        test, seeds = KINDS[kind](folder / "work")
        corpus = folder / "seeds"
        corpus.mkdir()
        for i, seed in enumerate(seeds):
            (corpus / str(i)).write_bytes(seed)
            test(seed)
        atheris.Setup([*sys.argv, str(corpus)], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
