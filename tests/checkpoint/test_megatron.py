"""Megatron-LM's 'torch' checkpoints: both generations of names, any ranks, every order of query, key and value."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.checkpoint.weights import check, expected_shapes
from megarewarm.errors import UserError
from tests.support.megatron_writer import HEADS, LAYERS, Shape, whole_model, write

SHAPES = {
    "one": Shape(),
    "2 tensor": Shape(tensor=2),
    "4 tensor, 2 stages": Shape(tensor=4, pipeline=2),
    "tied": Shape(tied=True, pipeline=2),
    "legacy": Shape(names="legacy"),
    "legacy, 2 tensor, 2 stages": Shape(names="legacy", tensor=2, pipeline=2),
    "version 0": Shape(names="legacy", version=0, tensor=2),
    "version 1": Shape(names="legacy", version=1.0, tensor=2),
    "version 2": Shape(names="legacy", version=2.0),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_are_read_as_they_were(tmp_path: Path, shape: Shape) -> None:
    model = whole_model(3, tied=shape.tied)
    folder = write(tmp_path, shape, model)
    for name in (tmp_path, folder):
        source = open_checkpoint(str(name))
        assert source.format == "megatron-lm" and source.keeps == frozenset()
    weights = source.weights
    config = source.model_config
    check(weights, expected_shapes(config))
    assert set(weights.describe()) == set(model)
    for key, tensor in model.items():
        assert torch.equal(weights.read(key), tensor), key
    assert (config.num_layers, config.num_heads, config.rotary_fraction) == (LAYERS, HEADS, 0.5)
    assert (config.residual, config.activation, config.tie_embeddings) == ("sequential", "gelu_erf", shape.tied)


@pytest.mark.parametrize("flag", ["bias_gelu_fusion", "openai_gelu"])
def test_the_approximation_of_gelu_is_recognised(tmp_path: Path, flag: str) -> None:
    write(tmp_path, Shape(args={flag: True}, names="legacy"), whole_model(3))
    source = open_checkpoint(str(tmp_path))
    assert source.model_config.activation == "gelu_tanh" and any("tanh GELU" in note for note in source.notes)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"swiglu": True}, "swiglu is True, expected False"),
        ({"normalization": "RMSNorm"}, "normalization is 'RMSNorm'"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is 'learned_absolute'"),
        ({"group_query_attention": True, "num_query_groups": 2}, "group_query_attention"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"num_attention_heads": None}, "no num_attention_heads"),
        ({"num_attention_heads": 3}, "hidden_size"),
    ],
)
def test_what_gpt_neox_does_not_have_is_refused(tmp_path: Path, args: dict[str, Any], says: str) -> None:
    write(tmp_path, Shape(args=args), whole_model(3))
    with pytest.raises(UserError, match=says):
        open_checkpoint(str(tmp_path))


def test_missing_ranks_and_other_formats_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, Shape(tensor=2, pipeline=2), whole_model(3))
    shutil.rmtree(folder / "mp_rank_00_001")
    with pytest.raises(UserError, match="no folder of tensor rank 0, pipeline rank 1; copy it"):
        open_checkpoint(str(tmp_path))
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "common.pt").write_bytes(b"")
    with pytest.raises(UserError, match="only Megatron-LM's 'torch' format is read: save with --ckpt-format torch"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run or checkpoint folder of megarewarm"):
        open_checkpoint(str(tmp_path / "empty"))
