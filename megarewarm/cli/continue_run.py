"""From a checkpoint and text to a re-warmed model: megarewarm continue CHECKPOINT --on TEXT [...] --tokens 50M

Tokenises the text with the checkpoint's own tokenizer, holds out a validation set, writes the run's YAML, trains it, and writes
its report. You can edit the YAML and train it again (megarewarm train); the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarewarm.arguments import Parser, path_text, rate, share, tokens
from megarewarm.errors import UserError
from megarewarm.process import importing
from megarewarm.spelling import counted

if TYPE_CHECKING:
    from rich.console import Console


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path_text, help="folder or hub name, as for start.from: EleutherAI/pythia-160m")
    parser.add_argument(
        "--on",
        type=path_text,
        nargs="+",
        required=True,
        metavar="TEXT",
        help="new text: files or folders of .txt, .jsonl, .parquet",
    )
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--replay", type=path_text, nargs="+", metavar="TEXT", help="old text to replay, to limit forgetting")
    old.add_argument("--replay-tokens", type=path_text, nargs="+", metavar="PREFIX", help="old text as token files")
    parser.add_argument(
        "--replay-share", type=share, default=0.05, metavar="SHARE", help="share of old text in the samples; default: 5%%"
    )
    parser.add_argument("--tokens", type=tokens, required=True, metavar="N", help="tokens to train on, such as 50M")
    parser.add_argument(
        "--peak", type=rate, metavar="LR", help="peak learning rate; default: that of Pythia's pre-training at this size"
    )
    parser.add_argument("--sequence-length", type=int, metavar="S", help="default: the model's positions, up to 2048")
    parser.add_argument("--tokenizer", type=path_text, help="default: the checkpoint's own")
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text in .jsonl and .parquet; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for all output; default: CHECKPOINT-on-TEXT")
    parser.add_argument("--dry-run", action="store_true", help="tokenise and write the YAML, show the run, train nothing")
    return parser


def main(words: Sequence[str]) -> int:
    arguments = command_line().parse_args(words)
    with importing():
        from megarewarm.config.load import read_configs, validate
        from megarewarm.config.schema import RunConfig
        from megarewarm.config.yaml_text import write_yaml
        from megarewarm.console import make_console
        from megarewarm.files import write_whole

    console = make_console(highlight=False)
    name = _name(arguments)
    folder: Path = arguments.output or Path(name)
    path = folder / "run.yml"
    header = f"# megarewarm continue {shlex.join(words)}\n"
    if path.exists():
        before = path.read_text(encoding="utf-8").partition("\n")[0] + "\n"
        made_by = before.strip("# \n")
        if _without_dry_run(before) != _without_dry_run(header):
            raise UserError(
                f"{path}: made by another command ({made_by}); train it with 'megarewarm train {path}', or give a new --output"
            )
        console.print(f"{path}: exists already, used unchanged")
    else:
        mapping, chosen = _prepare(arguments, name, folder, console)
        for line in chosen:
            console.print(line)
        hint = f"# to change it: another 'folder', then megarewarm train {shlex.quote(str(path))}\n"
        write_whole(path, (header + hint + write_yaml(mapping)).encode())
        console.print(f"written: {path}")
    from megarewarm.main import main as train

    code = train([str(path), *(["--dry-run"] if arguments.dry_run else [])])
    if code or arguments.dry_run:
        return code
    from megarewarm.report.pages.run_page import report

    config = validate(RunConfig, *read_configs([str(path)]))  # its user may have edited it
    run = Path(config.run_folder)
    console.print(f"report: {report([run], folder / 'report')}")
    if config.export.huggingface:
        console.print(f"model for transformers: {run / 'huggingface'}")
    return 0


def _prepare(arguments: argparse.Namespace, name: str, folder: Path, console: Console) -> tuple[dict[str, object], list[str]]:
    with importing():
        from megarewarm.checkpoint.source import open_checkpoint
        from megarewarm.lab.from_text import MOST_TOKENS, hold_out, settings

    source = open_checkpoint(arguments.checkpoint)
    tokenizer = arguments.tokenizer or source.tokenizer.file
    if tokenizer is None:
        raise UserError(f"{source.name}: comes without a tokenizer; give --tokenizer FILE")
    length = arguments.sequence_length or min(source.model_config.max_positions, 2048)
    if not 0 < length <= source.model_config.max_positions:
        raise UserError(f"--sequence-length {length}: expected 1 to {source.model_config.max_positions}, the model's positions")
    if arguments.tokens < length:
        raise UserError(f"--tokens {arguments.tokens}: expected at least one sequence of {length} tokens (--sequence-length)")
    if arguments.tokens > MOST_TOKENS:
        raise UserError(f"--tokens {arguments.tokens:,}: expected at most {MOST_TOKENS:,}")
    new = _tokenise(arguments, arguments.on, tokenizer, folder / "data" / "new", console)
    old = list(arguments.replay_tokens or [])
    if arguments.replay:
        old = [_tokenise(arguments, arguments.replay, tokenizer, folder / "data" / "old", console)]
    checkpoint = Path(arguments.checkpoint)
    return settings(
        name,
        str((folder / "run").absolute()),
        str(checkpoint.absolute()) if checkpoint.exists() else arguments.checkpoint,
        source.model_config,
        hold_out(new, length),
        [hold_out(prefix, length) for prefix in old],
        tokens=arguments.tokens,
        sequence_length=length,
        peak=arguments.peak,
        replay=arguments.replay_share,
        tokenizer=str(Path(tokenizer).absolute()),
    )


def _tokenise(arguments: argparse.Namespace, inputs: Sequence[str], tokenizer: object, prefix: Path, console: Console) -> str:
    """Write the token file, unless an interrupted command did. Returns its name."""
    from megarewarm.cli.prepare import teller
    from megarewarm.console import WorkShown, make_console
    from megarewarm.data.text.preprocess import job

    prefix.parent.mkdir(parents=True, exist_ok=True)
    bar = WorkShown(make_console(stderr=True))
    options = job.Options(text_key=arguments.text_key, shuffle=1234)
    try:
        # the same texts and tokenizer are not tokenised again, others are refused
        (written,) = job.preprocess(inputs, str(tokenizer), prefix, options, resume=True, tell=teller(bar))
    except job.OtherTokens as error:  # its remedies are options of prepare
        raise UserError(
            f"{prefix}: holds tokens of other text, or by another tokenizer or --text-key; remove {prefix.parent}, or give a "
            f"new --output"
        ) from error
    finally:
        bar.finish()
    console.print(f"{prefix}: {counted(written.counts.documents, 'document')}, {counted(written.counts.tokens, 'token')}")
    for reason, count in written.skipped.items():
        console.print(f"left out: {counted(count, 'record')}: {reason}")
    return str(prefix.absolute())


def _name(arguments: argparse.Namespace) -> str:
    """A run's name from CHECKPOINT and TEXT, in the characters allowed in names."""
    parts = (
        (arguments.output.name,)
        if arguments.output
        else (Path(arguments.checkpoint.partition("@")[0]).name, "on", Path(arguments.on[0]).stem)
    )
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(parts)).strip("._-") or "continued"


def _without_dry_run(header: str) -> str:
    return header.replace(" --dry-run", "")
