"""Values of rows during a run: what they must add up to, and that training, stops and layouts don't notice them."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarewarm.config.experiment import load_experiment
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from megarewarm.parallel import direction
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.values import Values, rows_in
from megarewarm.training import trainer, valuing
from megarewarm.training.run import Run, Update
from megarewarm.training.setup import build
from megarewarm.training.spikes import SpikeDetector
from megarewarm.training.start.plan import make_plan
from megarewarm.training.start.valuation import valued_rows
from megarewarm.training.step import training_step
from megarewarm.training.trainer import train
from megarewarm.training.valuing import StepValue, carried_rate, value_step
from tests.parallel.test_direction import Named, gradient_of, in_float64, row_losses
from tests.support.tiny import config, events, mapping, printed, quiet
from tests.training.test_resume import losses, tensors_of

ALONE = Ranks(0, 1, torch.device("cpu"))
AGAINST = {"against": ["old", "new"], "every": 5, "share": 1.0, "rows": 8, "carry": False}


def valued(run: Run, steps: int) -> list[tuple[int, Update, list[StepValue | None]]]:
    """The values of all rows of each of ``steps`` steps against all validation sets."""
    found: list[tuple[int, Update, list[StepValue | None]]] = []

    def before(update: Update) -> None:
        everything = range(run.plan.config.training.global_batch)
        sets = [windows.portion(0, 8) for windows in run.validation]
        found.append((run.step + 1, update, value_step(run, update, sets, everything)))

    run.before_update = before
    for _ in range(steps):
        training_step(run, run.plan.lr(run.step + 1))
    run.batches.close()
    return found


# ---- what values are --------------------------------------------------------------------------------------------------


def _adamw_by_hand(run: Run, weights: Named, state: dict[tuple[str, str], torch.Tensor], gradient: Named, lr: float) -> Named:
    """The weights after PyTorch's own AdamW step from a state before it, in float64."""
    chosen, steps = run.plan.config.optimizer, run.optimizer.completed_steps
    moved = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    groups = [
        {"params": [moved[name]], "weight_decay": chosen.weight_decay if run.model.cards[name].decays else 0.0}
        for name in moved
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=chosen.betas, eps=chosen.eps, foreach=False)
    for name, parameter in moved.items():
        parameter.grad = gradient[name]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps)),
            **{what: state[what, name].double().clone() for what in ("exp_avg", "exp_avg_sq")},
        }
    optimizer.step()
    return {name: parameter.detach() for name, parameter in moved.items()}


def test_values_are_the_shapley_values_of_an_adamw_step(tmp_path: Path) -> None:
    """Of the real fall of the validation loss, from all 64 subsets of a batch of six rows (as in docs/worth.md)."""
    count = 6
    settings = config(
        tmp_path,
        training={"budget": 60, "global_batch": count, "micro_batch": 2},
        optimizer={"clip_norm": None},
        schedule={"max_lr": 3e-4, "min_lr": 3e-4},
    )
    run = build(make_plan(settings), ALONE)
    for step in range(1, 51):
        training_step(run, run.plan.lr(step))
    held_out = torch.from_numpy(next(iter(run.validation[1].portion(0, 8).micro_batches(0, 1, 8))))
    seen: dict[str, Any] = {}

    def before(update: Update) -> None:
        (seen["value"],) = value_step(run, update, [run.validation[1].portion(0, 8)], range(count))
        model, weights = in_float64(run)
        rows = torch.from_numpy(update.rows)
        each = [gradient_of(model, weights, row[None]) for row in rows]
        state = run.optimizer.state()
        base = float(row_losses(model, weights, held_out).sum())
        for size in range(count + 1):
            for subset in itertools.combinations(range(count), size):
                total = {name: sum((each[i][name] for i in subset), torch.zeros_like(w)) / count for name, w in weights.items()}
                moved = _adamw_by_hand(run, weights, state, total, update.lr)
                loss = float(row_losses(model, moved, held_out).sum())
                seen[str(subset)] = (base - loss) / held_out[:, 1:].numel()

    run.before_update = before
    training_step(run, run.plan.lr(51))
    run.batches.close()
    shapley = []
    for row in range(count):
        others = [i for i in range(count) if i != row]
        shapley.append(
            sum(
                math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                * (seen[str(tuple(sorted((*subset, row))))] - seen[str(subset)])
                for size in range(count)
                for subset in itertools.combinations(others, size)
            )
        )  # fmt: skip
    value: StepValue = seen["value"]
    found = np.array(value.rows) * run.plan.lr(51)
    assert np.corrcoef(found, shapley)[0, 1] > 0.999
    assert np.linalg.norm(found - shapley) < 0.2 * np.linalg.norm(shapley)
    whole, nobody = seen[str(tuple(range(count)))], seen["()"]
    assert sum(shapley) == pytest.approx(whole - nobody, rel=1e-9)
    assert value.momentum + value.decay == pytest.approx(nobody, rel=0.05)
    assert value.predicted == pytest.approx(whole, rel=0.05)


CASES: dict[str, dict[str, Any]] = {
    "clipped": {"optimizer": {"clip_norm": 0.1}},
    "layer_decay": {"optimizer": {"layer_decay": 0.5, "weight_decay": 0.3}},
    "accumulated": {"training": {"micro_batch": 3}},
    "masked": {"data": {"eod": 5, "reset_at_eod": True, "mask_eod_loss": True}},
    "fused_optimizer": {"kernels": {"optimizer": "triton"}, "optimizer": {"clip_norm": 0.5}},
    "recomputed": {"training": {"recompute": "full"}},
    "odd_vocabulary_tied": {"model": {"vocab_size": 67, "tie_embeddings": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_rows_add_up_to_the_share_of_the_batch_and_all_to_the_change(tmp_path: Path, case: str) -> None:
    """The share of the batch is a product with its whole gradient, the rows' are differences of losses; at a small rate, all
    shares together are what the loss then falls by."""
    settings = config(tmp_path, schedule={"max_lr": 1e-4, "min_lr": 1e-4, "warmup": 0}, **CASES[case])
    run = build(make_plan(settings), ALONE)
    for step, update, values in valued(run, 6):
        for value in values:
            assert value is not None
            scale = math.sqrt(sum((update.lr * row) ** 2 for row in value.rows))
            assert sum(value.rows) * update.lr == pytest.approx(value.samples, abs=3e-3 * scale), step
    loss = {windows.name: valuing.mean_loss(run, windows.portion(0, 8))[0] for windows in run.validation}
    for windows, value in zip(run.validation, values, strict=True):
        assert value is not None
        assert value.loss - loss[windows.name] == pytest.approx(value.predicted, rel=0.05, abs=3e-6)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_a_row_is_worth_what_its_whole_term_of_the_loss_does(tmp_path: Path, kind: str) -> None:
    """With a teacher, too; the validation loss is the cross entropy alone."""
    start = train(config(tmp_path, name="first", folder=str(tmp_path / "first")), ALONE, quiet())
    settings = config(
        tmp_path,
        start={"from": str(start.folder)},
        distill={"kind": kind, "weight": 0.5},
        schedule={"max_lr": 1e-3, "min_lr": 1e-3, "warmup": 0},
    )
    run = build(make_plan(settings), ALONE)
    found = valued(run, 6)
    for _, update, values in found[3:]:
        for value in values:
            assert value is not None
            scale = math.sqrt(sum((update.lr * row) ** 2 for row in value.rows))
            assert sum(value.rows) * update.lr == pytest.approx(value.samples, abs=3e-3 * scale)
    _, _, last = found[-1]
    for windows, value in zip(run.validation, last, strict=True):
        assert value is not None
        after = valuing.mean_loss(run, windows.portion(0, 8))[0]
        assert value.loss - after == pytest.approx(value.predicted, rel=0.2)


def test_fp16_has_the_values_of_fp32(tmp_path: Path) -> None:
    """Whatever its loss scale; the passes of the differences are in fp32."""
    found = {}
    for precision in ("fp32", "fp16", "bf16"):
        run = build(make_plan(config(tmp_path, training={"precision": precision})), ALONE)
        _, _, values = valued(run, 6)[-1]
        assert all(value is not None for value in values)
        found[precision] = np.array([value.rows for value in values if value is not None])
    for precision, tolerance in (("fp16", 0.01), ("bf16", 0.05)):
        difference = np.linalg.norm(found[precision] - found["fp32"]) / np.linalg.norm(found["fp32"])
        assert 0 < difference < tolerance, precision


def test_what_momentum_carries_on_is_what_it_adds_to_the_weights(tmp_path: Path) -> None:
    """The displacement that one gradient leaves behind at the end of the run, step by step with Adam's own recursion."""
    run = build(make_plan(config(tmp_path, training={"budget": 40})), ALONE)
    for step in range(1, 8):
        training_step(run, run.plan.lr(step))
    run.batches.close()
    beta = run.plan.config.optimizer.betas[0]
    for lr in (run.plan.lr(8), 0.0):  # at a rate of nothing, momentum still carries it on
        moment, moved = 0.0, 0.0
        for step in range(8, 41):
            moment = beta * moment + (1 - beta) * (step == 8)
            moved += (lr if step == 8 else run.plan.lr(step)) * moment / (1 - beta**step)
        own = (1 - beta) / (1 - beta**8)
        assert carried_rate(run, lr) == pytest.approx(moved / own, rel=2e-3)


# ---- a run with values ------------------------------------------------------------------------------------------------


def _content(folder: Path) -> list[dict[str, Any]]:
    return [row.__dict__ for _, _, row in rows_in(folder / "values.jsonl")]


def _value_lines(folder: Path) -> list[dict[str, Any]]:
    lines = {(line["step"], line["name"]): {k: v for k, v in line.items() if k != "time"} for line in events(folder, "value")}
    return [lines[key] for key in sorted(lines)]


def test_training_is_the_same_with_values_and_without(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optimizer": {"layer_decay": 0.9}, "training": {"micro_batch": 3}}
    without = train(config(tmp_path, folder=str(tmp_path / "without"), **changes), ALONE, quiet())
    console = quiet()
    settings = config(tmp_path, folder=str(tmp_path / "with"), valuation={**AGAINST, "every": 2}, **changes)
    found = train(settings, ALONE, console)
    assert losses(found.folder) == losses(without.folder)
    assert [line["grad_norm"] for line in events(found.folder, "train")] == [
        line["grad_norm"] for line in events(without.folder, "train")
    ]
    assert found.losses == without.losses
    one, two = (tensors_of(run.folder / "checkpoints/step_20") for run in (found, without))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert printed(console).count("positive values lowered") == 1


def test_events_and_rows_say_the_same(tmp_path: Path) -> None:
    """Sums by source, in a blend whose rows come from both files; every row is where the line says it is."""
    sources = [{"path": str(tmp_path / name), "max_epochs": 9} for name in ("new", "old")]
    settings = config(tmp_path, data={"train": sources}, valuation={**AGAINST, "carry": True})
    folder = train(settings, ALONE, quiet()).folder
    rows, lines = Values(folder), _value_lines(folder)
    assert [(line["step"], line["name"]) for line in lines] == [(s, name) for s in (5, 10, 15, 20) for name in ("new", "old")]
    assert set(rows.sources) == {"new", "old"} and rows.sets == ["old", "new"] and len(rows) == 4 * 8
    for line in lines:
        until = rows.step <= line["step"]
        for i, source in enumerate(rows.sources):
            mine = until & (rows.source == i)
            assert line["sources"][source] == pytest.approx(rows.values[line["name"]][mine].sum(), rel=1e-12)
            assert line["rows"][source] == mine.sum()
        assert line["predicted"] == pytest.approx(line["samples"] + line["momentum"] + line["decay"], rel=1e-12)
        assert line["rest"] == pytest.approx(line["measured"] - line["predicted"], rel=1e-9)
    late = [line for line in lines if line["step"] == 20]
    assert all(abs(line["rest"]) < 0.2 * abs(line["measured"]) for line in late)
    for number in range(len(rows)):
        row = rows.row(number)
        assert row.tokens is not None and len(row.tokens) == 17 and rows.lengths[number] == 16
        file = open_tokens(row.path.removesuffix(".bin"))
        held = [file.document(part.document)[part.offset : part.offset + part.tokens] for part in row.parts]
        assert np.concatenate(held).tolist() == row.tokens
        batch = (row.step - 1) * 8
        assert batch <= row.position < batch + 8 and Path(row.path).stem == row.source


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_after", [pytest.param(3, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow), 12])
def test_a_run_that_was_killed_has_the_same_values(tmp_path: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"every": 2, "share": 0.5, "rows": 3, "against": ["old", "new"], "keep_extremes": 3}
    whole = train(config(tmp_path, folder=str(tmp_path / "whole"), valuation=settings), ALONE, quiet()).folder
    broken = config(tmp_path, folder=str(tmp_path / "broken"), valuation=settings)
    original = trainer.training_step

    def step_or_die(run: Run, lr: float) -> Any:
        if run.step == killed_after:
            raise Killed
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(Killed):
        train(broken, ALONE, quiet())
    monkeypatch.undo()
    with open(tmp_path / "broken/values.jsonl", "ab") as file:
        file.write(b'{"step":99,"posi')  # what a kill amid a line leaves
    console = quiet()
    again = train(broken, ALONE, console).folder
    assert (again / "values.jsonl").read_bytes() == (whole / "values.jsonl").read_bytes()
    assert _value_lines(again) == _value_lines(whole) and "lacks" not in printed(console)


def test_rows_that_are_gone_are_missed(tmp_path: Path) -> None:
    settings = config(tmp_path, valuation=AGAINST)
    folder = train(settings, ALONE, quiet()).folder
    shutil.rmtree(folder / "checkpoints/step_20")
    (folder / "values.jsonl").unlink()
    console = quiet()
    train(settings, ALONE, console)
    assert "values.jsonl lacks 24 rows of earlier steps" in printed(console)
    assert {row["step"] for row in _content(folder)} == {20}


def test_extremes_keep_their_tokens(tmp_path: Path) -> None:
    folder = train(config(tmp_path, valuation={**AGAINST, "every": 1, "keep_extremes": 2}), ALONE, quiet()).folder
    rows = Values(folder)
    kept = {number for number in range(len(rows)) if rows.row(number).tokens is not None}
    for values in rows.values.values():
        ascending = np.argsort(values)
        assert {*ascending[:2].tolist(), *ascending[-2:].tolist()} <= kept
    assert 4 <= len(kept) < len(rows) / 2


def test_a_roll_back_takes_the_values_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reliability = {"spikes": "roll_back", "roll_back_steps": 2, "spike_window": 8, "non_finite": "skip"}
    settings = config(
        tmp_path, training={"budget": 24}, reliability=reliability, valuation={**AGAINST, "every": 3}, checkpoint={"every": 4}
    )
    spike = losses(train(config(tmp_path, folder=str(tmp_path / "quiet"), training={"budget": 24}), ALONE, quiet()).folder)[16]
    monkeypatch.setattr(SpikeDetector, "judge", lambda self, loss, norm: "a spike" if loss == spike else None)
    folder = train(settings, ALONE, quiet()).folder
    back = [line["to"] for line in events(folder, "alarm") if line["kind"] == "roll_back"]
    assert len(back) == 1 and back[0] <= 14
    steps = [row["step"] for row in _content(folder)]
    assert not [step for step in steps if back[0] < step <= 16] and {3, 6, 18, 21, 24} <= set(steps)
    last = [line for line in _value_lines(folder) if line["step"] == 24]
    for line in last:
        wanted = sum(row["values"][line["name"]] for row in _content(folder))
        assert sum(line["sources"].values()) == pytest.approx(wanted, rel=1e-9)


def test_rows_are_drawn_evenly_and_the_same_each_time(tmp_path: Path) -> None:
    settings = config(tmp_path, training={"global_batch": 48, "micro_batch": 4}, valuation={"against": ["new"]})
    counts = np.zeros(48, int)
    for step in range(1, 2001):
        chosen = valued_rows(settings, step)
        assert chosen == sorted(set(chosen)) and len(chosen) == 12 and chosen == valued_rows(settings, step)
        assert [row // 4 for row in chosen] == list(range(12))  # one of every four
        counts[chosen] += 1
    assert counts.min() > 400 and counts.max() < 600


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"valuation": {"against": ["pile"]}}, "no validation set is named 'pile'; data.validation has old, new"),
        ({"valuation": {"against": ["old", "old"]}}, "validation set 'old' is named twice"),
        ({"valuation": {"against": []}}, "valuation.against"),
        ({"valuation": {"against": ["old"], "order": "second"}}, "valuation.order"),
        ({"valuation": {"against": ["old"], "share": 0}}, "valuation.share"),
        ({"valuation": {"against": ["old"]}, "optimizer": {"kind": "muon"}}, "works with optimizer.kind: adamw"),
    ],
)
def test_what_can_not_be_valued_is_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as refused:
        config(tmp_path, **changes)
    assert what in str(refused.value) and "\n" not in str(refused.value)


def test_low_precision_is_said(tmp_path: Path) -> None:
    console = quiet()
    train(config(tmp_path, training={"precision": "bf16", "budget": 5}, valuation=AGAINST), ALONE, console)
    assert "valuation: training computes in bf16, the two forward passes of each valuation in fp32" in printed(console)
    assert isinstance(config(tmp_path), RunConfig) and direction._CHANGE == 2e-3


def test_an_axis_may_vary_it(tmp_path: Path) -> None:
    base = mapping(tmp_path, valuation=AGAINST)
    del base["name"], base["folder"]
    axes: dict[str, list[Any]] = {"valuation.carry": [True, False], "valuation.every": [2, "10%"]}
    experiment = {"experiment": "e", "base": base, "sweeps": [{"name": "grid", "axes": axes}]}
    arms = load_experiment(experiment, {}).arms
    found = {(arm.config.valuation.carry, str(arm.config.valuation.every)) for arm in arms if arm.config.valuation}
    assert found == {(carry, every) for carry in (True, False) for every in ("2 steps", "10%")}
