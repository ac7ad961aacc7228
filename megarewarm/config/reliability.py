"""The section of a run that says what is done about steps, ranks and times that are not as they should be."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue

from megarewarm.config.budget import Budget, Interval, Steps
from megarewarm.config.section import Section

_PARTS = re.compile(r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?$")
_CLOCK = re.compile(r"^(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?$")
_FORM = r"^\s*(([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?|([0-9]+-)?[0-9]+:[0-9]+(:[0-9]+)?)\s*$"


class Duration(BaseModel):
    """``23h30m``, ``90m``, ``2d``, or as Slurm writes it: ``HOURS:MINUTES:SECONDS`` and ``DAYS-HOURS:MINUTES:SECONDS``."""

    model_config = ConfigDict(frozen=True)

    seconds: int = Field(gt=0)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, Duration | dict):
            return value
        text = value.replace(" ", "") if isinstance(value, str) else ""
        parts = _PARTS.match(text) if text else None
        clock = _CLOCK.match(text)
        if clock is not None and (clock[1] is not None or clock[4] is not None):
            days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
            if max(minutes, seconds) > 59:
                raise ValueError(f"{value!r} has more than 59 minutes or seconds; write '90m', or as a clock shows it")
        elif parts is not None:
            days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        else:  # 12:30 is minutes and seconds to Slurm, hours and minutes to people
            raise ValueError(f"{value!r} is not a length of time; write '23h30m', '90m' or '23:30:00'")
        return {"seconds": ((days * 24 + hours) * 60 + minutes) * 60 + seconds}

    @model_serializer
    def _text(self) -> str:
        return str(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"description": cls.__doc__ or "", "type": "string", "pattern": _FORM}

    def __str__(self) -> str:
        minutes, seconds = divmod(self.seconds, 60)
        hours, minutes = divmod(minutes, 60)
        parts = [f"{count}{unit}" for count, unit in ((hours, "h"), (minutes, "m"), (seconds, "s")) if count]
        return "".join(parts) or "0s"


class ReliabilityConfig(Section):
    """Handling of bad steps, slow ranks, corrupted replicas and time limits. All of it may change between restarts."""

    max_wall_time: Duration | None = Field(
        None,
        description="Time after which the run saves and ends with exit code 75, from the start of the process, or of the Slurm "
        "job that it is part of. It ends early enough for the last step and the save. null: no limit.",
    )
    non_finite: Literal["skip", "stop"] = Field(
        "skip",
        description="A step whose loss or gradient is not finite is recomputed. If it is not finite again, then skip: "
        "the step is skipped; stop: the run ends. Either way RUN/batches records the place of its data.",
    )
    spikes: Literal["off", "warn", "skip", "roll_back"] = Field(
        "warn",
        description="Reaction to a loss or gradient norm far above the last ones. warn: an alarm. skip: skip the step. "
        "roll_back: load weights and optimizer state of a checkpoint that is 'roll_back_steps' or more old, and skip the "
        "batches between it and the spike.",
    )
    spike_deviations: float = Field(
        6.0, gt=0, description="Standard deviations above the mean of the last 'spike_window' steps from which it is a spike."
    )
    spike_window: Steps = Field(128, ge=8, description="Steps that a step is compared with, once half of them are there.")
    roll_back_steps: Steps = Field(50, description="roll_back: how many steps before the spike the checkpoint has to be.")
    give_up_after: Steps = Field(
        10, description="Steps in a row that changed nothing (not finite, or a spike) after which the run ends as diverged."
    )
    check_replicas: Interval | None = Field(
        Budget(amount=100, unit="steps"),
        description="Interval at which ranks that hold the same weights and moments compare checksums of them; before every "
        "checkpoint as well. A difference ends the run with exit code 5 and names the rank. null: never.",
        validate_default=False,
    )
    slow_step: float | None = Field(
        3.0, gt=1, description="A step of this many times the median time is reported, with its slowest rank. null: never."
    )
    slow_rank: float | None = Field(
        1.2,
        gt=1,
        description="A rank that is last in most steps and takes this many times the median rank's time is reported with its "
        "host. null: never.",
    )
