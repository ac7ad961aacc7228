"""Which parameters of a run train, and until when the others are frozen."""

from __future__ import annotations

from dataclasses import dataclass

from megarewarm.checkpoint.lineage import Lineage
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import cards
from megarewarm.model.size import count_parameters
from megarewarm.model.trained import GROUPS, NEW_LAYERS, NEW_ROWS, Rows, Trained, chosen, count_trained

_KEY = "optimizer.train"


@dataclass(frozen=True)
class Freezing:
    """``trained``: what trains up to step ``until`` of the run; then everything does. None: to its end."""

    trained: Trained
    until: int | None

    def after(self, step: int) -> Trained | None:
        """What has moments once ``step`` steps are completed; None for everything. What thaws begins within the next step."""
        return self.trained if self.until is None or step <= self.until else None

    def of(self, model: ModelConfig) -> str:
        """What trains and what is frozen, for people."""
        count = count_trained(model, self.trained)
        end = "to the end of the run" if self.until is None else f"up to step {self.until:,}"
        return f"{count:,} train, {count_parameters(model) - count:,} frozen {end}"

    @property
    def of_moments(self) -> str:
        """What the reset table says of moments beside its choice."""
        begin = "have none" if self.until is None else f"begin at zero after step {self.until:,}"
        return f"; frozen parameters' {begin}"


def settle_freezing(config: RunConfig, model: ModelConfig, history: Lineage, first: int = 0) -> Freezing | None:
    """What ``optimizer.train`` means for ``model``, whose stages before the run are ``history``; None where everything trains.
    ``first``: the completed steps after which something must still be frozen.

    Raises ``UserError`` for an entry that names no parameter, and where nothing would be frozen or thaw.
    """
    settings = config.optimizer.train
    if settings is None:
        return None
    layers = next((stage.new_layers for stage in reversed(history.stages) if stage.new_layers), [])
    rows = next((stage.new_rows for stage in reversed(history.stages) if stage.new_rows is not None), None)
    trained: dict[str, Rows | None] = {}
    for only in settings.only:
        found = chosen(only, model, layers, rows)
        if not found:
            raise UserError(f"{_KEY}.only: {_why_nothing(only, model)}")
        # a whole parameter includes its rows
        trained |= {name: part for name, part in found.items() if part is None or name not in trained}
    if count_trained(model, trained) == count_parameters(model):
        raise UserError(f"{_KEY}.only: {', '.join(settings.only)} is every parameter, nothing is frozen; remove {_KEY}")
    if settings.for_ is None:
        return Freezing(trained, None)
    until = round(config.steps(settings.for_))
    if not first < until < config.total_steps:
        begins = f", and the run begins after step {first:,}" if first else ""
        raise UserError(
            f"{_KEY}.for: '{settings.for_}' is step {until:,} of {config.total_steps:,}{begins}: "
            + ("nothing would be frozen; remove optimizer.train" if until <= first else "nothing would thaw; leave 'for' out")
        )
    return Freezing(trained, until)


def _why_nothing(only: str, model: ModelConfig) -> str:
    if only in (NEW_LAYERS, NEW_ROWS):
        made = "megarewarm grow adds layers" if only == NEW_LAYERS else "megarewarm extend-vocabulary adds rows"
        return f"'{only}', but the lineage of the start checkpoint records none ({made}); name what shall train"
    names = list(cards(model))
    return (
        f"'{only}' names what this model does not have: it has {model.num_layers} layers (from 0) and parameters such as "
        f"{names[1]}; give {', '.join(GROUPS)}, 'layers 0-3', or a pattern of names such as '*.bias'"
    )
