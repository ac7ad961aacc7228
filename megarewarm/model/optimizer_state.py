"""Which tensors an optimizer keeps of each parameter: what plans, checkpoints and the optimizers themselves must agree on."""

from __future__ import annotations

from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import Card, cards
from megarewarm.model.trained import Trained, trained_values


def states_of(kind: str, card: Card) -> tuple[str, ...]:
    """Names of the tensors of the parameter's shape, fp32, that optimizer ``kind`` (``optimizer.kind``) keeps."""
    return ("momentum",) if kind == "muon" and card.is_matrix else ("exp_avg", "exp_avg_sq")


def state_kinds(kind: str) -> str:
    """The names that occur, for people."""
    return {"adamw": "exp_avg, exp_avg_sq", "muon": "momentum, exp_avg, exp_avg_sq"}[kind]


def state_bytes(kind: str, model: ModelConfig, trained: Trained | None = None) -> int:
    """Bytes of the state of all parameters of which something trains (None: everything)."""
    every = cards(model).values()
    return sum(4 * trained_values(card, trained) * len(states_of(kind, card)) for card in every)
