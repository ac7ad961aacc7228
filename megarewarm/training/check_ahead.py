"""What the runs of an experiment would be refused for, before the first of them trains."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.training.evaluate import open_validation
from megarewarm.training.owed import is_trained
from megarewarm.training.plan import Plan
from megarewarm.training.run_data import open_data
from megarewarm.training.saving import check_saving
from megarewarm.training.texts import settle_texts
from megarewarm.training.unwritten import plan_ahead


def check_ahead(configs: Sequence[RunConfig], chosen: Collection[str]) -> None:
    """Raise ``UserError`` for what the start of a run whose name is ``chosen`` would refuse about its plan, data, tokenizers
    and export, before the first trains: each starts from what is there, or from what an earlier one of ``configs`` will have
    written. All ranks call it."""
    plans: list[Plan] = []
    for config in configs:
        try:
            plan, missing = plan_ahead(config, plans)
            plans.append(plan)
            if config.name not in chosen or is_trained(plan):
                continue
            if missing:
                raise UserError(missing[0])
            check_saving(plan.config, plan.origin.step, plan.origin.step + plan.schedule.warmup_steps)
            settle_texts(plan)
            open_data(plan)
            open_validation(plan.config, plan.model.vocab_size)
        except UserError as error:
            if config.name in chosen:
                raise UserError(f"run '{config.name}': {error}") from error
