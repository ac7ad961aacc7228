"""The blends of a run, one after another: where each begins, in samples, from steps, tokens or the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megarewarm.config.data import BlendSwitch
from megarewarm.config.schema import RunConfig
from megarewarm.data.mixture.phases import AnySource, Phase
from megarewarm.errors import UserError
from megarewarm.rewarm.replay import with_replay
from megarewarm.rewarm.reset import Position
from megarewarm.schedules.schedule import Schedule


def training_phases(config: RunConfig, schedule: Schedule, origin: Position, old: Sequence[AnySource]) -> list[Phase]:
    """The phases of the run that began at ``origin``: its training sources with ``old`` replayed, then each switch. Raises
    ``UserError`` for switches that never happen, or not in their order."""
    fraction = config.replay.fraction if config.replay is not None else 0.0
    phases = [Phase(0, with_replay(config.data.train, old, fraction, config.data.order_name))]
    for number, switch in enumerate(config.data.switches):
        step = switch_step(switch, config, schedule, origin, f"data.switches.{number}")
        first = origin.samples + (step - origin.step) * config.training.global_batch
        if first <= phases[-1].first:
            raise UserError(
                f"data.switches.{number} takes place after step {step}, which is not after the one before it: give them in "
                f"their order"
                if number
                else f"data.switches.0 takes place before the first step (after step {step}): give its sources as data.train"
            )
        share = fraction if switch.replay_fraction is None else switch.replay_fraction
        phases.append(Phase(first, with_replay(switch.train, old, share, config.data.order_name)))
    return phases


def switch_step(switch: BlendSwitch, config: RunConfig, schedule: Schedule, origin: Position, key: str) -> int:
    """The number of completed steps of the run after which the blend changes."""
    total = config.total_steps
    if switch.at is not None:
        step = round(config.steps(switch.at))
        if step >= total:
            raise UserError(f"{key}.at: '{switch.at}' is step {step}, the run ends at {total}: nothing would be read after it")
        return step
    assert switch.lr_below is not None
    warm = math.ceil(schedule.warmup_steps)
    last = origin.schedule + total - origin.step
    rates = schedule.values(np.arange(warm, last)) if last > warm else np.empty(0)
    (below,) = np.nonzero(rates < switch.lr_below)
    if not below.size:
        raise UserError(
            f"{key}.lr_below: the learning rate never falls below {switch.lr_below:g} (it ends at "
            f"{schedule.lr(max(0, last - 1)):g}): choose a higher one, or give 'at'"
        )
    if below[0] == 0:
        raise UserError(
            f"{key}.lr_below: {switch.lr_below:g} is above the peak {schedule.max_lr:g}: choose a lower one, or give 'at'"
        )
    return origin.step + warm + int(below[0]) - origin.schedule
