"""Configurations and files of checkpoints, damaged in every way: read, or refused in one clear line, whatever the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import hostile

SEEDS = hostile.seeds()
KINDS = sorted(hostile.READERS)
_shared = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
quick = settings(max_examples=60, deadline=None, suppress_health_check=_shared)
long = settings(max_examples=5_000, deadline=None, suppress_health_check=_shared)


@st.composite
def damaged(draw: st.DrawFn, kind: str) -> bytes:
    """A right file in which some places are replaced, put in, or cut out; at times nothing but random bytes."""
    data = bytearray(draw(st.sampled_from(SEEDS[kind]) | st.binary(max_size=60)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        gone = draw(st.integers(0, 12))
        data[at : at + gone] = draw(st.sampled_from(hostile.WORDS) | st.binary(max_size=6))
    return bytes(data[: len(data) - draw(st.sampled_from([0, 0, 0, 1, 20]))])


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_damaged_files(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    hostile.READERS[kind](tmp_path, data.draw(damaged(kind)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@long
@given(data=st.data())
def test_many_damaged_files(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    hostile.READERS[kind](tmp_path, data.draw(damaged(kind)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.0006", "0.00.6"), ("0.0006", "[1]"), ('"params": {', '"params": [1], "x": {'), ("8, \"save\"", "0, \"save\""),
        ('"data_path": "d"', '"train_data_paths": [3]'), ('"save": "out"', '"extra_save_iters": ["x"]'),
        ('"save": "out"', '"checkpoint_scale": "log", "checkpoint_factor": 1.0000001, "train_iters": 100000000'),
        ('"save": "out"', '"attention_config": [[["flash"], 1000000000000]]'), 
        ('"fp16": {', '"zero_optimization": {"stage": "x"}, "x": {'),
    ],
)  # fmt: skip
def test_what_is_inside_of_gpt_neox_keys_is_refused_by_the_keys_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    """The first was found by the fuzzer."""
    told: list[str] = []
    monkeypatch.setattr(hostile, "refused", lambda error: told.append(str(error)))
    monkeypatch.chdir(tmp_path)
    text = SEEDS["neox"][0].decode()
    assert old in text
    hostile.neox(tmp_path, text.replace(old, new).encode())
    assert len(told) == 1 and told[0].startswith(f"{tmp_path}/x.yml:"), told


def test_right_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would hold for readers that refuse everything."""
    monkeypatch.setattr(hostile, "refused", lambda error: pytest.fail(str(error)))
    monkeypatch.chdir(tmp_path)
    for text, count in zip(SEEDS["index"], (1, 49), strict=True):
        assert len(hostile.read_index(hostile.io.BytesIO(text)).state_dict_metadata) == count
    hostile.checkpoint(tmp_path, SEEDS["checkpoint"][0])
    for text in SEEDS["checkpoint"][4:8]:
        hostile.checkpoint(tmp_path, text)
    for text in SEEDS["safetensors"][:2]:
        hostile.safetensors(tmp_path, text)
    hostile.pickles(tmp_path, SEEDS["pickles"][1])
    hostile.pickles(tmp_path, SEEDS["pickles"][2])
    for text in SEEDS["config"][:2]:
        hostile.config(tmp_path, text)
    hostile.neox(tmp_path, SEEDS["neox"][0])
    for right in SEEDS["runs"]:
        hostile.runs(tmp_path, right)
