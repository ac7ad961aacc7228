"""The Python interface against the command line, the trainer's own evaluations, and transformers."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import megarewarm
from megarewarm import api
from megarewarm.data.text.tokenizers import train_bpe
from megarewarm.errors import EXIT_TIME_LIMIT, UserError
from tests.support.tiny import mapping

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {"training": {"budget": 6}, "evaluation": {"every": 3}, "export": {"huggingface": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token files, and a run 'tiny' that is complete and knows its tokenizer."""
    folder = tmp_path_factory.mktemp("api")
    settings = mapping(folder, **SETTINGS)
    vocabulary = settings["model"]["vocab_size"]
    if vocabulary >= 258:
        train_bpe(["some text of a few words " * 20], vocabulary, folder / "tokenizer.json")
    megarewarm.train(megarewarm.load_config(settings), quiet=True)
    return folder


def test_importing_it_costs_nothing() -> None:
    code = "import sys, megarewarm; assert not {'torch', 'numpy'} & set(sys.modules); assert 'train' in dir(megarewarm)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = megarewarm.tarin


def test_a_mapping_a_file_and_overrides_are_the_same(place: Path, tmp_path: Path) -> None:
    settings = mapping(place, **SETTINGS)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    loaded = megarewarm.load_config(tmp_path / "run.yml")
    assert loaded == megarewarm.load_config(settings)
    assert yaml.safe_load(megarewarm.to_yaml(loaded))["training"]["budget"] == 6
    sources = [{"path": "a", "weight": 2.0}, {"path": "b"}]
    changed = megarewarm.load_config(settings, {"schedule.max_lr": 0.25, "training.budget": "9", "data.train": sources})
    assert changed.schedule.max_lr == 0.25 and changed.total_steps == 9 and [s.path for s in changed.data.train] == ["a", "b"]
    assert settings == mapping(place, **SETTINGS), "the caller's mapping is not changed"
    with pytest.raises(UserError, match="did you mean 'max_lr'"):
        megarewarm.load_config(settings, {"schedule.max_Ir": 1})


def test_the_plan_is_what_the_run_does(place: Path) -> None:
    config = megarewarm.load_config(mapping(place, **SETTINGS))
    planned = megarewarm.plan(config)
    run = megarewarm.read_run(place / "tiny")
    assert planned.steps == 6 and planned.resumes_at == 6 and planned.tokens == run.tokens
    assert np.array_equal(planned.learning_rates, run.train["lr"])
    assert planned.evaluations == sorted({evaluation.step for evaluation in run.evaluations})


def test_callbacks_see_the_events_and_can_stop(place: Path, tmp_path: Path) -> None:
    settings = mapping(place, **SETTINGS, folder=str(tmp_path / "run"))
    seen: list[dict[str, Any]] = []

    def stop_at_four(event: dict[str, Any]) -> bool:
        seen.append(event)
        return event["event"] == "train" and event["step"] == 4

    outcome = megarewarm.train(megarewarm.load_config(settings), [stop_at_four], quiet=True)
    assert outcome.exit_code == EXIT_TIME_LIMIT and outcome.step == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["event"] != "start"] == seen
    assert seen[-1]["event"] == "stop" and seen[-1]["reason"] == "a callback"
    again = megarewarm.train(megarewarm.load_config(settings), quiet=True)
    assert (
        again.exit_code == 0
        and again.losses == megarewarm.train(megarewarm.load_config(mapping(place, **SETTINGS)), quiet=True).losses
    )


def test_it_trains_in_a_thread(place: Path, tmp_path: Path) -> None:
    outcomes: list[megarewarm.Outcome] = []
    config = megarewarm.load_config(mapping(place, **SETTINGS, folder=str(tmp_path / "run")))
    thread = threading.Thread(target=lambda: outcomes.append(megarewarm.train(config, quiet=True)))
    thread.start()
    thread.join()
    assert outcomes[0].exit_code == 0 and outcomes[0].losses == {
        evaluation.name: evaluation.loss
        for evaluation in megarewarm.read_run(place / "tiny").evaluations
        if evaluation.step == 6
    }


def test_a_loaded_model_is_that_of_transformers(place: Path) -> None:
    ours = megarewarm.load_model(place / "tiny")
    theirs = AutoModelForCausalLM.from_pretrained(place / "tiny" / "huggingface")
    tokens = torch.randint(0, ours.config.vocab_size, (2, 7))
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(megarewarm.load_model(place / "tiny" / "huggingface").logits(tokens), ours.logits(tokens))


def test_its_evaluation_is_the_trainers(place: Path) -> None:
    """The same windows, whatever the micro-batch: an odd one, too."""
    settings = mapping(place, **SETTINGS)
    model = megarewarm.load_model(place / "tiny")
    run = megarewarm.read_run(place / "tiny")
    for asked in settings["data"]["validation"]:
        (source,) = asked["sources"]
        length = settings["data"]["sequence_length"]
        loss, count, _ = model.evaluate(source["path"], tokens=asked["tokens"], sequence_length=length, micro_batch=3)
        (recorded,) = [e.loss for e in run.evaluations if e.name == asked["name"] and e.step == 6]
        assert loss == pytest.approx(recorded, rel=1e-6) and count <= asked["tokens"]
    with pytest.raises(UserError, match="the positions of the model"):
        model.evaluate(source["path"], sequence_length=10**6)


@pytest.mark.parametrize(("reset", "mask"), [(True, False), (False, True), (True, True)])
def test_a_runs_document_rules_apply(place: Path, tmp_path: Path, reset: bool, mask: bool) -> None:
    settings = mapping(place, **SETTINGS, folder=str(tmp_path / "run"))
    settings["data"] |= {"eod": 3, "reset_at_eod": reset, "mask_eod_loss": mask}
    megarewarm.train(megarewarm.load_config(settings), quiet=True)
    model, length = megarewarm.load_model(tmp_path / "run"), settings["data"]["sequence_length"]
    asked = settings["data"]["validation"][0]
    path = asked["sources"][0]["path"]
    loss, *_ = model.evaluate(path, tokens=asked["tokens"], sequence_length=length)
    run = megarewarm.read_run(tmp_path / "run")
    (recorded,) = [e.loss for e in run.evaluations if e.name == asked["name"] and e.step == 6]
    assert loss == pytest.approx(recorded, rel=1e-6)
    model.document_rules = None
    other, *_ = model.evaluate(path, tokens=asked["tokens"], sequence_length=length)
    assert abs(other - loss) > 1e-5 * loss, "the rules make a difference here"


def test_numbers_out_of_range(place: Path) -> None:
    model = megarewarm.load_model(place / "tiny")
    for keys in ({"tokens": 0}, {"micro_batch": 0}, {"sequence_length": 0}):
        with pytest.raises(UserError, match=f"{next(iter(keys))} 0: expected"):
            model.evaluate(place / "new", **keys)
    with pytest.raises(UserError, match=r"new: 1 token, fewer than one window of .*: give more, or a lower sequence length"):
        model.evaluate(place / "new", tokens=1)
    with pytest.raises(UserError, match="max_tokens 0: expected"):
        model.generate("x", 0)
    odd: list[dict[str, Any]] = [{"temperature": value} for value in (-1.0, math.nan, math.inf)]
    for options in [*odd, {"seed": -1}, {"seed": 2**64}]:
        with pytest.raises(UserError, match=f"{next(iter(options))} .*: expected"):
            model.generate("x", **options)
    with pytest.raises(UserError, match="the text is not UTF-8"):
        model.generate("na\udcc3\udcafve")  # as Python reads the command line where the locale has no such characters


def test_arguments_of_another_type(place: Path, tmp_path: Path) -> None:
    """One line each; one path where several are expected is that path, not its letters."""
    settings: Any = mapping(place)
    for function in (megarewarm.train, megarewarm.plan):
        with pytest.raises(UserError, match=r"config: expected what megarewarm\.load_config returns, found dict"):
            function(settings)
    model = megarewarm.load_model(place / "tiny")
    odd: list[Any] = [[[1, 2], [3]], [], [1, 2], [[1, model.config.vocab_size]], [[-1]]]
    for tokens in odd:
        with pytest.raises(UserError, match="tokens: expected"):
            model.logits(tokens)
    with pytest.raises(UserError, match=r"tokens: .* positions, the model has"):
        model.logits([[1] * (model.config.max_positions + 1)])
    assert megarewarm.draw(str(place / "tiny")).keys() == megarewarm.draw([place / "tiny"]).keys()
    with pytest.raises(UserError, match=r"write \[text\]"):
        megarewarm.train_tokenizer("one text", 300, tmp_path / "tokenizer.json")
    megarewarm.train_tokenizer(["one text"], 258, tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text("one text")
    (written,) = megarewarm.prepare(tmp_path / "text.txt", tmp_path / "tokenizer.json", tmp_path / "data")
    assert written.counts.documents == 1
    with pytest.raises(UserError, match=r"no option 'bogus'; known: .*split"):
        megarewarm.prepare([tmp_path / "text.txt"], tmp_path / "tokenizer.json", tmp_path / "other", bogus=1)


def test_it_generates_as_transformers_does(place: Path, tmp_path: Path) -> None:
    """A model with a tokenizer that begins texts: greedy tokens are the arg max of our logits after transformers' prompt."""
    train_bpe(["some text of a few words " * 20], 258, tmp_path / "tokenizer.json")
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    file.post_processor = TemplateProcessing(single="<|padding|> $A", special_tokens=[("<|padding|>", 1)])
    file.save(str(tmp_path / "tokenizer.json"))
    shape = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 259, "max_positions": 48}
    settings = mapping(place, **SETTINGS, model=shape, folder=str(tmp_path / "run"))
    settings["data"]["tokenizer"] = str(tmp_path / "tokenizer.json")
    megarewarm.train(megarewarm.load_config(settings), quiet=True)
    model = megarewarm.load_model(tmp_path / "run")
    assert model.tokenizer is not None
    ids = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).encode("some words")
    assert ids[0] == 1 and ids[1:] == model.tokenizer.encode_batch(["some words"])[0].tolist()
    expected = [*ids]
    for _ in range(5):
        expected.append(int(model.logits([expected])[0, -1].argmax()))
        if expected[-1] == model.tokenizer.eod_id:
            break
    assert model.generate("some words", 5, temperature=0) == model.tokenizer.decode(
        [token for token in expected[len(ids) :] if token != model.tokenizer.eod_id]
    )
    assert model.generate("some words", 5, seed=1) == model.generate("some words", 5, seed=1)
    texts = ["some words", "a", "words of some text, few of a few"]
    assert model.generate(texts, 9, temperature=0) == [model.generate(text, 9, temperature=0) for text in texts]
    with pytest.raises(UserError, match="48 positions for both"):
        model.generate("some words", 48)
    with pytest.raises(UserError, match="give a text"):
        model.generate(["words", ""])
    with pytest.raises(UserError, match="no tokenizer is known"):
        megarewarm.load_model(place / "tiny").generate("x")


def test_a_device_that_is_not_there(place: Path) -> None:
    with pytest.raises(UserError, match="device 'xyz': expected auto, cpu or cuda"):
        megarewarm.load_model(place / "tiny", device="xyz")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs GPU 0"):
            megarewarm.load_model(place / "tiny", device="cuda")


def test_it_draws_the_reports_figures(place: Path) -> None:
    figures = megarewarm.draw([place / "tiny"])
    assert "pretraining" in figures and figures["pretraining"].get_axes()


def test_the_page_of_the_interface_is_up_to_date() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        api_markdown = runpy.run_path(str(ROOT / "tools/document_config.py"))["api_markdown"]
    finally:
        sys.path.remove(str(ROOT / "tools"))
    page = (ROOT / "docs/api.md").read_text()
    assert page == api_markdown(), "run: python tools/document_config.py"
    assert megarewarm.__all__ == ["__version__", *api.__all__]
    assert all(f"## megarewarm.{name}\n" in page for name in megarewarm.__all__ if name not in ("__version__", "UserError"))


_TWO_RUNS = """
import os
import sys
import megarewarm

for name in ("a", "b"):
    config = megarewarm.load_config(sys.argv[1], {"folder": f"{sys.argv[2]}/{name}"})
    seen = []
    outcome = megarewarm.train(config, [lambda event: seen.append(event["event"])])
    assert outcome.exit_code == 0 and bool(seen) == (os.environ["RANK"] == "0")
"""


@pytest.mark.launch
def test_under_torchrun_every_rank_makes_the_same_calls(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(place, **SETTINGS)))
    (tmp_path / "two.py").write_text(_TWO_RUNS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "two.py")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "run.yml"), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("complete in") == 2
    alone = megarewarm.read_run(place / "tiny").train["loss"]
    for name in ("a", "b"):
        np.testing.assert_allclose(megarewarm.read_run(tmp_path / name).train["loss"], alone, rtol=1e-5)
