"""GPT-NeoX's checkpoints, read and written: against its own files, an independent writer and DeepSpeed itself."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megarewarm.checkpoint.export.neox import export_neox
from megarewarm.checkpoint.foreign.neox_folder import NeoXFolder
from megarewarm.checkpoint.foreign.neox_optimizer import What
from megarewarm.checkpoint.source import NeoXCheckpoint, open_checkpoint
from megarewarm.checkpoint.weights import check, expected_shapes
from megarewarm.errors import UserError
from megarewarm.main import main
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from tests.support import neox_writer as theirs
from tests.support.distributed import run_ranks, whole
from tests.support.huggingface import load_weights
from tests.support.neox_writer import Shape, our_name, whole_model
from tests.support.tiny import config, write_tokens

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def golden_layers(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ck7" / "global_step10"
    shutil.copytree(golden / "neox_ckpt_r7_layers", folder)
    (folder / "configs").mkdir()
    shutil.copy(golden / "configs" / "r7_pipe1.yml", folder / "configs")
    return folder


def test_files_of_gpt_neox_are_the_weights_it_converted(golden: Path, golden_layers: Path) -> None:
    wanted = load_file(golden / "hf_r7" / "model.safetensors")
    folder = NeoXFolder(golden_layers)
    check(folder, expected_shapes(folder.model_config))
    assert {("" if name == "embed_out.weight" else "gpt_neox.") + name for name in folder.describe()} == set(wanted)
    for name in folder.describe():
        key = name if name == "embed_out.weight" else f"gpt_neox.{name}"
        assert torch.equal(folder.read(name), wanted[key]), name
    config = folder.model_config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.rotary_fraction) == (2, 64, 4, 0.25)


# ---- the independent writer ----------------------------------------------------------------------------------------

SHAPES = {
    "one": Shape(),
    "legacy names": Shape(legacy_mlp=True),
    "no pipeline": Shape(pipe=0),
    "no pipeline, legacy, 2 tensor": Shape(pipe=0, legacy_mlp=True, tensor=2),
    "2 tensor": Shape(tensor=2),
    "4 tensor, 3 data": Shape(tensor=4, data=3),
    "2 stages, 2 tensor, 2 data": Shape(pipe=2, tensor=2, data=2),
    "rigid": Shape(era="modern_rigid", data=2, tensor=2),
    "bf16": Shape(era="bf16", data=2, dtype=torch.bfloat16),
    "fp32 without zero": Shape(era="none", dtype=torch.float32, tensor=2),
    "fp32 without zero, no pipeline": Shape(era="none", dtype=torch.float32, pipe=0),
    "fp32 without zero, 2 stages, 2 tensor": Shape(era="none", dtype=torch.float32, pipe=2, tensor=2),
    "fp32 without zero, 2 stages, tied": Shape(era="none", dtype=torch.float32, pipe=2, tied=True, parallel_residual=False),
    "fp32 without zero, 2 stages, one group": Shape(era="none", dtype=torch.float32, pipe=2, decays=False),
    "fp16 without zero": Shape(era="fp16_flat"),
    "fp16 without zero, 2 stages, tied, 2 tensor": Shape(era="fp16_flat", pipe=2, tied=True, tensor=2),
    "fp16 without zero, one group": Shape(era="fp16_flat", pipe=0, decays=False),
    "bf16 without zero, 2 stages": Shape(era="bf16_unsharded", pipe=2, dtype=torch.bfloat16),
    "bf16 without zero, 3 data": Shape(era="bf16_unsharded", data=3, tensor=2, dtype=torch.bfloat16),
    "one group, 2 data": Shape(data=2, decays=False),
    "tied, 2 stages": Shape(pipe=2, tied=True, data=2),
    "round robin": Shape(pipe=0, data=3, round_robin=True),
    "aligned": Shape(pipe=0, data=2, alignment=48, era="modern_rigid"),
    "pythia": Shape(era="pythia", data=4, legacy_mlp=True),
    "pythia, intervals": Shape(era="pythia", data=3, tensor=2, legacy_mlp=True, per_communication=700),
    "pythia, rigid": Shape(era="pythia_rigid", data=2, legacy_mlp=True, per_communication=1000),
    "sequential residual": Shape(parallel_residual=False, tensor=2),
}


def written(place: Path, shape: Shape) -> tuple[Path, dict, dict, tuple]:
    # masters that fp16 can't hold, so that it shows which of the two was read; powers of two as divisors keep bits
    masters = whole_model(1)
    if shape.tied:
        masters = {name: tensor for name, tensor in masters.items() if "final_linear" not in name}
    weights = {name: tensor.to(shape.dtype) for name, tensor in masters.items()}
    if shape.era == "none":
        masters = weights
    moments: tuple[dict[str, torch.Tensor], ...] = (
        whole_model(2),
        {name: tensor.square() for name, tensor in whole_model(3).items()},
    )
    moments = tuple({name: each[name] for name in masters} for each in moments)
    return theirs.write(place, shape, weights, masters, moments), weights, masters, moments


def assert_read(folder: Path, shape: Shape, weights: dict, masters: dict, moments: tuple) -> None:
    source = open_checkpoint(str(folder.parent))
    assert isinstance(source, NeoXCheckpoint)
    stored = NeoXFolder(folder)
    assert source.training is not None and source._optimizer is not None
    for name, tensor in weights.items():
        assert torch.equal(stored.read(our_name(name)), tensor), name
        assert torch.equal(source.weights.read(our_name(name)), masters[name].float()), name
        for what, values in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            assert torch.equal(source._optimizer.read(cast(What, what), our_name(name)), values[name]), (what, name)
    state = source.training
    assert (state.step, state.optimizer_step, state.schedule_position, state.samples) == (7, 6, 6, 28)
    assert state.loss_scale == (
        None if shape.era in ("none", "bf16", "bf16_unsharded") else {"scale": 4096.0, "finite_steps": 0}
    )
    assert state.schedule == {"curve": "cosine", "max_lr": 3e-4, "min_lr": 3e-5}
    assert source.model_config.activation == "gelu_tanh"
    assert source.model_config.residual == ("parallel" if shape.parallel_residual else "sequential")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_masters_and_moments_of_every_form(tmp_path: Path, shape: Shape) -> None:
    assert_read(*written_and_shape(tmp_path, shape))


def written_and_shape(place: Path, shape: Shape):
    folder, weights, masters, moments = written(place, shape)
    return folder, shape, weights, masters, moments


@settings(max_examples=25, deadline=None)
@given(
    tensor=st.sampled_from([1, 2, 4]),
    data=st.integers(1, 5),
    pipe=st.integers(0, 2),
    era=st.sampled_from(["modern", "modern_rigid", "bf16", "pythia", "pythia_rigid"]),
    per_communication=st.sampled_from([64, 700, 3001, 10**9]),
    legacy=st.booleans(),
)
def test_any_way_of_cutting_is_put_together_again(tmp_path_factory, tensor, data, pipe, era, per_communication, legacy) -> None:
    dtype = torch.bfloat16 if era == "bf16" else torch.float16
    shape = Shape(tensor, data, pipe, legacy, era, per_communication, dtype)
    place = tmp_path_factory.mktemp("cut")
    assert_read(*written_and_shape(place, shape))
    shutil.rmtree(place)


# ---- training goes on ----------------------------------------------------------------------------------------------


def _run(place: Path, save: Path, start: dict[str, Any], parallel: dict[str, Any] | None = None):
    return config(
        place,
        model=None,
        start={"from": str(save), **start},
        data={"sequence_length": 8, "train": [{"path": str(place / "new"), "max_epochs": 9}], "validation": []},
        training={"budget": 20, "global_batch": 4, "micro_batch": 4},
        parallel=parallel or {},
    )


@pytest.fixture
def small_vocabulary(tmp_path: Path) -> Path:
    for name in ("old", "new"):
        write_tokens(tmp_path / name, 1, vocabulary=theirs.VOCABULARY)
    return tmp_path


def _built(ranks: Ranks, place: str, save: str, start: dict[str, Any], parallel: dict[str, Any]) -> dict[str, torch.Tensor]:
    run = build(make_plan(_run(Path(place), Path(save), start, parallel)), ranks)
    run.batches.close()
    return {name: whole(tensor).clone() for name, tensor in run.tensors().items()} | {
        "step": torch.tensor([run.step, run.optimizer.completed_steps, run.plan.position.schedule, run.plan.position.samples])
    }


KEEP = {"intent": "rewarm", "moments": "keep"}
RESUME = {"intent": "resume", "schedule": "restart", "rng": "reseed"}


@pytest.mark.parametrize(
    "shape", [Shape(data=2), Shape(era="pythia", data=3, tensor=2, legacy_mlp=True)], ids=["modern", "pythia"]
)
def test_a_run_takes_over_weights_moments_and_counters(small_vocabulary: Path, shape: Shape) -> None:
    folder, _, masters, moments = written(small_vocabulary / "neox", shape)
    for start, counters in ((KEEP, [0, 6, 0, 0]), (RESUME, [7, 6, 0, 28]), ({"intent": "rewarm"}, [0, 0, 0, 0])):
        found = _built(ALONE, str(small_vocabulary), str(folder.parent), start, {})
        assert found["step"].tolist() == counters
        for name, master in masters.items():
            assert torch.equal(found[f"model.{our_name(name)}"], master)
            for what, values in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                held = found[f"optimizer.{what}.{our_name(name)}"]
                assert torch.equal(held, values[name] if start != {"intent": "rewarm"} else torch.zeros_like(held))


def _two_ranks(ranks: Ranks, place: str, save: str) -> list[dict[str, npt.NDArray[Any]]]:
    return [
        {name: tensor.numpy() for name, tensor in _built(ranks, place, save, KEEP, parallel).items()}
        for parallel in ({"tensor": 2}, {"sharding": "zero3"})
    ]


def test_ranks_take_their_parts_of_it(small_vocabulary: Path) -> None:
    folder, _, _, _ = written(small_vocabulary / "neox", Shape(tensor=4, data=2))
    alone = _built(ALONE, str(small_vocabulary), str(folder.parent), KEEP, {})
    for answer in run_ranks(_two_ranks, 2, str(small_vocabulary), str(folder.parent)):
        for found in answer:
            for name, tensor in alone.items():
                assert name.startswith("rng") or np.array_equal(found[name], tensor.numpy()), name


# ---- written by DeepSpeed itself -----------------------------------------------------------------------------------


def _deepspeed(ranks: Ranks, save: str, stage: int, dtype: str) -> dict[str, tuple[int, npt.NDArray[Any]]]:
    """Name -> (first element, values) of this rank's fragments of masters and moments, by DeepSpeed's own record of them."""

    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.world_size), "LOCAL_RANK": "0"}
    import deepspeed

    torch.manual_seed(5)
    weights = whole_model(5)
    model = torch.nn.Module()
    model.sequential = torch.nn.ModuleDict()
    for name, tensor in weights.items():
        module: torch.nn.Module = model
        for key in f"sequential.{name}".split(".")[:-1]:
            if key not in dict(module.named_children()):
                module.add_module(key, torch.nn.Module())
            module = module.get_submodule(key)
        module.register_parameter(name.rsplit(".", 1)[1], torch.nn.Parameter(tensor.clone()))
    model.forward = lambda x: sum((p * x).square().sum() for p in model.parameters())
    named: dict[str, Any] = {name.removeprefix("sequential."): p for name, p in model.named_parameters()}
    groups = [
        {"params": [p for name, p in named.items() if theirs.decays(name)], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if not theirs.decays(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for _ in range(3):
        engine.backward(engine(torch.tensor(1.0 + ranks.rank, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)))
        engine.step()
    engine.save_checkpoint(save, tag="global_step3", client_state={"iteration": 3, "args": {"num_attention_heads": 4}})
    found = {}
    zero = engine.optimizer
    for name, parameter in named.items():
        if (fragment := parameter._hp_mapping) is None:
            continue  # it lies on other ranks
        first, inside = fragment.lp_fragment_address.start, fragment.hp_fragment_address
        flat = zero.single_partition_of_fp32_groups[int(not theirs.decays(name))]
        state = zero.optimizer.state[flat]
        for what, values in (("master", flat), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            found[f"{what}.{name}"] = first, values.detach()[inside.start : inside.start + inside.numel].numpy().copy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (1, 2), (2, 2)])
def test_files_that_deepspeed_writes(tmp_path: Path, stage: int, ranks: int) -> None:
    pytest.importorskip("deepspeed")
    fragments = run_ranks(_deepspeed, ranks, str(tmp_path), stage, "bf16", timeout=300)
    source = open_checkpoint(str(tmp_path))
    assert isinstance(source, NeoXCheckpoint) and source._optimizer is not None and source.training is not None
    assert source.training.optimizer_step == 3
    assert len(set().union(*fragments)) == 3 * len(whole_model(5))
    for key, (first, values) in [item for rank in fragments for item in rank.items()]:
        what, name = key.split(".", 1)
        found = source._optimizer.read(what, our_name(name))
        assert np.array_equal(found.flatten()[first : first + len(values)].numpy(), values), key


# ---- written by us -------------------------------------------------------------------------------------------------


def test_what_we_write_is_what_the_other_writer_writes(tmp_path: Path) -> None:
    for tensor in (1, 2, 4):
        shape = Shape(tensor=tensor, dtype=torch.float32, era="none")
        folder, weights, _, _ = written(tmp_path / f"theirs{tensor}", shape)
        source = NeoXFolder(folder)
        for again in (1, 2, 4):  # from any number of ranks to any other
            ours = tmp_path / f"ours{tensor}to{again}"
            export_neox(source, source.model_config, ours, step=9, tensor_ranks=again)
            assert (ours / "latest").read_text() == "global_step9"
            back = NeoXFolder(ours / "global_step9")
            assert back.model_config == source.model_config
            for name, tensor_ in weights.items():
                assert torch.equal(back.read(our_name(name)), tensor_), name
            like = Shape(tensor=again, dtype=torch.float32, era="none")
            place = tmp_path / f"reference{tensor}to{again}"
            reference = theirs.write(place, like, weights, weights, (weights, weights))
            files = sorted(file.name for file in reference.glob("layer_*"))
            assert files == sorted(file.name for file in (ours / "global_step9").glob("layer_*"))
            for file in files:
                one = torch.load(reference / file, weights_only=True)
                two = torch.load(ours / "global_step9" / file, weights_only=True)
                one = {key: value for key, value in one.items() if "inv_freq" not in key}
                assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file


def test_hugging_face_to_neox_and_back_is_bit_exact(golden: Path, tmp_path: Path) -> None:
    from megarewarm.checkpoint.export.huggingface import export
    from megarewarm.checkpoint.foreign.huggingface import HuggingFaceWeights, read_model_config
    from megarewarm.model.transformer import Transformer

    shape, _ = read_model_config(golden / "hf_r1")
    export_neox(HuggingFaceWeights(golden / "hf_r1"), shape, tmp_path / "neox", tensor_ranks=2)
    source = open_checkpoint(str(tmp_path / "neox"))
    export(NeoXFolder(tmp_path / "neox/global_step0"), source.model_config, tmp_path / "hf")
    one, two = load_file(golden / "hf_r1/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    model = Transformer(shape)
    load_weights(tmp_path / "hf", model)


# ---- bad input -----------------------------------------------------------------------------------------------------


def _breakage() -> dict[str, tuple[object, str]]:
    def remove(pattern: str):
        return lambda folder: [file.unlink() for file in folder.glob(pattern)]

    def rewrite(name: str, change):
        def act(folder: Path) -> None:
            content = torch.load(folder / name, weights_only=True)
            change(content)
            torch.save(content, folder / name)

        return act

    def cut(folder: Path) -> None:
        os.truncate(folder / "layer_03-model_00-model_states.pt", 900)

    def reshape(content: dict[str, torch.Tensor]) -> None:
        content["attention.dense.weight"] = torch.zeros(3, 3)

    def rename(content: dict[str, torch.Tensor]) -> None:
        content["mlp.gate.weight"] = content.pop("mlp.linear1.weight")

    return {
        "a layer is missing": (remove("layer_02-*"), r"the file of layer 02 is missing; copy it"),
        "the last layer is missing": (remove("layer_03-*"), r"it had 2 layers, its files hold 1; copy all layer_"),
        "the head is missing": (remove("layer_06-*"), r"layer_06-model_00-model_states\.pt: the head .* is missing; copy"),
        "a rank of a layer is missing": (remove("layer_02-model_01*"), r"layer_02-model_01-model_states\.pt: missing.*copy it"),
        "the last layer's norm is missing": (remove("layer_05-*"), r"missing tensor final_layer_norm\.bias"),
        "a data rank's optimizer is missing": (remove("zero_pp_rank_0_mp_rank_01*"), r"zero_pp_rank_0_mp_rank_01_.*missing"),
        "the last data rank's optimizer is missing": (remove("zero_pp_rank_1_*"), r"written by 2 data-parallel ranks, 1 files"),
        "a file is cut off": (cut, r"layer_03-model_00-model_states\.pt: not a readable PyTorch file.*copy it again"),
        "a shape is wrong": (
            rewrite("layer_03-model_01-model_states.pt", reshape),
            r"dense\.weight has shape \(3, 3\)",
        ),
        "a name is in one rank's file": (
            rewrite("layer_03-model_00-model_states.pt", rename),
            r"linear1\.weight is in it, but not",
        ),
        "a name is unknown": (
            lambda folder: [rewrite(f"layer_03-model_{rank:02d}-model_states.pt", rename)(folder) for rank in (0, 1)],
            r"unexpected tensor mlp\.gate\.weight in layer_03",
        ),
        "no configuration": (lambda folder: (shutil.rmtree(folder / "configs"), remove("mp_rank*")(folder)), r"how many heads"),
        "latest names another": (
            lambda folder: (folder.parent / "latest").write_text("global_step8"),
            "names global_step8",
        ),
        "other positions": (
            lambda folder: (folder / "configs/model.yml").write_text("{num_attention_heads: 4, pos_emb: alibi}"),
            r"model.yml: pos_emb is 'alibi', under which the weights are another model",
        ),
    }


@pytest.mark.parametrize("name", _breakage())
def test_what_is_wrong_is_named_in_one_line(small_vocabulary: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    break_it, says = _breakage()[name]
    folder, *_ = written(small_vocabulary / "neox", Shape(tensor=2, data=2))
    break_it(folder)  # type: ignore[operator]
    run = _run(small_vocabulary, folder.parent, KEEP).model_dump(mode="json", by_alias=True)
    (small_vocabulary / "run.yml").write_text(yaml.safe_dump(run))
    assert main([str(small_vocabulary / "run.yml")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and re.search(says, err), err
    assert not (small_vocabulary / "tiny").exists()


@pytest.mark.parametrize("tensor", [1, 2])
def test_tied_embeddings_lie_in_two_files(tmp_path: Path, tensor: int) -> None:
    shape = Shape(tensor=tensor, dtype=torch.float32, era="none", tied=True)
    weights = {name: whole for name, whole in whole_model(1).items() if "final_linear" not in name}
    folder = NeoXFolder(theirs.write(tmp_path, shape, weights, weights, (weights, weights)))
    assert folder.model_config.tie_embeddings and set(folder.describe()) == {our_name(name) for name in weights}
    assert all(torch.equal(folder.read(our_name(name)), whole) for name, whole in weights.items())


def test_the_settings_of_published_checkpoints_lie_beside_the_files(tmp_path: Path) -> None:
    folder, *_ = written(tmp_path / "neox", Shape())
    wanted = NeoXFolder(folder).model_config
    (folder / "configs" / "model.yml").rename(folder / "70M.yml")
    assert NeoXFolder(folder).model_config == wanted


def test_an_export_that_cannot_be_writes_nothing(tmp_path: Path) -> None:
    folder, *_ = written(tmp_path / "theirs", Shape(era="none", dtype=torch.float32))
    source = NeoXFolder(folder)
    with pytest.raises(UserError, match="--tp 3: the 4 heads can't be shared evenly"):
        export_neox(source, source.model_config, tmp_path / "out", tensor_ranks=3)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(UserError, match="exists and is not an export"):
        export_neox(source, source.model_config, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()


def test_the_configuration_that_we_write_is_read_by_gpt_neox(tmp_path: Path) -> None:
    """Its reader is plain PyYAML, for which 1e-05 is text, and it insists on the types of its own arguments."""
    folder, *_ = written(tmp_path / "theirs", Shape(era="none", dtype=torch.float32))
    source = NeoXFolder(folder)
    for number, (eps, base, share) in enumerate(((1e-5, 10000.0, 0.25), (1e-12, 500000.0, 1.0), (0.5, 1e16, 0.5))):
        shape = source.model_config.model_copy(update={"layernorm_eps": eps, "rotary_base": base, "rotary_fraction": share})
        export_neox(source, shape, tmp_path / f"ours{number}")
        text = (tmp_path / f"ours{number}/global_step0/configs/model.yml").read_text()
        read = yaml.safe_load(text)
        assert (read["layernorm_epsilon"], read["rotary_emb_base"], read["rotary_pct"]) == (eps, base, share), text
        defaults = _defaults_of_gpt_neox()
        for key, value in read.items():
            wanted: Any = {"int": int, "float": (int, float), "bool": bool, "str": str}[defaults.get(key, type(value).__name__)]
            assert isinstance(value, wanted) and (isinstance(value, bool) == (wanted is bool)), (key, value)
        assert type(read["rotary_emb_base"]) is int
        assert NeoXFolder(tmp_path / f"ours{number}/global_step0").model_config == shape
    odd = source.model_config.model_copy(update={"rotary_base": 10000.5})
    with pytest.raises(UserError, match=r"rotary_base 10000\.5: GPT-NeoX's rotary_emb_base is a whole number"):
        export_neox(source, odd, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def _defaults_of_gpt_neox() -> dict[str, str]:
    """Key -> type of its default, where that says the type."""
    recorded = Path(os.environ.get("MEGAREWARM_TEST_DATA", "")) / "neox_real" / "neox_fields.json"
    fields = json.loads(recorded.read_text()) if recorded.is_file() else {}
    return {key: type(value).__name__ for key, value in fields.items() if isinstance(value, bool | int | float | str)}
