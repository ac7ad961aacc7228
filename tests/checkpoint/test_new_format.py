"""A format that is registered from outside, one .npz file with the shape in it: opened, trained on from, written, converted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from megarewarm import arguments
from megarewarm.checkpoint.convert import FORMS, Conversion, ConvertOptions, Form, convert
from megarewarm.checkpoint.source import FORMATS, ForeignCheckpoint, OpenedCheckpoint, open_checkpoint
from megarewarm.checkpoint.weights import Description, Weights
from megarewarm.cli import convert as cli_convert
from megarewarm.cli import grow_checkpoint, merge_checkpoints
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.training.trainer import train
from tests.checkpoint.test_convert import ALONE, assert_same, tool, weights_of
from tests.support.tiny import config, events, quiet

FILE = "model.npz"


class NumpyWeights:
    """Parameters that lie in the file under our own names."""

    def __init__(self, file: Path) -> None:
        self.where, self._arrays = str(file), np.load(file)

    def describe(self) -> Mapping[str, Description]:
        shapes = {name: self._arrays[name].shape for name in self._arrays.files if name != "shape"}
        return {name: Description(shape, torch.float32, f"{name} in {FILE}") for name, shape in shapes.items()}

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[name])


def opened(name: str, folder: Path) -> OpenedCheckpoint | None:
    if not (folder / FILE).is_file():
        return None
    shape = ModelConfig(**json.loads(str(np.load(folder / FILE)["shape"])))
    return ForeignCheckpoint(name, "numpy", shape, lambda: NumpyWeights(folder / FILE), [])


def write(it: Conversion) -> list[str]:
    it.destination.mkdir(parents=True)
    arrays: dict[str, Any] = {name: it.weights.read(name).float().numpy() for name in it.weights.describe()}
    np.savez(it.destination / FILE, shape=json.dumps(it.config.model_dump()), **arrays)
    return ["weights only"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "numpy", (opened, f"one of numpy (no {FILE})"))
    monkeypatch.setitem(FORMS, "numpy", Form(write))
    forms = (*arguments.FORMS, "numpy")
    for module in (arguments, cli_convert, grow_checkpoint, merge_checkpoints):
        monkeypatch.setattr(module, "FORMS", forms)


def test_it_is_written_read_and_trained_on(tmp_path: Path) -> None:
    model = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 64, "max_positions": 16}
    first = train(config(tmp_path, model=model), ALONE, quiet()).folder
    said = tool("convert_checkpoint", first, tmp_path / "numpy", "--to", "numpy")
    assert "numpy: weights only" in said
    source = open_checkpoint(str(tmp_path / "numpy"))
    assert source.format == "numpy" and source.training is None and not source.keeps
    assert_same(weights_of(first), weights_of(tmp_path / "numpy"))

    for form in ("hf", "neox", "megarewarm"):
        convert(source, tmp_path / form, ConvertOptions(form))
        assert_same(weights_of(first), weights_of(tmp_path / form))
    tool("merge_checkpoints", tmp_path / "mean", "--mean", first, tmp_path / "numpy", "--to", "numpy")
    assert_same(weights_of(first), weights_of(tmp_path / "mean"))

    tool("grow_checkpoint", tmp_path / "numpy", tmp_path / "wide", "--width", 2, "--to", "numpy")
    assert open_checkpoint(str(tmp_path / "wide")).model_config.hidden_size == 64

    then = config(tmp_path, model=model, start={"from": str(tmp_path / "numpy")}, folder=str(tmp_path / "then"))
    losses = {line["name"]: line["loss"] for line in events(train(then, ALONE, quiet()).folder, "eval") if line["step"] == 0}
    ends = {line["name"]: line["loss"] for line in events(first, "eval") if line["step"] == 20}
    assert losses == ends


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a run .*, nor one of numpy \(no model.npz\)"):
        open_checkpoint(str(tmp_path / "empty"))
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=8)
    source = ForeignCheckpoint("x", "numpy", model, lambda: cast(Weights, None), [])
    with pytest.raises(UserError, match="only '--to neox' has files for each tensor rank"):
        convert(source, tmp_path / "out", ConvertOptions("numpy", tensor_ranks=2))
