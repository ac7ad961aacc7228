"""Thousands of sources in one blend: the right samples, with few files open, trained in one run."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from megarewarm.config.data import DataConfig
from megarewarm.data.files import open_files
from megarewarm.data.files.file_bytes import FileBytes
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.open_files import OpenFiles
from megarewarm.data.mixture.blend import Blend, GreedyTable
from megarewarm.data.mixture.mixture import build_mixture
from megarewarm.data.mixture.phases import Phase
from megarewarm.errors import UserError
from tests.data.test_fuzz import pair_of
from tests.support.tiny import mapping

ROOT = Path(__file__).resolve().parents[2]
MANY = 3000


def write_sources(folder: Path, count: int) -> list[dict[str, object]]:
    """Pairs of 17 ids, of which the last two say which pair it is."""
    folder.mkdir()
    index, _ = pair_of([17])
    for i in range(count):
        ids = np.full(17, 7, np.uint16)
        ids[-2:] = divmod(i, 64)
        (folder / f"{i:05d}.idx").write_bytes(index)
        (folder / f"{i:05d}.bin").write_bytes(ids.tobytes())
    return [{"path": str(folder / f"{i:05d}"), "max_epochs": 9, "weight": 1 + i % 3} for i in range(count)]


def test_samples_of_many_sources_with_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = OpenFiles(8)
    for module in ("open_files", "file_bytes"):
        monkeypatch.setattr(f"megarewarm.data.files.{module}.OPEN_FILES", few)
    data = DataConfig.model_validate({"sequence_length": 16, "train": write_sources(tmp_path / "data", 300)})
    mixture = build_mixture(TokenFiles(data, 64), [Phase(0, data.train)], total_samples=1200)
    rows = mixture.rows.read(0, 1200)
    source, _ = Blend([part.weight for part in data.train]).locate(np.arange(1200))
    assert (rows[:, -2] * 64 + rows[:, -1] == source).all()
    assert mixture.rows.counts(1200).tolist() == np.bincount(source, minlength=300).tolist()
    assert 1 <= len(few) <= 8


def test_threads_share_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = OpenFiles(2)
    for module in ("open_files", "file_bytes"):
        monkeypatch.setattr(f"megarewarm.data.files.{module}.OPEN_FILES", few)
    for i in range(12):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 64)
    files = [FileBytes(tmp_path / str(i)) for i in range(12)]
    wrong: list[object] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(12, size=400).tolist():
            try:
                if files[i].raw(3, 10) != bytes([i]) * 10:
                    wrong.append(i)
            except Exception as error:  # of any kind: a descriptor of somebody else's
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    files[0].raw(0, 1)
    assert len(few) <= 2
    files.clear()
    assert len(few) == 0


def test_a_file_that_is_another_one_when_it_is_opened_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = OpenFiles(1)
    for module in ("open_files", "file_bytes"):
        monkeypatch.setattr(f"megarewarm.data.files.{module}.OPEN_FILES", few)
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(8))
    a, b = FileBytes(tmp_path / "a"), FileBytes(tmp_path / "b")
    os.utime(tmp_path / "a", ns=(1, 1))
    with pytest.raises(UserError, match="a has changed while it was in use"):
        a.raw(0, 8)
    assert b.raw(0, 8) == bytes(8)
    (tmp_path / "a").unlink()
    with pytest.raises(UserError, match="a is gone"):
        a.raw(0, 8)


def test_room_is_left_for_others() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert open_files._room() <= max(1, soft // 2) or soft == resource.RLIM_INFINITY


@pytest.mark.parametrize("count", [49, 600])
def test_blends_of_many_are_those_of_the_rule(count: int) -> None:
    weights = (1 + np.random.default_rng(count).integers(5, size=count)).tolist()
    blend, short = Blend(weights), Blend(weights, 700)
    numerators, period = [int(n) for n in blend.numerators], blend.period
    taken, picks = [0] * count, []
    for p in range(700):
        deficits = [numerators[i] * max(p, 1) - period * taken[i] for i in range(count)]
        picks.append(deficits.index(max(deficits)))
        taken[picks[-1]] += 1
    within = [picks[:p].count(pick) for p, pick in enumerate(picks)]
    for each in (blend, short):
        source, index = each.locate(np.arange(700))
        assert source.tolist() == picks and index.tolist() == within
        assert each.counts(700).tolist() == taken
    table = GreedyTable(weights, 700)
    assert table.locate(np.arange(200))[0].tolist() == picks[:200]  # in float64, where no ties are near


@pytest.mark.slow
def test_one_run_over_thousands_of_sources_under_the_usual_limit(tmp_path: Path) -> None:
    settings = mapping(
        tmp_path,
        data={"train": write_sources(tmp_path / "data", MANY)},
        training={"budget": 4, "global_batch": MANY // 2, "micro_batch": MANY // 2},
        evaluation={"every": 4},
        checkpoint={"every": 4},
    )
    (tmp_path / "run.yml").write_text(yaml.dump(settings, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 1024 && exec "$@"', "-", sys.executable, str(ROOT / "launch.sh"), str(tmp_path / "run.yml")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4]
    assert lines[-1]["event"] == "stop" and lines[-1]["reason"] == "complete"
