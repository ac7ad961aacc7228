"""The command ``megarewarm train | prepare | report | ...``: the list of commands, and how one is started.

A command is a module of this package with ``command_line()``, its parser, and ``main(words)``, which returns an exit code.
Neither imports packages outside the standard library until ``main`` has parsed ``words``, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, NoReturn

from megarewarm import __version__
from megarewarm.errors import EXIT_BAD_INPUT, nearest
from megarewarm.process import begin, run, say


class Command(NamedTuple):
    """``module``: in this package; ``about``: its line in the list; ``stopped``: the line that it prints after Ctrl-C."""

    module: str
    about: str
    stopped: str = "stopped"

    def load(self) -> ModuleType:
        return import_module(f"{__name__}.{self.module}")


_NOTHING_WRITTEN = "stopped; nothing was written"

COMMANDS: dict[str, Command] = {
    "train": Command("train", "train a run or an experiment; the same command resumes it"),
    "continue": Command("continue_run", "from a checkpoint and a folder of text to a re-warmed model"),
    "prepare": Command("prepare", "tokenise text into token files"),
    "tokenizer": Command("tokenizer", "train a tokenizer", _NOTHING_WRITTEN),
    "extend-tokenizer": Command(
        "extend_tokenizer", "add tokens to a tokenizer: merges continued on new text", _NOTHING_WRITTEN
    ),
    "inspect-data": Command("inspect_data", "inspect, check and compare token files"),
    "merge-data": Command("merge_data", "join token files", _NOTHING_WRITTEN),
    "score-data": Command("score_data", "score the documents of a token file with a checkpoint"),
    "make-task": Command("make_task", "which continuation is real: a task file of held-out text", _NOTHING_WRITTEN),
    "select-data": Command("select_data", "choose documents: not duplicate, tested or read before"),
    "sweep": Command("sweep", "run an experiment, several runs at a time, here or on Slurm"),
    "watch": Command("watch", "follow runs live in the terminal"),
    "report": Command("report", "draw and compare runs, or the arms of an experiment"),
    "values": Command("values", "say which training data lowered which validation loss"),
    "advise": Command("advise", "say which arm of an experiment is best and what to run next"),
    "plan": Command("plan", "rank the layouts of a run on a cluster"),
    "inspect": Command("inspect_checkpoint", "inspect a checkpoint, or compare two"),
    "convert": Command("convert", "convert a checkpoint: Hugging Face, GPT-NeoX, megarewarm"),
    "choose-start": Command("choose_start", "compare checkpoints as starts of a run"),
    "merge": Command("merge_checkpoints", "average or interpolate checkpoints"),
    "grow": Command("grow_checkpoint", "grow a checkpoint into a wider or deeper model", _NOTHING_WRITTEN),
    "extend-vocabulary": Command("extend_vocabulary", "give a checkpoint rows for an extended tokenizer", _NOTHING_WRITTEN),
    "generate": Command("generate", "continue a text with a checkpoint"),
    "evaluate": Command("evaluate", "measure a checkpoint: losses, accuracies on tasks"),
    "replay-step": Command("replay_step", "recompute one step of a run to inspect it"),
    "convert-config": Command("convert_config", "convert GPT-NeoX files to a megarewarm config"),
    "schedules": Command("schedules", "draw every learning-rate schedule into one picture"),
    "configs": Command("configs", "copy the example configs into a folder", _NOTHING_WRITTEN),
    "completion": Command("completion", "print the completion script of a shell"),
}


def main() -> NoReturn:
    """The installed command: ``sys.argv`` is ``megarewarm COMMAND ...``."""
    begin()
    words = sys.argv[1:]
    # DeepSpeed's launcher (deepspeed --module megarewarm train ...) puts its own word first
    launcher = [word for word in words[:1] if word.startswith(("--local_rank=", "--local-rank="))]
    words = [*words[len(launcher) :], *launcher]
    if not words or words[0] in ("-h", "--help", "help"):
        run(_show_help)
    if words[0] == "--version":
        run(lambda: print(f"megarewarm {__version__}"))
    run_command(words[0], words[1:])


def run_command(name: str, words: Sequence[str], program: str | None = None) -> NoReturn:
    """Run one command and end the process with its exit code. ``program``: its name in the usage line."""
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or "; 'megarewarm --help' lists the commands"
        say(f"megarewarm: no command '{name}'{hint}")
        raise SystemExit(EXIT_BAD_INPUT)
    command = COMMANDS[name]
    sys.argv = [program or f"megarewarm {name}", *words]  # argparse takes the program's name from here
    run(lambda: command.load().main(words), stopped=command.stopped)


def _show_help() -> None:
    print("usage: megarewarm COMMAND [...]\n\nContinual pre-training of language models: re-warm, re-decay, replay.\n")
    width = max(map(len, COMMANDS))
    print(*(f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()), sep="\n")
    print(
        "\n'megarewarm COMMAND --help' shows a command's options."
        "\nFirst steps: megarewarm configs; megarewarm train configs/quickstart.yml"
    )
