"""A run's settings from a checkpoint and tokenised text: what ``megarewarm continue`` writes, each choice with its reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megarewarm.config.model import ModelConfig
from megarewarm.data.files.split import split_documents
from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from megarewarm.model.size import count_parameters
from megarewarm.spelling import counted

_PEAKS = [(1e8, 1e-3), (3e8, 6e-4), (1.2e9, 3e-4), (5e9, 2e-4), (math.inf, 1.2e-4)]
"""(largest parameter count, peak learning rate) of Pythia's pre-training (arXiv 2304.01373, table 6). Both papers re-warm to
these peaks."""

_SHARES = (1, 5, 20)  # percent of the documents to hold out; the smallest that is enough is used
_ENOUGH = 64  # validation windows for a stable loss
_LEAST = 8  # windows
_EVALUATION_SHARE = 140  # 21 evaluations at a third of a training step's cost take 5% of the compute
_MOST_EVALUATED = 2**18  # tokens
_STEPS = 400  # of a run, about: fewer leave no room for a schedule, more only make the batches smaller
_MOST_PER_STEP = 2**20  # tokens
MOST_TOKENS = 10**15  # above it the steps of that size are more than a run may have


@dataclasses.dataclass(frozen=True)
class Text:
    """A token file of shuffled documents. ``split`` holds out its last documents, ``held_out`` tokens, for validation."""

    prefix: str
    split: str
    trained: int
    held_out: int

    def source(self, part: str, **more: Any) -> dict[str, Any]:
        return {"path": self.prefix, "split": self.split, "part": part, **more}


def hold_out(prefix: str, sequence_length: int) -> Text:
    """Hold out the smallest share of ``prefix``'s documents that makes a validation set. Raises ``UserError`` if none does."""
    file = open_tokens(prefix)
    found = None
    for share in _SHARES:
        split = f"{100 - share},{share},0"
        parts = split_documents(split, file.num_documents, "neox")
        trained, held_out = (
            file.view(*parts[name]).num_tokens if _documents(parts[name]) else 0 for name in ("train", "valid")
        )
        if trained > sequence_length and held_out > sequence_length:
            found = Text(prefix, split, trained, held_out)
            if held_out >= _ENOUGH * sequence_length:
                break
    if found is None:
        raise UserError(
            f"{file.path}: {counted(file.num_documents, 'document')} with {counted(file.total_tokens, 'token')} are too few "
            f"for a validation set of one window of {sequence_length} tokens; give more text, one file per document, or a "
            f"smaller --sequence-length"
        )
    return found


def _documents(part: tuple[int, int]) -> int:
    return part[1] - part[0]


def settings(
    name: str,
    folder: str,
    checkpoint: str,
    model: ModelConfig,
    new: Text,
    old: Sequence[Text],
    *,
    tokens: int,
    sequence_length: int,
    peak: float | None = None,
    replay: float = 0.05,
    tokenizer: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """(the run's YAML as a mapping, one line for each choice with its reason).

    Re-warming to the peak, cosine decay to a tenth of it, ``replay`` of the samples from ``old``: arXiv 2403.08763, sections
    6 and 7. ``tokens``: of training; ``new`` is repeated as often as they need, and a line reports how often.
    """
    rate = peak or next(rate for parameters, rate in _PEAKS if count_parameters(model) <= parameters)
    batch = max(1, min(tokens // _STEPS, _MOST_PER_STEP) // sequence_length)
    epochs = tokens * (1 - replay * bool(old)) / new.trained
    chosen = [
        f"peak learning rate {rate:g}" + ("" if peak else f": Pythia's for {count_parameters(model):,} parameters (--peak)"),
        f"global batch {batch} x {sequence_length} tokens: {round(tokens / (batch * sequence_length)):,} steps",
        f"{new.prefix}: read {epochs:.2f} times; {new.held_out:,} tokens are held out for validation set 'new'",
    ]
    validation = [_validation("new", "downstream", new, tokens, sequence_length)]
    mapping: dict[str, Any] = {
        "name": name,
        "folder": folder,
        "start": {"from": checkpoint, "intent": "rewarm"},
        "data": {
            "sequence_length": sequence_length,
            "train": [new.source("train", name="new", max_epochs=None)],
            "validation": validation,
        },
        "schedule": {"curve": "cosine", "max_lr": rate, "min_lr": "10%", "warmup": "1%"},
        "training": {"budget": f"{tokens} tokens", "global_batch": batch, "micro_batch": "auto"},
        "evaluation": {"every": "5%"},
        "checkpoint": {"every": "10%", "keep_last": 1},
        "export": {"huggingface": True},
    }
    if tokenizer:
        mapping["data"]["tokenizer"] = tokenizer
    for number, text in enumerate(old, 1):
        label = "old" if len(old) == 1 else f"old_{number}"
        validation.append(_validation(label, "upstream", text, tokens, sequence_length))
    if old:
        sources = [text.source("train", name=f"old_{i}", weight=text.trained, max_epochs=None) for i, text in enumerate(old, 1)]
        shown = "validation set 'old' shows" if len(old) == 1 else f"validation sets 'old_1' to 'old_{len(old)}' show"
        mapping["replay"] = {"fraction": replay, "sources": sources}
        chosen.append(f"replay: {replay:.0%} of the samples are old text; {shown} what is forgotten")
    else:
        chosen.append("no replay and no validation set of old text, so forgetting is not measured: give old text with --replay")
    return mapping, chosen


def _validation(name: str, role: str, text: Text, tokens: int, sequence_length: int) -> dict[str, Any]:
    """A validation set of a size at which all its evaluations take about 5% of the run's compute, at least 8 windows."""
    wanted = max(_LEAST * sequence_length, min(tokens // _EVALUATION_SHARE, _MOST_EVALUATED))
    windows = min(text.held_out, wanted) // sequence_length
    return {"name": name, "role": role, "tokens": windows * sequence_length, "sources": [text.source("valid")]}
