"""What older revisions wrote is read, and what newer ones will have written is refused.

tests/fixtures/format_1 was written by revision 86a0c31, the first one that trained: a run of 8 steps that was killed after the
4th, with its checkpoint (format 1: no checksums) and its token files; ``undisturbed.json`` holds the losses of that run when
the same revision was let finish it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megarewarm.checkpoint.own.state import FORMAT
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.load import read_configs, validate
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.record.follow import Follower
from megarewarm.record.layout import EXPERIMENT_FORMAT, RUN_FORMAT
from megarewarm.record.run import read_run
from megarewarm.report.live.watch import planned_runs
from megarewarm.report.numbers.experiment import read_experiment
from megarewarm.report.pages.run_page import report
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.trainer import train
from tests.support.tiny import events, quiet
from tests.training.test_resume import ALONE

FIXTURE = Path(__file__).parent / "fixtures" / "format_1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, in which everything is named relative to it."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("run")


def config_of(*words: str) -> RunConfig:
    return validate(RunConfig, *read_configs(["run/config.yaml", *words]))


def test_the_oldest_run_goes_on_as_it_would_have_gone_on(old: Path) -> None:
    source = open_checkpoint(str(old))
    assert source.training is not None and source.training.format == 1 and source.training.step == 4
    assert any("before checkpoints had checksums" in note for note in source.notes)
    train(config_of(), ALONE, quiet())
    told = json.loads(Path("undisturbed.json").read_text())
    losses = {str(line["step"]): line["loss"] for line in events(old, "train")}
    assert losses.keys() == told["train"].keys() == {str(step) for step in range(1, 9)}
    np.testing.assert_allclose([losses[step] for step in told["train"]], list(told["train"].values()), rtol=1e-5)
    evaluated = {f"{line['step']} {line['name']}": line["loss"] for line in events(old, "eval")}
    np.testing.assert_allclose([evaluated[key] for key in told["eval"]], list(told["eval"].values()), rtol=1e-5)
    written = open_checkpoint(str(old)).training
    assert written is not None and written.format == FORMAT and written.step == 8
    assert (old / "config.yaml").read_text().startswith(f"format: {RUN_FORMAT}\n")
    assert events(old, "start")[-1].get("format", 1) == 1


def test_the_oldest_checkpoint_is_rewarmed(old: Path) -> None:
    run = config_of("name=again", "folder=again", f"start.from={old}", "training.budget=4")
    folder = train(run, ALONE, quiet()).folder
    told = json.loads(Path("undisturbed.json").read_text())
    (before,) = [line["loss"] for line in events(folder, "eval") if line["step"] == 0 and line["name"] == "old"]
    assert before == pytest.approx(told["eval"]["4 old"], rel=1e-5)
    stages = open_checkpoint(str(folder)).lineage.stages
    assert [stage.run for stage in stages] == ["run", "again"]


def test_report_and_watch_read_the_oldest_metrics(old: Path, tmp_path: Path) -> None:
    run = read_run(old)
    assert run.steps == 4 and run.train["loss"].tolist() == [
        json.loads(line)["loss"] for line in (old / "metrics.jsonl").read_text().splitlines() if '"train"' in line
    ]
    follower = Follower(old / "metrics.jsonl")
    assert follower.poll() and follower.step == 4 and follower.total_steps == 8 and follower.damage is None
    assert report([old], tmp_path / "page").is_file()


def test_newer_formats_are_refused_in_one_line(old: Path) -> None:
    state = next(old.glob("checkpoints/*/state.json"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=rf"state\.json: format {FORMAT + 1} is newer"):
        open_checkpoint(str(state.parent))
    # also where it has nothing that this version needs
    state.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UserError, match=rf"state\.json: format {FORMAT + 1} is newer"):
        open_checkpoint(str(state.parent))

    config, settings = config_of(), (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(f"format: {RUN_FORMAT}\n{settings}")
    assert config_of() == config and read_run(old).config["name"] == "run" and "format" not in read_run(old).config
    for odd in (RUN_FORMAT + 1, "new", "null"):
        (old / "config.yaml").write_text(f"format: {odd}\n{settings}")
        for reader in (config_of, lambda: RunFolder(old).check(config), lambda: read_run(old)):
            with pytest.raises(UserError, match=r"run/config\.yaml: format .*: use the version that wrote it$"):
                reader()
    (old / "config.yaml").write_text(settings)

    lines = (old / "metrics.jsonl").read_text()
    (old / "metrics.jsonl").write_text(lines.replace('{"event":"start"', f'{{"event":"start","format":{RUN_FORMAT + 1}'))
    for newer in (lambda: read_run(old), Follower(old / "metrics.jsonl").poll):
        with pytest.raises(UserError, match=rf"metrics\.jsonl: format {RUN_FORMAT + 1}, this program reads {RUN_FORMAT}"):
            newer()
    (old / "metrics.jsonl").write_text(lines)

    Path("experiment.json").write_text(json.dumps({"format": EXPERIMENT_FORMAT + 1, "experiment": "e", "runs": []}))
    for later in (lambda: read_experiment(Path()), lambda: planned_runs(Path())):
        with pytest.raises(UserError, match=r"experiment\.json: format 2, this program reads 1"):
            later()
