"""The examples run as they stand, each in a process of its own, and the notebook's cells in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(code: list[str], place: Path) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, *code], cwd=place, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_data(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (tmp_path / "texts" / f"{page.stem}.txt").write_text(page.read_text()[:4000])
    shown = run([str(EXAMPLES / "own_data.py"), "texts", "out"], tmp_path)
    assert "10,240 tokens in 40 steps" in shown and "step 40: loss" in shown and "on all of the text" in shown


def test_add_schedule(tmp_path: Path) -> None:
    shown = run([str(EXAMPLES / "add_schedule.py"), "all.png"], tmp_path)
    assert shown.startswith("200 steps, peak 0.0003, last 3e-05") and (tmp_path / "all.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks(tmp_path: Path, path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "clear the outputs before committing"
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code)
    assert "bits per byte, over" in run([str(tmp_path / "notebook.py")], tmp_path)


def test_the_list_of_examples_is_complete() -> None:
    text = (EXAMPLES / "README.md").read_text()
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert all(f"]({name})" in text for name in names) and len(names) == 3
