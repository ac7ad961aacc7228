"""An experiment's runs as Slurm job arrays: one array for the runs that can start, the next for those that start from them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarewarm.config.arms import Arm
from megarewarm.errors import UserError
from megarewarm.resources import CHECKOUT, FOLDER

SCRIPTS = CHECKOUT / "tools" / "slurm" if CHECKOUT else FOLDER / "slurm"


@dataclass(frozen=True)
class Wave:
    """The runs of one array; ``job`` is its number once it is submitted."""

    arms: tuple[Arm, ...]
    list_file: Path
    job: str = ""


def waves(arms: Sequence[Arm], folder: Path) -> list[Wave]:
    """``arms`` grouped by the length of the chain of runs before each. ``folder``: the experiment's."""
    names = {arm.name for arm in arms}
    depth: dict[str, int] = {}
    for arm in arms:
        depth[arm.name] = max((depth[name] + 1 for name in arm.after if name in names), default=0)
    return [
        Wave(tuple(arm for arm in arms if depth[arm.name] == level), folder / "slurm" / f"wave_{level}.txt")
        for level in range(max(depth.values(), default=-1) + 1)
    ]


def command_of(wave: Wave, words: Sequence[str], jobs: int | None, options: Sequence[str], after: str) -> list[str]:
    """The sbatch command of a wave. ``jobs``: tasks of the array at a time, None: no limit; ``after``: the job it waits for."""
    array = f"1-{len(wave.arms)}" + (f"%{jobs}" if jobs is not None else "")
    waiting = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    output = f"--output={wave.list_file.parent}/%x-%A_%a.out"
    return [
        "sbatch",
        "--parsable",
        f"--array={array}",
        output,
        *waiting,
        *options,
        str(SCRIPTS / "experiment.sbatch"),
        str(wave.list_file),
        *words,
    ]


def submit(
    arms: Sequence[Arm],
    words: Sequence[str],
    folder: Path,
    *,
    jobs: int | None,
    options: Sequence[str],
    environment: dict[str, str],
) -> list[Wave]:
    """Submit ``arms`` in waves. ``words``: the experiment for launch.sh; ``options``: for sbatch. Raises ``UserError``."""
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        raise UserError("--launcher slurm: there is no sbatch on this machine; run this on the cluster's login node")
    place = {"MEGAREWARM_ROOT": str(CHECKOUT)} if CHECKOUT else {"MEGAREWARM_PYTHON": sys.executable}
    place["MEGAREWARM_SLURM"] = str(SCRIPTS)  # Slurm runs a copy of the script, which can't find the files next to the original
    submitted: list[Wave] = []
    for wave in waves(arms, folder):
        wave.list_file.parent.mkdir(parents=True, exist_ok=True)
        wave.list_file.write_text("".join(f"{arm.name}\n" for arm in wave.arms), encoding="utf-8")
        command = command_of(wave, words, jobs, options, submitted[-1].job if submitted else "")
        done = subprocess.run(  # noqa: S603 - sbatch with the arguments of this command line, no shell
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment | place,
            check=False,
        )
        if done.returncode:
            earlier = f"; already submitted: {', '.join(w.job for w in submitted)} (scancel cancels them)" if submitted else ""
            raise UserError(f"sbatch failed: {done.stderr.strip() or done.stdout.strip()} ({' '.join(command)}){earlier}")
        submitted.append(Wave(wave.arms, wave.list_file, done.stdout.strip().split(";")[0]))
    return submitted
