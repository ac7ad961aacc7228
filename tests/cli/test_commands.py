"""The one command: every name is listed and answers --help without packages; mistyped words; completion; resources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megarewarm.cli import COMMANDS, configs
from megarewarm.config.load import read_configs
from megarewarm.errors import UserError
from megarewarm.resources import CHECKOUT, FOLDER

ROOT = Path(__file__).resolve().parents[2]


def megarewarm(*words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "megarewarm", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr if code else done.stdout


def test_the_list_names_every_command_and_each_has_its_file() -> None:
    shown = megarewarm("--help")
    assert shown == megarewarm() and all(f"\n  {name} " in shown for name in COMMANDS)
    files = {path.stem for path in (ROOT / "megarewarm/cli").glob("*.py")} - {"__init__"}
    assert {command.module for command in COMMANDS.values()} == files
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_package(name: str) -> None:
    """Only Python's own modules and megarewarm's light ones: this is what keeps it fast."""
    code = (
        "import sys\nsys.argv = ['megarewarm', sys.argv[1], '--help']\nimport megarewarm.cli\n"
        "try: megarewarm.cli.main()\n"
        "finally: print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'rich', 'pydantic', 'yaml'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: megarewarm {name}"), done.stderr
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "no command 'trian', did you mean 'train'?"),
        (["xyz"], "no command 'xyz'; 'megarewarm --help' lists the commands"),
        (["prepare", "--tokeniser", "x"], "--tokeniser, did you mean '--tokenizer'?"),
        (["report", "--outptu", "x"], "--outptu, did you mean '--output'?"),
        (["train", "--dryrun", "x.yml"], "--dryrun, did you mean '--dry-run'?"),
    ],
)
def test_mistyped_words(words: list[str], said: str) -> None:
    assert megarewarm(*words, code=2).rstrip().endswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "x", "y", "--to", "neox", "--tp", "0"], "'0' is not a whole number above 0"),
        (["generate", "x", "y", "--max-tokens", "0"], "argument --max-tokens: '0' is not a whole number above 0"),
        (["generate", "x", "y", "--top-p", "2"], "argument --top-p: '2' is not a share above 0, at most 1"),
        (
            ["generate", "x", "y", "--temperature", "-1"],
            "argument --temperature: '-1' is neither 0 (the most likely token each time) nor a number above 0",
        ),
        (["evaluate", "x", "--on", "y", "--micro-batch", "0"], "argument --micro-batch: '0' is not a whole number above 0"),
        (["continue", "x", "--on", "y", "--tokens", "1M", "--peak", "0"], "'0' is not a learning rate above 0, such as 3e-4"),
        (
            ["continue", "x", "--on", "y", "--tokens", "1M", "--peak", "nan"],
            "'nan' is not a learning rate above 0, such as 3e-4",
        ),
        (["evaluate", "x", "--on", "y", "--tokens", "0"], "'0' is not a number of tokens, such as 50M"),
        (["schedules", "x.txt"], "x.txt: expected the name of a picture, such as schedules.png"),
    ],
)
def test_values_out_of_range(words: list[str], said: str) -> None:
    assert megarewarm(*words, code=2).rstrip().endswith(said)


@pytest.mark.parametrize("seed", ["-1", "1.5", str(2**63)])
def test_seeds_out_of_range_are_refused_before_anything_is_read(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = f"argument --seed: '{seed}' is not a whole number from 0 to 2^63 - 1"
    parsers = [import_module(f"megarewarm.cli.{command.module}") for command in COMMANDS.values()]
    seeded = [p.command_line() for p in parsers if hasattr(p, "command_line") and "--seed" in p.command_line().format_help()]
    assert len(seeded) >= 6
    for parser in seeded:
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--seed", seed])
        assert told in capsys.readouterr().err


def test_every_shell_gets_every_command() -> None:
    for shell in ("bash", "zsh", "fish"):
        script = megarewarm("completion", shell)
        assert (all(name in script for name in COMMANDS) and "--upstream-within" in script) or shell == "fish"
        if program := shutil.which(shell):
            subprocess.run([program, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["re"], {"report", "replay-step"}),
        (["convert", "--to", ""], {"hf", "neox", "megarewarm"}),
        (["sweep", "--la"], {"--launcher"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    quoted = " ".join(f"'{word}'" for word in ["megarewarm", *words])
    lines = [megarewarm("completion", "bash"), f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _megarewarm"]
    script = "\n".join([*lines, 'echo "${COMPREPLY[@]}"'])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_example_configs_are_copied_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs.main([str(tmp_path)])
    copied = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert {
        tmp_path / "configs/pythia/410m.yml",
        tmp_path / "configs/llama/llama3_1b.yml",
    } <= copied and tmp_path / "slurm/job.sh" in copied
    read_configs([str(tmp_path / "configs/410m_rewarm.yml")])  # which extends its neighbour
    with pytest.raises(UserError, match="exists; add --overwrite"):
        configs.main([str(tmp_path)])
    configs.main([str(tmp_path), "--overwrite"])


def test_resources_are_the_files_of_the_checkout() -> None:
    assert CHECKOUT == ROOT
    assert os.path.samefile(FOLDER / "configs", ROOT / "configs") and os.path.samefile(FOLDER / "slurm", ROOT / "tools/slurm")


def test_deepspeeds_own_word_may_come_first(tmp_path: Path) -> None:
    """``deepspeed --module megarewarm train x.yml`` starts ``python -m megarewarm --local_rank=0 train x.yml``."""
    assert "x.yml: no such config file" in megarewarm("--local_rank=0", "train", str(tmp_path / "x.yml"), code=2)
