"""What surrounds the layouts: changing them in mid-run, precisions, recomputation, traps of the libraries underneath."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megarewarm.config.execution import LossScaleConfig, ParallelConfig
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import cards
from megarewarm.model.transformer import Transformer
from megarewarm.parallel import connect as connect_module
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.loss_scaler import LossScaler
from megarewarm.parallel.mesh import Layout, Mesh, choose_layout
from megarewarm.parallel.pipeline import balance, my_stages, rank_of
from megarewarm.parallel.placement import place
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.step import training_step
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks, whole
from tests.support.tiny import config, events, quiet
from tests.support.wire import Wire

ALONE = Ranks(0, 1, torch.device("cpu"))
MODEL = {"num_layers": 4, "num_heads": 4}
ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path) -> list[float]:
    found = {line["step"]: line["loss"] for line in events(folder, "train")}
    return [found[step] for step in sorted(found)]


# ---- a change of layout in mid-run ------------------------------------------------------------------------------------


def _halves(ranks: Ranks, place_: str, parallel: dict[str, Any]) -> None:
    """As a user's second command on other ranks: the run's own checkpoint is the start."""
    train(_changing(Path(place_), parallel), ranks, quiet())


def _changing(place_: Path, parallel: dict[str, Any], name: str = "changing") -> Any:
    return config(
        place_,
        name=name,
        folder=str(place_ / name),
        model=MODEL | {"vocab_size": 66},
        training={"budget": 10, "micro_batch": 2},
        checkpoint={"every": 2, "keep_last": 9},
        parallel=parallel,
    )


def _keep_until(folder: Path, step: int) -> None:
    """What the disk holds after a kill that came after ``step``."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


def test_a_run_continues_its_curve_in_any_other_layout(tmp_path: Path) -> None:
    train(_changing(tmp_path, {}, "whole"), ALONE, quiet())
    train(_changing(tmp_path, {}), ALONE, quiet())
    journey: list[tuple[int, int, dict[str, Any]]] = [
        (8, 4, {"tensor": 2, "pipeline": 2}),
        (6, 2, {"sharding": "zero3"}),
        (4, 2, {"pipeline": 2, "schedule": "zero_bubble"}),
        (2, 4, {"tensor": 2, "sequence": True, "sharding": "zero2"}),
    ]
    for left, world_size, parallel in journey:
        _keep_until(tmp_path / "changing", left)
        run_ranks(_halves, world_size, str(tmp_path), parallel)
        assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5), parallel
    assert [line["step"] for line in events(tmp_path / "changing", "resume")] == [8, 6, 4, 2]
    _keep_until(tmp_path / "changing", 4)  # back to one process, from what four ranks wrote
    train(_changing(tmp_path, {}), ALONE, quiet())
    assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


# ---- precision and recomputation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_fp32(tmp_path: Path, precision: str) -> None:
    exact = train(config(tmp_path, folder=str(tmp_path / "fp32")), ALONE, quiet())
    low = train(config(tmp_path, folder=str(tmp_path / precision), training={"precision": precision}), ALONE, quiet())
    assert losses(low.folder) == pytest.approx(losses(exact.folder), rel=0.02) and losses(low.folder) != losses(exact.folder)
    assert low.losses == pytest.approx(exact.losses, rel=0.02)


def _low(ranks: Ranks, place_: str, precision: str) -> list[float]:
    for name, parallel in (("pipeline", {"pipeline": 2}), ("tensor", {"tensor": 2}), ("zero2", {"sharding": "zero2"})):
        settings = config(
            Path(place_),
            folder=f"{place_}/{precision}_{name}",
            model=MODEL,
            training={"precision": precision, "budget": 10},
            parallel=parallel,
        )
        train(settings, ranks, quiet())
    return []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_in_layouts(tmp_path: Path, precision: str) -> None:
    exact = train(config(tmp_path, folder=str(tmp_path / "fp32"), model=MODEL, training={"budget": 10}), ALONE, quiet())
    run_ranks(_low, 2, str(tmp_path), precision)
    for name in ("pipeline", "tensor", "zero2"):
        found = losses(tmp_path / f"{precision}_{name}")
        assert found == pytest.approx(losses(exact.folder), rel=0.03), name


def _one_micro_batch(ranks: Ranks, place_: str) -> None:
    layout = {"pipeline": 2, "schedule": "zero_bubble", "sharding": "zero2"}
    model, training = MODEL | {"num_layers": 5, "tie_embeddings": True}, {"budget": 4}
    for name, parallel, precision in (("data", {}, "fp32"), ("laid_out", layout, "bf16")):
        made = {"model": model, "training": training | {"precision": precision}, "parallel": parallel}
        train(config(Path(place_), folder=f"{place_}/{name}", **made), ranks, quiet())


@pytest.mark.slow
def test_a_v_of_shards_in_low_precision_takes_a_micro_batch_that_is_all(tmp_path: Path) -> None:
    config(tmp_path)
    run_ranks(_one_micro_batch, 4, str(tmp_path))
    assert losses(tmp_path / "laid_out") == pytest.approx(losses(tmp_path / "data"), rel=0.03)


def test_an_overflow_leaves_the_step_out_and_halves_the_scale(tmp_path: Path) -> None:
    run = build(make_plan(config(tmp_path, training={"precision": "fp16"})), ALONE)
    assert run.scaler is not None
    run.scaler.scale = 2.0**40  # no fp16 gradient survives this
    before = {name: parameter.detach().clone() for name, parameter in run.model.parameters.items()}
    norm = training_step(run, 1e-3).norm
    run.batches.close()
    assert not math.isfinite(norm) and run.scaler.scale == 2.0**39 and run.optimizer.completed_steps == 0
    assert all(torch.equal(before[name], parameter) for name, parameter in run.model.parameters.items())


def test_the_loss_scale_survives_a_restart_and_can_be_reset(tmp_path: Path) -> None:
    first = config(tmp_path, training={"precision": "fp16", "budget": 10}, checkpoint={"every": 5})
    train(first, ALONE, quiet())
    _keep_until(tmp_path / "tiny", 5)
    resumed = build(make_plan(first), ALONE)
    resumed.batches.close()
    assert resumed.scaler is not None and (resumed.scaler.scale, resumed.scaler.finite_steps) == (2.0**16, 5)
    for choice, steps in (("keep", 5), ("reset", 0)):
        start = {"from": str(tmp_path / "tiny"), "intent": "rewarm", "loss_scale": choice}
        other = build(make_plan(config(tmp_path, folder=choice, start=start, training={"precision": "fp16"})), ALONE)
        other.batches.close()
        assert other.scaler is not None and other.scaler.finite_steps == steps
        (row,) = (row for row in other.reset_table() if row.line == "loss_scale")
        assert (row.choice, row.checkpoint_had) == (choice, "65536")


def test_the_scaler_grows_and_gives_up() -> None:
    scaler = LossScaler(LossScaleConfig(initial=4.0, window=3))
    for finite in (True, True, False, True, True, True):
        scaler.update(finite)
    assert scaler.scale == 4.0
    with pytest.raises(UserError, match="not finite in fp16 even at a loss scale"):
        for _ in range(20):
            scaler.update(False)


@pytest.mark.parametrize("changes", [{"training": {"recompute": "selective"}}, {"training": {"recompute": "full"}}], ids=str)
def test_recomputation_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = train(config(tmp_path, folder=str(tmp_path / "plain")), ALONE, quiet())
    again = train(config(tmp_path, folder=str(tmp_path / "again"), **changes), ALONE, quiet())
    assert losses(again.folder) == losses(plain.folder)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    plain = train(config(tmp_path, folder=str(tmp_path / "plain")), ALONE, quiet())
    compiled = train(config(tmp_path, folder=str(tmp_path / "compiled"), kernels={"compile": True}), ALONE, quiet())
    assert losses(compiled.folder) == pytest.approx(losses(plain.folder), rel=1e-5)


# ---- traps ------------------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Names of the collectives that ran, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _run(place_: str, ranks: Ranks, **changes: Any) -> Run:
    return build(make_plan(config(Path(place_), folder=f"{place_}/trap", model=MODEL, **changes)), ranks)


def _accumulation(ranks: Ranks, place_: str) -> list[tuple[str, int, int]]:
    counts: list[tuple[str, int, int]] = []
    for name, parallel in (("data", {}), ("zero2", {"sharding": "zero2"})):
        found = []
        for micro_batch in (4, 1):
            run = _run(place_, ranks, parallel=parallel, training={"micro_batch": micro_batch})
            training_step(run, 1e-3)
            with Collectives() as seen:
                training_step(run, 1e-3)
            run.batches.close()
            found.append(len(seen.names))
        counts.append((name, found[0], found[1]))
    return counts


def test_gradient_accumulation_communicates_once(tmp_path: Path) -> None:
    config(tmp_path)
    for name, once, four_times in run_ranks(_accumulation, 2, str(tmp_path))[0]:
        assert once == four_times > 0, name


def _forwards(ranks: Ranks, place_: str) -> tuple[int, int]:
    """Micro-batches that go through the model in one evaluation between two steps, and in the step after it."""
    run = _run(place_, ranks, parallel={"pipeline": 2}, training={"micro_batch": 2})
    calls = []
    for module in run.model._modules:
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    training_step(run, 1e-3)
    calls.clear()
    rows = list(run.validation[0].slice(0).micro_batches(0, 1, 2))
    run.model.evaluate(rows, 2 * len(rows), 2)
    evaluated, expected = len(calls), len(rows)
    calls.clear()
    training_step(run, 1e-3)
    run.batches.close()
    assert len(calls) == 4, "8 sequences in micro-batches of 2, and none to probe shapes"
    return evaluated, expected


def test_evaluation_in_a_pipeline_costs_no_extra_micro_batch(tmp_path: Path) -> None:
    config(tmp_path)
    for evaluated, expected in run_ranks(_forwards, 2, str(tmp_path)):
        assert evaluated == expected


def _initial(ranks: Ranks, place_: str) -> dict[str, Any]:
    found = {}
    for name, parallel in (("tensor", {"tensor": 2}), ("pipeline", {"pipeline": 2}), ("zero3", {"sharding": "zero3"})):
        run = _run(place_, ranks, parallel=parallel)
        run.batches.close()
        for parameter, part in run.model.weights().items():
            found[f"{name} {parameter}"] = whole(part).numpy().copy()
    return found


def test_initial_weights_are_those_of_one_device(tmp_path: Path) -> None:
    alone = _run(str(tmp_path), ALONE)
    alone.batches.close()
    for found in run_ranks(_initial, 2, str(tmp_path)):
        for name, weight in found.items():
            assert torch.equal(torch.from_numpy(weight), alone.model.parameters[name.split()[1]]), name


def _gathered(ranks: Ranks, place_: str) -> tuple[int, float]:
    """How often the sharded loss gathers, and how many bytes at most. Layers without sequence parallelism only add up."""
    run = _run(place_, ranks, parallel={"tensor": 2})
    run.batches.close()
    with Wire() as wire:
        run.model.forward_backward(run.data.rows(0, 4))
    return wire.calls["_allgather_base_"], wire.most["_allgather_base_"]


def test_the_loss_gathers_no_logits(tmp_path: Path) -> None:
    """Three fp32 numbers for each of 4 x 16 tokens."""
    config(tmp_path)
    assert run_ranks(_gathered, 2, str(tmp_path)) == [(1, 3 * 4 * 16 * 4)] * 2


def test_help_needs_neither_torch_nor_deepspeed() -> None:
    probe = "import sys, megarewarm.main; print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=path)
    assert result.stdout.strip() == "[]"


# ---- arithmetic of layouts ---------------------------------------------------------------------------------------------


def test_stages_are_balanced_with_the_head_counted() -> None:
    assert balance(8, 4, 1.0, 0.0) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    for layers in range(4, 20):
        for head in (0.0, 0.7, 3.0):
            cut = balance(layers, 4, 1.0, head)
            assert [i for stage in cut for i in stage] == list(range(layers)) and all(len(stage) for stage in cut)
            costs = [len(stage) + (head if stage is cut[-1] else 0) for stage in cut]
            best = min(
                max([*(a, b, c), layers - a - b - c + head])
                for a in range(1, layers)
                for b in range(1, layers - a)
                for c in range(1, layers - a - b)
                if layers - a - b - c >= 1
            )
            assert max(costs) == pytest.approx(best)
    with pytest.raises(UserError, match=r"parallel\.pipeline: 5 stages for 4 layers"):
        balance(4, 5, 1.0, 0.0)


@pytest.mark.parametrize(("order", "per_rank"), [("1f1b", 1), ("interleaved", 3), ("zero_bubble", 2)])
def test_every_stage_has_one_rank(order: Any, per_rank: int) -> None:
    held = [my_stages(order, rank, 4, per_rank) for rank in range(4)]
    assert sorted(n for numbers in held for n in numbers) == list(range(4 * per_rank))
    assert all(rank_of(order, n, 4) == rank for rank, numbers in enumerate(held) for n in numbers)


def test_parts_of_a_parameter_make_the_whole() -> None:
    shape = ModelConfig(num_layers=1, hidden_size=24, num_heads=6, vocab_size=17, rotary_fraction=0.5)
    whole = torch.arange(17 * 24, dtype=torch.float32).view(17, 24)
    for ranks in (1, 2, 3):
        placed = [place(cards(shape)["embed_in.weight"], rank, ranks, False) for rank in range(ranks)]
        parts = [torch.full(p.local_shape, -1.0) for p in placed]
        for p, part in zip(placed, parts, strict=True):
            p.fill(part, whole)
        assert torch.equal(torch.cat([p.slice(part).local for p, part in zip(placed, parts, strict=True)]), whole)
        assert float(sum(part.sum() for part in parts)) == float(whole.sum()), "padding is zero"


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        ({"tensor": 2}, 3, r"parallel: pipeline 1 x tensor 2 = 2 ranks hold one model, the launcher started 3"),
        ({"tensor": 2, "data": 4}, 4, r"parallel\.data: 4 is asked for, the launcher started 4 ranks, which leaves 2; start 8"),
        ({"sharding": "zero2", "shard_ranks": 3}, 4, r"parallel\.shard_ranks: 3 does not divide the 4 data-parallel ranks"),
    ],
)
def test_layouts_that_do_not_fit_name_the_number(parallel: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_layout(ParallelConfig(**parallel), world_size)


def _refused(ranks: Ranks, place_: str) -> list[str]:
    messages = []
    for changes in (
        {"parallel": {"tensor": 2}, "model": {"num_heads": 1}},
        {"parallel": {"tensor": 2}, "model": {"num_heads": 2, "ffn_size": 33}},
        {"parallel": {"tensor": 2, "sequence": True}, "data": {"sequence_length": 15}},
        {"parallel": {"pipeline": 2, "schedule": "zero_bubble"}, "model": {"num_layers": 3}},
        {"parallel": {"pipeline": 2, "schedule": "1f1b", "stages_per_rank": 2}},
    ):
        try:
            build(make_plan(config(Path(place_), folder=f"{place_}/no", **changes)), ranks)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_models_that_cannot_be_divided_name_the_number(tmp_path: Path) -> None:
    config(tmp_path)
    messages = run_ranks(_refused, 2, str(tmp_path))[0]
    assert [message.split(";")[0] for message in messages] == [
        "parallel.tensor: 2 ranks can't share model.num_heads 1 evenly",
        "parallel.tensor: 2 ranks can't share model.ffn_size 33 evenly",
        "parallel.sequence: 2 tensor ranks can't share data.sequence_length 15 evenly",
        "parallel.pipeline: 4 stages for 3 layers",
        "parallel.stages_per_rank: 2 with schedule '1f1b', which needs 1",
    ]


def test_the_engine_with_one_rank_wraps_nothing(tmp_path: Path) -> None:
    run = _run(str(tmp_path), ALONE)
    run.batches.close()
    (module,) = run.model._modules
    assert type(module) is Transformer and isinstance(Mesh(ALONE, Layout()).tensor, type(None))
    assert all(type(parameter) is torch.nn.Parameter for parameter in run.model.parameters.values())


def test_a_tied_embedding_adds_to_the_heads_gradient(tmp_path: Path) -> None:
    """As autograd does with one matrix in two places, over several micro-batches with tokens that come again; but the head's
    gradient is not held back, beside another of its size, until the embedding's is there too."""
    asked = config(tmp_path, model=MODEL | {"tie_embeddings": True}, training={"micro_batch": 2})
    run = build(make_plan(asked), ALONE)
    run.batches.close()
    rows = run.data.rows(0, 6)
    rows[:, ::3] = rows[0, 0]
    run.model.gradients.zero()
    embedding, before_layers = run.model.parameters["embed_in.weight"], []
    last = run.model._modules[0].final_layer_norm
    assert isinstance(last, torch.nn.Module)
    last.register_full_backward_hook(lambda *_: before_layers.append(embedding.grad is not None))
    run.model.forward_backward(rows)
    assert before_layers == [True] * 3
    plain = Transformer(run.plan.model)
    plain.load_state_dict({name: p.detach() for name, p in run.model.parameters.items()})
    assert type(run.model._modules[0].embed_in) is not type(plain.embed_in)
    tokens = torch.from_numpy(rows)
    loss, _ = plain.loss(tokens[:, :-1], tokens[:, 1:])
    (loss / run.plan.config.training.global_batch / (rows.shape[1] - 1)).backward()
    for name, wanted in plain.named_parameters():
        torch.testing.assert_close(run.model.parameters[name].grad, wanted.grad, rtol=1e-4, atol=1e-7)


def test_ranks_that_fell_silent_are_named() -> None:
    """A rank that froze after it had reported its step is behind nobody: the others know it by its silence."""
    store = dist.HashStore()
    ranks = [Ranks(rank, 4, torch.device("cpu"), store=store) for rank in range(4)]
    for one in ranks:
        one.report(7)
    ranks[1].give_up(patience=0)
    ranks[3].give_up(patience=0)
    assert ranks[0].give_up(patience=0) == "rank 2 (last seen at step 7)"
    assert ranks[2].give_up(patience=0) == "one of the other ranks", "all have spoken and none is behind"
    ranks[0].report(8)
    ranks[1].report(8)
    assert ranks[0].give_up(patience=0) == "ranks 2, 3 (last seen at step 7)"
    assert Ranks(0, 1, torch.device("cpu")).give_up() == "another rank"


def _speaking(store: dist.Store, messages: dict[int, str], error: pytest.CaptureFixture[str]) -> list[str]:
    """Of three ranks that end with ``messages``, all lines that they print."""
    ranks = {rank: Ranks(rank, 3, torch.device("cpu"), store=store) for rank in messages}
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda rank: ranks[rank].say_once(messages[rank], 0.5), messages))
    return sorted(error.readouterr().err.splitlines())


def test_what_ends_several_ranks_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    assert _speaking(store, {0: "a", 1: "a", 2: "a"}, capsys) == ["a"]
    assert _speaking(store, {0: "b", 1: "c", 2: "d"}, capsys) == ["b", "rank 1: c", "rank 2: d"]
    assert _speaking(store, {1: "e"}, capsys) == ["rank 1: e"]
    assert _speaking(store, {1: "f", 2: "f"}, capsys) in (["rank 1: f"], ["rank 2: f"])
    Ranks(0, 1, torch.device("cpu")).say_once("alone")
    Ranks(1, 2, torch.device("cpu")).say_once("nobody to ask")
    assert capsys.readouterr().err == "alone\nrank 1: nobody to ask\n"
    main = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False, timeout=timedelta(seconds=5))
    other = dist.TCPStore("127.0.0.1", main.port, 2, False, timeout=timedelta(seconds=5))
    del main  # whoever held the store has died: better twice than never
    assert _speaking(other, {2: "g"}, capsys) == ["rank 2: g"]


def test_the_main_rank_has_spoken_before_another_one_ends() -> None:
    """Or a launcher, which ends all ranks after the first, could end it before it does."""
    store, told = dist.HashStore(), []

    class Telling(Ranks):
        def _say(self, message: str) -> None:
            time.sleep(0.2)
            told.append(self.rank)

    with ThreadPoolExecutor(2) as pool:
        main = pool.submit(Telling(0, 2, torch.device("cpu"), store=store).say_once, "h")
        Telling(1, 2, torch.device("cpu"), store=store).say_once("h")
        assert told == [0]
        main.result()
    assert told == [0]


def _meet(words: dict[int, tuple[str, str]]) -> dict[int, str]:
    """What each rank is told when these (refusal, GPU) meet."""
    store, said = dist.HashStore(), {}

    def one(rank: int) -> None:
        launch = Launch(rank, len(words), rank, len(words), "127.0.0.1", 29500, "environment")
        try:
            connect_module._wait_for_all(store, launch, timedelta(seconds=20), "here", connect_module._Report(*words[rank]))
            said[rank] = ""
        except UserError as error:
            said[rank] = str(error)

    with ThreadPoolExecutor(len(words)) as pool:
        list(pool.map(one, words))
    return said


def test_ranks_with_one_gpu_between_them_or_none_are_told_at_once() -> None:
    assert set(_meet({0: ("", "GPU-a"), 1: ("", "GPU-b"), 2: ("", "")}).values()) == {""}
    (shared,) = set(_meet({0: ("", "GPU-a"), 1: ("", "GPU-b"), 2: ("", "GPU-b")}).values())
    assert shared.startswith("ranks 1 and 2 would share one GPU (GPU-b)")
    for refusing in (0, 1):
        words = {rank: ("no such GPU" if rank == refusing else "", "") for rank in (0, 1)}
        assert set(_meet(words).values()) == {"no such GPU"}


def test_a_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.delenv("SLURM_GPUS_PER_TASK", raising=False)
    monkeypatch.delenv("SLURM_GPU_BIND", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launch = Launch(5, 8, 1, 4, "node1", 29500, "slurm")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert connect_module.choose_device(launch, "auto") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"rank 5 needs GPU 1 of host .* which has 1"):
        connect_module.choose_device(launch, "cuda")
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert connect_module.choose_device(launch, "cuda") == torch.device("cuda", 0)
    assert connect_module.choose_device(launch, "cpu") == torch.device("cpu")
    monkeypatch.delenv("SLURM_GPUS_PER_TASK")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # by a script, whatever the launcher
    assert connect_module.choose_device(Launch(1, 4, 1, 4, "127.0.0.1", 29500, "openmpi"), "auto") == torch.device("cuda", 0)
