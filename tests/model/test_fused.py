"""Fused operations in the model: the same function as the plain one, in every combination; choices that say what they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megarewarm_kernels import apex
from torch import Tensor, nn

from megarewarm.config.execution import KernelsConfig, OptimizerConfig
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.model import operations
from megarewarm.model.documents import DocumentRules
from megarewarm.model.fused import Operations, fuse
from megarewarm.model.fused_neox import FusedLayer, FusedMLP
from megarewarm.model.given_bias import GivenBias
from megarewarm.model.operations import choose_operations, choose_optimizer
from megarewarm.model.parameters import cards
from megarewarm.model.transformer import Transformer
from megarewarm.optimizers.adamw import AdamW
from megarewarm.parallel.gradients import OwnGradients
from megarewarm.parallel.ranks import Ranks
from megarewarm.parallel.recompute import recompute
from megarewarm.training.trainer import train
from tests.model.test_neox import VARIANTS, pair, some_tokens
from tests.support.tiny import config, events, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
FUSED = Operations(norms="triton", gelu="triton", attention="sdpa", loss="reference")
"""On a CPU the operators compute their definitions: what is tested is how the model calls them."""


def losses_and_gradients(model: Transformer, tokens: Tensor, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = model(tokens[:, :-1], **more)
    loss = torch.nn.functional.cross_entropy(
        nn.functional.linear(hidden, model.head).flatten(0, 1).float(), tokens[:, 1:].flatten()
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("what", ["none", "selective", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_fused_model_is_the_model(name: str, what: str, documents: bool) -> None:
    plain, _ = pair(VARIANTS[name], torch.float64)
    fused, _ = pair(VARIANTS[name], torch.float64)
    fuse(fused, FUSED)
    kinds = [type(fused.layers[0]), type(fused.layers[0].mlp)]
    assert kinds == [FusedLayer if plain.config.residual == "parallel" else type(plain.layers[0]), FusedMLP]
    for layer in fused.layers:
        recompute(layer, what)  # type: ignore[arg-type]
    tokens = some_tokens(plain.config)
    more = {"starts": DocumentRules(5, True, False).starts(tokens[:, :-1])} if documents else {}
    (loss, gradients), (ours, mine) = (losses_and_gradients(model, tokens, **more) for model in (plain, fused))
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-9, atol=1e-12, msg=f"{key}: {{}}".format)


@pytest.mark.parametrize("what", ["none", "full"])
@pytest.mark.parametrize("variant", ["pythia", "no_attention_bias", "qwen2", "llama"])
def test_biases_that_attention_gives_their_gradients(variant: str, what: Any) -> None:
    """With an attention of GPUs, which gives way to PyTorch's here and keeps its way of giving gradients."""
    if variant in VARIANTS:
        plain, fused = (pair(VARIANTS[variant], torch.float64)[0] for _ in range(2))
    else:
        shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 61}
        plain, fused = (Transformer(ModelConfig(family=variant, **shape)).double() for _ in range(2))
        for parameter in plain.parameters():
            nn.init.normal_(parameter, std=0.3)
        fused.load_state_dict(plain.state_dict())
    fuse(fused, dataclasses.replace(FUSED, attention="cudnn"))
    given = [isinstance(module, GivenBias) for name, module in fused.named_modules() if name.endswith("query_key_value")]
    assert given == [variant in ("pythia", "qwen2")] * len(fused.layers)
    for layer in fused.layers:
        recompute(layer, what)
    tokens = some_tokens(plain.config)
    (loss, gradients), (ours, mine) = (losses_and_gradients(model, tokens) for model in (plain, fused))
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-9, atol=1e-12, msg=f"{key}: {{}}".format)


def test_under_autocast_the_fused_model_is_no_worse_than_the_plain_one() -> None:
    """Against float64: in bf16 the stream is rounded once a layer, which may not cost more than twice autocast's own error."""
    exact, _ = pair({}, torch.float64)
    tokens = some_tokens(exact.config)
    true, wanted = losses_and_gradients(exact, tokens)
    errors = {}
    for name in ("plain", "fused"):
        model, _ = pair({})
        if name == "fused":
            fuse(model, FUSED)
        with torch.autocast("cpu", torch.bfloat16):
            loss, found = losses_and_gradients(model, tokens)
        distance = torch.stack([(found[key].double() - wanted[key]).norm() / wanted[key].norm() for key in wanted])
        errors[name] = distance.median(), abs(float(loss) - float(true))
    assert errors["fused"][0] < 2 * errors["plain"][0] and errors["fused"][1] < 2 * errors["plain"][1] + 0.02


def test_compiled_whole(tmp_path: Path) -> None:
    """No graph break in a fused layer, its attention included."""
    model, _ = pair({})
    fuse(model, FUSED)
    plain, _ = pair({})
    tokens = some_tokens(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hidden = compiled(tokens)
    torch.testing.assert_close(hidden, plain(tokens), rtol=1e-4, atol=1e-4)
    hidden.sum().backward()
    plain(tokens).sum().backward()
    for (key, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3, msg=f"{key}: {{}}".format)


def losses_of(run: RunConfig) -> list[float]:
    return [line["loss"] for line in events(train(run, ALONE, quiet()).folder, "train")]


def test_a_run_with_fused_operations_follows_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = losses_of(config(tmp_path, folder=str(tmp_path / "plain")))
    for name, forced in (("all", FUSED), ("norms", dataclasses.replace(FUSED, gelu="reference"))):
        monkeypatch.setattr("megarewarm.training.start.inputs.choose_operations", lambda *_, forced=forced, **__: (forced, []))
        run = config(tmp_path, folder=str(tmp_path / name), training={"recompute": "full" if name == "all" else "none"})
        assert losses_of(run) == pytest.approx(plain, rel=1e-4)


# ---- choices ----------------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(num_layers=2, hidden_size=128, num_heads=2, vocab_size=64)


def chosen(kernels: Any, device: str = "cpu", model: ModelConfig = MODEL, **more: Any) -> tuple[Operations, list[str]]:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "length": 64, "documents": False} | more
    return choose_operations(KernelsConfig.model_validate(kernels), model, torch.device(device), **settings)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an H100 and Triton."""
    monkeypatch.setattr(operations, "no_triton", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_one_word_chooses_everything(hopper: None) -> None:
    assert chosen("auto", "cuda") == (Operations("triton", "triton", "cudnn", "triton", False), [])
    assert chosen("triton", "cuda")[0] == chosen("auto", "cuda")[0]
    assert chosen("reference", "cuda") == (Operations("reference", "reference", "sdpa", "reference", False), [])
    assert chosen("compile", "cuda") == (Operations("reference", "reference", "cudnn", "auto", False), [])
    mixed, notes = chosen({"use": "auto", "norms": "reference", "attention": "triton"}, "cuda")
    assert mixed == Operations("reference", "triton", "triton", "triton", False) and notes == []
    assert chosen("auto", "cuda", documents=True)[0].attention == "triton", "cuDNN keeps no documents apart"
    assert chosen({"deterministic": True}, "cuda")[0].attention == "triton"


def test_what_can_t_be_gives_way_and_says_so(hopper: None) -> None:
    sequential = MODEL.model_copy(update={"residual": "sequential"})
    found, notes = chosen({"norms": "triton"}, "cuda", sequential)
    assert found.norms == "reference" and "the sequential residual has no two norms" in notes[0]
    assert chosen("auto", "cuda", sequential) == (Operations("reference", "triton", "cudnn", "triton", False), [])
    found, notes = chosen({"norms": "apex", "attention": "flash3"}, "cuda")
    assert found.norms == "reference" and found.attention == "cudnn"
    assert "NVIDIA apex" in notes[0] and "cudnn, not flash3" in notes[1]
    assert choose_optimizer(KernelsConfig(optimizer="apex"), torch.device("cuda"))[1]
    kinds = {use: choose_optimizer(KernelsConfig(use=use), torch.device("cuda")) for use in ("auto", "compile", "reference")}
    assert kinds == {"auto": ("triton", []), "compile": ("torch", []), "reference": ("torch", [])}


def test_on_a_cpu_it_is_plain_pytorch() -> None:
    assert chosen("auto", dtype=torch.float32) == (Operations("reference", "reference", "sdpa", "reference", False), [])
    found, notes = chosen("triton", dtype=torch.float32)
    assert found.norms == found.gelu == found.loss == "reference"
    assert choose_optimizer(KernelsConfig(use="triton"), torch.device("cpu")) == (
        "torch",
        ["kernels.optimizer: torch, not triton: it runs on GPUs"],
    )
    assert len(notes) == 3 and all("not triton: it runs on GPUs" in note for note in notes)
    with pytest.raises(UserError, match=r"kernels.attention: no attention for heads of 64 in torch.int8"):
        chosen("auto", dtype=torch.int8)


def test_the_old_key_still_means_what_it_did() -> None:
    assert KernelsConfig.model_validate({"compile": True}).use == "compile"
    assert KernelsConfig.model_validate({"compile": False, "loss_memory": 5}) == KernelsConfig(loss_memory=5)
    assert KernelsConfig().logit_bytes("cpu") == 2**26 and KernelsConfig().logit_bytes("cuda") == 2**31


def test_the_start_says_what_computes_what(tmp_path: Path) -> None:
    console = quiet()
    outcome = train(config(tmp_path, kernels="triton", training={"budget": 1}), ALONE, console)
    text = printed(console)
    assert "kernels: norms reference, gelu reference, attention sdpa, loss reference, optimizer torch" in text
    assert text.count("note: kernels.norms: reference, not triton: it runs on GPUs") == 1
    (start,) = events(outcome.folder, "start")
    assert start["kernels"]["attention"] == "sdpa" and start["kernels"]["compile"] is False


def test_apex_is_used_where_it_is_really_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index's other apex has none of this; NVIDIA's has these names. Stood in for by what they are documented to do."""
    assert apex.fused_adam() is None and apex.fused_layer_norm() is None

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, groups: list[dict[str, Any]], adam_w_mode: bool, lr: float, betas: tuple, eps: float) -> None:
            assert adam_w_mode
            super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                (b1, b2), n = group["betas"], group["step"]
                for p in group["params"]:
                    first, second = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                    first.lerp_(p.grad, 1 - b1)
                    second.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    root = (second / (1 - b2**n)).sqrt() + group["eps"]
                    p.addcdiv_(first, root, value=-group["lr"] / (1 - b1**n))

    settings = OptimizerConfig()
    results = []
    for kind in ("torch", "triton", "apex"):
        if kind == "apex":
            monkeypatch.setattr("megarewarm.optimizers.adamw.fused_adam", lambda: FusedAdam)
        torch.manual_seed(0)
        every = cards(ModelConfig(num_layers=1, hidden_size=4, num_heads=1, vocab_size=5, rotary_fraction=0.5))
        parameters = {"embed_in.weight": nn.Parameter(torch.randn(5, 3)), "final_layer_norm.bias": nn.Parameter(torch.randn(5))}
        optimizer = AdamW(parameters, every, settings, kind)
        optimizer.set_completed_steps(7)
        for _ in range(3):
            for parameter in parameters.values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step(1e-2)
        gradients = OwnGradients(parameters)
        optimizer.step(1e-2, gradients, 0.5)
        assert optimizer.completed_steps == 11 and optimizer.kind == kind
        results.append([*parameters.values(), *optimizer.state().values()])
    for one, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_apex_norms_stand_in_for_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float) -> Tensor:
        return nn.functional.layer_norm(x, shape, weight.to(x.dtype), bias.to(x.dtype), eps)

    monkeypatch.setattr("megarewarm.model.fused_neox.fused_layer_norm", lambda: norm)
    plain, _ = pair({})
    with_apex, _ = pair({})
    fuse(with_apex, Operations(norms="apex"))
    tokens = some_tokens(plain.config)
    assert torch.equal(with_apex(tokens), plain(tokens))
