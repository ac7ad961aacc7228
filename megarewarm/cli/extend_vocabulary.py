"""Give a checkpoint rows for new tokens: megarewarm extend-vocabulary CKPT DST --tokenizer tok/ [--init mean]

    megarewarm extend-vocabulary CKPT DST --tokenizer tok/                        new rows: means of the old pieces' rows
    megarewarm extend-vocabulary CKPT DST --tokenizer tok/ --init weighted        later pieces count more in the embedding
    megarewarm extend-vocabulary CKPT DST --tokenizer tok/ --distill new/*.txt    embeddings trained against the old pieces

--tokenizer is what 'megarewarm extend-tokenizer' wrote. Logits of old tokens stay as they are, which it checks, and it prints
the share of the softmax that the new rows take. The result has weights only: continue training from it (start.from). One
tensor is in memory at a time, with --distill the whole model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarewarm.arguments import FORMS, ROW_INITS, Parser, count, path_text, rate, seed
from megarewarm.errors import UserError
from megarewarm.process import importing

if TYPE_CHECKING:
    from rich.console import Console

    from megarewarm.checkpoint.extend_vocabulary import NewTokens
    from megarewarm.checkpoint.source import OpenedCheckpoint
    from megarewarm.checkpoint.token_distillation import Distilled, TokenDistillation
    from megarewarm.checkpoint.untrained_rows import UntrainedRows
    from megarewarm.checkpoint.weights import Weights


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_text, metavar="CKPT", help="folder or hub name, as for start.from")
    parser.add_argument("destination", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="the extended tokenizer")
    parser.add_argument("--init", choices=ROW_INITS, default="mean", help="of new rows; default: %(default)s")
    parser.add_argument("--old-tokenizer", type=Path, metavar="FILE", help="default: what CKPT comes with")
    parser.add_argument("--distill", type=path_text, nargs="+", metavar="FILE", help="new text, to train the new embeddings on")
    parser.add_argument("--distill-steps", type=count, metavar="N", help="default: once through 100 snippets of each new token")
    parser.add_argument("--distill-lr", type=rate, metavar="RATE", help="default: 1e-4")
    parser.add_argument("--text-key", default="text", help="of --distill; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of noise and --distill; default: %(default)s")
    parser.add_argument("--on", type=path_text, metavar="PREFIX", help="old token file to compare on; default: random old ids")
    parser.add_argument("--tokens", type=count, default=1024, metavar="N", help="to compare on; default: %(default)s")
    parser.add_argument("--to", choices=FORMS, default="megarewarm", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> None:
    arguments = command_line().parse_args(words)
    for option in ("distill_steps", "distill_lr"):
        if getattr(arguments, option) and not arguments.distill:
            raise UserError(f"--{option.replace('_', '-')}: nothing without --distill; give it the new text")
    with importing():
        from megarewarm.checkpoint.compare_logits import sample_tokens
        from megarewarm.checkpoint.convert import ConvertOptions, weights_for
        from megarewarm.checkpoint.extend_vocabulary import bytes_to_read, extend, new_tokens, refuse
        from megarewarm.checkpoint.inspection import size_of
        from megarewarm.checkpoint.progress import reading
        from megarewarm.checkpoint.source import open_checkpoint
        from megarewarm.checkpoint.token_distillation import TokenDistillation
        from megarewarm.checkpoint.untrained_rows import table, untrained_rows
        from megarewarm.console import make_console

    console = make_console()
    source = open_checkpoint(arguments.source)
    for note in source.notes:
        console.print(f"{source.name}: {note}", highlight=False)
    config = source.model_config
    new = new_tokens(source, arguments.tokenizer, arguments.old_tokenizer)
    old_rows = config.model_copy(update={"vocab_size": new.first})
    tokens = sample_tokens(arguments.on, old_rows, arguments.tokens, arguments.seed)
    options = ConvertOptions(arguments.to, tokenizer=new.new.path)
    refuse(source, arguments.destination, new, options)
    with reading(console, "rows never trained", size_of(source.stored)) as advance:
        untrained = untrained_rows(source, advance)
    lines, embeddings, intent = [], None, ""
    if arguments.distill:
        defaults = TokenDistillation()
        asked = TokenDistillation(arguments.distill_steps, arguments.distill_lr or defaults.lr, seed=arguments.seed)
        distilled = _distill(console, weights_for(source, options), source, new, arguments, asked)
        embeddings, intent = distilled.embeddings, ", embeddings distilled"
        lines.append(_distilled_line(distilled, config.tie_embeddings))
    with reading(console, "comparing and writing", bytes_to_read(source, new, options)) as advance:
        difference, notes = extend(
            source,
            arguments.destination,
            new,
            arguments.init,
            options,
            tokens,
            seed=arguments.seed,
            embeddings=embeddings,
            intent=intent,
            on_bytes=advance,
        )
    console.print(table(source, untrained))
    matrices = "one tied matrix" if config.tie_embeddings else "embedding and head"
    loss = "; loss {:.4f} before, {:.4f} after".format(*difference.losses) if tokens.real else ""
    lines = [
        new.description(config),
        f"init {arguments.init}, {matrices}",
        *_about_pieces(new, untrained),
        *lines,
        f"logits of the {new.first:,} old ids on {tokens.where} are the same, bit for bit; the new rows have "
        f"{difference.new_mass:.2%} of the softmax{loss}",
        *notes,
    ]
    if source.training is not None:
        lines.append("weights only: moments have no rows for the new tokens, so a run from it begins with new ones")
    for line in lines:
        console.print(f"{arguments.destination}: {line}", highlight=False, markup=False)


def _distill(
    console: Console,
    weights: Weights,
    source: OpenedCheckpoint,
    new: NewTokens,
    arguments: argparse.Namespace,
    asked: TokenDistillation,
) -> Distilled:
    from megarewarm.checkpoint.token_distillation import distill, snippets_of, steps_of
    from megarewarm.console import make_bar
    from megarewarm.data.text.preprocess.documents import Documents

    config = source.model_config
    documents = Documents(arguments.distill, arguments.text_key)
    with make_bar(console) as bar:
        task = bar.add_task("reading snippets", total=documents.total_bytes or None)
        snippets = snippets_of(
            documents, new, asked, config.max_positions, lambda: bar.update(task, completed=documents.bytes_read)
        )
        steps = steps_of(len(snippets), asked)
        console.print(
            f"distilling: {len(snippets):,} snippets of up to {asked.length} tokens, {steps:,} steps of {asked.batch}, "
            f"learning rate {asked.lr:g}",
            highlight=False,
        )
        task = bar.add_task("distilling", total=steps)
        return distill(
            weights,
            config,
            new,
            arguments.init,
            snippets,
            asked,
            lambda loss: bar.update(task, advance=1, description=f"distilling, loss {loss:.4f}"),
        )


def _distilled_line(found: Distilled, tied: bool) -> str:
    where = f"{found.held_out:,} snippets not trained on" if found.held_out else "snippets that were trained on"
    line = f"distilled: squared difference of hidden states on {where} {found.before:.4f} before, {found.after:.4f} after"
    line += f"; {found.without:,} new tokens were in no snippet" if found.without else ""
    return line + ("; the head is tied, so the logits of new tokens moved with it" if tied else "; the head's new rows stay")


def _about_pieces(new: NewTokens, untrained: Sequence[UntrainedRows]) -> Iterator[str]:
    """Lines about new tokens whose pieces say little."""
    bad = {number for each in untrained for number in each.ids}
    if doubtful := [i for i, pieces in enumerate(new.pieces, new.first) if bad & set(pieces)]:
        shown = ", ".join(str(new.new.shown(i)) for i in doubtful[:4])
        yield f"{len(doubtful):,} new tokens have pieces whose rows look untrained: {shown}"
    if empty := sum(not pieces for pieces in new.pieces):
        yield f"{empty:,} new ids are no tokens of {new.new.path}; their rows are zero"
