"""Numbers that are not finite, or larger than a float32 counts: what is written of them is read again, by every reader."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from megarewarm.checkpoint import inspection
from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.own.state import RecentSteps, TrainingState, read_state, write_state
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.execution import OptimizerConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import cards
from megarewarm.optimizers.adamw import AdamW
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import read_run
from megarewarm.report.live.frame import frame
from megarewarm.report.live.watch import Watch
from megarewarm.report.pages.run_page import report
from megarewarm.report.pages.terminal_table import summary_table
from megarewarm.training import trainer
from megarewarm.training.after_step import evaluate as evaluation
from tests.support.tiny import config, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_with_validation_losses_that_are_not_finite(tmp_path: Path, loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One set's are from some time on; the run is continued from every checkpoint, exported, and shown by all who show runs."""
    trained = config(
        tmp_path,
        training={"budget": 8},
        model={"num_layers": 1},
        evaluation={"every": 2},
        checkpoint={"every": 2, "keep_last": 1, "keep_best": "old"},
        export={"huggingface": True},
        logging={"dynamics": None},
    )
    original, calls = evaluation.evaluate, [0]

    def evaluate(*arguments: Any) -> tuple[float, int]:
        calls[0] += 1
        found, tokens = original(*arguments)
        return (found if calls[0] in (3, 4) else loss), tokens  # those after step 2

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    outcome = trainer.train(trained, ALONE, quiet())
    console = quiet()
    assert trainer.train(trained, ALONE, console).losses.keys() == {"old", "new"}
    assert "already complete" in printed(console)
    assert [step for step, _ in checkpoints_in(outcome.folder / "checkpoints")] == [2, 8]  # the best is a number
    state = read_state(outcome.folder / "checkpoints/step_8")
    kept = [state.measured["old"], state.start_losses["new"], state.lineage.stages[-1].losses["old"]]
    assert all(str(value) == str(loss) for value in kept)
    json.loads((outcome.folder / "checkpoints/step_8/state.json").read_bytes(), parse_constant=lambda word: pytest.fail(word))
    assert (outcome.folder / "huggingface/README.md").read_text().count(f"| {loss:.4f} |") == 2
    source = open_checkpoint(str(outcome.folder))
    shown = Console(file=io.StringIO(), width=120)
    shown.print(inspection.state_table(source), inspection.lineage_tree(source))
    run = read_run(outcome.folder)
    shown.print(summary_table([run]))
    shown.print(*frame(Watch(outcome.folder).look(), 100, 30))
    assert (report([outcome.folder], tmp_path / "page")).is_file()
    after = config(
        tmp_path,
        name="after",
        folder=str(tmp_path / "after"),
        start={"from": str(outcome.folder)},
        training={"budget": 2},
        model={"num_layers": 1},
    )
    assert trainer.train(after, ALONE, quiet()).step == 2


def test_every_number_of_a_checkpoint_may_be_anything(tmp_path: Path) -> None:
    """Also those that earlier revisions wrote as null."""
    run = trainer.train(
        config(tmp_path, training={"budget": 1}, model={"num_layers": 1}, logging={"dynamics": None}), ALONE, quiet()
    )
    state = read_state(run.folder / "checkpoints/step_1")
    for odd in (math.nan, math.inf, -math.inf, 1.7976931348623157e308, 5e-324, 0.1 + 0.2):
        stage = state.lineage.stages[-1].model_copy(update={"losses": {"x": odd}, "max_lr": odd, "last_lr": odd})
        changes = {
            "lineage": state.lineage.model_copy(update={"stages": [stage]}),
            "recent": RecentSteps(losses=[odd, 1.0], norms=[odd]),
            **{key: {"x": odd} for key in ("start_losses", "measured", "loss_scale")},
            "last_lr": odd,
        }
        write_state(tmp_path, state.model_copy(update=changes))
        found = read_state(tmp_path)
        assert str(found.model_dump()) == str(state.model_copy(update=changes).model_dump())
    text = (tmp_path / "state.json").read_text().replace("5e-324", "null")
    write_state(tmp_path, state.model_copy(update={"measured": {"x": 5e-324}, "start_losses": {"x": 5e-324}}))
    text = (tmp_path / "state.json").read_text().replace("5e-324", "null")
    assert math.isnan(TrainingState.model_validate_json(text).measured["x"])


def test_adams_count_goes_on_where_float32_has_no_whole_numbers() -> None:
    """Beyond 2**24 the count and the bias correction are those of float64, also where moments decay over millions of steps."""
    settings = OptimizerConfig(betas=(0.9, 0.99999999), eps=1e-12, weight_decay=0.0)
    parameter = nn.Parameter(torch.ones(3))
    every = cards(ModelConfig(num_layers=1, hidden_size=4, num_heads=1, vocab_size=5, rotary_fraction=0.5))
    optimizer = AdamW({"final_layer_norm.weight": parameter}, every, settings)
    begun = 2**24 - 2
    optimizer.set_completed_steps(begun)
    weight, first, second = 1.0, 0.0, 0.0
    for step in range(begun + 1, begun + 7):
        parameter.grad = torch.full((3,), 0.5)
        optimizer.step(1e-3)
        first, second = 0.9 * first + 0.1 * 0.5, 0.99999999 * second + 1e-8 * 0.25
        root = math.sqrt(second / -math.expm1(step * math.log(0.99999999)))
        weight -= 1e-3 * (first / -math.expm1(step * math.log(0.9))) / root
        assert optimizer.completed_steps == step
    assert float(parameter[0]) == pytest.approx(weight, rel=1e-4)
    for steps in (2**24 + 1, 2**31 + 3, 2**40 + 1):
        optimizer.set_completed_steps(steps)
        assert optimizer.completed_steps == steps
