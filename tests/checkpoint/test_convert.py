"""Conversions by the command line: bit-exact round trips, memory, bad input; merged and inspected weights."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megarewarm.checkpoint.export import safetensors_stream
from megarewarm.checkpoint.export.torch_stream import write_streaming
from megarewarm.checkpoint.own.integrity import find_damage
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.checkpoint.weights import expected_shapes
from megarewarm.config.model import ModelConfig
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.checkpoint.test_neox import written
from tests.model.test_neox import some_tokens
from tests.support import neox_writer
from tests.support.megatron_writer import Shape as MegatronShape
from tests.support.megatron_writer import whole_model as megatron_model
from tests.support.megatron_writer import write as write_megatron
from tests.support.tiny import config, quiet

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


sys.path.insert(0, str(ROOT / "tools"))


def tool(name: str, *arguments: object, expect: int = 0) -> str:
    """Run a tool's file as ``python tools/NAME.py`` does, in this process; what it printed on the stream that matters."""
    sys.argv, before = [f"tools/{name}.py", *map(str, arguments)], sys.argv
    try:
        return run_in_process(lambda: runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__"), expect)
    finally:
        sys.argv = before


def run_in_process(command: Callable[[], object], expect: int = 0) -> str:
    """What ``command``, which ends with an exit code, prints on the stream that matters."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            command()
    except SystemExit as exit_:
        code = exit_.code or 0
    finally:
        sys.argv = before
    assert code == expect, out.getvalue() + err.getvalue()
    return err.getvalue() if expect else out.getvalue()


def weights_of(name: Path) -> dict[str, torch.Tensor]:
    stored = open_checkpoint(str(name)).stored
    return {key: stored.read(key) for key in stored.describe()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 64, "max_positions": 16}
    return train(config(place, model=model, checkpoint={"every": 4, "keep_last": 9}), ALONE, quiet()).folder


def test_round_trips_keep_every_bit(run: Path, tmp_path: Path) -> None:
    """Ours to Hugging Face to GPT-NeoX at 4 tensor ranks to ours to Hugging Face."""
    first = weights_of(run)
    tool("convert_checkpoint", run, tmp_path / "hf", "--to", "hf")
    assert_same(first, weights_of(tmp_path / "hf"))
    tool("convert_checkpoint", tmp_path / "hf", tmp_path / "neox", "--to", "neox", "--tp", 4)
    assert_same(first, weights_of(tmp_path / "neox"))
    assert len(list((tmp_path / "neox/global_step0").glob("layer_02-*"))) == 4
    said = tool("convert_checkpoint", tmp_path / "neox", tmp_path / "own", "--to", "megarewarm")
    assert "weights only" in " ".join(said.split())
    assert find_damage(tmp_path / "own") is None
    assert_same(first, weights_of(tmp_path / "own"))
    tool("convert_checkpoint", tmp_path / "own", tmp_path / "hf2", "--to", "hf")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "hf2"))
    assert one == two
    assert "tiny" in (tmp_path / "hf" / "README.md").read_text()


def test_logits_are_those_of_transformers(run: Path, tmp_path: Path) -> None:
    tool("convert_checkpoint", run, tmp_path / "hf", "--to", "hf")
    ours: Transformer = OwnCheckpoint(run / "checkpoints/step_20").whole_model()
    tokens = some_tokens(ours.config)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
    torch.testing.assert_close(ours.logits(tokens), wanted, rtol=2e-5, atol=2e-5)


def test_a_training_state_is_converted_with_its_moments(tmp_path: Path) -> None:
    folder, _, masters, moments = written(tmp_path / "neox", neox_writer.Shape(era="pythia", data=3, tensor=2, legacy_mlp=True))
    tool("convert_checkpoint", folder, tmp_path / "own", "--to", "megarewarm")
    own = OwnCheckpoint(tmp_path / "own")
    own.verify()
    neox = open_checkpoint(str(folder))
    assert own.keeps == neox.keeps and "moments" in own.keeps and "rng" not in own.keeps
    assert own.training is not None and neox.training is not None
    assert own.training.model_copy(update={"keeps": None}) == neox.training
    for name, master in masters.items():
        ours = neox_writer.our_name(name)
        assert torch.equal(own.stored.read(ours), master)
        for what, values in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            held = torch.empty_like(values[name])
            own.load_tensors({f"optimizer.{what}.{ours}": held})
            assert torch.equal(held, values[name])


def test_stored_weights_or_masters(tmp_path: Path) -> None:
    """fp16 weights stay as they are unless fp32 is asked for, which takes the masters."""
    folder, weights, masters, _ = written(tmp_path / "neox", neox_writer.Shape())
    tool("convert_checkpoint", folder, tmp_path / "half", "--to", "hf")
    tool("convert_checkpoint", folder, tmp_path / "full", "--to", "hf", "--dtype", "fp32")
    assert_same({neox_writer.our_name(n): t for n, t in weights.items()}, weights_of(tmp_path / "half"))
    assert_same({neox_writer.our_name(n): t for n, t in masters.items()}, weights_of(tmp_path / "full"))
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"


def test_megatron_to_hugging_face(tmp_path: Path) -> None:
    model = megatron_model(4)
    write_megatron(tmp_path / "megatron", MegatronShape(tensor=2, pipeline=2, args={"rotary_percent": 0.5}), model)
    tool("convert_checkpoint", tmp_path / "megatron", tmp_path / "hf", "--to", "hf")
    assert_same(model, weights_of(tmp_path / "hf"))


def test_the_vocabulary_changes_only_when_told_to(run: Path, tmp_path: Path) -> None:
    first = weights_of(run)
    said = tool("convert_checkpoint", run, tmp_path / "more", "--to", "hf", "--vocab-size", 128)
    assert "64 rows became 128, 64 of zeros were added" in " ".join(said.split())
    more = weights_of(tmp_path / "more")
    for name in ("embed_in.weight", "embed_out.weight"):
        assert torch.equal(more[name][:64], first[name]) and not more[name][64:].any()
    said = tool("convert_checkpoint", tmp_path / "more", tmp_path / "back", "--to", "neox", "--tp", 2, "--vocab-size", 64)
    assert "the last 64 were cut" in " ".join(said.split())
    assert_same(first, weights_of(tmp_path / "back"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "neox", "--tp", 3], "--tp 3: the 4 heads can't be shared evenly"),
        (["--to", "neox", "--tp", 4, "--vocab-size", 63], "63 rows are not divisible by 4 tensor ranks; pad or cut"),
        (["--to", "hf", "--tp", 2], "only '--to neox' has files for each tensor rank"),
        (["--to", "megarewarm", "--dtype", "fp16"], "hold fp32 masters; leave it out"),
        (["--to", "megarewarm", "--vocab-size", 70], "with Adam's moments in the checkpoint rows can't be changed"),
        (["--to", "hf", "--tokenizer", "nowhere.json"], "nowhere.json: no such tokenizer file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run: Path, tmp_path: Path, arguments: list[object], says: str) -> None:
    error = tool("convert_checkpoint", run, tmp_path / "out", *arguments, expect=2)
    assert says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_strange_source_or_destination_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "precious.txt").write_text("mine")
    error = tool("convert_checkpoint", tmp_path / "strange", tmp_path / "out", "--to", "hf", expect=2)
    assert "is neither a run or checkpoint folder of megarewarm" in error and error.count("\n") == 1
    for form in ("hf", "neox", "megarewarm"):
        error = tool("convert_checkpoint", run, tmp_path / "strange", "--to", form, expect=2)
        assert "exists and is no" in error and error.count("\n") == 1
        assert (tmp_path / "strange" / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_streamed_torch_files_are_what_torch_writes(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(7, 5).half(), "b": torch.randn(3), "c": torch.randn(2, 2, 2).bfloat16()}
    write_streaming(tmp_path / "a.pt", {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}, tensors.__getitem__)
    for mmap in (True, False):
        read = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert list(read) == list(tensors) and all(
            torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items()
        )


# ---- memory ---------------------------------------------------------------------------------------------------------

_PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("PEAK", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """2.8 GB of fp16 weights, and 5.6 of fp32: in no direction more memory than the largest tensor plus 1 GiB."""
    hidden, layers, rows = 2048, 24, 50304
    shape = ModelConfig(num_layers=layers, hidden_size=hidden, num_heads=16, vocab_size=rows, max_positions=2048)
    shapes = {n if n == "embed_out.weight" else f"gpt_neox.{n}": s for n, s in expected_shapes(shape).items()}
    (tmp_path / "hf").mkdir()
    file = tmp_path / "hf/model.safetensors"
    safetensors_stream.write_streaming(file, shapes, torch.float16, lambda name: torch.full(shapes[name], 0.5))
    values = {
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 16,
        "intermediate_size": 4 * hidden,
        "vocab_size": rows,
    }
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    steps: list[tuple[str, str, list[object], int]] = [
        ("hf", "neox", ["--tp", 2], 2),
        ("neox", "megarewarm", [], 4),
        ("megarewarm", "hf2", [], 4),
    ]
    for source, destination, more, size in steps:
        assert_peak(tmp_path / source, tmp_path / destination, more, size * rows * hidden)


def assert_peak(source: Path, destination: Path, more: list[object], largest: int) -> None:
    """A conversion takes the ``largest`` tensor's bytes, and 1 GiB for the interpreter and torch."""
    form = "hf" if destination.name == "hf2" else destination.name
    command = [ROOT / "tools/convert_checkpoint.py", source, destination, "--to", form, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", _PEAK, *map(str, command)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    peak = int(result.stdout.split("PEAK")[1]) / 1024
    limit = largest / 2**20 + 1024
    print(f"to {form}: peak {peak:.0f} MiB, at most {limit:.0f} are promised")
    assert peak < limit, f"to {form}: {peak:.0f} MiB, at most {limit:.0f} were promised"


@pytest.mark.slow
def test_one_tensor_of_a_llama_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """1.4 GB of bf16 in two files, tensors of which several are one here; 2.8 GB of fp32."""
    hidden, mlp, layers, rows = 2048, 8192, 8, 64000
    like = {
        f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in _llama_layer(hidden, mlp).items()
    }
    shapes = {"model.embed_tokens.weight": (rows, hidden), **like, "model.norm.weight": (hidden,)}
    (tmp_path / "hf").mkdir()
    names = list(shapes)
    files = {f"model-{n}.safetensors": names[n::2] for n in (0, 1)}
    for file, held in files.items():
        inside = {name: shapes[name] for name in held}
        safetensors_stream.write_streaming(tmp_path / "hf" / file, inside, torch.bfloat16, lambda n: torch.full(shapes[n], 0.5))
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    values = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 32}
    values |= {"num_key_value_heads": 8, "intermediate_size": mlp, "vocab_size": rows, "tie_word_embeddings": True}
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    assert_peak(tmp_path / "hf", tmp_path / "megarewarm", [], 4 * rows * hidden)
    assert_peak(tmp_path / "megarewarm", tmp_path / "hf2", ["--dtype", "bf16"], 4 * rows * hidden)


def _llama_layer(hidden: int, mlp: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "o")}
    shapes |= {f"self_attn.{name}_proj": (hidden // 4, hidden) for name in ("k", "v")}
    shapes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    return shapes | {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}


# ---- merged and inspected -------------------------------------------------------------------------------------------


def test_means_moving_averages_and_interpolations(run: Path, tmp_path: Path) -> None:
    steps = [12, 16, 20]
    several = [weights_of(run / f"checkpoints/step_{step}") for step in steps]
    names = [run / f"checkpoints/step_{step}" for step in steps]
    tool("merge_checkpoints", tmp_path / "last", "--last", 3, run)
    tool("merge_checkpoints", tmp_path / "mean", "--mean", *names)
    tool("merge_checkpoints", tmp_path / "ema", "--ema", 0.8, *names)
    tool("merge_checkpoints", tmp_path / "between", "--interpolate", names[0], names[2], "--alpha", 0, 0.25, 1, 1.5)
    for key in several[0]:
        a, b, c = (weights[key].double() for weights in several)
        wanted = {
            "last": (a + b + c) / 3,
            "mean": (a + b + c) / 3,
            "ema": 0.8 * (0.8 * a + 0.2 * b) + 0.2 * c,
            "between_0": a,
            "between_0.25": 0.75 * a + 0.25 * c,
            "between_1": c,
            "between_1.5": -0.5 * a + 1.5 * c,
        }
        for name, value in wanted.items():
            found = open_checkpoint(str(tmp_path / name)).stored.read(key)
            torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-9)
    assert_same(weights_of(tmp_path / "between_1"), several[2])
    merged = OwnCheckpoint(tmp_path / "ema")
    merged.verify()
    assert "moving average with decay 0.8" in merged.lineage.stages[-1].intent
    on = config(
        tmp_path,
        model=None,
        name="on",
        folder=str(tmp_path / "on"),
        start={"from": str(tmp_path / "ema")},
        training={"budget": 2},
    )
    outcome = train(on, ALONE, quiet())
    assert outcome.step == 2


def test_merging_refuses_what_is_not_alike(run: Path, tmp_path: Path) -> None:
    folder, *_ = written(tmp_path / "neox", neox_writer.Shape())
    error = tool("merge_checkpoints", tmp_path / "out", "--mean", run, folder, expect=2)
    assert "only checkpoints of the same model can be averaged" in error and error.count("\n") == 1
    error = tool("merge_checkpoints", tmp_path / "out", "--last", 50, run, expect=2)
    assert "holds 5 checkpoints, 50 were asked for" in error
    error = tool("merge_checkpoints", tmp_path / "out", "--ema", "1.5", run, run, expect=2)
    assert "must lie in [0, 1)" in error
    error = tool("merge_checkpoints", tmp_path / "out", "--mean", run, expect=2)
    assert "at least two" in error
    assert not (tmp_path / "out").exists()


def test_a_merge_stands_for_a_decay(tmp_path: Path) -> None:
    """Decayed increments added up in float64; a constant rate is the condition, and its absence is said."""
    constant = {"curve": "constant", "max_lr": 1e-2, "min_lr": None}
    changes: dict[str, Any] = {"schedule": constant, "checkpoint": {"every": 2}, "evaluation": {"every": 20}}
    flat = train(config(tmp_path, folder=str(tmp_path / "flat"), **changes), ALONE, quiet()).folder
    steps = [12, 14, 16, 18, 20]
    names = [flat / f"checkpoints/step_{step}" for step in steps]
    shown = tool("merge_checkpoints", tmp_path / "run", "--like", "minus_sqrt", flat, "--window", "40%")
    assert "minus_sqrt decay over steps 12 to 20 by merging" in shown and "learning rate goes" not in shown
    tool("merge_checkpoints", tmp_path / "list", "--like", "minus_sqrt", *reversed(names))
    tool("merge_checkpoints", tmp_path / "two", "--like", "linear", flat, "--window", "4 steps")
    assert_same(weights_of(tmp_path / "run"), weights_of(tmp_path / "list"))
    several = [weights_of(name) for name in names]
    rates = 1 - ((torch.arange(8, dtype=torch.float64)) / 8).sqrt()
    for key, found in weights_of(tmp_path / "run").items():
        points = [weights[key].double() for weights in several]
        decayed = points[0].clone()
        for j in range(4):
            decayed += rates[2 * j : 2 * j + 2].mean() * (points[j + 1] - points[j])
        assert torch.equal(found, decayed.float()) or (found.double() - decayed).abs().max() < 1e-8, key
    two = weights_of(tmp_path / "two")
    assert all(torch.allclose(two[k], 0.125 * a + 0.5 * b + 0.375 * c) for k, (a, b, c) in
               {k: [w[k] for w in several[2:]] for k in two}.items())  # fmt: skip
    falling = train(config(tmp_path, folder=str(tmp_path / "falling")), ALONE, quiet()).folder
    shown = tool("merge_checkpoints", tmp_path / "f", "--like", "linear", falling, "--window", "50%")
    assert "the learning rate goes from" in shown and "only a constant rate makes it equal" in shown
    seed = train(config(tmp_path, folder=str(tmp_path / "seed"), training={"seed": 7}, **changes), ALONE, quiet()).folder
    decay = train(config(tmp_path, folder=str(tmp_path / "decay"), optimizer={"weight_decay": 0.5}, **changes), ALONE, quiet())
    for words, said in (
        (["linear", names[0], seed], f"{seed} is no checkpoint of the run of {names[0]}"),
        (["linear", names[0], decay.folder], "of the run of " + f"{names[0]}: optimizer.weight_decay is 0.5 there, here 0.1"),
        (["linear", flat], "Give --window, such as 10%"),
        (["linear", flat, "--window", "5%"], "within the last 1 steps"),
        (["linear", flat, "--window", "0%"], "give more than 0"),
        (["linear", flat, "--window", "2 epochs"], "in steps, tokens, or as a share"),
        (["linear", flat, "--window", "soon"], "not a length of training"),
        (["linear", *names, "--window", "10%"], "are a window themselves"),
        (["linear", names[0], names[0]], "two checkpoints are of step 12"),
        (["linear", names[0], falling], "is no checkpoint of the run of"),
        (["linear", tmp_path / "run", names[0]], "does not say after which step"),
        (["round", flat, "--window", "10%"], "the shape comes first (linear, cosine, exponential, minus_sqrt)"),
        (["linear", tmp_path, "--window", "10%"], "no checkpoints are in it"),
    ):
        error = tool("merge_checkpoints", tmp_path / "out", "--like", *words, expect=2)
        assert said in error and error.count("\n") == 1, error
    assert "--window: is the length" in tool("merge_checkpoints", tmp_path / "out", "--mean", *names, "--window", 3, expect=2)
    assert not (tmp_path / "out").exists()


def test_inspection_shows_state_history_norms_and_changes(run: Path, tmp_path: Path) -> None:
    shown = tool("inspect_checkpoint", run, "--norms", "--verify", "--diff", run / "checkpoints/step_16")
    text = " ".join(shown.split())
    assert "every file is as it was written" in text
    assert "2 layers, width 32, 4 heads" in text and "optimizer adamw, 20 steps" in text and "tiny: scratch, 20 steps" in text
    weight = weights_of(run)["embed_out.weight"]
    assert f"{float(weight.double().square().mean().sqrt()):.4g}" in text
    before, after = weight.double(), weights_of(run / "checkpoints/step_16")["embed_out.weight"].double()
    assert f"{float((after - before).norm() / before.norm()):.3g}" in text
    assert "parameters are the same bit for bit" in text
    same = tool("inspect_checkpoint", run, "--diff", run)
    assert "28 of 28 parameters are the same bit for bit" in " ".join(same.split())


def test_inspection_names_damage(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints/step_20", tmp_path / "copy")
    with open(tmp_path / "copy/__0_0.distcp", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
        file.seek(5001)
        file.write(b"\x00\xff")
    error = tool("inspect_checkpoint", tmp_path / "copy", "--verify", expect=2)
    assert "__0_0.distcp is damaged" in error and error.count("\n") == 1
    for arguments in (
        ["inspect_checkpoint", tmp_path / "copy", "--norms"],
        ["inspect_checkpoint", run, "--diff", tmp_path / "copy"],
    ):
        assert "__0_0.distcp is damaged" in tool(*map(str, arguments), expect=2)
    assert "is damaged" in tool("convert_checkpoint", tmp_path / "copy", tmp_path / "out", "--to", "hf", expect=2)
    assert "is damaged" in tool("merge_checkpoints", tmp_path / "out", "--mean", run, tmp_path / "copy", expect=2)
    assert not (tmp_path / "out").exists()
    tool("convert_checkpoint", run, tmp_path / "hf", "--to", "hf")
    assert "have no checksums" in tool("inspect_checkpoint", tmp_path / "hf", "--verify", expect=2)
