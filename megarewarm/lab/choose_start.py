"""Which checkpoint to start from: scores of each candidate on the same tokens, and short runs from each as the truth."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from megarewarm.config.budget import Budget
from megarewarm.config.data import DataConfig, ValidationSet
from megarewarm.config.experiment import is_experiment, load_experiment
from megarewarm.config.load import merge, read_configs
from megarewarm.console import make_bar
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.errors import UserError
from megarewarm.files import write_whole
from megarewarm.lab.candidates import Candidate, check_reads, find_candidates
from megarewarm.lab.start_scores import Scores, choose_positions, kendall_tau, score
from megarewarm.lab.sweep import sweep
from megarewarm.parallel.connect import choose_device
from megarewarm.parallel.meeting_place import launch_of_process
from megarewarm.record.run import read_run
from megarewarm.report.figures.starts import ScorePanel, draw_starts
from megarewarm.report.pages.files import write_json
from megarewarm.spelling import tokens_text

_DECAYED = 0.5  # of the peak: below it a rate counts as decayed
PICTURE, NUMBERS, PROBES = "start_scores.png", "start_scores.json", "probes"


@dataclass(frozen=True)
class Settings:
    """``on``: the token file that is to be learned; ``also``: further ones, such as old data. ``tokens``: read of each.
    ``positions``, ``classes``, ``seed``: of LogME. ``probe``: length of the probe runs, None for none, with the run file and
    overrides ``config``; ``folder``: for pictures, numbers and probe runs."""

    on: str
    also: Sequence[str]
    tokens: int
    folder: Path
    sequence_length: int | None = None
    micro_batch: int = 4
    positions: int = 16_384
    classes: int = 128
    seed: int = 1
    device: str = "auto"
    probe: Budget | None = None
    config: Sequence[str] = ()
    jobs: int | None = None


def choose_start(names: Sequence[str], settings: Settings, console: Console) -> int:
    """Score the checkpoints ``names``, tell and draw it. Returns the exit code: 0, or that of probe runs that did not end.
    Raises ``UserError``, before anything is written or computed for candidates that can't be compared."""
    device = choose_device(launch_of_process(), settings.device)
    candidates = find_candidates(names)
    mapping = _probe_mapping(settings)
    length = _sequence_length(candidates, settings, mapping)
    opened = [open_tokens(path) for path in (settings.on, *settings.also)]
    for candidate in candidates:
        check_reads(candidate, opened)
    files, sets = _windows(candidates, settings, length)
    for note in (note for windows in sets for note in windows.notes):
        console.print(note, style="yellow", highlight=False)
    positions = choose_positions(sets[0], settings.classes, settings.positions, settings.seed, files.vocab_size)
    console.print(
        f"{len(candidates)} candidates, {tokens_text(sum(windows.num_tokens for windows in sets))} tokens each in windows of "
        f"{length}; LogME at {len(positions.places):,} positions of {sets[0].name} whose next token is one of its "
        f"{positions.classes} commonest ({100 * positions.share:.0f} % of all are)",
        highlight=False,
    )
    with _bar(console, len(candidates) * sum(windows.num_tokens for windows in sets)) as (describe, advance):
        found = []
        for candidate in candidates:
            describe(candidate.label)
            found.append(score(candidate, sets, positions, device, settings.micro_batch, advance))
    code = 0
    if mapping is not None:
        code, found = _probed(candidates, found, sets, settings, mapping, console)
    _tell(candidates, found, sets, settings, console)
    return code


def _sequence_length(candidates: Sequence[Candidate], settings: Settings, mapping: Mapping[str, Any] | None) -> int:
    """That of the probe runs, or the one given, or the most that all candidates have positions for."""
    shortest = min(candidates, key=lambda each: each.source.model_config.max_positions)
    most = shortest.source.model_config.max_positions
    given = (mapping.get("data") or {}).get("sequence_length") if mapping is not None else None
    length = settings.sequence_length or given or most
    if mapping is not None and length != given:
        raise UserError(f"--sequence-length {length}: probe runs have data.sequence_length {given}; leave it out")
    if not isinstance(length, int) or not 0 < length <= most:
        raise UserError(f"sequence length {length}: expected 1 to {most}, the positions of {shortest.name}")
    return length


def _windows(candidates: Sequence[Candidate], settings: Settings, length: int) -> tuple[TokenFiles, list[ValidationWindows]]:
    paths = [settings.on, *settings.also]
    if len(set(paths)) < len(paths):
        raise UserError("--on and --and: a token file is given twice")
    names = [Path(path).name for path in paths]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
    section = DataConfig.model_validate({"sequence_length": length, "train": [{"path": settings.on}]})
    files = TokenFiles(section, max(each.source.model_config.vocab_size for each in candidates))
    asked = [_set(name, path, settings.tokens, number) for number, (name, path) in enumerate(zip(names, paths, strict=True))]
    return files, [ValidationWindows(ValidationSet.model_validate(each), files) for each in asked]


def _set(name: str, path: str, tokens: int, number: int) -> dict[str, Any]:
    role = "upstream" if number else "downstream"
    return {"name": name, "role": role, "tokens": tokens, "sources": [{"path": path}]}


@contextmanager
def _bar(console: Console, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """(What names the candidate on a bar, what moves it)."""
    with make_bar(console) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda count: bar.advance(task, count)


# ---- probe runs ------------------------------------------------------------------------------------------------------


def _probe_mapping(settings: Settings) -> dict[str, Any] | None:
    """The run file of the probes, merged but not validated; None without probes."""
    if settings.probe is None:
        if settings.config:
            raise UserError("--with: is the run file of the probe runs; give their length too, with --probe")
        return None
    if not settings.config:
        raise UserError(f"--probe {settings.probe}: needs the run file that the probe runs follow: --with RUN.yml")
    mapping, _ = read_configs(settings.config)
    if is_experiment(mapping):
        raise UserError(f"{settings.config[0]}: an experiment; --with takes the file of a single run")
    return mapping


def _probed(
    candidates: Sequence[Candidate],
    found: Sequence[Scores],
    sets: Sequence[ValidationWindows],
    settings: Settings,
    mapping: dict[str, Any],
    console: Console,
) -> tuple[int, list[Scores]]:
    """Run the probes that are not done, and add their last losses."""
    folder = settings.folder / PROBES
    arms = [f"{number:02d}_{re.sub(r'[^A-Za-z0-9_.-]+', '_', each.label)[-40:]}" for number, each in enumerate(candidates, 1)]
    paths = [settings.on, *settings.also]
    validation = [_set(each.name, path, settings.tokens, i) for i, (each, path) in enumerate(zip(sets, paths, strict=True))]
    base = {key: value for key, value in mapping.items() if key not in ("name", "folder")}
    base = merge(
        base,
        {
            "data": {"validation": validation},
            "training": {"budget": str(settings.probe)},
            "evaluation": {"every": None, "every_in_warmup": None, "at_start": True, "windows": "fixed"},
            "checkpoint": {
                "every": None,
                "keep_last": 1,
                "keep_every": None,
                "keep_best": None,
                "extra_steps": [],
                "average": None,
            },
            "export": {"huggingface": False},
            "interpolate": None,
        },
    )
    runs = [{"name": arm, "start": {"from": each.name}} for arm, each in zip(arms, candidates, strict=True)]
    written = {"experiment": "choose_start", "folder": str(folder), "base": base, "runs": runs}
    experiment = load_experiment(written, {})
    file = settings.folder / "probes.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, yaml.safe_dump(written, sort_keys=False).encode())
    code = sweep(
        experiment,
        [str(file)],
        console,
        launcher="local",
        jobs=settings.jobs,
        ranks=1,
        options=[],
        only=[],
        dry_run=False,
        environment=dict(os.environ),
    )
    after = [_last_losses(folder / arm) for arm in arms]
    return code, [replace(scores, after=losses) for scores, losses in zip(found, after, strict=True)]


def _last_losses(run: Path) -> dict[str, float]:
    """Of a complete run; none of one that failed."""
    if not run.is_dir():
        return {}
    events = read_run(run).events
    return {} if not any(e["event"] == "stop" and e.get("reason") == "complete" for e in events) else _newest(run)


def _newest(run: Path) -> dict[str, float]:
    return {each.name: each.loss for each in read_run(run).evaluations}


# ---- table and picture ----------------------------------------------------------------------------------------------------


def _tell(
    candidates: Sequence[Candidate],
    found: Sequence[Scores],
    sets: Sequence[ValidationWindows],
    settings: Settings,
    console: Console,
) -> None:
    new = sets[0].name
    probed = all(new in scores.after for scores in found)
    console.print(_table(candidates, found, sets, probed))
    panels, lines = _panels(candidates, found, sets, probed)
    truth = [scores.after[new] if probed else scores.losses[new] for scores in found]
    what = f"loss on {new} after {settings.probe}" if probed else f"loss on {new} at the start"
    decayed = [None if each.phase.share is None else each.phase.share < _DECAYED for each in candidates]
    figure = draw_starts([str(number) for number, _ in enumerate(candidates, 1)], decayed, truth, what, panels)
    settings.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.folder / PICTURE, dpi=130)
    write_json(settings.folder / NUMBERS, [_row(each, scores) for each, scores in zip(candidates, found, strict=True)])
    for line in lines:
        console.print(line, highlight=False)
    best = min(range(len(found)), key=lambda i: truth[i])
    said = f"after {settings.probe}" if probed else "at the start; whether that is the best start, probe runs say (--probe)"
    console.print(f"lowest loss on {new}: {candidates[best].label}, {truth[best]:.4f} {said}", highlight=False)
    console.print(f"{settings.folder / PICTURE}, {settings.folder / NUMBERS}", highlight=False)


def _table(candidates: Sequence[Candidate], found: Sequence[Scores], sets: Sequence[ValidationWindows], probed: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("candidate", overflow="fold", min_width=12)
    table.add_column("phase, rate of peak", overflow="fold")
    for windows in sets:
        table.add_column(windows.name, justify="right", overflow="fold")
    table.add_column("LogME", justify="right", no_wrap=True)
    for windows in sets if probed else ():
        table.add_column(f"{windows.name} after", justify="right", overflow="fold")
    for number, (each, scores) in enumerate(zip(candidates, found, strict=True), 1):
        after = [f"{scores.after[windows.name]:.4f}" for windows in sets] if probed else []
        losses = [f"{scores.losses[windows.name]:.4f}" for windows in sets]
        table.add_row(str(number), each.label, str(each.phase), *losses, f"{scores.logme:.4f}", *after)
    return table


def _panels(
    candidates: Sequence[Candidate], found: Sequence[Scores], sets: Sequence[ValidationWindows], probed: bool
) -> tuple[list[ScorePanel], list[str]]:
    """The panels, and a line for each score's tau with the truth, where there is one. A score agrees (tau 1) where it puts
    the candidates in the order of their losses after the probe: the lower losses, the higher LogME, the later checkpoint."""
    new = sets[0].name
    scores: list[tuple[str, Sequence[float | None], float]] = []
    if probed:
        scores.append((f"loss on {new} at the start", [each.losses[new] for each in found], 1.0))
    scores.append(("LogME", [each.logme for each in found], -1.0))
    scores += [(f"loss on {other.name} at the start", [each.losses[other.name] for each in found], 1.0) for other in sets[1:]]
    if any(each.tokens for each in candidates):
        scores.append(("tokens trained on", [None if each.tokens is None else float(each.tokens) for each in candidates], -1.0))
    panels, lines = [], []
    for label, values, sign in scores:
        title = label
        if probed:
            pairs = [(sign * value, each.after[new]) for value, each in zip(values, found, strict=True) if value is not None]
            tau = kendall_tau([value for value, _ in pairs], [after for _, after in pairs])
            title = f"{label}: tau {'-' if tau is None else f'{tau:.2f}'}"
            lines.append(f"  {label}: {'-' if tau is None else f'{tau:.2f}'} ({len(pairs)} candidates)")
        panels.append(ScorePanel(values, label, title if probed else ""))
    if lines:
        lines.insert(0, f"Kendall's tau of each score with the loss on {new} after the probe (1: the same order)")
    return panels, lines


def _row(candidate: Candidate, scores: Scores) -> dict[str, Any]:
    return {
        "candidate": candidate.name,
        "label": candidate.label,
        "format": candidate.source.format,
        "step": candidate.step,
        "tokens": candidate.tokens,
        "phase": candidate.phase.name,
        "rate_over_peak": candidate.phase.share,
        **{f"loss_{name}": loss for name, loss in scores.losses.items()},
        "logme": scores.logme,
        **{f"loss_{name}_after": loss for name, loss in scores.after.items()},
    }
