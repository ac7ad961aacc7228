from __future__ import annotations

from pathlib import Path

from megarewarm.config.run_identity import difference_of_runs
from tests.support.tiny import mapping


def test_batches_for_moments_count_where_moments_are_measured(tmp_path: Path) -> None:
    def settings(**start: object) -> dict[str, object]:
        return mapping(tmp_path, start={"from": "hf", **start})

    assert difference_of_runs(settings(measure_batches=5), settings()) is None
    assert difference_of_runs(settings(measure_batches=5), settings(moments="reset")) == ("start.moments", None, "reset")
    measured = [settings(moments="measure", measure_batches=batches) for batches in (5, 6)]
    assert difference_of_runs(*measured) == ("start.measure_batches", 5, 6)
