"""Measure a checkpoint: megarewarm evaluate CHECKPOINT --on PREFIX [PREFIX ...] --tasks FILE [FILE ...]"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarewarm.arguments import Parser, count, path_text, tokens
from megarewarm.process import importing, say
from megarewarm.spelling import counted


def command_line() -> Parser:
    parser = Parser(
        description="Mean cross entropy (nats per token), perplexity and, where the tokenizer is known, bits per byte of a "
        "checkpoint on token files; accuracies on tasks."
    )
    parser.add_argument("checkpoint", type=path_text, help="folder or hub name, as for start.from")
    parser.add_argument("--on", type=path_text, nargs="+", default=[], metavar="PREFIX", help="token files, without suffix")
    parser.add_argument(
        "--tasks", type=path_text, nargs="+", default=[], metavar="FILE", help="task files, as for evaluation.tasks"
    )
    parser.add_argument("--truncate", action="store_true", help="drop the beginning of tasks' contexts that are too long")
    parser.add_argument("--tokens", type=tokens, metavar="N", help="at most N tokens of each file, such as 2M; default: all")
    parser.add_argument("--sequence-length", type=count, metavar="S", help="default: all positions of the model")
    parser.add_argument("--micro-batch", type=count, default=4, metavar="B", help="sequences at a time; default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    if not arguments.on and not arguments.tasks:
        parser.error("nothing to evaluate: give --on PREFIX or --tasks FILE")
    with importing():
        from megarewarm.api import load_model

    model = load_model(arguments.checkpoint, device=arguments.device)
    if (rules := model.document_rules) is not None:
        kept = [key for key, is_set in (("reset_at_eod", rules.reset), ("mask_eod_loss", rules.mask_loss)) if is_set]
        say(f"{arguments.checkpoint}: evaluated with {' and '.join(kept)}, as in its run")
    for prefix in arguments.on:
        loss, measured, bits = model.evaluate(
            prefix,
            tokens=arguments.tokens,
            sequence_length=arguments.sequence_length,
            micro_batch=arguments.micro_batch,
        )
        per_byte = "" if bits is None else f"{bits:.4f} bits per byte, "
        perplexity = math.inf if loss > 700 else math.exp(loss)
        print(f"{prefix}: loss {loss:.4f}, perplexity {perplexity:.3f}, {per_byte}{counted(measured, 'token')}", flush=True)
    if arguments.tasks:
        found, notes = model.test(arguments.tasks, truncate=arguments.truncate, sequences=arguments.micro_batch)
        for note in notes:
            say(note)
        for name, scores in found.items():
            print(
                f"{name}: accuracy {100 * scores.accuracy:.2f} % ({100 * scores.accuracy_bytes:.2f} % per byte), "
                f"{scores.bits_per_byte:.4f} bits per byte, {counted(len(scores.right), 'item')}",
                flush=True,
            )
