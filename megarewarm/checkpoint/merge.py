"""A weighted sum of checkpoints, written as a checkpoint whose history says what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megarewarm.checkpoint.convert import Wish, write_weights
from megarewarm.checkpoint.folder import checkpoints_in
from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.checkpoint.merging import Combination, check_alike
from megarewarm.checkpoint.own_export import weights_only_state, write_streaming
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.checkpoint.weights import check, expected_shapes
from megarewarm.errors import UserError


@dataclass(frozen=True)
class Merge:
    """Names of checkpoints, the share of each, and what that is in words."""

    names: Sequence[str]
    shares: Sequence[float]
    what: str

    @property
    def description(self) -> str:
        """For people."""
        parts = " + ".join(f"{share:.4g} x {name}" for share, name in zip(self.shares, self.names, strict=True))
        return f"{self.what}: {parts}"


def last_of(count: str, run: str) -> list[str]:
    """The names of a run's newest ``count`` checkpoints, oldest first. Raises ``UserError`` where there are fewer."""
    folder = Path(run)
    found = checkpoints_in(folder / "checkpoints") or checkpoints_in(folder)
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"--last {count}: the number of checkpoints comes first, then the run's folder")
    if len(found) < int(count):
        raise UserError(
            f"{run}: holds {len(found)} checkpoints, {count} were asked for; ask for fewer, or keep more (checkpoint.keep_last)"
        )
    return [str(path) for _, path in found[-int(count) :]]


def bytes_to_read(merged: Merge) -> int:
    """What ``merge`` reads: every parameter of every checkpoint whose share is not zero."""
    opened = [open_checkpoint(name) for name, share in zip(merged.names, merged.shares, strict=True) if share]
    return sum(item.nbytes for source in opened for item in source.weights.describe().values())


def merge(merged: Merge, destination: Path, wish: Wish, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Write ``merged``. Returns notes.

    ``advance`` is called with the bytes that were read. Raises ``UserError`` for a single checkpoint, for models that differ,
    and where ``destination`` holds anything else; nothing is written then.
    """
    if len(merged.names) < 2:
        raise UserError("at least two checkpoints are needed for an average")
    sources = [open_checkpoint(name) for name in merged.names]
    check_alike([(source.name, source.model_config) for source in sources])
    first = sources[0]
    combination = Combination([source.weights for source in sources], merged.shares)
    per_read = sum(share != 0 for share in merged.shares)
    shapes = expected_shapes(first.model_config)
    for source in sources:
        check(source.weights, shapes)
    history = sources[-1].lineage.extended(Stage(run=destination.name, intent=f"merged: {merged.description}"))
    state = weights_only_state(destination.name, first.model_config, Lineage(stages=history.stages))
    if wish.form == "megarewarm":
        described = {f"model.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}

        def read(key: str) -> torch.Tensor:
            tensor = combination.read(key.removeprefix("model."))
            advance(tensor.nbytes * per_read)
            return tensor

        write_streaming(destination, state, described, read)
        return []
    tokenizer = wish.tokenizer or getattr(first, "tokenizer", None)
    return write_weights(combination, first.model_config, destination, replace(wish, tokenizer=tokenizer), state.lineage)
