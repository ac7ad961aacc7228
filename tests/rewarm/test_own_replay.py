"""Own replay: the start model's documents are seeded, resumable, shared, labelled, and never held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarewarm.checkpoint.own.state import read_state
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.cli import plan
from megarewarm.config.data import GenerateConfig
from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from megarewarm.generation.continuation import Continuer
from megarewarm.main import main
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.own_replay import OwnReplay, write
from megarewarm.spelling import tokens_text
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, mapping, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
END = 5
GENERATE: dict[str, Any] = {"tokens": 900, "batch": 20}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token files and a trained run 'tiny'."""
    folder = tmp_path_factory.mktemp("own")
    train(config(folder, training={"budget": 10}), ALONE, quiet())
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def own(place: Path, **changes: Any) -> OwnReplay:
    settings = GenerateConfig.model_validate(GENERATE | changes)
    return OwnReplay(open_checkpoint(str(place / "tiny")), settings, END)


def written(made: OwnReplay) -> list[list[int]]:
    write(made, torch.device("cpu"), torch.float32, lambda done, total: None, lambda: None)
    file = open_tokens(made.prefix)
    return [file.document(i).tolist() for i in range(file.num_documents)]


def replaying(place: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    replay = {"of": "start", "fraction": 0.25, "max_epochs": None, "generate": GENERATE, **changes}
    return {"name": "second", "folder": str(folder), "start": {"from": str(place / "tiny")}, "replay": replay}


def test_documents_end_and_a_killed_start_goes_on_to_the_same_bytes(
    place: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = own(place)
    documents = written(made)
    sizes = [len(ids) for ids in documents]
    assert sum(sizes) >= 900 > sum(sizes[:-1]) and max(sizes) <= made.new_tokens == 15
    assert all(ids[-1] == END and END not in ids[:-1] for ids in documents)
    whole = Path(f"{made.prefix}.bin").read_bytes()
    told = json.loads(made.prefix.with_suffix(".json").read_text())
    assert told["generated"]["by"] == "tiny" and 0 < told["generated"]["ended"] < told["generated"]["documents_written"]

    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "again"))
    calls, real = [0], Continuer.__call__

    def killed(self: Continuer, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(Continuer, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        written(own(place))
    again = own(place)
    again.part_path(1).write_bytes(again.part_path(1).read_bytes()[:-9])  # and a part is damaged
    assert written(again) == documents and Path(f"{again.prefix}.bin").read_bytes() == whole
    before = calls[0]
    assert written(own(place)) == documents and calls[0] == before, "what is there is not written again"
    assert written(own(place, tokens=400)) == documents[: 1 + int(np.searchsorted(np.cumsum(sizes), 400))]
    assert calls[0] == before, "nor what is a part of it"
    assert written(own(place, seed=7)) != documents


def test_a_long_first_document_is_not_taken_for_an_endless_model(place: Path, cache: Path) -> None:
    """Large models write few documents at a time. Judged by the first 16, whatever the batch."""
    together = written(own(place, tokens=300))
    assert END not in together[0][:-1] and len(together[0]) == own(place).new_tokens, "the first one is cut"
    assert written(own(place, tokens=300, batch=1)) == together
    with pytest.raises(UserError, match="none of the first 18 documents"):
        written(own(place, tokens=900, batch=6, temperature=1e-4, prompt=[2]))


def test_prompts_of_ids_belong_to_the_documents(place: Path, cache: Path) -> None:
    documents = written(own(place, prompt=[3, 9], max_document_tokens=8))
    assert all(ids[:2] == [3, 9] and ids[-1] == END for ids in documents) and max(map(len, documents)) == 8


def test_a_run_replays_it_and_a_later_one_finds_it(place: Path, tmp_path: Path, cache: Path) -> None:
    settings = replaying(place, tmp_path / "second")
    plain = {"data": {"eod": END, "sequence_length": 16}, "training": {"budget": 6}}
    console = quiet()
    outcome = train(config(place, **settings, **plain), ALONE, console)
    assert "tiny writes its own replay, 900 tokens" in printed(console) and "were cut there" in printed(console)
    state = read_state(outcome.folder / "checkpoints/step_6")
    new, generated = state.lineage.stages[-1].data
    assert (generated.name, generated.generated_by, new.generated_by) == ("generated by tiny", "tiny", None)
    assert generated.tokens == 0.25 * 6 * 8 * 16

    # another run of the same settings reads the same, also resumed
    console = quiet()
    train(config(place, **{**settings, "folder": str(tmp_path / "same"), "name": "same"}, **plain), ALONE, console)
    assert [e["loss"] for e in events(tmp_path / "same", "train")] == [e["loss"] for e in events(tmp_path / "second", "train")]
    shutil.rmtree(tmp_path / "same/checkpoints/step_6")
    train(config(place, **{**settings, "folder": str(tmp_path / "same"), "name": "same"}, **plain), ALONE, quiet())
    assert events(tmp_path / "same", "train")[-1]["loss"] == events(tmp_path / "second", "train")[-1]["loss"]

    # a run that reads on in its data reads on in these documents, and can't have others
    on = settings | {"name": "on", "folder": str(tmp_path / "on"), "training": {"budget": 8}}
    on["start"] = {"from": str(tmp_path / "second"), "intent": "rewarm", "data": "continue"}
    others: list[tuple[str, Any]] = [("seed", 9), ("temperature", 0.5), ("tokens", 2000), ("prompt", [3])]
    for key, value in [*others, ("max_document_tokens", 9)]:
        on["replay"] = settings["replay"] | {"generate": GENERATE | {key: value}}
        with pytest.raises(UserError, match=f"replay.generate.{key}: .*in 'second', in whose data the run reads on"):
            train(config(place, **{**plain, **on}), ALONE, quiet())
    going = train(config(place, **{**plain, **on, "replay": settings["replay"]}), ALONE, quiet())
    (seen,) = (e for e in read_state(going.folder / "checkpoints/step_8").lineage.stages[-1].data if e.generated_by)
    assert (seen.path, seen.generated_by) == (generated.path, "tiny")

    later = {"name": "third", "folder": str(tmp_path / "third"), "start": {"from": str(tmp_path / "second")}}
    again = config(place, **later, replay={"of": "lineage", "fraction": 0.5, "max_epochs": None}, **plain)
    third = train(again, ALONE, quiet())
    names = [seen.name for seen in read_state(third.folder / "checkpoints/step_6").lineage.stages[-1].data]
    assert "replay of generated by tiny" in names


def test_what_writing_takes_is_said_beforehand(
    place: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = own(place)
    run = mapping(place, **replaying(place, tmp_path / "no"), data={"eod": END, "sequence_length": 16})
    (tmp_path / "run.json").write_text(json.dumps(run))
    plan.main([str(tmp_path / "run.json"), "--gpus", "2", "--gpu", "a100-80gb", "--price", "2"])
    shown = " ".join(capsys.readouterr().out.split())
    # by hand: 45 positions of 20 documents, on 2 GPUs; bf16 weights, and 8 positions of keys and values of 2 layers
    hours = 22.5 * 2 * (29_568 + 20 * 8 * 2 * 2 * 32) / 2e12 / 3600
    assert made.least_seconds(2, 2e12) / 3600 == pytest.approx(hours)
    assert (
        f"own replay: 900 tokens before training, at most {made.flops:.3g} FLOPs, at least {hours:.3g} hours, 0.00 cost"
        in shown
    )

    def dry() -> str:
        assert main([str(tmp_path / "run.json"), "--dry-run"]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "how long is not known: nothing like it was written on this machine before" in dry()
    written(own(place, seed=3))  # other documents, but of the same length
    (told,) = (json.loads(path.read_text())["generated"] for path in cache.glob("own_replay/*/tokens_900.json"))
    assert told["seconds"] == pytest.approx(told["written"] / told["tokens_per_second"], abs=0.06)
    assert f"at the {tokens_text(told['tokens_per_second'])} tokens/s of" in dry()
    written(own(place, seed=3, tokens=300))  # nothing new is written for it
    assert f"at the {tokens_text(told['tokens_per_second'])} tokens/s of" in dry()


def test_bad_input_is_refused_before_training(
    place: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*, eod: int | None = END, **changes: Any) -> str:
        path = tmp_path / "run.json"
        data: dict[str, Any] = {"sequence_length": 16, **({} if eod is None else {"eod": eod})}
        settings = {**replaying(place, tmp_path / "no"), "training": {"budget": 6}, **changes}
        lists = {key: settings.pop(key) for key in ("validation", "switches") if key in settings}
        whole = mapping(place, **settings, data=data)
        whole["data"] |= lists
        path.write_text(json.dumps(whole))
        assert main([str(path)]) == 2
        assert not list((tmp_path / "no").glob("checkpoints/*"))
        return capsys.readouterr().err.strip()

    def replay(**changes: Any) -> dict[str, Any]:
        generate = GENERATE | changes
        return {"of": "start", "fraction": 0.25, "max_epochs": None, "generate": generate}

    assert "which token ends a document is not known: give data.eod" in said(eod=None)
    assert "data.eod: 64 is no id" in said(eod=64)
    assert "none of the first 20 documents of tiny came to an end" in said(eod=END, replay=replay(temperature=1e-4, prompt=[2]))
    assert "has 16 positions: give at most as many" in said(replay=replay(max_document_tokens=17))
    assert "900, and the run replays 1,920 of them" in said(replay={**replay(), "max_epochs": 1.0}, training={"budget": 60})
    later = {"at": "20 steps", "train": mapping(place)["data"]["train"], "replay_fraction": 0.5}
    short: dict[str, Any] = {"replay": {**replay(), "max_epochs": 1.0}, "training": {"budget": 40}}
    assert "900, and the run replays 1,920 of them" in said(switches=[later], **short)  # 20 steps x 128 x (1/4 + 1/2)
    assert not list((cache / "own_replay").glob("*/tokens_900.bin")), "it is refused before anything is written"
    assert "'of: start' and 'generate' belong together" in said(replay={"of": "start", "fraction": 0.1, "generate": None})
    assert "replay.generate.prompt: 99 is no id" in said(replay=replay(prompt=[99]))
    made = own(place)
    written(made)
    held = [{"name": "held", "tokens": 160, "sources": [{"path": str(made.prefix)}]}]
    assert "validation set 'held' reads" in said(validation=held)
    monkeypatch.setenv("MEGAREWARM_CACHE", "")
    assert "turns the cache off" in said()


@pytest.mark.slow
def test_the_tokens_do_not_depend_on_the_ranks(place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = own(place)
    written(made)
    alone = Path(f"{made.prefix}.bin").read_bytes()
    for world in (2, 3):
        monkeypatch.setenv("MEGAREWARM_CACHE", str(cache / str(world)))
        assert run_ranks(_on_ranks, world, str(place)) == [alone] * world


def _on_ranks(ranks: Ranks, folder: str) -> bytes:
    made = own(Path(folder))
    written(made)
    return Path(f"{made.prefix}.bin").read_bytes()
