"""``training.micro_batch: auto``: the largest that fits, tried on a GPU, recorded, and without a say in the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.layout.memory import memory_of, parts
from megarewarm.layout.micro_batch import fitting, sizes, work_of
from megarewarm.main import main
from megarewarm.parallel.mesh import Layout
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import setup
from megarewarm.training.setup import build
from megarewarm.training.start import micro_batch
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, mapping, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
MODEL = ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=512)
BASE: dict[str, Any] = {
    "name": "x",
    "model": MODEL.model_dump(),
    "data": {"sequence_length": 64, "train": [{"path": "a"}]},
    "schedule": {"curve": "constant", "max_lr": 1e-3},
}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.floats(1e6, 5e8), st.booleans(), st.sampled_from([1, 2]))
def test_the_fewest_that_fit(share: int, memory: float, on_gpu: bool, pipeline: int) -> None:
    training = {"budget": 1, "global_batch": share, "micro_batch": "auto"}
    run = RunConfig.model_validate(BASE | {"training": training, "parallel": {"pipeline": pipeline}})
    layout = Layout(pipeline=pipeline)
    size, needed = fitting(run, MODEL, layout, memory, value_bytes=4, on_gpu=on_gpu)

    def bytes_of(each: int) -> float:
        work = work_of(run, MODEL, layout, each, value_bytes=4, on_gpu=on_gpu)
        held = parts(work, run.parallel, layout)
        return max(memory_of(part, i, work, run.parallel, layout).total for i, part in enumerate(held))

    def fits(each: int) -> bool:
        return bytes_of(each) <= memory and (on_gpu or each * 64 <= 8192)

    assert needed == bytes_of(size) and (size == 1 or fits(size))
    for other in sizes(share, pipeline):
        passes = -(-share // other)
        assert share % other == 0 or (pipeline == 1 and other & (other - 1) == 0)
        assert not (other > 1 and fits(other) and passes < -(-share // size)), "another has fewer micro-batches"
        assert not (other < size and passes == -(-share // size)), "another needs less memory"
    if pipeline > 1:
        assert size == 1 or share // size >= 4 * pipeline


def test_a_run_records_it_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = config(tmp_path, training={"micro_batch": "auto", "budget": 6}, checkpoint={"every": 3})
    console = quiet()
    train(auto, ALONE, console)
    assert "note: training.micro_batch: auto is 8 sequences: a rank needs" in printed(console)
    recorded = yaml.safe_load((tmp_path / "tiny" / "config.yaml").read_text())
    assert recorded["training"]["micro_batch"] == 8
    assert any("auto is 8 sequences" in note for note in events(tmp_path / "tiny", "start")[0]["notes"])
    train(config(tmp_path, folder=str(tmp_path / "two"), training={"micro_batch": 2, "budget": 6}), ALONE, quiet())
    losses = [[line["loss"] for line in events(tmp_path / name, "train")] for name in ("tiny", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    (tmp_path / "tiny" / "checkpoints" / "step_6").rename(tmp_path / "gone")
    monkeypatch.setattr(setup, "free_memory", lambda device, ranks: 1.0)
    console = quiet()
    train(auto, ALONE, console)
    assert "auto is 8 sequences, as when the run began" in printed(console)
    again = {line["step"]: line["loss"] for line in events(tmp_path / "tiny", "train")}
    assert [again[step] for step in range(1, 7)] == losses[0][:6]
    assert make_plan(auto).config.training.micro_batch == "auto"


def test_out_of_memory_halves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(make_plan(config(tmp_path, training={"micro_batch": "auto", "global_batch": 12})), ALONE)
    tried: list[int] = []
    compute = run.model.forward_backward

    def forward_backward(rows: Any) -> Any:
        tried.append(len(rows))
        compute(rows)
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.model, "forward_backward", forward_backward)
    plan, (note,) = micro_batch.confirmed(run.model, run.plan)
    assert tried == [12, 6, 3] and plan.config.training.micro_batch == run.model.micro_batch == 3
    assert note == "training.micro_batch: auto is 3: 12 ran out of memory when it was tried"
    assert not any(bool(p.grad.any()) for p in run.model.parameters.values() if p.grad is not None)
    assert micro_batch.confirmed(run.model, plan) == (plan, [])
    monkeypatch.setattr(run.model, "forward_backward", lambda rows: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        micro_batch.confirmed(run.model, plan)
    run.batches.close()


def _chosen(ranks: Ranks, place: str) -> int:
    if ranks.rank == 1:  # of which the other must hear
        setup.free_memory = lambda device, ranks: 1.0
    run = build(make_plan(config(Path(place), training={"micro_batch": "auto"})), ranks)
    run.batches.close()
    return run.plan.config.training.micro_batch_size


def test_ranks_agree(tmp_path: Path) -> None:
    mapping(tmp_path)  # makes the token files
    first, second = run_ranks(_chosen, 2, str(tmp_path))
    assert first == second == 1


def test_a_dry_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, training={"micro_batch": "auto"})))
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "training.micro_batch: auto is 8 sequences: a rank needs" in shown and "1 micro-batch of 8" in shown
    assert main([str(tmp_path / "run.yml"), "--dry-run", "training.micro_batch=0"]) == 2
    assert "training.micro_batch: must be above 0, or 'auto' (given: 0)" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([str(tmp_path / "run.yml"), "--dry-run", "training.device=cuda", "--allow-missing"]) == 0
        assert "auto is chosen at the start, on the GPU" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    all_fit = micro_batch._all_fit
    monkeypatch.setattr(micro_batch, "_all_fit", lambda *given: tried.append(given[1]) or all_fit(*given))
    device = torch.device("cuda", 0)
    run = build(make_plan(config(tmp_path, training={"micro_batch": "auto"})), Ranks(0, 1, device))
    run.batches.close()
    assert tried == [8] and run.model.micro_batch == run.plan.config.training.micro_batch == 8
