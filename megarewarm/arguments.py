"""The command line of a run, and what all commands share. Imports no other packages, so that --help answers at once."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megarewarm import __version__
from megarewarm.errors import nearest

DTYPES = ("fp32", "fp16", "bf16")
STORED_DTYPES = ("uint16", "uint32", "int32")
"""Of token ids in a file."""

FORMS = ("hf", "neox", "megarewarm")
"""Of checkpoints that are written; checkpoint/convert.py explains them."""

WIDENINGS = ("clone", "fpi", "aki")
DEEPENINGS = ("identity", "stack", "interpolate")
"""Ways to grow a checkpoint; checkpoint/grow.py explains them."""

ROW_INITS = ("mean", "weighted", "zero", "noise")
"""Ways to make rows for new tokens; checkpoint/extend_vocabulary.py explains them."""

_EPILOG = """\
Configs are merged from left to right; words of the form section.key=value override single keys.
Start it with any of:
  megarewarm train configs/quickstart.yml
  bash launch.sh configs/quickstart.yml                             (from a checkout; installs what is missing into .venv)
  python launch.sh configs/410m_rewarm.yml training.micro_batch=4
  deepspeed launch.sh configs/410m_rewarm.yml
  torchrun --nproc-per-node 8 launch.sh configs/410m_rewarm.yml
  deepspeed launch.sh 410M.yml local_setup.yml                      (files of GPT-NeoX, unchanged)
The same command after an interruption resumes the run where it stopped.
Exit codes: 0 done, 2 bad input, 3 diverged, 4 another rank was lost, 5 replicas differ, 6 out of memory, 75 time limit
reached, 128 + n stopped by signal n (both after a checkpoint was saved)."""


def path_text(text: str) -> str:
    """A path on the command line as text, for ``argparse``: shells leave ``--output=~/x`` to the program."""
    from megarewarm.config.paths import expanded

    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """'5%' or '0.05' -> 0.05, for ``argparse``."""
    from megarewarm.config.budget import share as of_percent

    try:
        value = float(of_percent(text))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share from 0 to below 1, such as 5%")
    return value


def tokens(text: str) -> int:
    """'50M' or '50M tokens' -> 50,000,000, for ``argparse``."""
    from pydantic import TypeAdapter

    from megarewarm.config.budget import Tokens

    try:
        return TypeAdapter(Tokens).validate_python(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of tokens, such as 50M") from None


def count(text: str) -> int:
    """A whole number above 0, for ``argparse``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to 2^63 - 1, for ``argparse``."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to 2^63 - 1")
    return int(text)


def rate(text: str) -> float:
    """A learning rate, for ``argparse``."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a learning rate above 0, such as 3e-4")
    return float(text)


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest option for a mistyped one and expands arguments of type ``Path``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._words: list[str] = []
        self.register("type", Path, lambda text: Path(path_text(text)))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and ``message`` on stderr, exit with code 2. Reports a mistyped option before missing ones."""
        options = [word.partition("=")[0] for word in self._words if re.match("--[a-z]", word)]
        unknown = [option for option in options if option not in self._option_string_actions]
        if unknown and "arguments are required: " in message:
            message = f"unrecognized arguments: {unknown[0]}"
        _, colon, words = message.partition("unrecognized arguments: ")
        if colon and words.startswith("-"):
            option = words.split()[0].partition("=")[0]
            message += nearest(option, self._option_string_actions) or self._key(option)
        super().error(message)

    def _key(self, option: str) -> str:
        """The hint for ``--learning-rate`` or ``--schedule.max_lr`` if the command takes keys of a run, else ''."""
        from megarewarm.config.foreign_names import ours

        name = option.lstrip("-")
        key = name if "." in name else ours(name)
        takes_keys = any(action.dest == "configs" for action in self._actions)
        return f"; keys of a run are words without dashes, such as {key}=..." if key is not None and takes_keys else ""


def run_command_line() -> Parser:
    """The options of ``megarewarm train`` and launch.sh. The DeepSpeed launcher adds ``--local_rank``."""
    parser = Parser(
        description="Continual pre-training of language models, from a run's YAML or an experiment's.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG | section.key=value", help="YAML files, then overrides")
    parser.add_argument("--quick", action="store_true", help="run the reduced experiment that the file defines under 'quick'")
    parser.add_argument(
        "--only", action="append", default=[], metavar="RUN", help="of an experiment, only this run; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan of the run and its LR curve; train nothing")
    parser.add_argument(
        "--show-config", action="store_true", help="with --dry-run: also show every key of the run, defaults included"
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="with --dry-run: list missing files and GPUs instead of failing"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"megarewarm {__version__}")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of a run: ``argv`` without the program's name."""
    return run_command_line().parse_intermixed_args(list(argv))
