"""The completion script of a shell, from the parsers of all commands: eval "$(megarewarm completion bash)\""""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from megarewarm.arguments import Parser
from megarewarm.cli import COMMANDS

_BASH = """\
_megarewarm() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  case "${{COMP_WORDS[1]}} $before" in
{choices}
    *) case "$word" in -*) case "${{COMP_WORDS[1]}}" in
{options}
       esac ;; esac ;;
  esac
  if [ "$COMP_CWORD" = 1 ]; then words={commands}; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _megarewarm megarewarm
"""


def command_line() -> Parser:
    parser = Parser(
        description='Print a completion script: eval "$(megarewarm completion bash)" in ~/.bashrc, or zsh in ~/.zshrc.'
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(words: Sequence[str]) -> None:
    shell = command_line().parse_args(words).shell
    parsers = {name: command.load().command_line() for name, command in COMMANDS.items()}
    if shell == "fish":
        print(_fish(parsers))
        return
    options = [f"         {name}) words={shlex.quote(' '.join(_options(parser)))} ;;" for name, parser in parsers.items()]
    choices = [
        f"    {shlex.quote(f'{name} {option}')}) words={shlex.quote(' '.join(map(str, action.choices)))} ;;"
        for name, parser in parsers.items()
        for action in parser._actions
        for option in action.option_strings
        if action.choices is not None
    ]
    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(
        _BASH.format(choices="\n".join(choices), options="\n".join(options), commands=shlex.quote(" ".join(COMMANDS))), end=""
    )


def _options(parser: Parser) -> list[str]:
    return [
        option
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        for option in action.option_strings
        if option.startswith("--")
    ]


def _fish(parsers: dict[str, Parser]) -> str:
    lines = [
        f"complete -c megarewarm -n __fish_use_subcommand -a {name} -d {shlex.quote(COMMANDS[name].about)}" for name in parsers
    ]
    for name, parser in parsers.items():
        for action in parser._actions:
            for option in action.option_strings:
                if option.startswith("--"):
                    values = f" -xa {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices is not None else ""
                    lines.append(f"complete -c megarewarm -n '__fish_seen_subcommand_from {name}' -l {option[2:]}{values}")
    return "\n".join(lines)
