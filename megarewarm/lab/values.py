"""The values of a run's training rows: its sources in a table, the best and worst rows as text, a selection of documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.own.state import read_state
from megarewarm.config.data import Source
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.document_table import DocumentTable, table_path, write_table
from megarewarm.data.files.file_identity import FileIdentity, identity_of
from megarewarm.data.files.library import part_of
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.data.mixture.mixture import source_names
from megarewarm.data.text.tokenizers import load_tokenizer
from megarewarm.errors import UserError, nearest
from megarewarm.record.layout import CHECKPOINTS
from megarewarm.record.run import RecordedRun
from megarewarm.record.values import SIGN, ValuedRow, Values
from megarewarm.report.numbers.values import MeanValue, predictions, source_values
from megarewarm.spelling import MINUS, counted, tokens_text

By = Literal["source", "document"]


def check_sets(values: Values, against: Sequence[str]) -> list[str]:
    """The validation sets to look at, all where none is named. Raises ``UserError`` for one without values."""
    for name in against:
        if name not in values.sets:
            known = ", ".join(values.sets)
            raise UserError(f"{values.path}: no values against '{name}'{nearest(name, values.sets)}; it has {known}")
    return list(against) or values.sets


def show_values(values: Values, run: RecordedRun, against: Sequence[str], console: Console) -> None:
    """Print the sources' values against each set, the most harmful first, and how well the steps were predicted."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("source", overflow="fold", min_width=8)
    for heading in ("rows", "tokens", *against):
        table.add_column(heading, justify="right", no_wrap=heading in ("rows", "tokens"))
    for one in source_values(values, against):
        table.add_row(
            one.source, f"{one.rows:,}", tokens_text(one.tokens), *(_value_text(one.values[name]) for name in against)
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Value: fall of the set's loss in nats per token, by a million tokens, with its standard error; {SIGN}. It belongs to "
        f"this run: its steps, its optimizer, these sets.",
        highlight=False,
    )
    for name, pair in predictions(run).items():
        if name in against and pair.r_squared is not None:
            trust = f"R squared {pair.r_squared:.3f}".replace("-", MINUS)
            console.print(f"{name}: predicted against measured change of {len(pair.measured)} steps: {trust}", highlight=False)


def _value_text(value: MeanValue) -> Text:
    text = f"{_plain(value.per_million, 3, '+')} ± {_plain(value.error, 2)}".replace("-", MINUS)
    return Text(text, style="red" if value.is_harmful else "")


def _plain(number: float, digits: int, sign: str = "") -> str:
    """To ``digits`` of it, without an exponent where it is large."""
    return f"{number:{sign}.0f}" if abs(number) >= 10 ** (digits - 1) else f"{number:{sign}.{digits}g}"


def show_extremes(values: Values, config: RunConfig, against: Sequence[str], count: int, console: Console) -> None:
    """Print the ``count`` rows with the highest and lowest value for each set: where they are from, and their text, or ids
    where the run has no tokenizer."""
    decode = _decoder(config, console)
    for name in against:
        ascending = np.argsort(values.values[name], kind="stable")
        ascending = ascending[np.isfinite(values.values[name][ascending])]
        for what, places in (("highest", ascending[::-1][:count]), ("lowest", ascending[:count])):
            console.print(f"\n[bold]{what} for {name}[/]", highlight=False)
            for place in places.tolist():
                row = values.row(place)
                documents = ", ".join(f"{part.document}+{part.offset}" for part in row.parts[:3])
                more = "" if len(row.parts) <= 3 else f" and {len(row.parts) - 3} more"
                where = f"{row.source}, documents {documents}{more}, step {row.step:,}"
                said = Text(f"{row.values[name]:+.3g} ".replace("-", MINUS), style="bold")
                console.print(said.append(where, style="dim"))
                console.print(Text(f"  {_excerpt(row, decode)}"))


def _excerpt(row: ValuedRow, decode: Callable[[list[int]], str]) -> str:
    tokens = row.tokens
    if tokens is None:
        return "(its tokens were not kept: valuation.keep_extremes)"
    text = decode(tokens)
    return repr(text[:400])[1:-1]


def _decoder(config: RunConfig, console: Console) -> Callable[[list[int]], str]:
    if config.data.tokenizer is not None:
        try:
            tokenizer = load_tokenizer(config.data.tokenizer)
        except UserError as error:
            console.print(f"rows as token ids: {error}", style="yellow", highlight=False)
        else:
            return lambda ids: tokenizer.decode(np.array(ids, np.int64))
    return lambda ids: " ".join(map(str, ids))


@dataclass(frozen=True)
class KeptOfSource:
    """What is kept of the training source ``name``: ``kept`` documents out of ``of``, and the source that reads them; None if
    none are."""

    name: str
    kept: int
    of: int
    source: Source | None


def select(
    values: Values,
    config: RunConfig,
    against: Sequence[str],
    by: By,
    output: Path,
    tell: Callable[[str], None] = lambda _: None,
) -> list[KeptOfSource]:
    """Write into the new folder ``output``, for each training source of which something goes and something stays, a list of
    the documents that stay.

    ``by`` source: whole sources whose value, summed over the sets ``against``, is below zero by two standard errors.
    document: those whose rows, each counted by the document's share of its tokens, sum up to less than zero; documents that
    were not valued stay. ``tell`` is called with a line on what is harmful and no source of the configuration: replays of a
    lineage. Raises ``UserError`` for an ``output`` that exists, where nothing is harmful or nothing would stay,
    and for files that have changed.
    """
    if output.exists():
        raise UserError(f"{output} exists: remove it, or choose another folder")
    sources = _training_sources(config)
    harmful: dict[str, npt.NDArray[np.int64] | None]
    if by == "source":
        harmful = {one.source: None for one in source_values(values, against) if one.values[""].is_harmful}
    else:
        harmful = dict(_harmful_documents(values, against))
    for name in sorted(set(harmful) - set(sources)):
        del harmful[name]
        tell(f"'{name}' is harmful in part or as a whole, and stays: replay.of lineage takes no list; see replay.fraction")
    if not harmful:
        raise UserError(f"{values.path}: no {by} is harmful to {', '.join(against)}, so nothing would be dropped")
    found: list[KeptOfSource] = []
    lists: list[tuple[Path, npt.NDArray[np.int64], TokenFile]] = []
    read = _files_read(values) if by == "document" else {}
    for name, source in sources.items():
        file = open_tokens(source.path, dtype=source.dtype, vocab_size=config.model.vocab_size if config.model else None)
        if name in harmful and name in read and (change := identity_of(file).differing(read[name])) is not None:
            raise UserError(f"{file.path}: changed since the run read it ({change}), so the values aren't its own: restore it")
        view = part_of(file, source, config.data)
        first, last = view.documents_of
        held = view.in_file(np.arange(first, last))
        dropped = harmful.get(name, np.empty(0, np.int64))
        kept = np.empty(0, np.int64) if dropped is None else np.setdiff1d(held, dropped)
        left = source if len(kept) else None
        if 0 < len(kept) < len(held) and source.layout == "rows":
            raise UserError(f"source '{name}' is read in rows, not in documents: use --by source")
        if 0 < len(kept) < len(held):
            path = table_path(output / re.sub(r"[^A-Za-z0-9_.-]", "_", name))  # a name may hold slashes
            if path in [other for other, *_ in lists]:
                raise UserError(f"two sources would have the list {path}: give one of them another name")
            lists.append((path, kept, file))
            left = source.model_copy(update={"documents": str(path), "split": None, "part": "train"})
        found.append(KeptOfSource(name, len(kept), len(held), left))
    if not any(selection.source for selection in found):
        raise UserError(f"{values.path}: every source is harmful to {', '.join(against)}: nothing would stay")
    about = {"name": "kept", "dropped": f"harmful {by}s", "against": ", ".join(against), "by": str(values.path.parent)}
    try:
        for path, kept, file in lists:
            write_table(path, DocumentTable("list", kept, about), file)
    except OSError as error:
        raise UserError(f"{output}: can't be written ({error.strerror or error}); choose another folder") from error
    return found


def _training_sources(config: RunConfig) -> dict[str, Source]:
    blends = [config.data.train, *(switch.train for switch in config.data.switches)]
    if config.replay is not None and config.replay.sources is not None:
        blends.append(config.replay.sources)
    return {name: source for blend in blends for name, source in zip(source_names(blend), blend, strict=True)}


def _files_read(values: Values) -> dict[str, FileIdentity]:
    """Of each source what its file was when the run read it. Raises ``UserError`` for a run without a checkpoint."""
    folder = values.path.parent
    found = checkpoints_in(folder / CHECKPOINTS)
    if not found:
        raise UserError(f"{folder}: no checkpoint, which says what the files were that the run read: use --by source")
    return {seen.name: seen.file for seen in read_state(found[-1][1]).lineage.stages[-1].data}


def _harmful_documents(values: Values, against: Sequence[str]) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Of each source that has any, the documents with a value below zero."""
    sums: dict[str, dict[int, float]] = {}
    for number in range(len(values)):
        row = values.row(number)
        length = sum(part.tokens for part in row.parts)
        value = sum(row.values.get(name, 0.0) for name in against)
        of = sums.setdefault(row.source, {})
        for part in row.parts:
            of[part.document] = of.get(part.document, 0.0) + value * part.tokens / length
    for source, documents in sums.items():
        below = np.array(sorted(document for document, value in documents.items() if value < 0), np.int64)
        if len(below):
            yield source, below


def show_selection(selections: Sequence[KeptOfSource], config: RunConfig, console: Console) -> None:
    """Print what stays, and the keys of the run that read it: each blend with its own sources and weights."""
    for one in selections:
        dropped = f"{one.of - one.kept:,} dropped"
        console.print(f"{one.name}: {one.kept:,} of {counted(one.of, 'document')} kept, {dropped}", highlight=False)
    kept = {one.name: one.source for one in selections if one.source is not None}
    for where, gone in _emptied(config, kept):
        console.print(f"{where}: all of {gone} goes, so this blend has no sources: give it others", highlight=False)
    text = yaml.safe_dump(_keys(config, kept), sort_keys=False, allow_unicode=True, width=1000)
    console.print("to train on what is kept:", highlight=False)
    console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _emptied(config: RunConfig, kept: Mapping[str, Source]) -> Iterator[tuple[str, str]]:
    """The key, and the sources, of each blend of which nothing is ``kept``."""
    blends = {"data.train": config.data.train}
    blends |= {f"data.switches[{i}].train": switch.train for i, switch in enumerate(config.data.switches)}
    if config.replay is not None and config.replay.sources is not None:
        blends["replay.sources"] = config.replay.sources
    for where, blend in blends.items():
        if not kept.keys() & (names := source_names(blend)):
            yield where, ", ".join(names)


def _keys(config: RunConfig, kept: Mapping[str, Source]) -> dict[str, Any]:
    def left(blend: Sequence[Source]) -> list[dict[str, Any]]:
        which = ("documents", "split", "part")
        return [
            source.model_copy(update={key: getattr(kept[name], key) for key in which}).model_dump(
                mode="json", exclude_defaults=True
            )
            for name, source in zip(source_names(blend), blend, strict=True)
            if name in kept
        ]

    data: dict[str, Any] = {"train": left(config.data.train)}
    if config.data.switches:
        dumped = [switch.model_dump(mode="json", exclude_defaults=True) for switch in config.data.switches]
        data["switches"] = [{**said, "train": left(s.train)} for said, s in zip(dumped, config.data.switches, strict=True)]
    if config.replay is None or config.replay.sources is None:
        return {"data": data}
    return {"data": data, "replay": {"sources": left(config.replay.sources)}}
