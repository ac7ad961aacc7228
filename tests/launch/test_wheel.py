"""The wheel in an environment of its own, outside of the checkout: the installed command trains, sweeps and reports."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.support.tiny import mapping

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with megarewarm's wheel; what it needs is taken from the tests' environment."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = place / "source"  # a build writes into its folder
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(source)], check=True)
    files = subprocess.run(
        ["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():  # what is not committed yet
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-P", str(ROOT / name), str(source / name)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(place), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "env")], check=True)
    python = place / "env" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # where pip would find it
    (wheel,) = place.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, env=environment)
    (site,) = (place / "env" / "lib").glob("python3*/site-packages")
    # .pth files in there are not followed, so that the checkout stays out of it
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return place / "env" / "bin"


def megarewarm(installed: Path, place: Path, *words: str, code: int = 0) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(place), "OMP_NUM_THREADS": "1"}
    command = [str(installed / "megarewarm"), *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@pytest.mark.launch
def test_a_run_a_sweep_and_a_report(installed: Path, tmp_path: Path) -> None:
    settings = mapping(tmp_path, training={"budget": 4}, evaluation={"every": 2}, folder="tiny")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    assert "complete" in megarewarm(installed, tmp_path, "train", "run.yml")
    base = {key: value for key, value in settings.items() if key not in ("name", "folder")}
    runs = [{"name": "a"}, {"name": "b", "start": {"from": "${folder}/a"}}]
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump({"experiment": "both", "base": base, "runs": runs}))
    megarewarm(installed, tmp_path, "sweep", "sweep.yml")
    assert "report.html" in megarewarm(installed, tmp_path, "report", "runs/both")
    assert (tmp_path / "runs/both/report/report.html").is_file() and (tmp_path / "runs/both/b/checkpoints").is_dir()
    place = "import megarewarm, megarewarm_kernels; print(megarewarm.__file__, megarewarm_kernels.__file__)"
    bare = {"PATH": "/usr/bin:/bin"}
    shown = subprocess.run(
        [installed / "python", "-c", place], cwd=tmp_path, env=bare, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in shown.stdout


def test_it_has_the_examples_types_and_version(installed: Path, tmp_path: Path) -> None:
    shown = megarewarm(installed, tmp_path, "configs")
    assert "configs/quickstart.yml" in shown and (tmp_path / "slurm/train.sbatch").is_file()
    assert "nothing there yet" in megarewarm(installed, tmp_path, "report", "configs/quickstart.yml", code=2)
    (site,) = (installed.parent / "lib").glob("python3*/site-packages")
    assert (site / "megarewarm/py.typed").exists() and (site / "megarewarm_kernels/py.typed").exists()
    assert megarewarm(installed, tmp_path, "--version").startswith("megarewarm ")


@pytest.mark.slow
def test_a_missing_extra_is_one_line(installed: Path, tmp_path: Path) -> None:
    """Training needs none of the extras; what needs one says which."""
    blocked = ["matplotlib", "scipy", "zstandard", "tiktoken", "sentencepiece", "pyarrow", "ftfy", "mpi4py", "transformers"]
    blocked += ["rensa", "sklearn"]
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in blocked)]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    settings = mapping(tmp_path, training={"budget": 2}, folder="tiny", evaluation={"every": 2})
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    command = [str(installed / "megarewarm")]
    done = subprocess.run(
        [*command, "train", "run.yml"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [*command, "report", "tiny"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == "the package matplotlib is not installed; pip install 'megarewarm[report]'\n"


def test_slurm_scripts_start_the_installed_command(installed: Path, tmp_path: Path) -> None:
    """With a stand-in for srun; real jobs are started from a checkout in test_slurm.py."""
    megarewarm(installed, tmp_path, "configs")
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "MEGAREWARM_SLURM": str(tmp_path / "slurm"),
        "MEGAREWARM_PYTHON": str(installed / "python"),
    }
    script = ["bash", str(tmp_path / "slurm/train.sbatch"), "run.yml"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"--wait=60 {installed}/python -u -m megarewarm train run.yml\n", done.stderr
    assert done.returncode == 0
    del environment["MEGAREWARM_SLURM"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "holds no job.sh" in done.stderr and "MEGAREWARM_SLURM" in done.stderr
