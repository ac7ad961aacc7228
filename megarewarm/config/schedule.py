"""The section ``schedule`` of a run, and the schedule that it becomes once lengths are steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from megarewarm.config.budget import Budget
from megarewarm.config.section import LearningRate, OneOf, Section
from megarewarm.schedules.curves import WSD_DECAYS
from megarewarm.schedules.schedule import CURVES, Schedule

_RATE_OR_SHARE: list[JsonValue] = [
    {"type": "number", "minimum": 0},
    {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$"},
    {"type": "null"},
]


class ScheduleConfig(Section):
    """The learning-rate curve, a pure function of the step. Keys a curve has no use for are refused."""

    curve: Annotated[str, OneOf(CURVES)] = Field(description="Shape after the warmup; docs/schedules.md draws each one.")
    max_lr: LearningRate = Field(description="Peak, reached at the end of the warmup.")
    min_lr: LearningRate | None = Field(
        None,
        description="Floor, reached at the end of 'length'; '10%' is a tenth of max_lr.",
        json_schema_extra={"anyOf": _RATE_OR_SHARE},
    )
    warmup: Budget = Field(
        Budget(amount=1, unit="percent"), description="Linear re-warming from 0; 0 for none.", validate_default=False
    )
    length: Budget | None = Field(
        None, description="From step 0 to the end of the decay; null: the training budget. Later steps stay at the floor."
    )
    decay: Budget | None = Field(None, description="wsd: length of the final decay.")
    decay_shape: Annotated[str, OneOf(WSD_DECAYS)] | None = Field(
        None, description="wsd: shape of the final decay; null: minus_sqrt."
    )
    constant_lr: LearningRate | None = Field(
        None,
        description="infinite_*: height of the constant phase; '55%' is a share of max_lr.",
        json_schema_extra={"anyOf": _RATE_OR_SHARE},
    )
    cooldown: Budget | None = Field(None, description="infinite_*: own length of the cooldown from max_lr to constant_lr.")
    constant: Budget | None = Field(
        None, description="infinite_*: own length of the constant phase (not its end); the rest of 'length' anneals."
    )
    timescale: float | None = Field(None, gt=0, description="infinite_inverse_sqrt: steepness; null: 10.")
    unclamped: bool | None = Field(
        None,
        description="cosine, linear_clipped, exponential, constant: true is GPT-NeoX's formula without any limit: past "
        "'length' it goes on (a cosine climbs again), a warmup of less than one step starts above max_lr. "
        "Null: held at both ends.",
    )

    @field_validator("min_lr", "constant_lr", mode="before")
    @classmethod
    def _share(cls, value: Any, info: ValidationInfo) -> Any:
        """'10%' of max_lr."""
        if not (isinstance(value, str) and value.strip().endswith("%")):
            return value
        try:
            share = float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError(f"'{value}' is neither a rate nor a share of max_lr such as '10%'") from None
        return share * info.data["max_lr"] if "max_lr" in info.data else None

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        curve = CURVES[self.curve]
        special = set(ScheduleConfig.model_fields) - {"curve", "max_lr", "warmup"}
        given = {key for key in special if getattr(self, key) is not None}
        if missing := set(curve.needs) - given:
            raise ValueError(f"curve '{self.curve}' needs {_names(missing)}")
        if extra := given - {*curve.needs, *curve.may}:
            raise ValueError(
                f"curve '{self.curve}' has no use for {_names(extra)}: remove it, or set it to null where it is inherited"
            )
        if self.min_lr is not None and self.min_lr > self.max_lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above max_lr {self.max_lr:g}")
        if self.constant_lr is not None and not (self.min_lr or 0) <= self.constant_lr <= self.max_lr:
            raise ValueError(f"constant_lr {self.constant_lr:g} does not lie between min_lr and max_lr")
        if curve.anneals and not self.min_lr:
            raise ValueError(f"curve '{self.curve}' anneals exponentially, so min_lr must be above 0")
        return self


def _names(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(keys))


def build_schedule(config: ScheduleConfig, to_steps: Callable[[Budget], float], total_steps: int) -> Schedule:
    """The schedule of a run: ``config`` with every length turned into steps by ``to_steps``.

    ``total_steps`` is the training budget in steps, the length of a curve that gives none. Raises UserError, naming
    the keys, where the phases are longer than the whole.
    """
    given = {key: float(to_steps(value)) if isinstance(value, Budget) else value for key, value in config if value is not None}
    keys: dict[str, Any] = {"length": float(total_steps), **CURVES[config.curve].defaults, **given}
    keys["warmup_steps"] = keys.pop("warmup")
    keys["unclamped"] = config.unclamped or None
    return Schedule(**keys)
