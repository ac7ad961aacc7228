#!/usr/bin/env python3
"""tests/requirements.txt: the test environment with the SHA-256 of every file, out of what pip reports it would install.

    python -m pip install --dry-run --ignore-installed --report a.json -c constraints.txt ".[test]" setuptools wheel
    DS_BUILD_OPS=0 python -m pip install --dry-run --ignore-installed --no-build-isolation --report b.json -c constraints.txt \
        torch deepspeed
    python tools/lock_requirements.py a.json b.json

What is built from source goes into tests/requirements_source.txt: its build looks for torch, so that must be there before.

Reports of further Pythons (pip's --python-version, --only-binary=:all: and --no-deps with the versions of the first) add their
hashes; torch's are taken from the first alone, for elsewhere an index may offer another build under the same version.
"""

from __future__ import annotations

import find_megarewarm  # isort: skip
import argparse
import json
import re
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.process import run

TESTS = find_megarewarm.ROOT / "tests"
HEADER = """\
# The test environment by hashes; written by tools/lock_requirements.py, installed by 'tools/environment.sh hashed'.
# torch is the CPU build for CPython 3.11 on Linux x86-64.
"""


def lines_of(reports: list[Path]) -> tuple[list[str], list[str]]:
    """``name==version --hash=sha256:...`` of every package, by name: of wheels, and of sources.

    Raises ``UserError`` where reports contradict each other, or are none.
    """
    versions: dict[str, str] = {}
    hashes: dict[str, set[str]] = {}
    sources = set()
    for number, report in enumerate(reports):
        try:
            installed = json.loads(report.read_text(encoding="utf-8"))["install"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{report}: no report of pip's (--report FILE)") from error
        for item in installed:
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            if "dir_info" in item["download_info"] or (name == "torch" and number > 0 and name in versions):
                continue  # megarewarm itself is a folder
            version = item["metadata"]["version"].partition("+")[0]
            if versions.setdefault(name, version) != version:
                raise UserError(f"{report}: {name} {version}, another report has {versions[name]}")
            hashes.setdefault(name, set()).add(item["download_info"]["archive_info"]["hashes"]["sha256"])
            if not item["download_info"]["url"].endswith(".whl"):
                sources.add(name)
    lines = {
        name: " \\\n    ".join([f"{name}=={versions[name]}", *(f"--hash=sha256:{value}" for value in sorted(hashes[name]))])
        for name in sorted(versions)
    }
    wheels = [line for name, line in lines.items() if name not in sources]
    return wheels, [line for name, line in lines.items() if name in sources]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="JSON that pip install --report wrote")
    wheels, sources = lines_of(parser.parse_args().reports)
    for name, lines in (("requirements.txt", wheels), ("requirements_source.txt", sources)):
        (TESTS / name).write_text(HEADER + "".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(TESTS / name)


if __name__ == "__main__":
    run(main)
