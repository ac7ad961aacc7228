"""``state.json``: every counter of a run that is not a tensor, readable by people. Losses may be NaN or infinite. JSON has
no such numbers: they are written as the texts "NaN", "Infinity" and "-Infinity"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megarewarm.checkpoint.lineage import Lineage, Loss
from megarewarm.config.model import ModelConfig
from megarewarm.data.files.file_identity import FileIdentity
from megarewarm.errors import UserError

FORMAT = 2
STATE_FILE = "state.json"


class RecentSteps(BaseModel):
    """State of the parts that follow a step: losses and gradient norms of the last steps, the number of skipped steps in a
    row, whether a planned save waits for a good step, whether the run stopped before an evaluation was complete; further
    parts add keys of their own."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings", extra="allow")

    losses: list[Loss] = []
    norms: list[Loss] = []
    unchanged: int = 0
    due: bool = False
    unevaluated: bool = False


class _Format(BaseModel):
    format: int = FORMAT


class Thawed(BaseModel):
    """Parameters whose moments began later than the run's: those of a run with ``optimizer.train.for``. ``optimizer_step``:
    their own count of steps."""

    model_config = ConfigDict(frozen=True)

    names: list[str]
    optimizer_step: int


class TrainingState(BaseModel):
    """The counters of a run.

    ``step``: completed optimizer steps of the run. ``optimizer_step``: Adam's count. ``schedule_position``: the position in the
    schedule, in its own steps. ``samples``: consumed samples of the data identified by ``data_fingerprint``.
    ``schedule``: the whole curve. ``start_position``: (step, schedule position, samples) at which the run began, so that a
    resumed run continues all three. ``measured``: validation losses at this step. ``recent``: state of the parts that
    follow a step. ``keeps``: the rows of the reset table that the checkpoint can provide, beside the weights; null for all
    of them. ``interim``: written only because the run was stopped there. ``step_tokens``: tokens of all steps that ``step``
    counts, those of earlier runs among them (``tokens`` are the run's own); null where it was not recorded. ``optimizer``: the
    kind whose state is kept. ``held_out``: the files of each validation set; none where it was not recorded. ``trained``: the
    parameters that have moments, with their rows (first, stop) or null for all of them; null for all parameters. ``thawed``:
    those of them that began later.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    format: int = FORMAT
    run: str
    intent: str
    step: int
    tokens: int
    optimizer_step: int
    schedule_position: int
    schedule: dict[str, Any]
    last_lr: float
    samples: int
    data_fingerprint: str
    model: ModelConfig
    lineage: Lineage
    start_position: tuple[int, int, int]
    start_losses: dict[str, Loss] = {}
    measured: dict[str, Loss] = {}
    loss_scale: dict[str, float] | None = None
    recent: RecentSteps | None = None
    keeps: frozenset[str] | None = None
    interim: bool = False
    step_tokens: int | None = None
    optimizer: str = "adamw"
    held_out: dict[str, list[FileIdentity]] = {}
    trained: dict[str, tuple[int, int] | None] | None = None
    thawed: list[Thawed] = []

    @property
    def recent_steps(self) -> RecentSteps:
        """``recent``, or the initial state if it was not recorded."""
        return self.recent or RecentSteps()

    @property
    def tokens_counted(self) -> int | None:
        """``step_tokens``, or else the lineage's count; None without both."""
        if self.step_tokens is not None:
            return self.step_tokens
        steps, tokens = 0, 0
        for stage in reversed(self.lineage.stages):
            steps, tokens = steps + stage.steps, tokens + stage.tokens
            if steps >= self.step:
                break
        return tokens if steps == self.step else None


def write_state(checkpoint: Path, state: TrainingState) -> None:
    """Write ``checkpoint/state.json``. Raises ``OSError``."""
    (checkpoint / STATE_FILE).write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_state(checkpoint: Path) -> TrainingState:
    """The counters of a checkpoint. Raises ``UserError`` for a file that is damaged or of another format."""
    path = checkpoint / STATE_FILE
    try:
        content = path.read_bytes()
        # first, because a later format may lack keys that this one needs
        found = _Format.model_validate_json(content).format
        if found > FORMAT:
            raise UserError(f"{path}: format {found} is newer than this megarewarm reads ({FORMAT}); update megarewarm")
        return TrainingState.model_validate_json(content)
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({first}); name another checkpoint") from error
