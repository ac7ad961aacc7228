"""Frozen parameters stay bit for bit, the others train as in a plain loop, and both at every rank, save and thaw."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarewarm.checkpoint.convert import ConvertOptions, convert
from megarewarm.checkpoint.own.state import read_state
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.errors import UserError
from megarewarm.layout.memory import memory_of, parts
from megarewarm.layout.micro_batch import work_of
from megarewarm.model.parameters import EMBEDDING, HEAD, cards
from megarewarm.model.transformer import Transformer
from megarewarm.optimizers.muon import orthogonalised
from megarewarm.optimizers.staggered import parts_of
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import trainer
from megarewarm.training.measuring import measure_moments
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.thaw import thawed
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, printed, quiet
from tests.training.test_resume import Killed, losses, tensors_of

ALONE = Ranks(0, 1, torch.device("cpu"))
# an odd vocabulary, of which tensor ranks have padded rows; an odd number of layers; no bias of keys, which has no gradient
MODEL = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_heads": 4,
    "rotary_fraction": 0.5,
    "vocab_size": 67,
    "attention_bias": False,
}
NEW_ROWS, NEW_LAYERS = (33, 65), [1]  # rows of both halves of the vocabulary
STEPS, THAW = 8, 3


def _start(place: Path, **model: Any) -> Path:
    """A checkpoint whose lineage records new layers and new rows."""
    original = Run.stage
    try:
        Run.stage = lambda self: original(self).model_copy(update={"new_rows": NEW_ROWS, "new_layers": NEW_LAYERS})  # type: ignore[method-assign]
        up = _config(place, "up", training={"budget": 1}, model=model, evaluation={"every": None}, checkpoint={"every": None})
        return train(up, ALONE, quiet()).folder
    finally:
        Run.stage = original  # type: ignore[method-assign]


def _config(place: Path, name: str, **changes: Any) -> Any:
    model = {**MODEL, **changes.pop("model", {})}
    training = {"budget": STEPS, "micro_batch": 2, **changes.pop("training", {})}
    settings = {"checkpoint": {"every": 1}, "evaluation": {"every": STEPS}, **changes}
    return config(place, name=name, folder=str(place / name), model=model, training=training, **settings)


def _frozen(place: Path, name: str, only: Any, until: int | None = None, **changes: Any) -> Any:
    optimizer = {"train": {"only": only, "for": until}, "clip_norm": 0.5, **changes.pop("optimizer", {})}
    return _config(place, name, start={"from": str(place / "up"), "intent": "rewarm"}, optimizer=optimizer, **changes)


def _weights(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    return {
        name.removeprefix("model."): tensor
        for name, tensor in tensors_of(folder / f"checkpoints/step_{step}").items()
        if name.startswith("model.")
    }


def _plainly(settings: Any, trains: Callable[[str], bool], thaw: int | None, only_rows: bool) -> dict[str, Tensor]:
    """The weights after the run, by a loop in float64 over torch's own optimizers. ``only_rows``: of the vocabulary's matrices
    only the new rows train, and their moments begin again at the thaw."""
    plan = make_plan(settings.model_copy(update={"folder": settings.folder + "_data"}))
    run = build(plan, ALONE)
    rows = [torch.from_numpy(run.data.rows(8 * step, 8)) for step in range(STEPS)]
    run.batches.close()
    model = Transformer(plan.model).double()
    every, chosen = cards(plan.model), plan.config.optimizer
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, weights in _weights(Path(settings.start.from_), 1).items():
            named[name].copy_(weights)
    matrices = {name: p for name, p in named.items() if every[name].is_matrix and chosen.kind == "muon"}
    momentum = {name: torch.zeros_like(p) for name, p in matrices.items()}
    rest = [
        {
            "params": [p for name, p in named.items() if every[name].decays is decays and name not in matrices],
            "weight_decay": chosen.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(rest, betas=chosen.betas, eps=chosen.eps)
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.requires_grad_(trains(name) or (thaw is not None and step >= thaw))
        model.zero_grad()
        for group in adamw.param_groups:
            group["lr"] = plan.lr(step + 1)
        loss, count = model.loss(rows[step][:, :-1], rows[step][:, 1:])
        (loss / count).backward()
        frozen_rows = [
            (p, torch.arange(len(p)).lt(NEW_ROWS[0]) | torch.arange(len(p)).ge(NEW_ROWS[1]), p.detach().clone())
            for name, p in named.items()
            if only_rows and every[name].has_vocabulary and (thaw is None or step < thaw)
        ]
        for parameter, frozen, _ in frozen_rows:
            assert parameter.grad is not None
            parameter.grad[frozen] = 0
        torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.grad is not None], chosen.clip_norm or 1e9)
        if only_rows and step == thaw:
            for name in (EMBEDDING, HEAD):
                adamw.state.pop(named[name])
        adamw.step()
        for name, parameter in matrices.items():
            if parameter.grad is not None:
                momentum[name].lerp_(parameter.grad, 1 - chosen.momentum)
                direction, several = parameter.grad.lerp(momentum[name], chosen.momentum), every[name].interleaved
                parts = [direction] if several is None else list(several.split(direction))
                moved = [orthogonalised(part, 5) * 0.2 * max(part.shape) ** 0.5 for part in parts]
                change = moved[0] if several is None else several.join(moved)
                parameter.data -= plan.lr(step + 1) * (change + chosen.weight_decay * parameter.data)
        for parameter, frozen, kept in frozen_rows:
            parameter.data[frozen] = kept[frozen]  # the decay
    return {name: parameter.detach() for name, parameter in named.items()}


def _is_vocabulary(name: str) -> bool:
    return name in (EMBEDDING, HEAD)


Case = tuple[Any, Callable[[str], bool], int | None, dict[str, Any]]
CASES: dict[str, Case] = {
    "head": ("head", lambda name: name == HEAD, None, {}),
    "norms_then_all": ("norms", lambda name: "norm" in name, THAW, {}),
    "layer_and_embedding": (
        ["layers 0", "embed_in*"],
        lambda name: name.startswith(("layers.0.", "embed_in")),
        None,
        {"training": {"recompute": "full"}},
    ),
    "new_layers_then_all": ("new_layers", lambda name: name.startswith("layers.1."), THAW, {"optimizer": {"kind": "muon"}}),
    "tied_head": ("head", lambda name: name == EMBEDDING, None, {"model": {"tie_embeddings": True}}),
    "new_rows_then_all": (
        "new_rows",
        _is_vocabulary,
        THAW,
        {"logging": {"dynamics": 1}, "valuation": {"against": ["new"], "every": "2 steps", "rows": 8}},
    ),
}
FAST = ("new_layers_then_all", "new_rows_then_all")


@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_frozen_parameters_stay_and_the_others_train_as_in_a_plain_loop(tmp_path: Path, case: str) -> None:
    only, trains, thaw, changes = CASES[case]
    start = _start(tmp_path, **changes.get("model", {}))
    settings = _frozen(tmp_path, "frozen", only, thaw, **changes)
    console = quiet()
    outcome = train(settings, ALONE, console)
    before, after = _weights(start, 1), _weights(outcome.folder)
    plain = _plainly(settings, trains, thaw, only == "new_rows")
    at_thaw = tensors_of(outcome.folder / f"checkpoints/step_{thaw or STEPS}")
    for name, weights in after.items():
        frozen = at_thaw[f"model.{name}"]
        if only == "new_rows" and trains(name):
            assert not torch.equal(frozen, before[name])
            frozen[slice(*NEW_ROWS)] = before[name][slice(*NEW_ROWS)]
        if only == "new_rows" or not trains(name):
            assert torch.equal(frozen, before[name]), name
        # by tensor: where a gradient is next to nothing, Adam makes its rounding large
        assert float(torch.linalg.vector_norm(weights - plain[name]) / torch.linalg.vector_norm(plain[name])) < 2e-5, name
    moments = {name.split(".", 2)[2]: tensor for name, tensor in at_thaw.items() if name.startswith("optimizer.")}
    assert moments.keys() == {name for name in after if trains(name)}
    if only == "new_rows":
        assert all(len(tensor) == NEW_ROWS[1] - NEW_ROWS[0] for tensor in moments.values())
        for line in events(outcome.folder, "dynamics"):
            moves = [line["groups"][group]["update_ratio"] > 0 for group in ("embed_in", "layers.1", "embed_out")]
            assert moves == [True, line["step"] > THAW, True]
        first = events(outcome.folder, "value")[0]
        assert first["step"] < THAW and first["predicted"] == pytest.approx(first["measured"], rel=0.2)
    assert [line["step"] for line in events(outcome.folder, "thaw")] == ([thaw] if thaw else [])
    assert "frozen parameters' " in printed(console)


@pytest.mark.parametrize("only", [["new_rows", "norms"], pytest.param("layers 0-1", marks=pytest.mark.slow)])
def test_a_run_killed_around_the_thaw_goes_on_bit_for_bit(tmp_path: Path, only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _start(tmp_path)
    whole = train(_frozen(tmp_path, "whole", only, THAW), ALONE, quiet()).folder
    original = trainer.training_step
    broken = _frozen(tmp_path, "broken", only, THAW)
    for killed_after in (THAW - 1, THAW, THAW + 1):

        def step_or_die(run: Run, lr: float, killed_after: int = killed_after) -> Any:
            if run.step == killed_after:
                raise Killed
            return original(run, lr)

        monkeypatch.setattr(trainer, "training_step", step_or_die)
        with pytest.raises(Killed):
            train(broken, ALONE, quiet())
    monkeypatch.setattr(trainer, "training_step", original)
    again = train(broken, ALONE, quiet()).folder
    assert losses(whole) == losses(again) and len(losses(whole)) == STEPS
    for step in (THAW, THAW + 1, STEPS):
        one, two = (tensors_of(folder / f"checkpoints/step_{step}") for folder in (whole, again))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), step

    # a roll-back to before the thaw: what was frozen then begins again
    run = build(make_plan(broken, up_to=THAW + 1), ALONE)
    run.batches.close()
    before = OwnCheckpoint(whole / f"checkpoints/step_{THAW - 1}")
    assert [late.optimizer.completed_steps for late in parts_of(run.optimizer)[1]] == [1]
    run.restore_from(before)
    saved = tensors_of(before.folder)
    for (what, name), tensor in run.optimizer.state().items():
        kept = saved.get(f"optimizer.{what}.{name}")
        assert torch.equal(tensor, kept if kept is not None and len(kept) == len(tensor) else torch.zeros_like(tensor))
    assert [run.optimizer.completed_steps, parts_of(run.optimizer)[1][0].optimizer.completed_steps] == [THAW - 1, 0]


LAYOUTS: dict[int, dict[str, tuple[Any, int | None, dict[str, Any], dict[str, Any]]]] = {
    2: {
        "tensor_rows_tied": ("new_rows", THAW, {"tensor": 2}, {"model": {"tie_embeddings": True}}),
        "pipeline_head": ("head", THAW, {"pipeline": 2}, {}),
        "zero2_norms": ("norms", THAW, {"sharding": "zero2"}, {}),
        "zero3_head": ("head", THAW, {"sharding": "zero3"}, {}),
        "zero2_rows": (["new_rows", "layers 2"], THAW, {"sharding": "zero2"}, {}),
        "data_muon": ("layers 1-2", THAW, {}, {"optimizer": {"kind": "muon"}}),
    },
    4: {
        "pipeline_tensor_rows_tied": (
            "new_rows",
            THAW,
            {"pipeline": 2, "tensor": 2, "sequence": True},
            {"model": {"tie_embeddings": True}},
        ),
        "pipeline_zero2_rows_tied": (
            "new_rows",
            THAW,
            {"pipeline": 2, "sharding": "zero2"},
            {"model": {"tie_embeddings": True}},
        ),
        "pipeline_late_layer": ("layers 2", THAW, {"pipeline": 2}, {"optimizer": {"kind": "muon"}}),
        "interleaved": ("layers 3", THAW, {"pipeline": 2, "schedule": "interleaved"}, {"model": {"num_layers": 5}}),
        "zero_bubble": ("layers 3-4", THAW, {"pipeline": 2, "schedule": "zero_bubble"}, {"model": {"num_layers": 5}}),
        "zero_bubble_zero2_tied": (
            ["new_rows", "norms"],
            THAW,
            {"pipeline": 2, "schedule": "zero_bubble", "sharding": "zero2"},
            {"model": {"num_layers": 5, "tie_embeddings": True}},
        ),
        "tensor_zero3": (["new_rows", "*.bias"], THAW, {"tensor": 2, "sharding": "zero3"}, {}),
        "hybrid_muon": ("new_layers", THAW, {"sharding": "zero2", "shard_ranks": 2}, {"optimizer": {"kind": "muon"}}),
        "tensor_head": ("head", None, {"tensor": 4}, {}),
        "pipeline_zero2_head": ("head", THAW, {"pipeline": 2, "sharding": "zero2"}, {}),
    },
}


FAST_LAYOUTS = ("tensor_rows_tied", "pipeline_head", "zero3_head")


def _train_all(ranks: Ranks, place: str, names: list[str], tried: int) -> None:
    for name in names:
        only, thaw, parallel, changes = LAYOUTS[tried][name]
        train(_frozen(Path(place) / name, "laid_out", only, thaw, parallel=parallel, **changes), ranks, quiet())


_SLOW = [
    pytest.param(ranks, [name for name in LAYOUTS[ranks] if name not in FAST_LAYOUTS], marks=pytest.mark.slow)
    for ranks in LAYOUTS
]


@pytest.mark.parametrize(("ranks", "names"), [(2, FAST_LAYOUTS), *_SLOW])
def test_layouts_freeze_and_thaw_as_one_process_does(tmp_path: Path, ranks: int, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        _start(tmp_path / name, **LAYOUTS[ranks][name][3].get("model", {}))
    run_ranks(_train_all, ranks, str(tmp_path), list(names), ranks, timeout=600)
    for name in names:
        only, thaw, _, changes = LAYOUTS[ranks][name]
        alone = train(_frozen(tmp_path / name, "alone", only, thaw, **changes), ALONE, quiet()).folder
        laid_out = tmp_path / name / "laid_out"
        norms = [[line["grad_norm"] for line in events(folder, "train")] for folder in (alone, laid_out)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), name
        for step in (THAW, STEPS):
            one, two = (tensors_of(folder / f"checkpoints/step_{step}") for folder in (alone, laid_out))
            assert one.keys() == two.keys(), name
            for key, tensor in one.items():
                if key.startswith("model."):
                    apart = float(torch.linalg.vector_norm(tensor - two[key]) / torch.linalg.vector_norm(tensor))
                    assert apart < 1e-4, f"{name}: {key} differs by {apart:.1e} after step {step}"
        if "rows" in name:  # another layout goes on with what this one saved at the thaw
            for step in range(THAW + 1, STEPS + 1):
                shutil.rmtree(laid_out / f"checkpoints/step_{step}")
            train(_frozen(tmp_path / name, "laid_out", only, thaw, **changes), ALONE, quiet())
            again = _weights(laid_out)
            for key, tensor in _weights(alone).items():
                torch.testing.assert_close(again[key], tensor, rtol=1e-3, atol=1e-4)


BAD: list[tuple[Any, Any, str]] = [
    ("heads", None, "'heads' names what this model does not have: it has 3 layers"),
    ("layers 3-4", None, "'layers 3-4' names what this model does not have"),
    ("layers 1-3", None, "'layers 1-3' names what this model does not have: it has 3 layers (from 0)"),
    (["head", "new_layers"], None, "'new_layers', but the lineage of the start checkpoint records none"),
    ("new_rows", None, "'new_rows', but the lineage"),
    ("*", None, "every parameter, nothing is frozen"),
    ("head", "100%", "optimizer.train.for: '100%' is step 8 of 8: nothing would thaw"),
    ("head", "1%", "nothing would be frozen"),
    ([], None, "optimizer.train.only: expected at least 1"),
]


@pytest.mark.parametrize(("only", "until", "said"), BAD)
def test_what_freezes_nothing_or_everything_is_refused(tmp_path: Path, only: Any, until: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        train(_config(tmp_path, "bad", optimizer={"train": {"only": only, "for": until}}), ALONE, quiet())
    assert "\n" not in str(refused.value) and not (tmp_path / "bad").exists()


def test_what_ends_before_the_run_begins_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    thaws = {"optimizer": {"train": {"only": "head", "for": 1}}, "training": {"budget": 2}}
    train(_config(tmp_path, "up", **thaws), ALONE, quiet())
    longer = {**thaws, "training": {"budget": 4}}
    start = {"from": str(tmp_path / "up"), "intent": "rewarm", "iteration": "continue"}
    with pytest.raises(UserError, match="'1 steps' is step 1 of 4, and the run begins after step 2: nothing would be frozen"):
        make_plan(_config(tmp_path, "late", start=start, **longer))
    resumed = make_plan(_config(tmp_path, "resumed", start={**start, "intent": "resume", "schedule": "restart"}, **longer))
    assert resumed.trains is None


def test_moments_of_what_was_frozen_cannot_be_kept(tmp_path: Path) -> None:
    train(_config(tmp_path, "half", optimizer={"train": {"only": "norms"}}, training={"budget": 2}), ALONE, quiet())
    kept = {"start": {"from": str(tmp_path / "half"), "moments": "keep"}}
    with pytest.raises(
        UserError, match=r"start.moments: 'keep' can't be honoured, .* other moments than this run needs of 20 "
    ):
        train(_config(tmp_path, "kept", **kept), ALONE, quiet())
    # it can go on with the same frozen, also after a conversion, which copies the moments that there are
    source = open_checkpoint(str(tmp_path / "half"))
    convert(source, tmp_path / "copy", ConvertOptions("megarewarm"))
    again = {"start": {"from": str(tmp_path / "copy"), "moments": "keep"}, "optimizer": {"train": {"only": ["norms"]}}}
    outcome = train(_config(tmp_path, "again", **again), ALONE, quiet())
    held = {name for name in tensors_of(outcome.folder / f"checkpoints/step_{STEPS}") if name.startswith("optimizer.")}
    assert held and all("norm" in name for name in held)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_plans_count_the_memory_of_what_trains(tmp_path: Path, kind: str) -> None:
    settings = _config(tmp_path, "planned", optimizer={"kind": kind, "train": {"only": ["layers 1", "head"]}})
    plan = make_plan(settings)
    run = build(plan, ALONE)
    run.batches.close()
    run.model.forward_backward(run.data.rows(0, 8))
    layout = run.mesh.layout
    work = work_of(plan.config, plan.model, layout, 2, value_bytes=4, on_gpu=False, trained=plan.trained_at_end)
    (part,) = parts(work, plan.config.parallel, layout)
    planned = memory_of(part, 0, work, plan.config.parallel, layout)
    assert planned.gradients == sum(p.grad.nbytes for p in run.model.parameters.values() if p.grad is not None)
    assert planned.optimizer == sum(tensor.nbytes for tensor in run.optimizer.state().values())
    assert plan.freezing is not None and plan.freezing.of(plan.model).startswith(
        f"{sum(p.numel() for p in run.model.trained.values()):,} train, "
    )


def test_moments_as_old_as_a_start_that_thawed_says_are_each_parameter_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments of all but the head are younger, and those of all but a layer begin again at the second thaw."""
    train(_config(tmp_path, "up", optimizer={"train": {"only": "head", "for": THAW}}), ALONE, quiet())
    kept = {
        "start": {"from": str(tmp_path / "up"), "moments": "keep"},
        "optimizer": {"train": {"only": "layers 0", "for": THAW}},
    }
    whole = train(_config(tmp_path, "whole", **kept), ALONE, quiet()).folder
    original = trainer.training_step

    def step_or_die(run: Run, lr: float) -> Any:
        if run.step == THAW + 2:
            raise Killed
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(Killed):
        train(_config(tmp_path, "broken", **kept), ALONE, quiet())
    monkeypatch.setattr(trainer, "training_step", original)
    again = train(_config(tmp_path, "broken", **kept), ALONE, quiet()).folder
    one, two = (tensors_of(folder / f"checkpoints/step_{STEPS}") for folder in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    state = read_state(whole / f"checkpoints/step_{STEPS}")
    ages = [(part.optimizer_step, all(name.startswith("layers.0.") for name in part.names)) for part in state.thawed]
    assert ages == [(2 * STEPS - THAW, True), (STEPS - THAW, False)]
    assert not set(state.thawed[0].names) & set(state.thawed[1].names)


def test_measured_moments_are_not_as_old_as_those_of_a_start_that_thawed(tmp_path: Path) -> None:
    thaws = {"kind": "muon", "train": {"only": "head", "for": 1}}
    train(_config(tmp_path, "up", optimizer=thaws, training={"budget": 2}), ALONE, quiet())
    start = {"from": str(tmp_path / "up"), "moments": "measure", "measure_batches": 2}
    run = build(make_plan(_config(tmp_path, "measured", start=start)), ALONE)
    run.batches.close()
    measure_moments(run)
    assert (run.optimizer.completed_steps, thawed(run.optimizer)) == (2, [])
