"""Tests of runs on tasks: which of them compare, and how the tasks are called together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from megarewarm.record.events import TaskEvent
from megarewarm.record.run import RecordedRun

TaskKey = tuple[str, str]
"""A task's name, and the digest of its items: tests on other items don't compare, whatever their name."""


def tests_of(run: RecordedRun) -> dict[TaskKey, list[TaskEvent]]:
    """The tests on each task of ``run``, in order, on the items of the newest."""
    newest = {test.name: test.digest for test in run.tests}
    return {key: [test for test in run.tests if (test.name, test.digest) == key] for key in newest.items()}


def task_labels(keys: Iterable[TaskKey]) -> dict[TaskKey, str]:
    """The tasks' names; for those that share a name, with the beginning of their digests."""
    distinct = list(dict.fromkeys(keys))
    count = Counter(name for name, _ in distinct)
    return {(name, digest): name if count[name] == 1 else f"{name} ({digest[:6]})" for name, digest in distinct}


def apart_sentences(runs: Sequence[RecordedRun]) -> list[str]:
    """What a reader must know of tasks of ``runs`` that share a name but not their items."""
    labels = task_labels(key for run in runs for key in tests_of(run))
    count = Counter(name for name, _ in labels)
    return [
        f"The runs were tested on {number} different files called {name}: accuracies on them don't compare, so each is shown "
        f"apart, under the digest of its items."
        for name, number in count.items()
        if number > 1
    ]
