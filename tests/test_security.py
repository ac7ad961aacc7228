"""Names out of foreign files lead nowhere else, secrets are repeated nowhere, shared folders are no trap."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megarewarm.checkpoint.foreign import hub, huggingface, megatron, neox_folder
from megarewarm.checkpoint.foreign.huggingface_neox import write_neox_config
from megarewarm.checkpoint.foreign.pickles import read_pickle
from megarewarm.checkpoint.own.integrity import find_damage
from megarewarm.config.experiment import load_experiment
from megarewarm.config.load import validate
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import parse_yaml
from megarewarm.data.order import array_cache
from megarewarm.errors import UserError
from megarewarm.laws.arms import read_trained
from megarewarm.main import main
from megarewarm.parallel import meeting_place
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.meeting_place import _meeting_point
from megarewarm.report.live.watch import planned_runs
from megarewarm.report.numbers.experiment import read_experiment
from megarewarm.report.pages.run_page import report
from megarewarm.untrusted import is_inside, is_name, redacted
from tests.config.test_schema import MINIMAL
from tests.support.report_runs import lines, write
from tests.support.tiny import mapping

WAYS_OUT = ["../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "x" * 300]
SECRET = "0123456789abcdef0123456789abcdef01234567"


# ---- names ----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=30) | st.sampled_from(WAYS_OUT))
def test_a_name_stays_in_its_folder(text: str) -> None:
    folder = "/a/b/c"
    inside = os.path.normpath(os.path.join(folder, text)).startswith(f"{folder}/")
    if is_name(text):
        assert os.path.dirname(os.path.normpath(os.path.join(folder, text))) == folder
    if is_inside(text):
        assert inside
    assert not any(map(is_name, WAYS_OUT))


@pytest.mark.parametrize("name", WAYS_OUT)
def test_an_index_of_weights_names_files_beside_it(tmp_path: Path, name: str) -> None:
    save_file({"secret": torch.zeros(2)}, tmp_path / "x")
    folder = tmp_path / "model"
    folder.mkdir()
    config = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=3)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", **write_neox_config(config)}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="no file beside it"):
        huggingface.HuggingFaceWeights(folder)
    for odd in ({"a": 3}, {"a": None}, {"a": ["x"]}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": odd}))
        with pytest.raises(UserError, match="no file beside it"):
            huggingface.HuggingFaceWeights(folder)


@pytest.mark.parametrize("name", [name for name in WAYS_OUT if name.strip()])
def test_pointers_to_the_newest_checkpoint_name_folders_beside_them(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "x"
    (outside / "mp_rank_00").mkdir(parents=True)
    (outside / "mp_rank_00_model_states.pt").write_bytes(b"")
    inside = tmp_path / "inside"
    inside.mkdir()
    for finder, file in ((neox_folder.find, "latest"), (megatron.find, "latest_checkpointed_iteration.txt")):
        (inside / file).write_text(name)
        with pytest.raises(UserError, match="names no folder beside it"):
            finder(inside)


@pytest.mark.parametrize("name", ["../../x", "../x", "a/..", "a/b@../../c", "a/b@/etc", ".a/b", "a/b@x/../y", "а/b"])
def test_hub_names_are_no_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="not a hub name"):
        hub.resolve(name)


@pytest.mark.parametrize("name", [name for name in WAYS_OUT if name not in ("", "a\nb")])
def test_checksums_are_of_files_beside_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    damage = find_damage(tmp_path, alone=True)
    assert damage is not None and damage.startswith(f"{tmp_path / 'SHA256SUMS'} is damaged")


def test_names_of_experiments_and_runs_are_folders_of_their_own() -> None:
    run = yaml.safe_load(MINIMAL)
    for place, name in (("experiment", ".."), ("experiment", "../x"), ("run", ".."), ("run", "../../x"), ("run", "a/b")):
        experiment = {"experiment": "e", "base": run, "runs": [{"name": "r"}]}
        if place == "run":
            experiment["runs"] = [{"name": name}]
        else:
            experiment["experiment"] = name
        with pytest.raises(UserError) as caught:
            load_experiment(experiment, {})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["..", "...", "a/b", ""])
def test_a_run_is_not_called_by_what_names_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"name"):
        validate(RunConfig, mapping(tmp_path, name=name, folder=None), {})


def test_words_in_braces_reach_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = yaml.safe_load(MINIMAL)
    for text, says in (("${HF_TOKEN}", "holds a secret"), ("$HF_TOKEN", "holds a secret"), ("a${../x}", "stands for nothing")):
        with pytest.raises(UserError, match=says) as caught:
            load_experiment({"experiment": "e", "base": run, "runs": [{"name": "r", "start": {"from": text}}]}, {})
        assert SECRET not in str(caught.value)
    with pytest.raises(UserError, match="variable 'runs', which is not set"):
        load_experiment({"experiment": "e", "folder": "x/${runs}", "base": run, "runs": [{"name": "r"}]}, {})


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/../../b", ""])
def test_a_foreign_experiment_reads_no_other_folders(tmp_path: Path, name: str) -> None:
    write(tmp_path / "secret", lines("rewarm", 4))
    folder = tmp_path / "experiment"
    folder.mkdir()
    run: dict[str, Any] = {"name": "r", "arm": "r", "seed": None, "folder": name, "steps": 1, "tokens_per_step": 1}
    run |= {"groups": {}, "after": []}
    (folder / "experiment.json").write_text(json.dumps({"format": 1, "experiment": "e", "runs": [run]}))
    for reader in (read_experiment, read_trained, planned_runs):
        with pytest.raises(UserError, match="outside of this one"):
            reader(folder)


# ---- what files may do ----------------------------------------------------------------------------------------------


def test_archives_that_unpack_to_gigabytes_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
        target.writestr("archive/data/9", bytes(2**20))
    assert read_pickle(tmp_path / "a.pt")["a"].tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError, match="compressed"):
        read_pickle(tmp_path / "b.pt")


def test_aliases_have_an_end() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    merging = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
    for text in (bomb, merging, "a: &a [*a]", "a: &a {b: *a}", "a: " + "[" * 5000, "a: " + "{b: " * 5000):
        with pytest.raises(UserError) as caught:
            parse_yaml(text, "f.yml")
        assert str(caught.value).startswith("f.yml") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [echo]", "!!python/name:os.system x", "!x {a: 1}", "!!set {a}"]
)
def test_tags_make_no_objects(tag: str) -> None:
    with pytest.raises(UserError):
        parse_yaml(f"a: {tag}", "f.yml")


def test_the_cache_of_orders_runs_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "run"),)

    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "cache"))
    array_cache.cached({"k": 1}, lambda: {"x": np.arange(3)})
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    np.save(entry / "x.npy", np.array([Bomb(), 1, 2], object), allow_pickle=True)
    assert array_cache.cached({"k": 1}, lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    for odd in ('{"../../x": [3]}', "[]", '{"x": 3}', '{"x": []}'):
        (entry / "arrays.json").write_text(odd)
        assert array_cache.cached({"k": 1}, lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
    assert not (tmp_path / "run").exists()


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_secrets_are_taken_out_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    hidden = {
        f"got {SECRET}!": "got ***!",
        "https://user:pass@host/x?a@b": "https://***@host/x?a@b",
        "s3://key@bucket": "s3://***@bucket",
        "hf_abcdefghijklmnopqrst": "***",
    }
    for text, shown in hidden.items():
        assert redacted(text) == shown and str(UserError(text)) == shown
    for text in ("org/name@main", "https://host/a@b", "runs/x@20%", "hf_model", "user@host:path"):
        assert redacted(text) == text


@pytest.mark.parametrize("key", ["start.from", "data.train.0.path", "logging.wandb.project", "name"])
def test_no_configuration_with_a_secret_is_kept(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(mapping(tmp_path)))
    for secret in (SECRET, f"https://me:{SECRET[:9]}@host/x", "hf_abcdefghijklmnopqrst"):
        before = sorted(tmp_path.rglob("*"))
        assert main([str(path), f"{key}={secret}"]) == 2
        said = capsys.readouterr()
        assert "holds a token or password" in said.err and "\n" not in said.err.strip()
        assert not any(word in said.out + said.err for word in (SECRET, SECRET[:9], "hf_abc"))
        assert sorted(tmp_path.rglob("*")) == before


def test_what_the_hub_says_is_repeated_without_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise OSError(f"401 for https://u:{SECRET}@hub/x with hf_abcdefghijklmnopqrst, {SECRET}")

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        hub.resolve("org/name")
    assert "401 for https://***@hub/x with ***, ***" in str(caught.value)


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_names_of_runs_are_text_on_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp;$x$[red]"
    events = lines("rewarm", 40)
    for event in events:
        event |= {"name": hostile + event["name"]} if "name" in event else {}
        event |= {"from": hostile} if event["event"] == "start" else {}
    settings = {"name": hostile, "start": {"from": hostile}, hostile: {hostile: hostile}}
    folder = write(tmp_path / "run", events, settings)
    page = report([folder], tmp_path / "report").read_text()
    assert "&lt;script&gt;" in page
    for raw in ("<script", "<img src=x", "onerror=y>"):
        assert raw not in page.replace("<img alt", "")


# ---- shared folders -------------------------------------------------------------------------------------------------


def test_the_meeting_point_in_a_shared_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(meeting_place, "_PLACE", str(tmp_path))
    launch = Launch(0, 2, 0, 2, "127.0.0.1", 1, "none")
    folder = tmp_path / f"megarewarm-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(UserError, match="TMPDIR"):
        _meeting_point(launch)
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others may write"):
        _meeting_point(launch)
    folder.rmdir()
    assert _meeting_point(launch).parent == folder and folder.stat().st_mode & 0o777 == 0o700
    assert not list(elsewhere.iterdir())
