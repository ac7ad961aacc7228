"""``--dry-run`` says what would happen, and nothing happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megarewarm.main import main
from megarewarm.parallel.launchers import Launch
from megarewarm.training.trainer import train
from tests.support.tiny import config, mapping, quiet
from tests.test_bad_input import without_notes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, a wide terminal, no network."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def test_the_papers_run(anywhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "configs" / "410m_rewarm.yml"), "--dry-run"]
    assert main(words) == 2
    told = capsys.readouterr()
    assert main([*words, "--allow-missing"]) == 0
    shown = capsys.readouterr().out
    assert told.out == without_notes(shown) and told.err.count("\n") == 1 and "EleutherAI/pythia-410m" in told.err
    shown = " ".join(shown.split())
    for expected in [
        "405,334,016",  # parameters
        "131,296 of 2,260,992 tokens",
        "296,859,205,632",
        "curve: cosine_clipped",
        "reset table",
        "first lr 2.285e-07",  # 3e-4 / 1312.96 steps of warmup
        "17.4 GiB",
        "learning rate",
        f"needed to train: {anywhere}/data/pile/validation: no such token file",
    ]:
        assert expected in shown, expected
    # 6 x (302e6 matrix weights + head 50304 x 1024) + 6 x 24 x 1024 x 2048, times the tokens
    assert "7.19e+20" in shown
    assert not list(anywhere.iterdir())


def test_layouts_are_shown_per_rank(anywhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel.pipeline=4", "parallel.tensor=2", "parallel.data=8"]
    assert main([str(ROOT / "configs" / "410m_rewarm.yml"), *words, "--dry-run", "--allow-missing"]) == 0
    shown = capsys.readouterr().out
    assert "per rank: 64 ranks, pipeline 4 x data 8 x tensor 2; 35 micro-batches" in shown
    rows = [line.split() for line in shown.splitlines() if line[:2] in ("0 ", "1 ", "2 ", "3 ")]
    assert sum(int(row[1]) for row in rows) == 24 and int(rows[-1][1]) < int(rows[0][1]), "the head costs layers"


def test_every_run_of_an_experiment_is_shown(anywhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs" / "quickstart_full.yml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for name in ("upstream", "constant_low", "rewarm_double", "kept_moments", "replay_25", "infinite", "from_scratch"):
        assert name in shown
    assert "18.6M" in shown
    assert not list(anywhere.iterdir())


def test_a_run_that_has_begun_is_shown_where_it_stands(
    anywhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training": {"budget": 20}, "checkpoint": {"every": 5}}
    outcome = train(config(tmp_path, **changes), _alone(), quiet())
    (outcome.folder / "checkpoints" / "step_20").rename(tmp_path / "elsewhere")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, **changes)))
    before = {path: path.stat().st_mtime_ns for path in outcome.folder.rglob("*")}
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 0
    assert "the run stands at step 15; the same command continues it" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in outcome.folder.rglob("*")} == before


def test_what_could_not_run_is_refused(anywhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs" / "410m_rewarm.yml"), "start.moments=keep", "--dry-run", "--allow-missing"]) == 2
    assert "start.moments: 'keep' can't be honoured" in capsys.readouterr().err


def _alone():
    from megarewarm.parallel.connect import connect

    return connect(Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none"), "cpu", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.data=3"], "training.global_batch: 8 sequences can't be shared evenly by 3 data-parallel ranks"),
        (["parallel.tensor=4"], "parallel.tensor: 4 ranks can't share model.num_heads 2 evenly"),
        (["parallel.tensor=2", "model.ffn_size=33"], "parallel.tensor: 2 ranks can't share model.ffn_size 33 evenly"),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=15"],
            "parallel.sequence: 2 tensor ranks can't share data.sequence_length 15 evenly",
        ),
        (["parallel.pipeline=2", "parallel.schedule=zero_bubble"], "parallel.pipeline: 4 stages for 2 layers"),
        (["parallel.pipeline=2", "parallel.stages_per_rank=2"], "parallel.stages_per_rank: 2 with schedule '1f1b'"),
    ],
)
def test_a_layout_that_can_not_run_is_refused(
    anywhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path)))
    assert main([str(tmp_path / "run.yml"), *words, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_empty_micro_batches_are_told(anywhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, parallel={"pipeline": 2})))
    words = ["training.micro_batch=8", "--dry-run"]
    assert main([str(tmp_path / "run.yml"), *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "'1f1b' on 2 pipeline ranks runs 2 micro-batches, the batch fills 1; the others are empty" in shown
    assert main([str(tmp_path / "run.yml"), "training.micro_batch=4", "--dry-run"]) == 0
    assert "are empty" not in capsys.readouterr().out
