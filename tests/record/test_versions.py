"""A run folder that an earlier version wrote, whose configuration lacks the keys that came later."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.training.output.run_folder import RunFolder


def config_of(folder: Path, **source: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "old",
            "folder": str(folder),
            "start": {"from": "somewhere"},
            "data": {"sequence_length": 8, "train": [{"path": "a", **source}]},
            "schedule": {"curve": "constant", "max_lr": 1e-3},
            "training": {"budget": 10, "global_batch": 2, "micro_batch": 2},
        }
    )


def test_keys_that_came_later_do_not_lock_a_run_out(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    written = config.model_dump(mode="json", by_alias=True)
    for key in ("layout", "first_row", "tokens"):
        del written["data"]["train"][0][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    RunFolder(tmp_path).check(config)
    with pytest.raises(UserError, match=r"data\.train\.0\.layout was 'documents', now it is 'rows'"):
        RunFolder(tmp_path).check(config_of(tmp_path, layout="rows"))
    written["data"]["train"][0]["path"] = "b"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(UserError, match=r"data\.train\.0\.path was 'b', now it is 'a'"):
        RunFolder(tmp_path).check(config)
