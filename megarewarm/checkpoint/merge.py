"""Weight averages of several checkpoints, one parameter at a time: a cheap remedy for forgetting.

The mean of the last checkpoints acts like a decayed learning rate; interpolation between the start and the end of a
re-warmed run trades what was learnt against what was forgotten (Wortsman et al., arXiv 2109.01903; Ilharco et al., arXiv
2208.05592). The result is a checkpoint whose history names its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarewarm.checkpoint.convert import FORMS, Conversion, ConvertOptions, Watched
from megarewarm.checkpoint.lineage import Stage
from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.source import ForeignCheckpoint, open_checkpoint, tokenizers_of
from megarewarm.checkpoint.weights import Description, OnBytes, Weights, check, expected_shapes, refuse_another_head
from megarewarm.config.model import ModelConfig
from megarewarm.data.files.manifest import refuse_other_tokenizers
from megarewarm.errors import UserError
from megarewarm.model.parameters import FUNCTION_KEYS, SHAPE_KEYS
from megarewarm.record.layout import CHECKPOINTS

# formats name the activation of one model differently
_SAME_FUNCTION = tuple(key for key in FUNCTION_KEYS if key != "activation")


def mean_shares(count: int) -> list[float]:
    """Equal shares of ``count`` checkpoints."""
    return [1 / count] * count


def ema_shares(count: int, decay: float) -> list[float]:
    """Shares of a moving average that starts at the first (oldest): average = decay * average + (1 - decay) * next. Raises
    ``UserError`` for a decay outside [0, 1)."""
    if not 0 <= decay < 1:
        raise UserError(f"--ema {decay:g}: the decay must lie in [0, 1)")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def interpolation_shares(alpha: float) -> list[float]:
    """Shares of start and end: (1 - alpha) * start + alpha * end. Beyond 0 and 1 it extrapolates."""
    return [1 - alpha, alpha]


class Combination:
    """The sum of ``shares[i] * weights[i]``, computed in float64, given in fp32."""

    def __init__(self, weights: Sequence[Weights], shares: Sequence[float]) -> None:
        self._weights, self._shares = list(weights), list(shares)
        self.where = " + ".join(f"{share:.4g} x {each.where}" for share, each in zip(shares, weights, strict=True))

    def describe(self) -> Mapping[str, Description]:
        first = self._weights[0].describe()
        return {name: Description(item.shape, torch.float32, item.place) for name, item in first.items()}

    def read(self, name: str) -> Tensor:
        total: Tensor | None = None
        for weights, share in zip(self._weights, self._shares, strict=True):
            if share == 0:
                continue
            part = weights.read(name)
            total = torch.zeros(part.shape, dtype=torch.float64) if total is None else total
            total.add_(part, alpha=share)
        assert total is not None, "all shares are zero"
        return total.float()


def check_alike(models: Sequence[tuple[str, ModelConfig]]) -> None:
    """Raise ``UserError`` naming what differs between the models of several checkpoints."""
    (first, one), *others = models
    for name, other in others:
        for key in (*SHAPE_KEYS, *_SAME_FUNCTION):
            if getattr(one, key) != getattr(other, key):
                raise UserError(
                    f"{name}: {key} is {getattr(other, key)}, in {first} it is {getattr(one, key)}; only checkpoints of "
                    f"the same model can be averaged"
                )


@dataclass(frozen=True)
class Merge:
    """Names of checkpoints, the share of each, and what that is in words."""

    names: Sequence[str]
    shares: Sequence[float]
    what: str

    @property
    def description(self) -> str:
        """A description for messages."""
        parts = " + ".join(f"{share:.4g} x {name}" for share, name in zip(self.shares, self.names, strict=True))
        return f"{self.what}: {parts}"


def last_of(count: str, run: str) -> list[str]:
    """The names of a run's newest ``count`` checkpoints, oldest first. Raises ``UserError`` if there are fewer."""
    folder = Path(run)
    found = checkpoints_in(folder / CHECKPOINTS) or checkpoints_in(folder)
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


def merge(merged: Merge, destination: Path, options: ConvertOptions, on_bytes: OnBytes = lambda _: None) -> list[str]:
    """Write ``merged``. Returns notes. ``on_bytes`` is called with the bytes that were read. Raises ``UserError`` for a
    single checkpoint, for models that differ, and where ``destination`` holds anything else; nothing is written then."""
    if len(merged.names) < 2:
        raise UserError("at least two checkpoints are needed for an average")
    sources = [open_checkpoint(name) for name in merged.names]
    check_alike([(source.name, source.model_config) for source in sources])
    first = sources[0]
    refuse_other_tokenizers([made for source in sources for made in tokenizers_of(source)])
    per_read = sum(share != 0 for share in merged.shares)
    combination = Watched(Combination([source.weights for source in sources], merged.shares), lambda n: on_bytes(n * per_read))
    shapes = expected_shapes(first.model_config)
    for source in sources:
        check(source.weights, shapes)
        refuse_another_head(source.weights, shapes)
    tokenizer = first.tokenizer
    for source in sources[1:]:
        tokenizer = tokenizer.over(source.tokenizer)
    average = ForeignCheckpoint(destination.name, "merged", first.model_config, lambda: combination, [], tokenizer)
    average.lineage = sources[-1].lineage.extended(Stage(run=destination.name, intent=f"merged: {merged.description}"))
    return FORMS[options.form].write(Conversion(average, combination, first.model_config, destination, options))
