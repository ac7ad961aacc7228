"""Growth against the models' own forward pass in float64, brute-force index maps, and transformers; training from it."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megarewarm.checkpoint.compare_logits import compare, sample_tokens
from megarewarm.checkpoint.export import safetensors_stream
from megarewarm.checkpoint.export.huggingface import ModelWeights
from megarewarm.checkpoint.grow import GrownWeights, Growth, LayerOrigin, copies, layer_origins
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.checkpoint.weights import expected_shapes
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.initialize import initialize
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.checkpoint.test_convert import _PEAK, ALONE, ROOT, tool, weights_of
from tests.support.distributed import run_ranks
from tests.support.families import CONFIGS, saved
from tests.support.family_shapes import SHAPES, shape
from tests.support.tiny import config, events, quiet

NEOX = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 61, "max_positions": 16}
KINDS: dict[str, dict[str, Any]] = {
    "neox, parallel": NEOX,
    "neox, sequential": NEOX | {"residual": "sequential"},
    "neox, tied": NEOX | {"tie_embeddings": True, "attention_bias": False, "hidden_size": 24, "num_heads": 3},
    **{name: shape(name, 3) | {"max_positions": 16} for name in SHAPES},
}


def random_model(values: dict[str, Any], seed: int = 3) -> Transformer:
    """Float64, with nothing at zero or one."""
    model = Transformer(ModelConfig(**values)).double()
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return model


def wanted(growth: dict[str, Any]) -> Growth:
    return Growth(**{**growth, "width": Fraction(growth.get("width", 1))})


def grown_model(model: Transformer, **growth: Any) -> Transformer:
    weights = GrownWeights(ModelWeights(model), model.config, wanted(growth))
    grown = Transformer(weights.config).double()
    assert {name: item.shape for name, item in weights.describe().items()} == expected_shapes(weights.config)
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            parameter.copy_(weights.read(name))
    return grown


def some(model: Transformer, rows: int = 3) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(5))


def moved(one: Transformer, other: Transformer) -> float:
    """Largest difference of logits, as a share of their standard deviation."""
    tokens = some(one)
    with torch.no_grad():
        logits = one.logits(tokens)
        return float((other.logits(tokens) - logits).abs().max() / logits.std())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "growth",
    [
        {"width": 2},
        {"width": 2, "noise": 10.0},
        {"width": 3, "noise": 0.0},
        {"width": 2, "method": "fpi", "noise": 5.0},
        {"layers": 5},
        {"width": 2, "noise": 10.0, "layers": 7},
    ],
    ids=str,
)
def test_the_function_is_preserved_in_float64(kind: str, growth: dict[str, Any]) -> None:
    """Of the size of float64's rounding: 2e-15 of logits was measured for GPT-NeoX."""
    model = random_model(KINDS[kind])
    assert wanted(growth).preserves(model.config)
    assert moved(model, grown_model(model, **growth)) < 2e-13


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_preserve_it_says_so(kind: str) -> None:
    model = random_model(KINDS[kind])
    for growth in ({"layers": 6, "depth": "stack"}, {"layers": 6, "depth": "interpolate"}, {"width": 2, "method": "aki"}):
        assert not wanted(growth).preserves(model.config)
        assert moved(model, grown_model(model, **growth)) > 0.05


@pytest.mark.parametrize("kind", ["neox, parallel", "neox, sequential"])
def test_other_factors_move_the_logits_little_and_the_loss_less(kind: str) -> None:
    """32 to 48 channels: 0.5 to 0.64 of logits with deviation 0.7, 0.03 of the cross entropy, was measured elsewhere."""
    model = random_model(KINDS[kind])
    grown = grown_model(model, width="3/2", method="fpi")
    assert grown.config.hidden_size == 48 and grown.config.num_heads == 3 and grown.config.head_width == 16
    tokens = some(model, 8)
    with torch.no_grad():
        loss = [F.cross_entropy(each.logits(tokens).flatten(0, 1)[:-1], tokens.flatten()[1:]) for each in (model, grown)]
    assert 1e-3 < moved(model, grown) < 2 and abs(float(loss[0] - loss[1])) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_copies_part_only_with_noise(kind: str) -> None:
    """Gradients of the rows of each inner matrix and of their copies."""
    model = random_model(KINDS[kind])
    tokens = some(model)
    for noise, apart in ((None, False), (10.0, True)):
        grown = grown_model(model, width=2, noise=noise)
        loss, _ = grown.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for name, parameter in grown.named_parameters():
            if name.startswith("layers.0.") and parameter.dim() == 2:
                assert parameter.grad is not None
                one, copy = parameter.grad.chunk(2)
                differ = float((one - copy).abs().max() / one.abs().max())
                assert differ > 0.01 if apart else differ < 1e-12, name


def test_the_maps_by_brute_force() -> None:
    """Weights of a widened gated MLP and grouped attention, row by row and column by column."""
    model = random_model(shape("llama_biases", 2) | {"num_kv_heads": 2})
    old = ModelWeights(model)
    new = GrownWeights(old, model.config, Growth(width=Fraction(2)))
    d, group, f, h = model.config.head_width, model.config.queries_per_key, model.config.mlp_size, model.config.hidden_size
    qkv, wide = (w.read("layers.1.attention.query_key_value.weight") for w in (old, new))
    for head in range(2 * model.config.kv_heads):
        for i in range((group + 2) * d):
            row = wide[head * (group + 2) * d + i]
            for j in range(2 * h):
                assert row[j] == qkv[(head % model.config.kv_heads) * (group + 2) * d + i, j % h] / 2
    gate_up, wide = (w.read("layers.0.mlp.gate_up.bias") for w in (old, new))
    for i in range(2 * f):
        assert wide[2 * i] == gate_up[2 * (i % f)] and wide[2 * i + 1] == gate_up[2 * (i % f) + 1]


def test_the_next_layers_rows() -> None:
    """AKI: the old rows are what FPI gives, the new ones are of the next layer; the last layer has none after it."""
    model = random_model(KINDS["neox, parallel"])
    old = ModelWeights(model)
    fpi, aki = (GrownWeights(old, model.config, Growth(width=Fraction(3, 2), method=method)) for method in ("fpi", "aki"))
    for name in ("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.bias", "attention.query_key_value.weight"):
        rows = old.describe()[f"layers.0.{name}"].shape[0]
        one, other, after = fpi.read(f"layers.0.{name}"), aki.read(f"layers.0.{name}"), fpi.read(f"layers.1.{name}")
        assert torch.equal(one[:rows], other[:rows]) and torch.equal(after[rows:], other[rows:])
        assert not torch.equal(one[rows:], other[rows:])
        assert torch.equal(fpi.read(f"layers.1.{name}"), aki.read(f"layers.1.{name}"))
    for name in ("layers.0.input_layernorm.weight", "embed_in.weight", "embed_out.weight"):
        assert torch.equal(fpi.read(name), aki.read(name))


@settings(max_examples=60, deadline=None)
@given(old=st.integers(1, 9), more=st.integers(0, 20), unit=st.integers(1, 4), drawn=st.booleans())
def test_copies_are_even(old: int, more: int, unit: int, drawn: bool) -> None:
    found = copies(old, old + more, unit, torch.Generator().manual_seed(more) if drawn else None)
    counts = np.bincount(found.origin.numpy(), minlength=old * unit)
    assert counts.max() - counts.min() <= 1 and len(found.origin) == (old + more) * unit
    assert found.origin[: old * unit].tolist() == list(range(old * unit))
    assert all(found.count[i] == counts[found.origin[i]] for i in range(len(found.origin)))
    assert all(b - a == 1 for a, b in zip(found.origin.tolist(), found.origin.tolist()[1:], strict=False) if b % unit)


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 12), more=st.integers(0, 30), depth=st.sampled_from(["identity", "stack", "interpolate"]))
def test_every_layer_is_there_once_and_then_again(count: int, more: int, depth: str) -> None:
    found = layer_origins(count, Growth(layers=count + more, depth=depth))
    assert len(found) == count + more
    assert [origin.layer for origin in found if not origin.new] == list(range(count))
    assert all(origin.silent == (origin.new and depth == "identity") for origin in found)
    if depth == "stack":
        assert [origin.layer for origin in found] == [i % count for i in range(count + more)]
    else:
        assert [origin.layer for origin in found] == sorted(origin.layer for origin in found)
        often = np.bincount([origin.layer for origin in found])
        assert often.max() - often.min() <= 1


def test_new_layers_are_spread_evenly() -> None:
    found = layer_origins(4, Growth(layers=6))
    silent = [LayerOrigin(i, new=True, silent=True) for i in (1, 3)]
    assert list(found) == [LayerOrigin(0), LayerOrigin(1), silent[0], LayerOrigin(2), LayerOrigin(3), silent[1]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Odd widths, heads and layers: a preserved function is preserved, any other growth has the shape it says."""
    draw = data.draw
    keys, group, d = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    family = draw(st.sampled_from(["neox", "llama", "olmo2", "qwen3"]))
    group = 1 if family == "neox" else group
    values = {
        "family": family,
        "num_layers": draw(st.integers(1, 3)),
        "hidden_size": keys * group * d,
        "num_heads": keys * group,
        "ffn_size": draw(st.integers(1, 23)),
        "vocab_size": draw(st.integers(2, 40)),
        "max_positions": 16,
        "rotary_fraction": 1.0,
        "tie_embeddings": draw(st.booleans()),
    } | ({"num_kv_heads": keys} if family != "neox" else {})
    model = random_model(values, draw(st.integers(0, 99)))
    growth = Growth(
        width=Fraction(draw(st.sampled_from(["1", "2", "3", "3/2", "4/3"]))),
        method=draw(st.sampled_from(["clone", "fpi", "aki"])),
        layers=model.config.num_layers + draw(st.integers(0, 4)),
        depth=draw(st.sampled_from(["identity", "stack", "interpolate"])),
        seed=draw(st.integers(0, 9)),
    )
    try:
        grown = grown_model(model, **vars(growth))
    except UserError as error:
        assert any(word in str(error) for word in ("steps of", "whole", "nothing would grow"))
        # whole factors are never refused where something grows
        assert growth.width.denominator > 1 or (growth.width == 1 and growth.layers == model.config.num_layers)
        return
    assert grown.config.hidden_size == model.config.hidden_size * growth.width and grown.config.num_layers == growth.layers
    assert grown.config.head_width == model.config.head_width
    if growth.preserves(model.config):
        assert moved(model, grown) < 1e-10


def test_the_comparison_is_that_of_whole_models() -> None:
    """Layer by layer and block by block, against the two models' logits at once."""
    one, other = random_model(KINDS["smollm3"]), random_model(KINDS["smollm3"], 4)
    tokens = sample_tokens(None, one.config, 48)
    found = compare((ModelWeights(one), one.config), (ModelWeights(other), other.config), tokens)
    with torch.no_grad():
        first, second = one.logits(tokens.ids), other.logits(tokens.ids)
    assert found.largest == pytest.approx(float((first - second).abs().max()), rel=1e-12)
    assert found.scale == pytest.approx(float(first.square().mean().sqrt()), rel=1e-12)
    for loss, logits in zip(found.losses, (first, second), strict=True):
        whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.ids[:, 1:].flatten())
        assert loss == pytest.approx(float(whole), rel=1e-12)


# ---- by the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_every_family(tmp_path: Path, name: str) -> None:
    """Strictly, and with the logits of the model it was grown from; what is particular to a layer follows it."""
    small = saved(name, tmp_path / "small")
    how = ["--width", 2, "--noise", "10dB", "--layers", 5, "--to", "hf"]
    said = tool("grow_checkpoint", tmp_path / "small", tmp_path / "large", *how)
    assert "the function is preserved" in " ".join(said.split())
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "large", output_loading_info=True, attn_implementation="eager"
    )
    large, loading = loaded
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert large.config.hidden_size == 72 and large.config.num_hidden_layers == 5
    tokens = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = small(tokens).logits, large(tokens).logits
    torch.testing.assert_close(after, before, rtol=2e-5, atol=2e-5 * float(before.abs().max()))
    old, new = (open_checkpoint(str(tmp_path / each)).model_config for each in ("small", "large"))
    for i, origin in enumerate(layer_origins(3, Growth(layers=5))):
        assert new.window_of(i) == old.window_of(origin.layer)
        assert (i in new.unrotated_layers) == (origin.layer in old.unrotated_layers)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 64, "max_positions": 16}
    return train(config(place, model=model, checkpoint={"every": 5, "keep_last": 9}), ALONE, quiet()).folder


def test_growth_is_measured_written_and_in_the_history(run: Path, tmp_path: Path) -> None:
    data = run.parent / "old"
    said = tool("grow_checkpoint", run, tmp_path / "out", "--width", 2, "--noise", "10dB", "--layers", 3, "--on", data)
    words = " ".join(said.split())
    assert "width x 2 (clone) with noise at 10 dB, 2 to 3 layers (identity)" in words
    assert f"tokens of {data}" in words and "before" in words and "moments of another shape can't be kept" in words
    own = OwnCheckpoint(tmp_path / "out")
    own.verify()
    assert own.model_config.hidden_size == 64 and own.model_config.num_layers == 3 and not own.keeps
    *before, stage = own.lineage.stages
    assert before == open_checkpoint(str(run)).lineage.stages
    assert stage.grown and stage.started_from == str(run / "checkpoints/step_20") and stage.new_layers == [2]
    small, large = open_checkpoint(str(run)), open_checkpoint(str(tmp_path / "out"))
    tokens = sample_tokens(str(data), small.model_config, 256)
    found = compare((small.stored, small.model_config), (large.stored, large.model_config), tokens)
    assert found.largest < 1e-5 * found.scale
    assert not weights_of(tmp_path / "out")["layers.2.mlp.dense_4h_to_h.bias"].any()
    for form in ("hf", "neox"):
        tool("grow_checkpoint", run, tmp_path / form, "--width", 2, "--layers", 3, "--to", form)
        again = open_checkpoint(str(tmp_path / form))
        assert again.model_config.hidden_size == 64
    assert "grown: width x 2" in (tmp_path / "hf/README.md").read_text()


def test_a_growth_that_moves_the_logits_says_how_far(run: Path, tmp_path: Path) -> None:
    said = tool("grow_checkpoint", run, tmp_path / "out", "--layers", 4, "--depth", "stack")
    words = " ".join(said.split())
    assert "random ids differ by" in words and "this growth does not preserve the function" in words
    said = tool("grow_checkpoint", run, tmp_path / "wide", "--width", "5/4", "--method", "fpi")
    assert "does not preserve" in " ".join(said.split())
    assert open_checkpoint(str(tmp_path / "wide")).model_config.num_heads == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--width", "0.5"], "--width 0.5: a model only grows here"),
        (["--layers", 1], "--layers 1: the model has 2, and only grows here"),
        (["--width", 1], "nothing would grow"),
        (["--layers", 2], "nothing would grow"),
        ([], "nothing would grow"),
        (["--width", "1.5"], "or --method fpi, which takes any"),
        (["--width", "1.3", "--method", "fpi"], "hidden_size 32 would become 41.6; this model takes factors in steps of 1/4"),
        (["--layers", 4, "--depth", "stack", "--noise", "10dB"], "--noise: it parts copied channels"),
        (["--width", 2, "--method", "aki", "--noise", "10dB"], "with --method aki copies differ already"),
        (["--width", 2, "--depth", "stack"], "--depth stack: nothing without --layers"),
        (["--layers", 3, "--method", "fpi"], "--method fpi: nothing without --width"),
        (["--width", 2, "--noise=-150dB"], "should preserve the function, yet logits moved by"),
        (["--width", 2, "--on", "nowhere"], "nowhere.bin does not exist"),
        (["--width", 2, "--to", "hf", "--tokenizer", "nowhere.json"], "nowhere.json: no such tokenizer file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run: Path, tmp_path: Path, arguments: list[object], says: str) -> None:
    error = tool("grow_checkpoint", run, tmp_path / "out", *arguments, expect=2)
    assert says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--width", "wide"), ("--width", "1/0"), ("--noise", "loud"), ("--noise", "nan")]
)
def test_words_that_are_no_numbers(run: Path, tmp_path: Path, option: str, value: str) -> None:
    assert f"'{value}' is not a" in tool("grow_checkpoint", run, tmp_path / "out", option, value, expect=2)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    tool("grow_checkpoint", run, tmp_path / "out", "--width", 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    error = tool("grow_checkpoint", run, tmp_path / "out", "--width", 3, expect=2)
    assert "exists; choose another folder" in error and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    model.save_pretrained(tmp_path / "small")
    error = tool("grow_checkpoint", tmp_path / "small", tmp_path / "large", "--width", 2, expect=2)
    assert "logits moved by nan" in error and not (tmp_path / "large").exists()


# ---- training from it -----------------------------------------------------------------------------------------------


def _train_on(ranks: Ranks, place: str, start: str, changes: dict[str, Any]) -> list[float]:
    settings = {"training": {"budget": 5}, "model": None, "start": {"from": start}, "folder": f"{place}/{ranks.world_size}"}
    run = train(config(Path(place), **settings, **changes), ranks, quiet())
    return [line["loss"] for line in events(run.folder, "train")] if ranks.is_main else []


@pytest.mark.slow
def test_training_from_it_is_the_same_on_two_ranks(run: Path, tmp_path: Path) -> None:
    tool("grow_checkpoint", run, tmp_path / "grown", "--width", 2, "--noise", "10dB", "--layers", 3)
    place = str(run.parent)
    (alone,) = run_ranks(_train_on, 1, place, str(tmp_path / "grown"), {})
    both, _ = run_ranks(_train_on, 2, place, str(tmp_path / "grown"), {"parallel": {"tensor": 2}})
    assert len(alone) == 5 and alone == pytest.approx(both, rel=1e-5)
    losses = {line["name"]: line["loss"] for line in events(run.parent / "1", "eval") if line["step"] == 0}
    ends = {line["name"]: line["loss"] for line in events(run, "eval") if line["step"] == 20}
    assert losses == pytest.approx(ends, rel=1e-5)


def test_replay_goes_on_and_moments_do_not(run: Path, tmp_path: Path) -> None:
    tool("grow_checkpoint", run, tmp_path / "grown", "--width", 2)
    common: dict[str, Any] = {"model": None, "folder": str(tmp_path / "on"), "training": {"budget": 3}}
    common |= {"replay": {"fraction": 0.25, "of": "lineage", "max_epochs": 9}}
    outcome = train(config(run.parent, start={"from": str(tmp_path / "grown")}, **common), ALONE, quiet())
    assert outcome.step == 3
    (begun,) = events(outcome.folder, "start")
    rows = {row["line"]: row for row in begun["reset"]}
    assert rows["moments"]["checkpoint_had"] == f"none: grown from {run / 'checkpoints/step_20'}"
    stages = open_checkpoint(str(outcome.folder)).lineage.stages
    assert [stage.grown for stage in stages] == [False, True, False]
    assert any(seen.name == "replay of new" and seen.samples for seen in stages[-1].data)
    with pytest.raises(UserError, match=r"start.moments: 'keep' can't be honoured, .*was grown from .*of another shape"):
        common["folder"] = str(tmp_path / "kept")
        train(config(run.parent, start={"from": str(tmp_path / "grown"), "moments": "keep"}, **common), ALONE, quiet())


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_parameter_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """0.3 GB of fp16 to 1.8 GB of fp32: the largest parameter, and 1 GiB for the interpreter, torch and a layer compared."""
    hidden, layers, rows = 1024, 4, 50304
    old = ModelConfig(num_layers=layers, hidden_size=hidden, num_heads=16, vocab_size=rows, max_positions=2048)
    shapes = {n if n == "embed_out.weight" else f"gpt_neox.{n}": s for n, s in expected_shapes(old).items()}
    (tmp_path / "hf").mkdir()
    file = tmp_path / "hf/model.safetensors"
    safetensors_stream.write_streaming(file, shapes, torch.float16, lambda name: 0.02 * torch.randn(shapes[name]))
    values = {"model_type": "gpt_neox", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 16}
    (tmp_path / "hf/config.json").write_text(json.dumps(values | {"intermediate_size": 4 * hidden, "vocab_size": rows}))
    command = [
        ROOT / "tools/grow_checkpoint.py",
        tmp_path / "hf",
        tmp_path / "out",
        "--width",
        2,
        "--noise",
        "10dB",
        "--layers",
        16,
    ]
    result = subprocess.run([sys.executable, "-c", _PEAK, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    peak, limit = int(result.stdout.split("PEAK")[1]) / 1024, 4 * rows * 2 * hidden / 2**20 + 1024
    print(f"peak {peak:.0f} MiB, at most {limit:.0f} are promised")
    assert peak < limit
