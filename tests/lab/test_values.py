"""What a run's values say of its sources, and what a selection by them keeps: a spoiled source beside two good ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megarewarm.cli import values as command
from megarewarm.config.load import read_run_config, validate
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.document_table import read_table
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.errors import UserError
from megarewarm.lab.values import KeptOfSource, select, show_selection
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.run import read_run
from megarewarm.record.values import Values, rows_in
from megarewarm.report.numbers.values import predictions, source_values, sums_by_source
from megarewarm.report.pages.run_page import report
from megarewarm.training.trainer import train
from tests.support.tiny import config, mapping, printed, quiet, write_tokens

ALONE = Ranks(0, 1, torch.device("cpu"))
SOURCES = ("new", "old", "noise")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on three sources, of which 'noise' are random ids."""
    place = tmp_path_factory.mktemp("values")
    for name, seed in (("old", 1), ("new", 3)):
        write_tokens(place / name, seed, documents=150)
    random = np.random.default_rng(0)
    with TokenFileWriter(place / "noise", np.uint16) as writer:
        for _ in range(150):
            writer.add_document(random.integers(64, size=int(random.integers(50, 200))))
    settings = config(
        place,
        data={"train": [{"path": str(place / name), "max_epochs": 9} for name in SOURCES]},
        training={"budget": 120, "global_batch": 12},
        schedule={"max_lr": 3e-3, "min_lr": 3e-4},
        evaluation={"every": 40},
        valuation={"against": ["old", "new"], "every": 3, "share": 1.0, "rows": 8},
    )
    return train(settings, ALONE, quiet()).folder


def test_a_source_that_teaches_one_and_makes_forget_the_other_has_two_numbers(run: Path) -> None:
    values = Values(run)
    found = {one.source: one for one in source_values(values, ["old", "new"])}
    assert next(iter(found)) == "noise" and set(found) == set(SOURCES)
    for good, other in (("old", "new"), ("new", "old")):
        assert found[good].values[good].per_million > 0 > found[good].values[other].per_million
    assert all(found["noise"].values[name].per_million < 0 for name in ("old", "new"))
    assert found["noise"].values[""].is_harmful and not found["new"].values[""].is_harmful
    mine = [row for *_, row in rows_in(run / "values.jsonl") if row.source == "noise"]
    assert len(mine) == found["noise"].rows and found["noise"].tokens == 16 * len(mine)
    each = np.array([row.values["old"] for row in mine])
    assert found["noise"].values["old"].per_million == pytest.approx(each.mean() / 16 * 1e6)
    assert found["noise"].values["old"].error == pytest.approx(each.std(ddof=1) / len(each) ** 0.5 / 16 * 1e6)


def test_steps_did_what_was_predicted(run: Path) -> None:
    recorded = read_run(run)
    for name, pair in predictions(recorded).items():
        assert len(pair.measured) == 40
        residual, spread = pair.measured - pair.predicted, pair.measured - pair.measured.mean()
        assert pair.r_squared is not None and pair.r_squared > 0.9
        assert pair.r_squared == pytest.approx(1 - (residual @ residual) / (spread @ spread))
        assert set(sums_by_source(recorded, name)) == set(SOURCES)
    page = report([run], run.parent / "report")
    assert (page.parent / "values.png").is_file() and "Values of the training data" in page.read_text()


def test_the_command_shows_sources_rows_and_a_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(run), "--rows", "2"])
    said = capsys.readouterr().out
    lines = said.splitlines()
    first = [next(i for i, line in enumerate(lines) if line.strip().startswith(name)) for name in ("noise", "old", "new")]
    assert first[0] == min(first)
    assert said.count("positive values lowered") == 1 and said.count("R squared") == 2
    assert [said.count(f"{what} for {name}") for what in ("highest", "lowest") for name in ("old", "new")] == [1] * 4
    assert (run / "values.png").is_file()
    values = Values(run)
    best = values.row(int(values.values["new"].argmax()))
    assert best.tokens is not None and " ".join(map(str, best.tokens)) in said


def test_harmful_sources_go(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run.parent
    command.main([str(run), "--rows", "0", "--select", str(place / "kept")])
    said = capsys.readouterr().out
    assert "noise: 0 of 150 documents kept, 150 dropped" in said and not (place / "kept").exists()
    left = yaml.safe_load(said[said.index("data:\n") :])["data"]["train"]
    assert [Path(source["path"]).name for source in left] == ["new", "old"]
    again = mapping(place, name="again", folder=str(place / "again"))
    again["data"]["train"] = left
    assert train(validate(RunConfig, again, {}), ALONE, quiet()).exit_code == 0


def test_harmful_documents_go_and_the_others_stay(run: Path) -> None:
    values, place = Values(run), run.parent
    settings = read_run_config(run)
    found = {one.name: one for one in select(values, settings, ["new"], "document", place / "lists")}
    sums: dict[tuple[str, int], float] = {}
    for *_, row in rows_in(run / "values.jsonl"):
        for part in row.parts:
            key = (row.source, part.document)
            sums[key] = sums.get(key, 0.0) + row.values["new"] * part.tokens / 17
    for name in SOURCES:
        kept = read_table(place / "lists" / name, "list", open_tokens(place / name)).values.tolist()
        assert kept == [document for document in range(150) if sums.get((name, document), 0.0) >= 0]
        assert found[name].kept == len(kept) < found[name].of == 150 and len(kept) > 0
    again = mapping(place, name="by_lists", folder=str(place / "by_lists"))
    again["data"]["train"] = [one.source.model_dump(mode="json", exclude_defaults=True) for one in found.values() if one.source]
    assert train(validate(RunConfig, again, {}), ALONE, quiet()).exit_code == 0
    with pytest.raises(UserError, match="lists exists: remove it"):
        select(values, settings, ["new"], "document", place / "lists")


def test_each_blend_keeps_its_own_sources_and_weights(tmp_path: Path) -> None:
    """What a switch reads, or a replay, is not printed as if it were of data.train."""
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    settings = config(
        tmp_path,
        data={
            "train": [{"path": new, "weight": 2}, {"path": new, "name": "bad"}],
            "switches": [
                {"at": "50%", "train": [{"path": new, "weight": 5}]},
                {"at": "75%", "train": [{"path": new, "name": "bad"}]},
            ],
        },
        replay={"fraction": 0.25, "sources": [{"path": old, "name": "again"}]},
    )
    source = settings.data.train[0].model_copy(update={"documents": "kept/new.safetensors"})
    kept = [KeptOfSource("new", 3, 5, source), KeptOfSource("bad", 0, 5, None)]
    kept.append(KeptOfSource("again", 5, 5, settings.replay.sources[0]))  # type: ignore[union-attr, index]
    show_selection(kept, settings, console := quiet())
    said = printed(console)
    assert "data.switches[1].train: all of bad goes" in said
    left = yaml.safe_load(said[said.index("data:\n") :])
    mine = {"path": new, "documents": "kept/new.safetensors"}
    assert left["data"]["train"] == [{**mine, "weight": 2.0}]
    assert left["data"]["switches"] == [{"at": "50%", "train": [{**mine, "weight": 5.0}]}, {"at": "75%", "train": []}]
    assert left["replay"]["sources"] == [{"path": old, "name": "again"}]


def test_harmful_replays_of_a_lineage_are_named_and_stay(run: Path, tmp_path: Path) -> None:
    lines = (run / "values.jsonl").read_text().replace('"source":"old"', '"source":"replay of old"')
    told = list[str]()
    before = (run / "values.jsonl").read_bytes()
    (run / "values.jsonl").write_text(lines)
    try:
        settings = read_run_config(run)
        chosen = select(Values(run), settings, ["new"], "document", tmp_path / "lists", told.append)
        found = {one.name: one for one in chosen}
    finally:
        (run / "values.jsonl").write_bytes(before)
    assert len(told) == 1 and told[0].startswith("'replay of old' is harmful in part or as a whole, and stays")
    assert found["noise"].kept < 150 and found["old"].kept == 150


def test_a_source_named_like_a_path_has_its_list_in_the_folder(run: Path, tmp_path: Path) -> None:
    settings, before = read_run_config(run), (run / "values.jsonl").read_text()
    train = [source.model_copy(update={"name": f"../{Path(source.path).name}"}) for source in settings.data.train]
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"train": train})})
    try:
        (run / "values.jsonl").write_text(re.sub(r'"source":"', '"source":"../', before))
        select(Values(run), settings, ["new"], "document", tmp_path / "lists")
    finally:
        (run / "values.jsonl").write_text(before)
    assert [path.name for path in tmp_path.iterdir()] == ["lists"]
    assert {path.name for path in (tmp_path / "lists").iterdir()} == {f".._{name}.safetensors" for name in SOURCES}


def test_documents_of_a_file_that_has_changed_are_refused(run: Path, tmp_path: Path) -> None:
    values, place = Values(run), run.parent
    settings = read_run_config(run)
    write_tokens(tmp_path / "noise", 7, documents=150)
    before = {suffix: (place / f"noise{suffix}").read_bytes() for suffix in (".bin", ".idx")}
    try:
        for suffix in before:
            shutil.copy(tmp_path / f"noise{suffix}", place / f"noise{suffix}")
        with pytest.raises(UserError, match=r"noise.bin: changed since the run read it \(fingerprint .*restore it"):
            select(values, settings, ["new"], "document", tmp_path / "lists")
    finally:
        for suffix, content in before.items():
            (place / f"noise{suffix}").write_bytes(content)
    assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--against", "nwe"], "no values against 'nwe', did you mean 'new'?; it has old, new"),
        (["--by", "document", "--select", "/proc/none"], "/proc/none"),
    ],
)
def test_bad_words(run: Path, words: list[str], what: str) -> None:
    with pytest.raises(UserError) as refused:
        command.main([str(run), "--rows", "0", *words])
    assert what in str(refused.value)


def test_a_run_without_values_is_refused(tmp_path: Path) -> None:
    folder = train(config(tmp_path, training={"budget": 3}), ALONE, quiet()).folder
    with pytest.raises(UserError, match="has valued no rows; give it 'valuation'"):
        command.main([str(folder)])
    (folder / "values.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"values.jsonl, line 1: a row with a missing or wrong"):
        command.main([str(folder)])
