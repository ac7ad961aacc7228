"""Importing this makes a checkout's packages importable, installed or not: 'python tools/X.py' works from anywhere.

Where this Python lacks a package that they need, the .venv that launch.sh made takes over; without one, a line says what to do.
Run as a script it says by its exit code whether this Python has all of them (tools/environment.sh asks so).
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
NEEDED = [
    "torch",
    "numpy",
    "pydantic",
    "yaml",
    "rich",
    "safetensors",
    "tokenizers",
    "orjson",
    "tensorboard",
]


def missing() -> list[str]:
    """The packages of ``NEEDED`` that this Python lacks; also what is wrong with its version."""
    old = [] if sys.version_info >= (3, 11) else ["Python 3.11"]
    return old + [name for name in NEEDED if find_spec(name) is None]


def hand_over() -> None:
    """Go on in .venv, with the same words, unless this is it."""
    python = ROOT / ".venv" / "bin" / "python"
    if os.path.realpath(sys.prefix) != os.path.realpath(ROOT / ".venv") and os.access(python, os.X_OK):
        words = getattr(sys, "orig_argv", ["", *sys.argv])[1:]  # with -u and the like; Python 3.9 has none
        os.execv(python, [str(python), *words])  # noqa: S606 - our own environment, no shell


def not_installed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for a package that is missing, Python's own words for everything else."""
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in NEEDED:
        what = f"{Path(sys.argv[0]).name}: this Python ({sys.executable}) has no package '{error.name}'"
        print(f"{what}; run 'sh {ROOT / 'tools' / 'environment.sh'}' once, which makes {ROOT / '.venv'}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    raise SystemExit(bool(missing()))
if missing():
    hand_over()
    sys.excepthook = not_installed
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megarewarm.process import begin  # noqa: E402

begin()


def run(command: str) -> NoReturn:
    """Run ``megarewarm COMMAND`` under the name of the tool that was started."""
    from megarewarm.cli import run_command

    run_command(command, sys.argv[1:], os.path.basename(sys.argv[0]))
