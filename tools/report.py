#!/usr/bin/env python3
"""Report of one or more runs: python tools/report.py RUN [RUN ...] [--output FOLDER]"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from megarewarm.errors import EXIT_BAD_INPUT, UserError
from megarewarm.report.page import report
from megarewarm.report.read import read_runs
from megarewarm.report.table import summary_table


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw and compare runs: report.html, PNGs, table.csv and table.json.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, with metrics.jsonl in it")
    parser.add_argument("--output", type=Path, help="default: RUN/report, or report/ beside the runs where there are several")
    arguments = parser.parse_args()
    together = arguments.runs[0] if len(arguments.runs) == 1 else Path(os.path.commonpath([r.parent for r in arguments.runs]))
    try:
        page = report(arguments.runs, arguments.output or together / "report")
        Console().print(summary_table(read_runs(arguments.runs)))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    print(page)


if __name__ == "__main__":
    main()
