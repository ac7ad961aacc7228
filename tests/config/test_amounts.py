"""One grammar for numbers: every spelling of an amount is the same amount, and what is refused is refused in plain words."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.budget import Budget, in_epochs, without_epochs
from megarewarm.config.experiment import ExperimentConfig, load_experiment
from megarewarm.config.load import dump, validate
from megarewarm.config.yaml_text import parse_scalar
from megarewarm.errors import UserError
from tests.config.test_schema import MINIMAL, load, refusal
from tests.support.tiny import config

UNITS = {"steps": "step", "tokens": "token", "epochs": "epoch"}
MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@settings(deadline=None)
@given(
    st.integers(1, 999_999), st.sampled_from(list(MULTIPLES)), st.sampled_from(list(UNITS)), st.sampled_from("_,"),
    st.sampled_from(["", " ", "  "]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_every_spelling_is_the_same_amount(
    number: int, multiple: str, unit: str, comma: str, space: str, plural: bool, upper: bool
) -> None:
    word = UNITS[unit] + "s" * plural
    expected = Budget(amount=float(number * MULTIPLES[multiple]), unit=unit)
    grouped = f"{number:{comma}}"
    for digits in (str(number), grouped, f"{number}.0", f"{number}e0"):
        text = f"{digits}{space}{multiple}{space}{word.upper() if upper else word}"
        assert Budget.model_validate(text) == expected
    assert Budget.model_validate(parse_scalar(str(expected), "here")) == expected


@settings(deadline=None)
@given(st.floats(0.001, 1000, allow_nan=False), st.fractions(1, 10**6))
def test_epochs_become_exact_steps(epochs: float, steps: Fraction) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        run = load(Path(place), MINIMAL, f"evaluation.every={epochs!r} epochs", "checkpoint.every=3 epochs")
    assert set(in_epochs(run)) == {"evaluation.every", "checkpoint.every"}
    settled = without_epochs(run, steps)
    assert not list(in_epochs(settled)) and settled.training == run.training
    every = settled.evaluation.every
    assert every is not None and every.unit == "steps"
    assert every.amount == pytest.approx(float(Fraction(repr(epochs)) * steps), rel=1e-15)


def test_an_axis_may_hold_the_arm_without_replay(tmp_path: Path) -> None:
    for nothing in ("0", "0.0", "0%", "0 %"):
        run = load(tmp_path, MINIMAL, f"replay={{fraction: {nothing}}}")
        assert run.replay is None
    assert load(tmp_path, MINIMAL, "replay={fraction: 5%, sources: [{path: b}]}").replay is not None
    switch = "data.switches=[{at: 50%, train: [{path: b}], replay_fraction: 5%}]"
    assert "nothing says what is replayed" in refusal(tmp_path, MINIMAL, "replay={fraction: 0}", switch)


def test_a_run_without_replay_stands_at_0_of_the_axis() -> None:
    base = {
        "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512},
        "data": {"sequence_length": 64, "train": [{"path": "a"}]},
        "schedule": {"curve": "constant", "max_lr": 1e-3},
        "training": {"budget": 9, "global_batch": 4, "micro_batch": 4},
        "replay": {"fraction": "1%", "sources": [{"path": "b"}]},
    }
    sweep = {"name": "s", "axes": {"replay.fraction": [0, "5%"]}, "with": ["none"]}
    runs = [{"name": "none", "replay": None, "training": {"budget": 8}}]
    none, zero, some = load_experiment({"experiment": "e", "base": base, "runs": runs, "sweeps": [sweep]}, {}).arms
    assert none.groups["s"] == {"replay.fraction": 0.0} == zero.groups["s"] and zero.config.replay is None
    assert some.config.replay is not None and some.config.replay.fraction == 0.05


@pytest.mark.parametrize("length", ["0", "0%", "five", "true", "null"])
def test_the_length_of_a_quick_form(length: str) -> None:
    whole = {"experiment": "e", "runs": [{"name": "a"}], "quick": {"length": parse_scalar(length, "here")}}
    with pytest.raises(UserError, match=r"quick: length: expected a share of the runs' budgets, such as 0.01 or '1%'"):
        validate(ExperimentConfig, whole, {})
    good = validate(ExperimentConfig, whole | {"quick": {"length": "1 %"}}, {})
    assert good.quick == {"length": 0.01}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("training.budget=5e9", "may be steps or tokens: write '5000000000 steps' or '5000000000 tokens'"),
        ("training.budget=1e30 tokens", "is more than 10,000,000,000 steps; give fewer"),
        ("training.budget={a: 1}", "training.budget: not a length of training; write steps as an integer (500), or"),
        ("training.budget=1%", "is a share of itself: give steps, tokens or epochs"),
        ("training.global_batch=2 tokens", "'2 tokens' is not a number of sequences; write it as 1000 or '512 sequences'"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected at least 2 in the list, found 1"),
        ("checkpoint.extra_steps=5", "checkpoint.extra_steps: expected a list, such as [1, 2], or 'log_spaced' (given: 5)"),
        ("checkpoint.extra_steps=[-1]", "checkpoint.extra_steps.0: must be at least 0 (given: -1)"),
        ("data.switches=[{at: 1 epoch, train: [{path: b}]}]", "an epoch has no length where the blend changes"),
        ("data.train.0.tokens=1 epoch", "expected a number of tokens above 0, such as '2B tokens'"),
        ("evaluation.every=0 epochs", "0 is no interval: write null for never"),
    ],
)
def test_what_is_refused_is_said_plainly(tmp_path: Path, word: str, said: str) -> None:
    message = refusal(tmp_path, MINIMAL, word)
    assert said in message and message.count("\n") == 0 and "constrained" not in message


def test_an_epoch_has_no_length_where_the_blend_changes(tmp_path: Path) -> None:
    words = ["training.budget=2 epochs", "data.switches=[{at: 50%, train: [{path: b}]}]"]
    assert "training.budget: where data.switches change the blend an epoch has no length" in refusal(tmp_path, MINIMAL, *words)


def test_a_budget_in_epochs_survives_being_written(tmp_path: Path) -> None:
    run = config(tmp_path, training={"budget": "2.5 epochs"}, evaluation={"every": "0.25 epochs"})
    assert "budget: 2.5 epochs\n" in dump(run) and "every: 0.25 epochs\n" in dump(run)
