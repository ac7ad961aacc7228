"""When a run saves, and which of its checkpoints stay, in steps: what ``checkpoint`` in the configuration means."""

from __future__ import annotations

import math

from megarewarm.checkpoint.own.retention import Retention
from megarewarm.config.execution import LOG_SPACED
from megarewarm.config.grid import Grid
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.training.start.evaluations import evaluation_steps


def saves(config: RunConfig) -> Grid | None:
    """The steps after which the run saves, counted from 0; None where only the end is saved."""
    every = config.checkpoint.every
    return None if every is None else config.grid(every)


def extra_steps(config: RunConfig) -> frozenset[int]:
    """The single steps that are saved in addition."""
    extra = config.checkpoint.extra_steps
    return frozenset(LOG_SPACED if extra == "log_spaced" else extra)


def saved_steps(config: RunConfig, first: int) -> list[int]:
    """The steps after ``first`` that a checkpoint is written after, ascending, and ``first`` if that is one of its own."""
    every, total = saves(config), config.total_steps
    points = every.between(first, total) if every is not None else []
    return sorted({*points, *(step for step in extra_steps(config) if first <= step <= total), total})


def is_saved(config: RunConfig, step: int) -> bool:
    """Whether a checkpoint is written after ``step``."""
    every = saves(config)
    return (every is not None and every.number(step) is not None) or step == config.total_steps or step in extra_steps(config)


def retention(config: RunConfig) -> Retention:
    """Which of the run's checkpoints stay."""
    settings = config.checkpoint
    keep_every = None if settings.keep_every is None else config.grid(settings.keep_every)
    return Retention(settings.keep_last, keep_every, extra_steps(config), settings.keep_best)


def check_saving(config: RunConfig, first: int, warmup_end: float) -> None:
    """Raise ``UserError`` for requested checkpoints that would never be written. ``first`` is the run's first step minus
    one, ``warmup_end`` the last step of the warmup."""
    settings = config.checkpoint
    every = saves(config)
    if settings.keep_every is not None:
        keep_every = retention(config).keep_every
        assert keep_every is not None
        if every is None or not keep_every.is_multiple_of(every):
            raise UserError(
                f"checkpoint.keep_every: {keep_every} is no multiple of checkpoint.every "
                f"({'only the end' if every is None else every}), so nothing is saved there; make it one"
            )
    if settings.keep_best is None:
        return
    names = [entry.name for entry in config.data.validation]
    if settings.keep_best not in names:
        raise UserError(
            f"checkpoint.keep_best: there is no validation set {settings.keep_best!r} (there are: {', '.join(names) or 'none'})"
        )
    total = config.total_steps
    if not any(is_saved(config, step) for step in evaluation_steps(config, first, warmup_end) if step < total):
        moving = "make checkpoint.every a multiple of evaluation.every, because moving windows are evaluated only there"
        raise UserError(
            "checkpoint.keep_best: no step before the last is both evaluated and saved; "
            + (moving if config.evaluation.windows == "moving" and every is not None else "give a shorter checkpoint.every")
        )


def check_roll_back(config: RunConfig) -> None:
    """Raise ``UserError`` for a roll-back that would find no checkpoint."""
    settings = config.reliability
    if settings.spikes != "roll_back":
        return
    every = saves(config)
    if every is None:
        raise UserError("reliability.spikes: 'roll_back' goes back to a checkpoint: set checkpoint.every")
    reach = math.floor((config.checkpoint.keep_last - 1) * every.interval)
    if reach < settings.roll_back_steps:
        raise UserError(
            f"reliability.roll_back_steps: {settings.roll_back_steps} steps before a spike there may be no checkpoint: "
            f"{config.checkpoint.keep_last} are kept, every {every}, which reaches {reach} back; raise "
            f"checkpoint.keep_last to {math.ceil(settings.roll_back_steps / every.interval) + 1}, or lower roll_back_steps"
        )
