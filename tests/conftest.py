"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy one takes any time for any example
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded GPT-NeoX runs (weights, token files, losses), where the machine has one."""
    folder = Path(os.environ.get("MEGAREWARM_TEST_DATA", "")) / "neox_golden"
    if "MEGAREWARM_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("set MEGAREWARM_TEST_DATA to the folder that holds neox_golden/")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured beside passing, such as the size of the product."""
    for reports in (terminalreporter.stats.get(outcome, []) for outcome in ("passed", "failed")):
        for what, value in (item for report in reports for item in report.user_properties):
            terminalreporter.write_line(f"{what}: {value:,}")
