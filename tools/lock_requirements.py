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

import json
import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
HEADER = """\
# The test environment by hashes; written by tools/lock_requirements.py, installed by 'tools/environment.sh hashed'.
# torch is the CPU build for CPython 3.11 on Linux x86-64.
"""


def lines_of(reports: list[Path]) -> tuple[list[str], list[str]]:
    """``name==version --hash=sha256:...`` of every package, by name: of wheels, and of sources.

    Raises ``SystemExit`` where reports contradict each other.
    """
    versions: dict[str, str] = {}
    hashes: dict[str, set[str]] = {}
    sources = set()
    for number, report in enumerate(reports):
        for item in json.loads(report.read_text())["install"]:
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            if "dir_info" in item["download_info"] or (name == "torch" and number > 0 and name in versions):
                continue  # megarewarm itself is a folder
            version = item["metadata"]["version"].partition("+")[0]
            if versions.setdefault(name, version) != version:
                sys.exit(f"{report}: {name} {version}, another report has {versions[name]}")
            hashes.setdefault(name, set()).add(item["download_info"]["archive_info"]["hashes"]["sha256"])
            if not item["download_info"]["url"].endswith(".whl"):
                sources.add(name)
    lines = {
        name: " \\\n    ".join([f"{name}=={versions[name]}", *(f"--hash=sha256:{value}" for value in sorted(hashes[name]))])
        for name in sorted(versions)
    }
    wheels = [line for name, line in lines.items() if name not in sources]
    return wheels, [line for name, line in lines.items() if name in sources]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    wheels, sources = lines_of([Path(word) for word in sys.argv[1:]])
    for name, lines in (("requirements.txt", wheels), ("requirements_source.txt", sources)):
        (TESTS / name).write_text(HEADER + "".join(f"{line}\n" for line in lines))
        print(TESTS / name)
