"""Scores of documents: how they are distributed, and how they go with the documents' lengths."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megarewarm.report.figures import style

_LEAST = 10
"""Documents of a class of lengths whose median is drawn."""


def draw_scores(scores: NDArray[np.float64], tokens: NDArray[np.int64], what: str) -> Figure:
    """Left the distribution of ``scores`` (n,) over documents and over their ``tokens`` (n,), right the median and the middle
    80 % by length. ``what``: the axis. Documents with a score of NaN are left out."""
    there = np.isfinite(scores)
    scores, tokens = scores[there], tokens[there]
    with style.style():
        figure = style.new_figure(9.6, 3.8)
        left, right = figure.subplots(1, 2, sharey=False)
        for axes in (left, right):
            style.quiet_axes(axes)
        if len(scores):
            low, high = np.percentile(scores, [0.1, 99.9])
            bins = np.linspace(low, high, min(80, max(10, round(len(scores) ** 0.5))) + 1) if high > low else 10
            inside = np.clip(scores, low, high)
            for weights, name, index in ((np.ones(len(scores)), "documents", 0), (tokens, "tokens", 1)):
                share = weights / weights.sum() * 100
                left.hist(inside, bins, weights=share, histtype="step", color=style.colour(index), linewidth=1.8, label=name)
            left.legend(frameon=False)
            middles, bands = _by_length(scores, tokens)
            right.fill_between(middles, bands[0], bands[2], color=style.colour(0), alpha=0.15, linewidth=0)
            right.plot(middles, bands[1], color=style.colour(0), marker="o", markersize=3.5)
            right.set_xscale("log")
        left.set_title("Distribution")
        left.set_xlabel(what)
        left.set_ylabel("share, %")
        right.set_title("By length: median, and from 10 % to 90 %")
        right.set_xlabel("tokens of a document")
        right.set_ylabel(what)
        figure.tight_layout()
    return figure


def _by_length(scores: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(the typical length of each class, (c,); 10th percentile, median, 90th percentile of the scores in it, (3, c))."""
    edges = np.unique(np.geomspace(tokens.min(), tokens.max() + 1, 25).astype(np.int64))
    classes = np.searchsorted(edges, tokens, side="right")
    found = [(classes == number) for number in range(1, len(edges) + 1)]
    least = min(_LEAST, max(1, len(scores) // 10))
    found = [chosen for chosen in found if chosen.sum() >= least]
    middles = np.array([np.median(tokens[chosen]) for chosen in found])
    bands = np.array([np.percentile(scores[chosen], [10, 50, 90]) for chosen in found]).reshape(len(found), 3).T
    return middles, bands
