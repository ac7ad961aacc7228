"""A start checkpoint that is not written yet, or not on this machine: enough to plan with."""

from __future__ import annotations

from dataclasses import dataclass, field

from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.own.store import Tensors
from megarewarm.checkpoint.tokenizer_source import TokenizerSource
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.parallel.engine import ParallelModel
from megarewarm.training.start.plan import Plan


@dataclass
class PlannedCheckpoint:
    """Stands for a start checkpoint that is not on this machine; enough to show the plan, not to train. ``written_by``: the
    plan of the run that will have written it."""

    name: str
    model_config: ModelConfig
    format: str = "not opened"
    notes: list[str] = field(default_factory=list)
    training: TrainingState | None = None
    lineage: Lineage = field(default_factory=Lineage)
    keeps: frozenset[str] = frozenset()
    tokenizer: TokenizerSource = field(default_factory=TokenizerSource)
    written_by: Plan | None = None

    def load_weights(self, model: ParallelModel) -> None:
        raise UserError(f"{self.name} was not opened")

    def load_tensors(self, tensors: Tensors) -> None:
        raise UserError(f"{self.name} was not opened")
