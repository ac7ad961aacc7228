"""A selection: steps one after another, each on the documents that the one before it kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megarewarm.errors import UserError
from megarewarm.selection.desk import Desk
from megarewarm.selection.step import Chosen, Corpus, Mask, Step


@dataclass(frozen=True)
class Taken:
    """A step that was taken. ``documents``, ``tokens``: dropped by it; ``left``: (documents, tokens) that it kept."""

    step: Step
    chosen: Chosen
    documents: int
    tokens: int
    left: tuple[int, int]

    @property
    def line(self) -> str:
        """What it did, for people."""
        share = self.tokens / max(1, self.tokens + self.left[1])
        return (
            f"{self.step.name}: dropped {self.documents:,} documents, {self.tokens:,} tokens ({share:.1%}); "
            f"{self.left[0]:,} documents, {self.left[1]:,} tokens are left"
        )


@dataclass(frozen=True)
class Selection:
    """Which documents of ``corpus`` are ``kept``, (num_documents,) bool, after the steps ``taken``."""

    corpus: Corpus
    kept: Mask
    taken: Sequence[Taken]


def select(corpus: Corpus, steps: Sequence[Step], desk: Desk, tell: Callable[[Taken], None] = lambda _: None) -> Selection:
    """Take the ``steps``; ``tell`` is called after each. Memory: about 60 bytes for each document of the corpus, and what a
    step says of itself. Raises ``UserError`` if a step leaves nothing."""
    if not corpus.num_documents:
        raise UserError(f"{corpus.files[0].path}: has no documents, so there is nothing to select")
    kept = np.ones(corpus.num_documents, bool)
    taken: list[Taken] = []
    for step in steps:
        chosen = step.choose(corpus, kept.copy(), desk)
        if not kept[chosen.dropped].all():
            raise ValueError(f"the step {step.name} drops documents that were dropped before")
        kept[chosen.dropped] = False
        tokens = int(corpus.sizes[chosen.dropped].sum())
        done = Taken(step, chosen, len(chosen.dropped), tokens, (int(kept.sum()), int(corpus.sizes[kept].sum())))
        if not done.left[1]:
            raise UserError(
                f"--{step.name}: nothing is left of {done.documents + done.left[0]:,} documents ({step.words}); nothing was "
                f"written: choose another limit"
            )
        taken.append(done)
        tell(done)
    return Selection(corpus, kept, taken)
