"""``--dry-run`` says what would happen, and nothing happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megarewarm.lab.plan_ahead import plan_ahead
from megarewarm.main import main
from megarewarm.model.size import forward_flops_per_token
from megarewarm.parallel.launchers import Launch
from megarewarm.spelling import duration_text
from megarewarm.training.start.evaluation_cost import evaluation_cost
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, mapping, quiet
from tests.test_bad_input import without_notes
from tests.training.test_resume import ALONE

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
        "rewarm from EleutherAI/pythia-410m",
        "memory the run would need",
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
    assert main([*words, "--allow-missing", "--show-config"]) == 0
    with_keys = " ".join(capsys.readouterr().out.split())
    assert "curve: cosine_clipped" in with_keys and "curve: cosine_clipped" not in shown
    assert main([words[0], "--show-config"]) == 2
    assert "--show-config works only with --dry-run" in capsys.readouterr().err


def test_layouts_are_shown_per_rank(anywhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel.pipeline=4", "parallel.tensor=2", "parallel.data=8"]
    assert main([str(ROOT / "configs" / "410m_rewarm.yml"), *words, "--dry-run", "--allow-missing"]) == 0
    shown = capsys.readouterr().out
    assert "per rank: 64 ranks, pipeline 4 x data 8 x tensor 2; 35 micro-batches of 4" in shown
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
    assert "the run is at step 15; the same command resumes it" in capsys.readouterr().out
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


def test_hours_are_those_of_a_run_like_it(anywhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, folder=str(runs / "next"))))
    words = [str(tmp_path / "run.yml"), "--dry-run"]
    assert main(words) == 0 and "tokens/s" not in capsys.readouterr().out
    train(config(tmp_path, folder=str(runs / "before"), training={"budget": 8}), _alone(), quiet())
    metrics = runs / "before" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    slowly = [line | {"tokens_per_second": 0.5} if line["event"] == "train" else line for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in slowly))
    assert main(words) == 0
    # 20 steps of 128 tokens, and 5 evaluations of two sets of 256 tokens, which cost a third
    seconds = (20 * 128 + 5 * 2 * 256 / 3) / 0.5
    shown = " ".join(capsys.readouterr().out.split())
    assert f"time about {duration_text(seconds)}, at the 0 tokens/s of {runs}/before" in shown
    for other in (["model.num_layers=1"], ["data.sequence_length=8"], ["parallel.data=2"], ["training.recompute=full"]):
        assert main([*words, *other]) == 0 and "tokens/s of" not in capsys.readouterr().out
    metrics.write_text("".join(json.dumps(line) + "\n" for line in slowly if line["event"] != "stop"))
    assert main(words) == 0 and "tokens/s of" not in capsys.readouterr().out


def test_a_longer_budget_is_a_branch(anywhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = train(config(tmp_path, training={"budget": 6}), _alone(), quiet())
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, training={"budget": 9})))
    for mode in (["--dry-run"], []):
        assert main([str(tmp_path / "run.yml"), *mode]) == 2
        refused = capsys.readouterr().err
        assert "holds a run in which training.budget was 6, now it is 9; to train on, make it a new run" in refused
        assert f"start.from={old.folder}, start.intent=branch" in refused
    new = {"folder": str(tmp_path / "longer"), "start": {"from": str(old.folder), "intent": "branch"}}
    longer = config(tmp_path, training={"budget": 3}, **new)
    train(longer, _alone(), quiet())
    lines = [line for line in events(tmp_path / "longer", "train")]
    assert [line["step"] for line in lines] == [1, 2, 3]
    whole = train(config(tmp_path, folder=str(tmp_path / "whole"), training={"budget": 9}), _alone(), quiet())
    ends = (tmp_path / "longer" / "checkpoints" / "step_3", whole.folder / "checkpoints" / "step_9")
    states = [json.loads((end / "state.json").read_text()) for end in ends]
    assert states[0]["samples"] == states[1]["samples"] == 9 * 8, "it reads on where the old run ended"
    assert states[0]["optimizer_step"] == states[1]["optimizer_step"] == 9


def test_a_teacher_is_counted_with_its_own_shape_also_before_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    plain = mapping(tmp_path)
    large = {"num_layers": 3, "hidden_size": 64}
    train(config(tmp_path, folder=str(tmp_path / "teacher"), model=large, training={"budget": 2}), ALONE, quiet())
    plan, missing = plan_ahead(config(tmp_path, distill={"from": str(tmp_path / "teacher")}))
    assert plan.taught_by is not None and not missing
    own, theirs = (forward_flops_per_token(shape, 16) for shape in (plan.model, plan.taught_by))
    # by hand: per layer 12 h^2 weights, each 2 FLOPs, causal attention over half of 16 positions, and the head of 64 ids
    assert theirs == 3 * (24 * 64**2 + 4 * 64 * 8) + 2 * 64 * 64
    (tmp_path / "run.yml").write_text(yaml.safe_dump(plain | {"distill": {"from": str(tmp_path / "teacher")}}))
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    per_token = 3 * own + theirs
    assert f"FLOPs {20 * 128 * per_token:.3g} ({per_token:.3g} per token" in shown
    assert f"forward of the teacher {tmp_path}/teacher, " in shown and "note: distill: the teacher is" in shown
    cost = evaluation_cost(plan, {"old": 256, "new": 256})
    assert cost is not None
    evaluated = 512 * len(cost.steps)
    assert cost.share == pytest.approx(evaluated / (evaluated + (3 + theirs / own) * 20 * 128))
    # an experiment whose teacher is yet to be trained
    runs = [
        {"name": "large", "model": large, "start": {"from": None}},
        {"name": "student", "distill": {"from": "${runs}/large"}},
        {"name": "early", "distill": {"from": "${runs}/large@50%"}},
    ]
    base = {key: value for key, value in plain.items() if key not in ("name", "folder")}
    experiment = {"experiment": "e", "folder": str(tmp_path / "e"), "base": base, "runs": runs}
    (tmp_path / "e.yml").write_text(yaml.safe_dump(experiment))
    assert main([str(tmp_path / "e.yml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    row = next(line.split() for line in shown.splitlines() if line.split()[:2] == ["student", "scratch"])
    assert float(row[-2]) == pytest.approx(20 * 128 * per_token / 1e15, rel=0.05)
    assert not (tmp_path / "e").exists()
    wide = [runs[0], {"name": "student", "distill": {"from": "${runs}/large", "kind": "hidden"}}]
    (tmp_path / "e.yml").write_text(yaml.safe_dump(experiment | {"runs": wide}))
    assert main([str(tmp_path / "e.yml"), "--dry-run"]) == 2
    assert "e/large has hidden_size 64, the model 32" in capsys.readouterr().err
    # and where it is not on this machine
    (tmp_path / "run.yml").write_text(yaml.safe_dump(plain | {"distill": {"from": str(tmp_path / "absent")}}))
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 2
    assert "distill.from: " in capsys.readouterr().err
    assert main([str(tmp_path / "run.yml"), "--dry-run", "--allow-missing"]) == 0
    assert "missing, needed to train: distill.from:" in " ".join(capsys.readouterr().out.split())
