"""How long a run will take, if a similar one has trained before."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarewarm.errors import UserError
from megarewarm.model.size import PASSES, count_parameters
from megarewarm.record.config_yaml import read_settings
from megarewarm.record.follow import Follower
from megarewarm.record.layout import METRICS_FILE
from megarewarm.spelling import duration_text, tokens_text
from megarewarm.training.start.evaluation_cost import EvaluationCost
from megarewarm.training.start.plan import Plan


@dataclass(frozen=True)
class SeenPace:
    """``tokens_per_second``: the median of the last steps of the complete run in ``folder``."""

    folder: Path
    tokens_per_second: float

    def outlook(self, plan: Plan, cost: EvaluationCost | None) -> str:
        """How long the rest of ``plan`` takes at this pace, and the run that the pace is from."""
        steps = plan.config.total_steps - plan.position.step + plan.measured_batches
        tokens = float(steps * plan.config.tokens_per_step)
        if cost is not None:
            tokens += cost.after(plan.position.step if plan.resumed else plan.origin.step - 1) / PASSES["none"]
        time = duration_text(tokens / self.tokens_per_second)
        return f"about {time}, at the {tokens_text(self.tokens_per_second)} tokens/s of {self.folder}, a similar run"


def seen_pace(plan: Plan, ranks: int, device: str) -> SeenPace | None:
    """The pace of the run itself so far, or of the newest complete run next to ``plan``'s folder with the same number of
    parameters and ``ranks``, the same type of ``device`` and the same settings that affect speed; None if there is none."""
    folder = Path(plan.config.run_folder)
    wanted = _like(plan.config.model_dump(mode="json"))
    found = []
    for metrics in folder.parent.glob(f"*/{METRICS_FILE}"):
        try:
            follower = Follower(metrics)
            follower.poll()
            settings = read_settings(metrics.parent)
        except (OSError, UserError):
            continue
        start, stop = follower.start, follower.stop
        same = start.get("parameters") == count_parameters(plan.model) and start.get("ranks") == ranks
        same = same and str(start.get("device")).partition(":")[0] == device and _like(settings) == wanted
        rates = [line.tokens_per_second for line in follower.recent if line.tokens_per_second > 0]
        own = metrics.parent == folder and plan.resumed
        if same and rates and (own or (stop is not None and stop.get("reason") == "complete")):
            found.append((metrics.stat().st_mtime, SeenPace(metrics.parent, statistics.median(rates))))
    return max(found, key=lambda each: each[0])[1] if found else None


def _like(settings: dict[str, Any]) -> list[Any]:
    """The recorded settings that determine the time per token."""
    keys = (("data", "sequence_length"), ("training", "recompute"), ("training", "precision"), ("parallel", "sharding"))
    sections = [(settings.get(section), key) for section, key in keys]
    return [found.get(key) if isinstance(found, dict) else None for found, key in sections]
