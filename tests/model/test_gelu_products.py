"""GELU as part of the products, in the model: where it is chosen, that it is used, and its gradients against float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megarewarm_kernels.layer import cublaslt
from torch import Tensor

from megarewarm.config.execution import KernelsConfig, ParallelConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model import fused_neox, operations
from megarewarm.model.fused import Operations, fuse
from megarewarm.model.fused_neox import GeluProductsMLP
from megarewarm.model.neox import MLP
from megarewarm.model.operations import choose_operations
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.laid_out import without_copies
from megarewarm.parallel.mesh import Layout
from megarewarm.parallel.ranks import Ranks
from megarewarm.parallel.tensor_ranks import RowLinear
from megarewarm.training.trainer import train
from tests.kernels.test_gelu_products import library  # noqa: F401  # a fixture
from tests.support.cublaslt import StandIn
from tests.support.laid_out import SHAPE, laid_out
from tests.support.tiny import config, events, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
CHOSEN = Operations("triton", "cublaslt", "sdpa", "reference")
ROWS = np.random.default_rng(0).integers(64, size=(6, 17), dtype=np.int64)
"""Three micro-batches."""


def model_of(chosen: Operations, recompute: Any = "none", device: str = "cpu", **more: Any) -> ParallelModel:
    model = laid_out(SHAPE | more, 6, recompute=recompute, device=device, operations=chosen)
    for name, parameter in model.parameters.items():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: ParallelModel) -> dict[str, Tensor]:
    model.gradients.zero()
    model.forward_backward(ROWS)
    model.gradients.reduce()
    return {name: parameter.grad.cpu().clone() for name, parameter in model.parameters.items() if parameter.grad is not None}


def exact_gradients(model: ParallelModel) -> dict[str, Tensor]:
    exact = Transformer(model.config).double()
    exact.load_state_dict({name: parameter.detach().cpu().double() for name, parameter in model.parameters.items()})
    tokens = torch.from_numpy(ROWS)
    total = exact.loss(tokens[:, :-1], tokens[:, 1:])[0]
    (total / tokens[:, 1:].numel()).backward()
    return {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("residual", ["parallel", "sequential"])
@pytest.mark.parametrize("by", ["definition", "cublaslt"])
def test_gradients_are_no_less_exact(
    by: str, residual: str, recompute: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = request.getfixturevalue("library") if by == "cublaslt" else None
    calls = []
    products = fused_neox.gelu_products
    monkeypatch.setattr(fused_neox, "gelu_products", lambda *given, **more: calls.append(more) or products(*given, **more))
    errors = {}
    for chosen in (dataclasses.replace(CHOSEN, gelu="triton"), CHOSEN):
        torch.manual_seed(5)
        model = model_of(chosen, recompute, residual=residual)
        found, wanted = gradients(model), exact_gradients(model)
        assert found.keys() == wanted.keys()
        errors[chosen.gelu] = {name: (found[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted}
    passes = 2 * 3 * (2 if recompute == "full" else 1)  # layers, micro-batches
    assert calls == [{"keep": recompute != "selective"}] * passes
    for name, error in errors["cublaslt"].items():
        assert error < 1.5 * errors["triton"][name] + 2e-3 and error < 0.03, name
    if stand_in is not None:
        assert stand_in.calls.count("Matmul") == passes + 2 * 3


@pytest.mark.parametrize(("recompute", "count"), [("none", 2), ("selective", 1)])
def test_what_is_kept_of_the_middle(recompute: str, count: int) -> None:
    """Of f values a token: GELU's argument, and its result where that is not computed again."""
    kept: dict[int, Tensor] = {}
    model = model_of(CHOSEN, recompute)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.forward_backward(ROWS[:1])
    assert sum(tensor.shape == (16, 128) for tensor in kept.values()) == 2 * count


def test_what_does_not_train_gets_no_gradient() -> None:
    model = model_of(CHOSEN)
    every = gradients(model)
    some = {name: None for name in every if "layers.1.mlp" in name and "4h_to_h" in name} | {"final_layer_norm.weight": None}
    model.train_only(some)
    found = gradients(model)
    assert found.keys() == some.keys() and len(found) == 3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, every[name], rtol=1e-5, atol=1e-7, msg=name)


def test_without_copies_it_is_bias_and_gelu_in_one_pass() -> None:
    model, plain = Transformer(ModelConfig(**SHAPE)), Transformer(ModelConfig(**SHAPE))
    plain.load_state_dict(model.state_dict())
    fuse(model, CHOSEN)
    assert all(type(layer.mlp) is GeluProductsMLP for layer in model.layers)
    tokens = torch.from_numpy(ROWS[:, :-1])
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-5, atol=1e-5)


def test_layers_that_tensor_ranks_divide_stay_as_they_are() -> None:
    model = Transformer(ModelConfig(**SHAPE))
    first, _ = model.layers
    assert isinstance(first.mlp, MLP)
    first.mlp.dense_4h_to_h.__class__ = RowLinear
    fuse(model, CHOSEN)
    assert [type(layer.mlp).__name__ for layer in model.layers] == ["MLP", "GeluProductsMLP"]


# ---- choices ----------------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(num_layers=2, hidden_size=128, num_heads=2, vocab_size=64)


def chosen(kernels: Any, model: ModelConfig = MODEL, device: str = "cuda", **more: Any) -> tuple[str, list[str]]:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "length": 64, "documents": False} | more
    found, notes = choose_operations(KernelsConfig.model_validate(kernels), model, torch.device(device), **settings)
    return found.gelu, notes


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an H100, Triton and cuBLASLt."""
    lt = cublaslt.CublasLt(StandIn())
    monkeypatch.setattr(operations, "no_triton", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cublaslt, "loaded", lambda: lt)


def test_it_is_chosen_where_it_is_named(hopper: None) -> None:
    for use in ("auto", "triton", "reference"):
        assert chosen({"use": use, "gelu": "cublaslt"}) == ("cublaslt", [])
        assert chosen({"use": use})[0] != "cublaslt", "no GPU has measured it"
    assert chosen({"gelu": "cublaslt"}, dtype=torch.float16) == ("cublaslt", [])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"model": MODEL.model_copy(update={"activation": "gelu_erf"})},
            "the tanh approximation, model.activation is gelu_erf",
        ),
        ({"model": ModelConfig(family="llama", num_layers=2, hidden_size=128, num_heads=2, vocab_size=64)}, "is swiglu"),
        ({"model": MODEL.model_copy(update={"ffn_size": 500})}, "multiples of 8 values, not 500"),
        ({"dtype": torch.float32}, "in bf16 or fp16, not float32"),
        ({"no_copies": "tensor ranks divide its weights"}, "tensor ranks divide its weights"),
    ],
    ids=["erf", "swiglu", "size", "dtype", "tensor"],
)
def test_what_can_t_be_gives_way_with_one_line(more: dict[str, Any], words: str, hopper: None) -> None:
    for use, instead in (("auto", "triton"), ("reference", "reference"), ("compile", "reference")):
        gelu, (note,) = chosen({"use": use, "gelu": "cublaslt"}, **more)
        assert gelu == instead and note.startswith(f"kernels.gelu: {instead}, not cublaslt: ") and note.endswith(words)


def test_deterministic_runs_and_machines_without_it_do_without(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gelu, (note,) = chosen({"gelu": "cublaslt", "deterministic": True})
    assert gelu == "triton" and "kernels.deterministic" in note
    monkeypatch.setattr(cublaslt, "loaded", lambda: None)
    gelu, (note,) = chosen({"gelu": "cublaslt"})
    assert gelu == "triton" and "no libcublasLt" in note


def test_on_a_cpu_it_gives_way_with_one_line_too() -> None:
    for use in ("auto", "triton", "reference"):
        gelu, notes = chosen({"use": use, "gelu": "cublaslt"}, device="cpu")
        about = [note for note in notes if note.startswith("kernels.gelu")]
        assert gelu == "reference" and about == ["kernels.gelu: reference, not cublaslt: it runs on GPUs"]


def test_why_there_are_no_copies() -> None:
    plain, sharded = ParallelConfig(), ParallelConfig(sharding="zero2")
    zero_bubble = ParallelConfig(pipeline=2, schedule="zero_bubble")
    assert without_copies("bf16", plain, Layout(), compiled=False) == ""
    assert without_copies("fp16", sharded, Layout(), compiled=False) == ""
    assert "fp32" in without_copies("fp32", plain, Layout(), compiled=False)
    assert "compile" in without_copies("bf16", plain, Layout(), compiled=True)
    assert "sharding" in without_copies("bf16", sharded, Layout(replicate=2), compiled=False)
    assert "zero_bubble" in without_copies("bf16", zero_bubble, Layout(pipeline=2), compiled=False)


def test_a_run_with_it_follows_the_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for gelu in ("triton", "cublaslt"):
        forced = dataclasses.replace(CHOSEN, gelu=gelu)
        monkeypatch.setattr("megarewarm.training.start.inputs.choose_operations", lambda *_, forced=forced, **__: (forced, []))
        run = config(tmp_path, folder=str(tmp_path / gelu), training={"precision": "bf16"}, schedule={"max_lr": 1e-3})
        losses[gelu] = [line["loss"] for line in events(train(run, ALONE, quiet()).folder, "train")]
    assert losses["cublaslt"] != losses["triton"]
    assert losses["cublaslt"] == pytest.approx(losses["triton"], rel=2e-3)


def test_a_run_on_a_cpu_says_what_it_does_instead(tmp_path: Path) -> None:
    console = quiet()
    train(config(tmp_path, kernels={"gelu": "cublaslt"}, training={"budget": 1}), ALONE, console)
    assert printed(console).count("note: kernels.gelu: reference, not cublaslt: it runs on GPUs") == 1
