"""A longer context while continuing: positions other than the checkpoint's, and losses by position."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.data import ValidationSet
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.errors import UserError
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.ranks import Ranks
from megarewarm.report.pages.run_page import report
from megarewarm.training.after_step.evaluate import position_edges
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
LONG = 48  # of a model of 16 positions
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.43}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, transformers' own words
    "base": ({"rotary_base": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    "linear": (
        {"rotary_scaling": {"kind": "linear", "factor": 3.0}},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    ),
    "llama3": (
        {"rotary_base": 2e4, "rotary_scaling": {"kind": "llama3", "factor": 3.0, "original_positions": 16}},
        {"rope_type": "llama3", "rope_theta": 2e4, "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
    ),
    "yarn": (
        {"rotary_scaling": {"kind": "yarn", "factor": 3.0, "original_positions": 16, "beta_fast": 2.0, "beta_slow": 0.5}},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 16, "beta_fast": 2.0,
         "beta_slow": 0.5},
    ),
}  # fmt: skip


def save_start(folder: Path, family: str) -> None:
    """Heads of 14 channels, of which GPT-NeoX rotates 6; weights large enough that positions matter."""
    torch.manual_seed(3)
    shape: dict[str, Any] = {
        "num_hidden_layers": 2, "hidden_size": 42, "num_attention_heads": 3, "intermediate_size": 52, "vocab_size": 64,
        "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model: torch.nn.Module = (
        GPTNeoXForCausalLM(GPTNeoXConfig(**shape, rope_parameters=ROPE))
        if family == "neox"
        else LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)  # type: ignore[operator]


def in_words_of_transformers(folder: Path, target: Path, rope: dict[str, Any], family: str) -> None:
    """The start's folder with the scaling as transformers writes it, without a line of this project."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    said = json.loads((folder / "config.json").read_text())
    old = said.pop("rope_parameters")
    if family == "neox":
        rope = rope | {"partial_rotary_factor": old["partial_rotary_factor"]}
    for key in ("rope_theta", "rotary_emb_base", "rotary_pct", "rope_scaling"):
        said.pop(key, None)
    (target / "config.json").write_text(json.dumps(said | {"max_position_embeddings": LONG, "rope_parameters": rope}))


def continued(place: Path, context: dict[str, Any], **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "folder": str(place / "run"),
        "model": None,
        "start": {"from": str(place / "start")},
        "data": {"sequence_length": LONG},
        "training": {"budget": 2, "global_batch": 2, "micro_batch": 1},
        "evaluation": {"every": 1},
        "export": {"huggingface": True},
    }
    made = config(place, **settings | changes)
    return type(made).model_validate(made.model_dump(by_alias=True) | {"model": context})


@pytest.mark.parametrize("family", ["neox", "llama"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_logits_in_a_longer_context_are_those_of_transformers(tmp_path: Path, family: str, kind: str) -> None:
    ours, theirs = SCALINGS[kind]
    save_start(tmp_path / "start", family)
    in_words_of_transformers(tmp_path / "start", tmp_path / "theirs", theirs, family)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 64, (2, LONG)))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits
    unchanged = AutoModelForCausalLM.from_pretrained(tmp_path / "start")(ids).logits
    plan = make_plan(continued(tmp_path, ours | {"max_positions": LONG}))
    model = Transformer(plan.model)
    assert plan.source is not None
    weights = plan.source.weights  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
        found = model.logits(ids)
    scale = float(expected.detach().abs().max())
    assert torch.allclose(found, expected, atol=2e-5 * scale) and not torch.allclose(expected, unchanged, atol=1e-2 * scale)
    # and what transformers wrote is read as the same
    assert open_checkpoint(str(tmp_path / "theirs")).model_config == plan.model


def test_a_run_says_it_in_the_reset_table_keeps_it_and_exports_it(tmp_path: Path) -> None:
    save_start(tmp_path / "start", "neox")
    settings = continued(tmp_path, SCALINGS["yarn"][0] | {"max_positions": LONG}, evaluation={"every": 1, "by_position": True})
    console = quiet()
    train(settings, ALONE, console)
    run = tmp_path / "run"
    (line,) = (each for each in events(run, "start")[0]["reset"] if each["line"] == "context")
    assert line["checkpoint_had"] == "16 positions, base 10000"
    assert line["run_has"] == "48 positions, base 10000, yarn x 3 of 16, beta_fast 2, beta_slow 0.5"
    assert "yarn x 3 of 16" in printed(console) and "rotary_scaling" not in printed(console), "in one line, in words"
    exported = AutoModelForCausalLM.from_pretrained(run / "huggingface")
    said = json.loads((run / "huggingface/config.json").read_text())
    assert said["rope_parameters"]["rope_type"] == "yarn" and said["max_position_embeddings"] == LONG
    source = open_checkpoint(str(run))
    assert source.model_config.rotary_scaling is not None
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 64, (2, LONG)))
    mine = open_checkpoint(str(run / "huggingface"))
    model = Transformer(mine.model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(mine.weights.read(name))
        assert torch.allclose(model.logits(ids), exported(ids).logits, atol=1e-3)
    # resumed: from its own checkpoint, with the same positions
    plan = make_plan(settings)
    assert plan.resumed and plan.model == source.model_config and plan.model.max_positions == LONG


def test_losses_by_position_are_those_of_transformers_and_in_the_report(tmp_path: Path) -> None:
    save_start(tmp_path / "start", "llama")
    long = 160
    settings = continued(
        tmp_path,
        {"rotary_base": 1e6, "max_positions": long},
        data={
            "sequence_length": long,
            "validation": [{"name": "new", "role": "downstream", "tokens": 960, "sources": [{"path": str(tmp_path / "new")}]}],
        },
        evaluation={"every": 2, "by_position": True},
    )
    train(settings, ALONE, quiet())
    event = events(tmp_path / "run", "eval")[-1]
    windows = ValidationWindows(
        ValidationSet.model_validate(settings.data.validation[0].model_dump()), TokenFiles(settings.data, 64)
    )
    (rows,) = windows.slice(0).micro_batches(0, 1, 99)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/huggingface")
    with torch.no_grad():
        logits = model(torch.from_numpy(rows[:, :-1])).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(rows[:, 1:]), reduction="none")
    assert position_edges(long) == [0, 64, 128, 160] and position_edges(64) == [0, 64] and position_edges(9) == [0, 9]
    expected = {"0": each[:, :64].mean(), "64": each[:, 64:128].mean(), "128": each[:, 128:].mean()}
    assert event["by_position"] == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-4)
    assert event["loss"] == pytest.approx(float(each.mean()), rel=1e-4)
    page = report([tmp_path / "run"], tmp_path / "report").read_text()
    assert "Loss by position" in page and (tmp_path / "report/positions.png").is_file()


def _evaluated(ranks: Ranks, place: Path, name: str, parallel: dict[str, Any]) -> None:
    settings = config(
        place,
        name=name,
        folder=str(place / name),
        model={"num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 66, "max_positions": 136},
        data={"sequence_length": 136},
        evaluation={"every": 1, "by_position": True},
        parallel=parallel,
        training={"budget": 1, "global_batch": 4, "micro_batch": 2},
        checkpoint={"every": None},
    )
    train(settings, ranks, quiet())


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2, "sequence": True},
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param({"sharding": "zero3"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_layout_measures_the_same_by_position(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """256 tokens are one window of 136: under zero3 the second rank has none."""
    _evaluated(ALONE, tmp_path, "alone", {})
    run_ranks(_evaluated, 2, tmp_path, "two", parallel)
    alone, two = ([each["by_position"] for each in events(tmp_path / name, "eval")] for name in ("alone", "two"))
    assert len(alone) == 4 and all(math.isfinite(loss) for each in alone for loss in each.values())
    for one, other in zip(alone, two, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("context", "changes", "message"),
    [
        (
            {"rotary_scaling": {"kind": "yarn", "factor": 2, "original_positions": 16}, "max_positions": LONG},
            {},
            r"factor 2 of 16 original_positions is not max_positions 48; transformers 4 would take",
        ),
        ({"rotary_base": 5e5}, {}, r"data.sequence_length 48 is above the 16 positions of .*raise context.max_positions"),
        ({"rotary_scaling": {"kind": "llama3", "factor": 2}}, {}, "needs 'original_positions'"),
        ({"max_positions": LONG}, {"distill": {"weight": 0.5}}, "would teach with positions that it was not trained with"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, context: Any, changes: Any, message: str) -> None:
    save_start(tmp_path / "start", "neox")
    with pytest.raises((UserError, ValueError), match=message):
        make_plan(continued(tmp_path, context, **changes))
    assert not (tmp_path / "run").exists()


def test_positions_alone_are_no_model_of_a_run_from_scratch(tmp_path: Path) -> None:
    made = config(tmp_path)
    with pytest.raises(ValueError, match=r"num_layers"):
        type(made).model_validate(made.model_dump(by_alias=True) | {"model": {"max_positions": LONG}})
    with pytest.raises(ValueError, match=r"context changes the model of 'start.from'"):
        type(made).model_validate(made.model_dump(by_alias=True) | {"context": {"rotary_base": 2e4}})
