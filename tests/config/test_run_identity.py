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


def test_another_context_is_another_run(tmp_path: Path) -> None:
    def settings(**changed: object) -> dict[str, object]:
        return {**mapping(tmp_path, start={"from": "hf"}), "model": None, **changed}

    one, other = settings(context={"rotary_base": 20000}), settings(context={"rotary_base": 50000})
    assert difference_of_runs(one, other) == ("context.rotary_base", 20000.0, 50000.0)
    assert difference_of_runs(one, settings(model={"rotary_base": 20000})) is None  # the same, in other words
