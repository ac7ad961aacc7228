"""megarewarm plan: every divisor of a rank's batch is tried, and no number is cut off, however narrow the terminal."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from megarewarm.cli import plan as tool
from megarewarm.config.load import dump, merge
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.token_file import open_tokens
from megarewarm.lab.dry_run import show_run
from megarewarm.layout.cluster import LayoutEstimate, rank_layouts
from megarewarm.layout.gpus import GPUS
from megarewarm.model.size import training_flops_per_token
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.family_shapes import SHAPES, larger
from tests.support.tiny import config, mapping, printed, quiet


def planned(place: Path, gpus: int, batch: int) -> tuple[RunConfig, list[LayoutEstimate]]:
    model = ModelConfig(num_layers=4, hidden_size=512, num_heads=8, vocab_size=50304)
    run = config(
        place, model=model.model_dump(), data={"sequence_length": 512}, training={"global_batch": batch, "budget": 131296}
    )
    assert run.model is not None
    return run, rank_layouts(run, run.model, gpus, GPUS["h100-80gb"])


@pytest.mark.parametrize("share", [1, 7, 12, 138])
def test_every_divisor_is_a_micro_batch(tmp_path: Path, share: int) -> None:
    run, plans = planned(tmp_path, 8, 8 * share)
    alone = {plan.keys["training.micro_batch"] for plan in plans if plan.layout.model == 1}
    assert alone == {m for m in range(1, share + 1) if share % m == 0}
    for plan in plans:
        assert plan.hours == pytest.approx(run.total_steps * plan.seconds / 3600)


@pytest.mark.parametrize(("gpus", "batch"), [(1, 32), (2048, 2048)])
def test_no_digit_is_dropped(tmp_path: Path, gpus: int, batch: int) -> None:
    _, plans = planned(tmp_path, gpus, batch)
    for width in range(50, 100):
        check(plans, gpus, width)


def test_the_price_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plans = planned(tmp_path, 8, 96)
    for text, heading, amount in (("2.5", "cost", 2.5), ("2.50EUR", "EUR", 2.5), ("3 USD", "USD", 3.0)):
        with (console := Console(width=80)).capture() as shown:
            console.print(tool.fitted(plans[:5], 8, 80, tool.Price(text)))
        headings, *rows = shown.get().splitlines()
        assert headings.split()[-1] == heading and all(len(row) <= 80 for row in rows)
        for plan, row in zip(plans, rows, strict=False):
            assert row.split()[-1] == f"{plan.hours * 8 * amount:,.0f}"
    for wrong in ("", "EUR", "-2", "2.5.1 EUR EUR"):
        with pytest.raises(ArgumentTypeError, match="is not a price; write it as"):
            tool.Price(wrong)


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_is_planned(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, with as many tensor ranks as key heads at most; and by a dry run of 2 of them."""
    keys = mapping(tmp_path, folder=str(tmp_path / "run"), model=larger(name, times=8))
    (tmp_path / "run.yml").write_text(yaml.safe_dump(json.loads(json.dumps(keys))))
    tool.main([str(tmp_path / "run.yml"), "--gpus", "8", "--gpu", "h100-80gb", "--most", "1000"])
    assert "the fastest: parallel.tensor=" in capsys.readouterr().out
    run = config(tmp_path, **keys)
    assert run.model is not None
    plans = rank_layouts(run, run.model, 8, GPUS["h100-80gb"])
    assert {plan.layout.tensor for plan in plans} == {n for n in (1, 2, 4) if run.model.kv_heads % n == 0}
    assert all(0 < plan.mfu < 0.65 for plan in plans)
    console = quiet()
    settings = config(tmp_path, **merge(keys, {"parallel": {"tensor": 2, "sequence": True}}))
    show_run(settings, console, Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none"), world_size=4)
    per_token = training_flops_per_token(run.model, 16)
    assert f"{per_token:.3g} per token" in printed(console) and "tensor 2" in printed(console)


def check(plans: list[LayoutEstimate], gpus: int, width: int) -> None:
    console = Console(width=width)
    with console.capture() as shown:
        console.print(tool.fitted(plans[:10], gpus, width))
    heading, *rows = shown.get().splitlines()
    assert len(rows) == min(10, len(plans)) and "…" not in shown.get()
    assert all(len(row) <= width for row in rows)
    names = heading.split()
    for plan, row in zip(plans, rows, strict=False):
        for name, cell in zip(names, row.replace(" seq", "-seq").split(), strict=True):
            assert cell.replace("-seq", " seq") == tool.COLUMNS[name](plan, gpus)
    assert {"pipe", "data", "tensor", "shard", "recomp.", "micro", "tok/s"} <= set(names)
    if width >= 80:
        assert {"GiB", "s/step", "MFU", "hours"} <= set(names)


def test_the_model_may_be_the_start_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = config(tmp_path, folder=str(tmp_path / "first"), training={"budget": 2})
    train(first, Ranks(0, 1, torch.device("cpu")), quiet())
    run = config(tmp_path, model=None, start={"from": first.run_folder})
    (tmp_path / "run.yml").write_text(dump(run))
    tool.main([str(tmp_path / "run.yml"), "--gpus", "2", "--gpu", "h100-80gb"])
    assert "the fastest: parallel.tensor=" in capsys.readouterr().out


def test_what_packing_makes_of_the_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = str(tmp_path / "new")
    data = {"pack": "best_fit", "train": [{"path": new, "max_epochs": 9}, {"path": str(tmp_path / "elsewhere")}]}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, data=data)))
    tool.main([str(tmp_path / "run.yml"), "--gpus", "2", "--gpu", "h100-80gb"])
    shown = " ".join(capsys.readouterr().out.split())
    sizes = open_tokens(new).view().sizes_between(0, open_tokens(new).view().num_documents)
    assert f"data.pack: {new}: {len(sizes):,} documents in " in shown and "of their places padding" in shown
    assert f"{sum(sizes > 17):,} documents are cut, the stream would cut" in shown
    assert f"data.pack: {tmp_path}/elsewhere: not here" in shown
    data["train"] = data["train"][:1]
    show_run(config(tmp_path, data=data), console := quiet(), Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none"))
    assert f"note: data.pack: {new}.bin: {len(sizes):,} documents in" in " ".join(printed(console).split())
