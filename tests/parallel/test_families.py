"""Every family in layouts of 1, 2 and 4 ranks trains, saves and exports the run of one process, and resumes to the bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.errors import UserError
from megarewarm.model.fused import Operations
from megarewarm.model.parameters import cards
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.setup import build
from megarewarm.training.start import inputs
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.checkpoint.test_layouts import tensors_of
from tests.support.distributed import run_ranks
from tests.support.family_shapes import SHAPES, shape
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
FUSED = Operations(norms="triton", gelu="triton", attention="sdpa", loss="reference")
STEPS, HALF, VOCABULARY = 20, 10, 67
# name -> (parallel, layers)
LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], int]]] = {
    2: {
        "data": ({}, 2),
        "tensor": ({"tensor": 2}, 2),
        "sequence": ({"tensor": 2, "sequence": True}, 2),
        "1f1b": ({"pipeline": 2}, 3),
        "interleaved": ({"pipeline": 2, "schedule": "interleaved"}, 5),
        "zero_bubble": ({"pipeline": 2, "schedule": "zero_bubble"}, 5),
        "zero2": ({"sharding": "zero2"}, 2),
        "zero3": ({"sharding": "zero3"}, 2),
    },
    4: {
        "tensor": ({"tensor": 4, "sequence": True}, 2),
        "tensor_1f1b": ({"tensor": 2, "pipeline": 2}, 3),
        "sequence_zero_bubble": ({"tensor": 2, "sequence": True, "pipeline": 2, "schedule": "zero_bubble"}, 5),
        "sequence_interleaved": ({"tensor": 2, "sequence": True, "pipeline": 2, "schedule": "interleaved"}, 5),
        "tensor_data": ({"tensor": 2}, 2),
        "tensor_zero2": ({"tensor": 2, "sharding": "zero2"}, 2),
        "sequence_zero3": ({"tensor": 2, "sequence": True, "sharding": "zero3"}, 2),
        "zero_bubble_zero2": ({"pipeline": 2, "schedule": "zero_bubble", "sharding": "zero2"}, 5),
        "hybrid": ({"sharding": "zero2", "shard_ranks": 2}, 2),
    },
}
# what changes nothing but rounding, in turn, so that each layout of each family has some of it
VARIATIONS: list[dict[str, Any]] = [
    {},
    {"kernels": {"use": "reference"}, "training": {"recompute": "selective"}},
    {"training": {"recompute": "full"}},
    {"kernels": {"use": "reference"}, "training": {"recompute": "full"}},
    {"training": {"recompute": "selective"}},
]
DOCUMENTS = {"eod": 5, "reset_at_eod": True, "mask_eod_loss": True}
Case = tuple[str, dict[str, Any], dict[str, Any]]
"""Name of the case, parallel, other changes."""


def case(model: str, world_size: int, layout: str, number: int) -> Case:
    """``number`` chooses among what changes nothing, and whether documents are kept apart."""
    parallel, layers = LAYOUTS[world_size][layout]
    divisible = {"num_kv_heads": 4, "ffn_size": 28} if parallel.get("tensor") == 4 else {}
    changes = dict(VARIATIONS[number % len(VARIATIONS)])
    return (
        f"{model}_{layout}",
        parallel,
        changes | {"model": shape(model, layers, **divisible), "data": DOCUMENTS if number % 2 else {}},
    )


def settings(place: Path, name: str, parallel: dict[str, Any], changes: dict[str, Any], **more: Any) -> Any:
    training = {"budget": STEPS, "global_batch": 8, "micro_batch": 2} | changes.get("training", {})
    return config(
        place,
        name=name,
        folder=str(place / name),
        training=training,
        evaluation={"every": HALF},
        checkpoint={"every": HALF, "keep_last": 9},
        parallel=parallel,
        schedule={"max_lr": 2e-3, "min_lr": 1e-3},
        **{key: value for key, value in changes.items() if key != "training"},
        **more,
    )


def _train_all(ranks: Ranks, place: str, cases: list[Case]) -> None:
    for name, parallel, changes in cases:
        train(settings(Path(place), name, parallel, changes, export={"huggingface": True}), ranks, quiet())


def _go_on(ranks: Ranks, place: str, cases: list[Case]) -> None:
    """From the middle: of the own run, and of the run of one process."""
    _train_all(ranks, place, cases)
    for name, parallel, changes in cases:
        start = {"from": str(Path(place) / alone_of(changes) / f"checkpoints/step_{HALF}"), "intent": "resume"}
        train(settings(Path(place), f"{name}_other", parallel, changes, start=start), ranks, quiet())


def alone_of(changes: dict[str, Any]) -> str:
    """The name of the run of one process with the same model and data."""
    model = changes["model"]
    return f"alone_{model['family']}_{model['num_layers']}_{model['num_kv_heads']}_{model['ffn_size']}_{len(changes['data'])}"


def told(folder: Path, event: str, value: str) -> dict[Any, float]:
    return {(line["step"], line.get("name")): line[value] for line in events(folder, event)}


def without_keys_bias(name: str, tensor: Tensor, folder: Path) -> Tensor:
    """A bias of the keys changes no attention weight (if keys aren't normed): its gradient is rounding noise, which Adam makes
    large."""
    if not name.endswith("query_key_value.bias"):
        return tensor
    card = cards(OwnCheckpoint(folder).model_config)[name[name.index("layers.") :]]
    assert card.interleaved is not None
    queries, _, values = card.interleaved.split(tensor)
    return torch.cat([queries, values])


def assert_same(run: Path, alone: Path, export: bool = True) -> None:
    """Losses, gradient norms, evaluations, what is saved at the end, and the export."""
    for event, value in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"), ("eval", "over")):
        wanted, found = told(alone, event, value), told(run, event, value)
        assert found and found == pytest.approx({key: wanted[key] for key in found}, rel=2e-4), f"{run}: {event} {value}"
    one, other = (folder / f"checkpoints/step_{STEPS}" for folder in (alone, run))
    wanted_tensors, found_tensors = tensors_of(one), tensors_of(other)
    assert wanted_tensors.keys() == found_tensors.keys()
    for name, tensor in wanted_tensors.items():
        if name.startswith("rng"):
            continue
        true, mine = (without_keys_bias(name, each, one) for each in (tensor, found_tensors[name]))
        difference = float((mine - true).norm() / (true.norm() + 1e-30))
        assert difference < 2e-3, f"{run.name} {name}: {difference:.1e}"
    if export:
        tokens = torch.arange(15)[None] * 4 % VOCABULARY
        theirs, ours = (AutoModelForCausalLM.from_pretrained(folder / "huggingface") for folder in (alone, run))
        wanted_logits = theirs(tokens).logits
        scale = float(wanted_logits.detach().abs().max())
        torch.testing.assert_close(ours(tokens).logits, wanted_logits, rtol=0, atol=5e-3 * scale)
        own = OwnCheckpoint(other).whole_model().logits(tokens)
        torch.testing.assert_close(ours(tokens).logits, own, rtol=0, atol=1e-5 * scale)


def _same_bits(run: Path, before: Path) -> None:
    first, again = tensors_of(before), tensors_of(run / f"checkpoints/step_{STEPS}")
    assert first.keys() == again.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, again[name])] == []


def check(place: Path, world_size: int, cases: Iterable[Case]) -> None:
    """Train ``cases`` on ranks and alone, go on from the middle, compare."""
    config(place)  # writes the token files before several ranks look for them
    every = list(cases)
    run_ranks(_train_all, world_size, str(place), every, timeout=600)
    for name, _, changes in every:
        if not (place / alone_of(changes)).exists():
            plain = {key: changes[key] for key in ("model", "data")} | {"kernels": {"use": "reference"}}
            train(settings(place, alone_of(changes), {}, plain, export={"huggingface": True}), ALONE, quiet())
        assert_same(place / name, place / alone_of(changes))
        (place / name / f"checkpoints/step_{STEPS}").rename(place / f"{name}_before")
    run_ranks(_go_on, world_size, str(place), every, timeout=600)
    for name, _, changes in every:
        _same_bits(place / name, place / f"{name}_before")
        assert_same(place / f"{name}_other", place / alone_of(changes), export=False)


# tried in every run of the tests; the others are slow
EVERY_TIME = {
    2: ["llama_biases sequence", "mistral zero_bubble", "olmo2 tensor"],
    4: ["qwen3 sequence_zero3"],
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_compute_the_run_of_one_process(world_size: int, tmp_path: Path) -> None:
    pairs = [name.split() for name in EVERY_TIME[world_size]]
    check(tmp_path, world_size, (case(model, world_size, layout, i) for i, (model, layout) in enumerate(pairs)))


@pytest.mark.slow
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_so_does_every_family_in_every_layout(world_size: int, model: str, tmp_path: Path) -> None:
    first = list(SHAPES).index(model)
    check(tmp_path, world_size, (case(model, world_size, layout, first + i) for i, layout in enumerate(LAYOUTS[world_size])))


COMPILED: dict[str, dict[str, Any]] = {"alone": {}, "sequence": {"tensor": 2, "sequence": True}, "zero2": {"sharding": "zero2"}}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3", "olmo2"])
def test_compiled_layers_compute_the_same(model: str, tmp_path: Path) -> None:
    config(tmp_path)
    plain: dict[str, Any] = {"model": shape(model, 2), "data": {}, "training": {"budget": 4}}
    cases = [(name, parallel, plain | {"kernels": {"use": "compile"}}) for name, parallel in COMPILED.items() if parallel]
    run_ranks(_train_all, 2, str(tmp_path), cases, timeout=600)
    train(settings(tmp_path, "alone", {}, plain | {"kernels": {"use": "compile"}}), ALONE, quiet())
    train(settings(tmp_path, "plain", {}, plain), ALONE, quiet())
    for name in COMPILED:
        for value in ("loss", "grad_norm"):
            wanted, found = (told(tmp_path / folder, "train", value) for folder in ("plain", name))
            assert found == pytest.approx(wanted, rel=1e-4), f"{name} {value}"


# ---- low precision ------------------------------------------------------------------------------------------------------

LOW: dict[str, tuple[dict[str, Any], int]] = {
    "1f1b": ({"pipeline": 2}, 3),
    "zero_bubble": ({"pipeline": 2, "schedule": "zero_bubble"}, 5),
    "tensor": ({"tensor": 2}, 3),
    "sequence": ({"tensor": 2, "sequence": True}, 3),
    "zero2": ({"sharding": "zero2"}, 3),
    "zero3": ({"sharding": "zero3"}, 3),
}


def low_case(model: str, layout: str, number: int) -> Case:
    parallel, layers = LOW[layout]
    kernels = {"use": ("auto", "reference")[number % 2]}
    return f"{model}_{layout}_{number % 2}", parallel, {"model": shape(model, layers), "data": {}, "kernels": kernels}


def _train_low(ranks: Ranks, place: str, cases: list[Case], precision: str) -> None:
    for name, parallel, changes in cases:
        low = changes | {"training": {"budget": HALF, "precision": precision}}
        train(settings(Path(place), name, parallel, low), ranks, quiet())


def check_low(place: Path, cases: list[Case], precision: str = "bf16") -> None:
    """Losses near those of one process in fp32."""
    config(place)
    run_ranks(_train_low, 2, str(place), cases, precision, timeout=600)
    for name, _, changes in cases:
        if not (place / alone_of(changes)).exists():
            exact = {"model": changes["model"], "data": {}, "training": {"budget": HALF}}
            train(settings(place, alone_of(changes), {}, exact), ALONE, quiet())
        wanted, found = (told(folder, "train", "loss") for folder in (place / alone_of(changes), place / name))
        assert found == pytest.approx(wanted, rel=0.03) and found != wanted, name


@pytest.mark.slow
def test_low_precision_stays_near_fp32(tmp_path: Path) -> None:
    pairs = [("olmo2", "sequence", 0), ("qwen3", "1f1b", 0), ("llama_biases", "zero3", 1)]
    check_low(tmp_path, [low_case(*pair) for pair in pairs])


def _train_neox(ranks: Ranks, place: str) -> None:
    usual = inputs.choose_operations
    try:
        inputs.choose_operations = lambda *_, **__: (FUSED, [])
        for layout in ("1f1b", "zero_bubble"):
            parallel, layers = LOW[layout]
            low: dict[str, Any] = {"model": {"num_layers": layers}, "training": {"budget": HALF, "precision": "bf16"}}
            train(settings(Path(place), layout, parallel, low), ranks, quiet())
    finally:
        inputs.choose_operations = usual


@pytest.mark.slow
def test_so_do_fused_pipelines_of_neox(tmp_path: Path) -> None:
    """Stages pass on a stream in bf16."""
    config(tmp_path)
    run_ranks(_train_neox, 2, str(tmp_path))
    for layout in ("1f1b", "zero_bubble"):
        exact: dict[str, Any] = {"model": {"num_layers": LOW[layout][1]}, "training": {"budget": HALF}}
        train(settings(tmp_path, f"{layout}_alone", {}, exact), ALONE, quiet())
        wanted, found = (told(tmp_path / name, "train", "loss") for name in (f"{layout}_alone", layout))
        assert found == pytest.approx(wanted, rel=0.03) and found != wanted, layout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("model", SHAPES)
def test_so_it_does_in_every_layout(model: str, precision: str, tmp_path: Path) -> None:
    check_low(tmp_path, [low_case(model, layout, i) for layout in LOW for i in range(2)], precision)


# ---- what can't be laid out ---------------------------------------------------------------------------------------------


def _refused(ranks: Ranks, place: str) -> list[str]:
    messages = []
    for model in ({"num_kv_heads": 1}, {"ffn_size": 27}):
        try:
            build(
                make_plan(config(Path(place), folder=f"{place}/no", model=shape("llama", 1, **model), parallel={"tensor": 2})),
                ranks,
            )
        except UserError as error:
            messages.append(str(error))
    return messages


def test_more_tensor_ranks_than_key_heads_name_the_number(tmp_path: Path) -> None:
    config(tmp_path)
    assert (
        run_ranks(_refused, 2, str(tmp_path))
        == [
            [
                "parallel.tensor: 2 ranks can't share model.num_kv_heads 1 evenly; choose a divisor of 1",
                "parallel.tensor: 2 ranks can't share model.ffn_size 27 evenly; choose a divisor of 27",
            ]
        ]
        * 2
    )
