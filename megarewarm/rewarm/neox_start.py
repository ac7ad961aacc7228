"""From GPT-NeoX files to a megarewarm run: the meaning of 'load' once the checkpoint is open, and the account of every key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megarewarm.config.load import apply_override, validate
from megarewarm.config.neox_read import NeoxFile, read_neox
from megarewarm.config.neox_translate import Translation, ranks_asked, translate
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import Origins
from megarewarm.errors import UserError
from megarewarm.record.layout import CONFIG_FILE


@dataclass(frozen=True)
class Account:
    """The fate of a GPT-NeoX configuration: key -> meaning here, key -> why it has no effect, remarks, its ranks."""

    honoured: dict[str, str]
    not_applicable: dict[str, str]
    notes: list[str] = field(default_factory=list)
    ranks: int = 1


def load_neox(files: Sequence[Path], overrides: Sequence[str], world_size: int | None) -> tuple[RunConfig, Account]:
    """The run that GPT-NeoX ``files`` describe on ``world_size`` ranks (None: as few as possible), and the account of every
    key. ``overrides``: words ``section.key=value`` with megarewarm's keys, applied last. Raises ``UserError``."""
    file = read_neox(files)
    ranks = ranks_asked(file) if world_size is None else world_size
    translation = translate(file, ranks)
    start, model, notes = _start(file, translation)
    mapping: dict[str, Any] = translation.mapping | {"start": start, "model": translation.mapping["model"] | model}
    origins: Origins = {(): file.name} | _places(file)
    for word in overrides:
        apply_override(mapping, origins, word)
    honoured = {key: meaning for key, meaning in file.honoured.items() if key not in translation.idle}
    account = Account(honoured, file.not_applicable | translation.idle, [*translation.notes, *notes], ranks)
    return validate(RunConfig, mapping, origins), account


def _places(file: NeoxFile) -> Origins:
    """The places of megarewarm's keys that come from one key of GPT-NeoX, for error messages."""
    places: Origins = {}
    for key, meaning in file.honoured.items():
        ours = meaning.split(",")[0].split(";")[0].split(":")[0]
        if key in file.places and re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", ours):
            places.setdefault(tuple(ours.split(".")), file.place(key))
    return places


def _start(file: NeoxFile, translation: Translation) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(the section 'start', additions to 'model', notes)."""
    load = translation.load
    if load is None:
        return {}, {}, []
    save = translation.mapping["folder"]
    if save is not None and Path(load).resolve() == Path(save).resolve() and _begins_here(Path(load)):
        # GPT-NeoX's usual way to say: continue if there is something to continue
        note = f"load and save are both {load}: the run starts from scratch there, and resumes from its own newest checkpoint"
        return {}, {"vocab_size": translation.vocabulary()}, [note]
    from megarewarm.checkpoint.source import open_checkpoint

    try:
        source = open_checkpoint(load)
    except UserError as error:
        raise UserError(f"{file.place('load')}: {error}") from error
    notes = []
    rows, expected = source.model_config.vocab_size, translation.vocabulary_or_none()
    if expected is not None and expected != rows:
        notes.append(f"the checkpoint has {rows:,} vocabulary rows, the file asks for {expected:,}: the checkpoint's are used")
    model = {"vocab_size": rows}
    if translation.finetune:
        notes.append("finetune: weights only; optimizer, schedule, data and iteration are reset")
        return {"from": load, "intent": "rewarm"}, model, notes
    if source.training is None:
        raise UserError(
            f"{file.place('load')}: {load} ({source.format}) holds weights only, so training can't continue from it; set "
            f"'finetune: true' to start from its weights alone"
        )
    keeps_rng = translation.keeps_rng and "rng" in source.keeps
    if translation.keeps_rng and not keeps_rng:
        notes.append("the random state of that format is not used: without dropout nothing here depends on it")
    start: dict[str, Any] = {"from": load, "intent": "resume", "rng": "keep" if keeps_rng else "reseed"}
    if translation.overrides_schedule:
        lines = dict.fromkeys(("moments", "optimizer_step", "loss_scale"), "keep")
        start |= lines | dict.fromkeys(("schedule", "iteration", "data"), "continue") | {"intent": "rewarm"}
        notes.append("override_lr_scheduler: this file's curve, at the checkpoint's position; it does not warm up again")
    return start, model, notes


def _begins_here(folder: Path) -> bool:
    """Whether ``folder`` is to be this run's own: missing, empty, or a megarewarm run."""
    return not folder.exists() or not any(folder.iterdir()) or (folder / CONFIG_FILE).is_file()


def show_account(account: Account, console: Console) -> None:
    """Every key of the files: how many are honoured, and one line for each that has no effect, with the reason."""
    ranks = f"; for {account.ranks} ranks" if account.ranks > 1 else ""
    console.print(
        f"GPT-NeoX configuration: {len(account.honoured)} keys are honoured (docs/neox_config.md){ranks}", highlight=False
    )
    if account.not_applicable:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(overflow="fold", ratio=1)
        table.add_column(overflow="fold", ratio=1)
        for reason in dict.fromkeys(account.not_applicable.values()):
            keys = [key for key, why in account.not_applicable.items() if why == reason]
            table.add_row(", ".join(keys), reason)
        console.print(f"{len(account.not_applicable)} keys are not applicable:", highlight=False)
        console.print(table)
    for note in account.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
