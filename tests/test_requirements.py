"""The list of hashes names the versions that constraints.txt names, all that pyproject.toml wants, and a hash for each."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"^([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.M)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hashed() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("requirements.txt", "requirements_source.txt"):
        text = (ROOT / "tests" / name).read_text()
        entries = ENTRY.findall(text)
        rest = ENTRY.sub("", text)
        assert all(line.startswith("#") for line in rest.splitlines() if line), f"{name}: {rest}"
        found |= {package: version for package, version, _ in entries}
    return found


def test_versions_are_those_of_the_constraints() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    found = hashed()
    assert {normal(name): version for name, version in pinned.items()}.items() <= found.items()


def test_all_that_is_wanted_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [item for name in ("test", "deepspeed", "data", "report", "mpi", "select") for item in extras[name]]
    names = {normal(re.split(r"[><=;\[ ]", item)[0]) for item in [*project["dependencies"], *wanted]} - {"megarewarm"}
    assert names <= hashed().keys() and len(names) > 20
