"""Replay: a share of every batch comes from old data, the new data get the rest (arXiv 2403.08763, section 4.2).

The accounting is compute-equivalent: the run's token budget stays what it is, so replaying a share x means that only
(1 - x) of the budget are new tokens.
"""

from __future__ import annotations

from megarewarm.config.schema import ReplayConfig, Source


def with_replay(new: list[Source], replay: ReplayConfig | None) -> list[Source]:
    """All training sources with weights that sum to 1: ``new`` share 1 - fraction, the replayed ones share fraction.

    Within each group the weights keep their proportions (Ibrahim et al. 2024: D1 gets (1 - x)B, replay xB).
    """
    if replay is None:
        return _scaled(new, 1.0)
    return _scaled(new, 1.0 - replay.fraction) + _scaled(replay.sources, replay.fraction)


def _scaled(sources: list[Source], share: float) -> list[Source]:
    total = sum(source.weight for source in sources)
    return [source.with_weight(source.weight / total * share) for source in sources]
