"""Bytes of text over which validation losses are measured, so that losses of different tokenizers compare.

The loss of a set in bits per byte is the sum of its losses in nats, over ln 2 and the bytes of the text of the same targets.
The token that ends a document is no text: its loss counts, its bytes are 0. Without such tokens it is the bits_per_byte of
lm-eval. Where the tokenizer is not at hand, the bytes follow from the mean that the manifest gives, as for the Pile
(arXiv 2101.00027, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.checkpoint.tokenizer_source import loaded, named_tokenizer, still_there
from megarewarm.config.data import ValidationSet
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.manifest import made_by, manifest_of
from megarewarm.data.mixture.validation import Slice, WindowSet
from megarewarm.data.text.byte_lengths import ByteLengths
from megarewarm.errors import UserError

_ROWS = 64  # windows in memory at once


@dataclass(frozen=True)
class SetBytes:
    """How the bytes of a set's windows are found. ``tokenizer``: by its tokens, ``ends`` being ids that are no text; without
    one by ``means``, the bytes per token of each source. ``mask``: whether positions after a document have no loss."""

    tokenizer: Path | None
    ends: tuple[int, ...]
    means: tuple[float, ...]
    mask: bool

    def measured(self, windows: Slice, targets: int) -> int | None:
        """Bytes of the text of ``windows`` whose loss is measured, on ``targets`` tokens; None where they are not known."""
        if self.tokenizer is None:
            counts = windows.counts()
            return round(targets * float(np.average(self.means, weights=counts)))
        lengths = self._lengths
        if lengths is None:
            return None
        found = [self._of(rows, lengths) for rows in windows.micro_batches(0, 1, _ROWS)]
        return None if None in found else sum(count for count in found if count is not None)

    def _of(self, rows: npt.NDArray[np.int64], table: ByteLengths) -> int | None:
        if int(rows.max()) >= len(table.lengths):  # a row that no token has, as in a padded vocabulary
            return None
        inputs, targets = rows[:, :-1], rows[:, 1:]
        lengths = np.where(np.isin(targets, self.ends), 0, table.lengths[targets])
        after_end = np.isin(inputs, self.ends)
        if table.leading is not None:
            lengths = lengths - (after_end & table.leading[targets])
        if self.mask:
            lengths = np.where(after_end, 0, lengths)
        return None if (lengths < 0).any() else int(lengths.sum())

    @cached_property
    def _lengths(self) -> ByteLengths | None:
        assert self.tokenizer is not None
        try:
            table = loaded(self.tokenizer).byte_lengths()
        except UserError:
            return None
        # a space before each text is only found where a token ends the text before it
        return None if table is None or (table.leading is not None and not self.ends) else table


class TextBytes:
    """The bytes of a run's validation sets. Nothing is read before they are asked for; then a set's tokens once."""

    def __init__(self, config: RunConfig, eod: int | None) -> None:
        mask = config.data.mask_eod_loss
        name = config.data.tokenizer
        named = None if name is None else named_tokenizer(name, "data.tokenizer")
        self._sets = {each.name: set_bytes(each, named, eod, mask) for each in config.data.validation}
        self._known: dict[str, int | None] = {}

    def measured(self, windows: WindowSet, number: int, targets: int) -> int | None:
        """Bytes of the text whose loss evaluation ``number`` of a set measured, on ``targets`` tokens; None if unknown."""
        found = self._sets.get(windows.name)
        if found is None:
            return None
        if not windows.is_fixed:
            return found.measured(windows.slice(number), targets)
        if windows.name not in self._known:
            self._known[windows.name] = found.measured(windows.slice(number), targets)
        return self._known[windows.name]

    @property
    def notes(self) -> list[str]:
        """On sets whose bytes are those of the whole file, in the mean."""
        rough = [name for name, found in self._sets.items() if found is not None and found.tokenizer is None]
        if not rough:
            return []
        names = ", ".join(f"'{name}'" for name in rough)
        return [
            f"bits per byte of the validation sets {names} follow from the mean bytes per token of their files: the tokenizer "
            f"that their manifests name is not here (data.tokenizer names one)"
        ]


def bits_per_byte(loss: float, targets: int, count: int | None) -> float | None:
    """The mean ``loss`` in nats per token over ``targets`` tokens, in bits per byte of ``count`` bytes; None without bytes."""
    return loss * targets / (math.log(2) * count) if count else None


def set_bytes(config: ValidationSet, named: Path | None, eod: int | None, mask: bool) -> SetBytes | None:
    """How the bytes of a set are found; None where its manifests don't say enough.

    ``named``: the tokenizer that the user names; ``eod``: the token that ends documents of files without manifests.
    """
    paths = [Path(f"{source.path.removesuffix('.bin').removesuffix('.idx')}.bin") for source in config.sources]
    made = [made_by(path) for path in paths]
    tokenizer = named or (still_there([each.tokenizer for each in made if each]) if all(made) else None)
    ends = {eod if each is None else each.end for each in made}
    if tokenizer is not None:
        return SetBytes(tokenizer, tuple(end for end in ends if end is not None), (), mask) if len(ends) == 1 else None
    means = [_mean(manifest_of(path)) for path in paths]
    if mask or any(source.split is not None or source.documents is not None for source in config.sources):
        return None
    return SetBytes(None, (), tuple(mean for mean in means if mean), mask) if all(means) else None


def _mean(manifest: dict[str, Any] | None) -> float | None:
    """Bytes of text per token of a whole file, as its manifest counts them."""
    count, tokens = ((manifest or {}).get(key) for key in ("bytes", "tokens"))
    return count / tokens if isinstance(count, int) and isinstance(tokens, int) and count > 0 and tokens > 0 else None
