"""Validation on moving slices, as GPT-NeoX does it: every evaluation takes the tokens after those of the one before."""

from __future__ import annotations

from megarewarm.config.data import ValidationSet
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.blend import normalised
from megarewarm.data.mixture.mixture import build_mixture
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.mixture.validation import Slice, WindowSet
from megarewarm.errors import UserError


class MovingWindows(WindowSet):
    """A set of ``evaluations`` slices of floor(tokens / s) windows each, in the order ``data.order`` gives them.

    The order is that of a training run of that many samples, with ``data.seed``; ``max_epochs`` of the sources holds.
    Raises ``UserError`` if not one whole window is asked for, and for files that can't be read.
    """

    is_fixed = False

    def __init__(self, config: ValidationSet, files: TokenFiles, evaluations: int) -> None:
        data = files.data
        num_windows = config.tokens // data.sequence_length
        self.evaluations = evaluations if config.when == "always" else 1
        if num_windows < 1:
            raise UserError(
                f"validation set '{config.name}' comes to no whole window of {data.sequence_length} tokens: raise its "
                f"'tokens' ({config.tokens})"
            )
        shares = normalised([source.weight for source in config.sources], data.order_name)
        sources = [source.with_weight(share) for source, share in zip(config.sources, shares, strict=True)]
        samples = num_windows * self.evaluations
        mixture = build_mixture(files, [Phase(0, sources)], total_samples=samples)
        super().__init__(config, mixture.rows, num_windows)
        epochs = max(
            count / max(part.samples_per_epoch, 1)
            for count, part in zip(mixture.rows.counts(samples).tolist(), mixture.rows.samples, strict=True)
        )
        if epochs > 1:
            self.notes.append(
                f"validation set '{self.name}' reads its sources {epochs:.3g} times: {self.evaluations:,} evaluations of "
                f"{self.num_tokens:,} tokens are asked for, and they hold no more"
            )

    def slice(self, number: int) -> Slice:
        """The windows of evaluation ``number``, counted from 0."""
        if not 0 <= number < self.evaluations:
            raise ValueError(f"validation set '{self.name}' has no slice {number} of {self.evaluations}")
        return Slice(self._rows, number * self.num_windows, self.num_windows)
