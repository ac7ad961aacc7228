"""Token Distillation (arXiv 2505.20133): embeddings of new tokens, trained so that hidden states match those of the old pieces.

A snippet of text in new tokens is the student's input, the same snippet with each new token in its old pieces the teacher's.
Both are the same frozen model; only the new rows of the embedding are trained. A new token's state is compared with that of its
last old piece, an old token's with its own:

    loss = mean over positions from the first new token on, and over channels, of (student - teacher)^2

of the states after the last norm. Adam, a constant rate, no decay. (The paper: 25 to 100 snippets a token of 50 tokens, 1e-4.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from megarewarm.checkpoint.extend_vocabulary import ExtendedVocabulary, NewTokens
from megarewarm.checkpoint.weights import Weights, load_module
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.initialize import generator_of
from megarewarm.model.parameters import EMBEDDING
from megarewarm.model.transformer import Transformer

_HELD_OUT = 128
"""Snippets that are measured on, and not trained on; a tenth of all at most."""
_TEXTS = 64


@dataclass(frozen=True)
class TokenDistillation:
    """``per_token``: snippets of each new token, of ``length`` tokens; ``batch`` of them a step. ``steps`` None: once through
    all snippets."""

    steps: int | None = None
    lr: float = 1e-4
    per_token: int = 100
    length: int = 50
    batch: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Distilled:
    """``embeddings`` (new, h) fp32; ``before`` and ``after``: the loss on snippets that were not trained on, of which there are
    ``held_out``. ``without``: new tokens that no snippet has, whose embeddings stay."""

    embeddings: Tensor
    before: float
    after: float
    snippets: int
    held_out: int
    without: int


def snippets_of(
    texts: Iterable[str], new: NewTokens, asked: TokenDistillation, positions: int, on_text: Callable[[], object] = lambda: None
) -> list[npt.NDArray[np.int64]]:
    """Pieces of ``texts`` in new tokens, at most ``asked.per_token`` around the first occurrences of each, which lie in their
    first half. Neither a piece nor the same in old pieces is longer than ``positions``. Raises ``UserError`` where no text has
    a new token."""
    taken = np.zeros(new.stop - new.first, np.int64)
    lengths = np.ones(new.stop, np.int64)
    lengths[new.first :] = [len(pieces) for pieces in new.pieces]
    random = np.random.default_rng(asked.seed)
    found: list[npt.NDArray[np.int64]] = []
    left = iter(texts)
    while batch := list(islice(left, _TEXTS)):
        for ids in new.new.encode_batch(batch):
            for place in np.flatnonzero(ids >= new.first).tolist():
                token = int(ids[place]) - new.first
                if taken[token] < asked.per_token:
                    start = max(0, place - int(random.integers(max(1, asked.length // 2))))
                    piece = ids[start : start + asked.length].astype(np.int64)
                    piece = piece[np.cumsum(lengths[piece]) <= positions]
                    if (piece == token + new.first).any():
                        taken[token] += 1
                        found.append(piece)
        on_text()
    if not found:
        raise UserError("--distill: its text has none of the new tokens; give text like that of extend-tokenizer")
    return found


def steps_of(snippets: int, asked: TokenDistillation) -> int:
    """How many steps ``distill`` makes on so many snippets."""
    return asked.steps or -(-(snippets - _held_out(snippets)) // asked.batch)


def _held_out(snippets: int) -> int:
    return min(_HELD_OUT, snippets // 10)


def distill(
    weights: Weights,
    config: ModelConfig,
    new: NewTokens,
    init: str,
    snippets: Sequence[npt.NDArray[np.int64]],
    asked: TokenDistillation,
    on_step: Callable[[float], object] = lambda loss: None,
) -> Distilled:
    """Train the embeddings of ``new`` from where ``init`` puts them, with the whole model ``weights`` in fp32 on a GPU, or else
    the CPU. ``on_step``: called with the loss of each step. Raises ``UserError`` where the loss is not finite."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_module(weights, config, device, torch.float32).requires_grad_(False)
    start = ExtendedVocabulary(weights, config, new, init, asked.seed).rows(EMBEDDING, weights.read(EMBEDDING)[: new.first])
    rows = start.to(device, torch.float32).requires_grad_()
    loss_of = lambda batch: distillation_loss(model, rows, new, batch)  # noqa: E731
    order = torch.randperm(len(snippets), generator=generator_of(asked.seed, "snippets")).tolist()
    held = [snippets[i] for i in order[: _held_out(len(snippets))]]
    trained = [snippets[i] for i in order[len(held) :]]
    groups = [held[i : i + asked.batch] for i in range(0, len(held), asked.batch)] or [trained[: asked.batch]]

    def measured() -> float:
        with torch.no_grad():
            return sum(float(loss_of(group)) for group in groups) / len(groups)

    before = measured()
    optimizer = torch.optim.Adam([rows], lr=asked.lr, betas=(0.9, 0.999))
    for step in range(steps_of(len(snippets), asked)):
        batch = [trained[(step * asked.batch + i) % len(trained)] for i in range(min(asked.batch, len(trained)))]
        optimizer.zero_grad()
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"--distill: the loss is {float(loss)} at step {step + 1}; lower --distill-lr ({asked.lr:g}), if the weights "
                f"are finite"
            )
        loss.backward()
        optimizer.step()
        on_step(float(loss.detach()))
    seen = np.unique(np.concatenate(trained))
    seen = seen[seen >= new.first] - new.first
    result = start.float()
    result[seen] = rows.detach().cpu()[seen]  # momentum moves no row whose token is in no snippet
    return Distilled(result, before, measured(), len(snippets), len(held), new.stop - new.first - len(seen))


def distillation_loss(model: Transformer, rows: Tensor, new: NewTokens, batch: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    """The loss of ``rows`` (new, h) as embeddings of the new tokens on a batch of snippets, each of which has one. A scalar in
    the dtype of ``model``, which is not trained."""
    first, table = new.first, model.embed_in.weight
    old, ends, counts = [], [], []
    for ids in batch:
        pieces = [new.pieces[token - first] if token >= first else [token] for token in ids.tolist()]
        old.append([piece for each in pieces for piece in each])
        ends.append(np.cumsum([len(each) for each in pieces]) - 1)
        counts.append((len(ids), int(np.flatnonzero(ids >= first)[0])))
    student, teacher = _padded(batch).to(table.device), _padded(old).to(table.device)
    is_new = student >= first
    embedded = F.embedding(student.masked_fill(is_new, 0), table)
    embedded = torch.where(is_new[..., None], rows[(student - first).clamp(min=0)], embedded)
    with torch.no_grad():
        wanted = model(teacher)
    states = model.from_embeddings(embedded, embedded.shape[1])
    differences = [
        states[i, begin:length] - wanted[i, torch.as_tensor(ends[i][begin:], device=table.device)]
        for i, (length, begin) in enumerate(counts)
    ]
    return torch.cat(differences).square().mean()


def _padded(rows: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> Tensor:
    """(len(rows), longest) int64, with zeros at the ends, which no position before them sees."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)
