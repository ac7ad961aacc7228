"""Report of an experiment or of runs: megarewarm report EXPERIMENT | EXPERIMENT.yml | RUN [RUN ...] [--output FOLDER]"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(
        description="Draw and compare an experiment's arms, or runs: report.html, figures as PNG, tables as CSV and JSON."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="FOLDER", help="an experiment's folder or its YAML, or folders of runs"
    )
    parser.add_argument(
        "--quick", action="store_true", help="with an experiment's YAML: report the folder that --quick trained in"
    )
    parser.add_argument("--output", type=Path, help="default: FOLDER/report, or for several runs report/ next to them")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.console import make_console
        from megarewarm.record.run import read_runs
        from megarewarm.report.numbers.experiment import is_experiment
        from megarewarm.report.pages.experiment_page import report_experiment
        from megarewarm.report.pages.run_page import report
        from megarewarm.report.pages.terminal_table import summary_table

    given: list[Path] = arguments.runs
    if given[0].is_file():
        given = [_folder_of(given, arguments.quick)]
    elif arguments.quick:
        raise UserError("--quick works only with an experiment's YAML: give that, or the folder without --quick")
    if experiments := [path for path in given if is_experiment(path)]:
        if len(given) > 1:
            raise UserError(f"{experiments[0]}: is an experiment: give it alone; for single runs of it, give their folders")
        page = report_experiment(given[0], arguments.output or given[0] / "report")
    else:
        together = given[0] if len(given) == 1 else Path(os.path.commonpath([run.parent for run in given]))
        page = report(given, arguments.output or together / "report")
        make_console().print(summary_table(read_runs(given)))
    print(page)


def _folder_of(given: list[Path], quick: bool) -> Path:
    """The folder of the experiment whose YAML was given. Raises ``UserError`` if that is no experiment or has not started."""
    from megarewarm.config.experiment import is_experiment as names_experiment
    from megarewarm.config.load import read_configs
    from megarewarm.report.numbers.experiment import is_experiment

    mapping, _ = read_configs([str(path) for path in given])
    if not names_experiment(mapping):
        raise UserError(f"{given[0]}: not an experiment (no key 'experiment'): give the folder of a run or of an experiment")
    folder = Path(str(mapping.get("folder") or f"runs/{mapping['experiment']}") + "_quick" * quick)
    if not is_experiment(folder):
        raise UserError(f"{folder}: nothing there yet; start the experiment first: megarewarm sweep {given[0]}")
    return folder
