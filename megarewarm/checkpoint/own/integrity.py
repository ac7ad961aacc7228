"""Checksums of a checkpoint's files, in the form that ``sha256sum -c SHA256SUMS`` checks as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megarewarm.files import sha256
from megarewarm.parallel.agreement import gather, position
from megarewarm.parallel.collective import collective
from megarewarm.untrusted import is_name

SUMS_FILE = "SHA256SUMS"


def write_sums(checkpoint: Path, digests: Mapping[str, str]) -> None:
    """Write the checksums of a checkpoint: relative file name -> digest."""
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    (checkpoint / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def read_sums(checkpoint: Path) -> dict[str, str]:
    """File name -> digest. Raises ``ValueError`` saying what is wrong with the list itself."""
    path = checkpoint / SUMS_FILE
    try:
        content = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read ({error})") from error
    sums: dict[str, str] = {}
    if not content.endswith("\n"):
        raise ValueError(f"{path} is cut off: its last line has no end")
    for line in content.removesuffix("\n").split("\n"):  # not splitlines, to which other bytes end a line, too
        value, gap, name = line[:64], line[64:66], line[66:]
        if gap != "  " or not is_name(name) or name in sums or not all(c in "0123456789abcdef" for c in value):
            raise ValueError(f"{path} is damaged: {line[:80]!r} is no checksum")
        sums[name] = value
    return sums


@collective
def find_damage(checkpoint: Path, *, alone: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, or None where every byte is as it was written. All ranks call it, unless
    ``alone``: each reads its share of the files, all get the same answer."""
    try:
        sums = read_sums(checkpoint)
        unlisted = sorted(f.name for f in checkpoint.iterdir() if f.is_file() and f.name not in sums and f.name != SUMS_FILE)
    except (ValueError, OSError) as error:
        sums, unlisted, mine = {}, [], str(error)
    else:
        mine = ""
    if unlisted:
        mine = f"{checkpoint / unlisted[0]} is not listed in {SUMS_FILE}, which is cut off or of another checkpoint"
    rank, ranks = (0, 1) if alone else position()
    for name in _share(checkpoint, sums, rank, ranks) if not mine else []:
        if problem := _problem(checkpoint / name, sums[name]):
            mine = problem
            break
    found = [mine] if alone else gather(mine)
    return next((problem for problem in found if problem), None)


def _share(checkpoint: Path, sums: Mapping[str, str], rank: int, ranks: int) -> list[str]:
    """The files that ``rank`` reads: the largest first, each to the rank that has the least to read so far."""
    sizes = {name: (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else 0 for name in sums}
    loads, mine = [0] * ranks, []
    for name in sorted(sums, key=lambda name: (-sizes[name], name)):
        taker = loads.index(min(loads))
        loads[taker] += sizes[name] + 1
        if taker == rank:
            mine.append(name)
    return mine


def _problem(file: Path, expected: str) -> str | None:
    try:
        found = sha256(file)
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} can't be read ({error.strerror or error})"
    return None if found == expected else f"{file} is damaged (its SHA-256 is not the one in {SUMS_FILE})"
