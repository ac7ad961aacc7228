"""Keys and words that somebody else's habits make of a configuration are answered with the key, or the form, that is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarewarm.arguments import parse_arguments
from megarewarm.config.foreign_names import OURS
from megarewarm.config.load import read_configs, validate
from megarewarm.config.schema import RunConfig
from megarewarm.config.unknown_keys import foreign_meaning, known_keys
from megarewarm.errors import UserError
from tests.support.tiny import mapping

SECTIONS = known_keys(RunConfig, [])
KEYS = {*SECTIONS, *(f"{section}.{key}" for section in SECTIONS for key in known_keys(RunConfig, [section]))}


def refused(given: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refusal:
        validate(RunConfig, given, {})
    return str(refusal.value)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meant")


@pytest.mark.parametrize("name", sorted(OURS))
def test_other_trainers_names(place: Path, name: str) -> None:
    ours = OURS[name]
    assert ours in KEYS and name not in SECTIONS and foreign_meaning(RunConfig, name)
    for spelling in (name, name.replace("_", "-")):
        assert f"unknown key '{spelling}', did you mean '{ours}' (" in refused(mapping(place, **{spelling: 1}))
    for section in ("training", "schedule"):
        if name not in known_keys(RunConfig, [section]):
            said = refused(mapping(place, **{section: {name: 1}}))
            meant = f"'{ours.removeprefix(f'{section}.')}'" + " at the top level" * ("." not in ours)
            assert f"unknown key '{name}' in {section}, did you mean {meant} (" in said


def test_a_name_of_ours_in_the_wrong_place(place: Path) -> None:
    for key in sorted(key for key in KEYS if "." in key):
        section, name = key.split(".")
        if name in OURS or name in SECTIONS:
            continue
        assert f"'{key}'" in refused(mapping(place, **{name: 1}))
        elsewhere = "logging" if section != "logging" else "optimizer"
        if name not in known_keys(RunConfig, [elsewhere]):
            assert f"'{key}'" in refused(mapping(place, **{elsewhere: {name: 1}}))


def test_a_key_of_the_top_level_in_a_section(place: Path) -> None:
    said = refused(mapping(place, checkpoint={"folder": "x"}))
    assert said.endswith("in checkpoint, did you mean 'folder' at the top level?")


@pytest.mark.parametrize("written", ["max_Ir", "maxlr", "learning_rate", "lr"])
def test_a_required_key_that_is_misspelt_is_not_called_missing(place: Path, written: str) -> None:
    given = mapping(place)
    given["schedule"][written] = given["schedule"].pop("max_lr")
    said = refused(given)
    assert "did you mean 'max_lr'" in said and "missing" not in said
    del given["schedule"]["curve"]
    first, second = refused(given).splitlines()
    assert "did you mean" in first and "'schedule.curve' is missing" in second


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"train": "en_train"}}, "data.train: expected a list, such as [{path: ...}] (given: 'en_train')"),
        ({"replay": {"fraction": 0.1, "sources": "x"}}, "replay.sources: expected a list, such as [{path: ...}]"),
        ({"training": 5}, "training: expected keys below it, such as {budget: ...} (given: 5)"),
        ({"export": True}, "export: expected keys below it, such as {huggingface: ...} (given: true)"),
        ({"evaluation": None}, "evaluation: expected keys below it, such as {every: ...} (given: null)"),
        ({"name": "x y"}, "name: expected a name of letters, digits, '_', '-' and '.', such as run_1 (given: 'x y')"),
    ],
)
def test_other_forms(place: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in refused({**mapping(place), **changes})


def test_words_that_name_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "upstream.yml").write_text("name: x\n")
    (tmp_path / "folder").mkdir()
    here = str(tmp_path.resolve())
    apart = "a key and its value are one word, without spaces"
    for words, expected in (
        (["upstream"], f"{here}/upstream: no such config file, did you mean 'upstream.yml'?"),
        (["upstrem.yml"], f"{here}/upstrem.yml: no such config file, did you mean 'upstream.yml'?"),
        (["../nope.yml"], "/nope.yml: no such config file"),
        (["folder"], "folder: is a folder, expected a config file"),
        (["upstream.yml", "training.budget", "=", "10"], apart),
        (["upstream.yml", "training.budget=", "10"], apart),
        (["upstream.yml", "training.budget", "=10"], apart),
        (["upstream.yml", "training.budget", "10"], apart),
    ):
        with pytest.raises(UserError) as refusal:
            read_configs(words)
        assert expected in str(refusal.value), words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dryrun"], "--dryrun, did you mean '--dry-run'?"),
        (["--learning-rate", "1e-3"], "such as schedule.max_lr=..."),
        (["--train_iters=5"], "such as training.budget=..."),
        (["--schedule.max_lr=1e-3"], "keys of a run are words without dashes, such as schedule.max_lr=..."),
        (["--xyz"], "unrecognized arguments: --xyz\n"),
    ],
)
def test_options_that_are_keys(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["run.yml", *words])
    assert ended.value.code == 2 and expected in capsys.readouterr().err
