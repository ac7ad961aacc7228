"""The map of clusters as a picture: each document a point, dropped ones hollow."""

from __future__ import annotations

import numpy as np

from megarewarm.report.figures import style
from megarewarm.report.pages.html import Picture
from megarewarm.selection.step import ClusterMap


def picture_of(drawn: ClusterMap, number: int = 0) -> Picture:
    """Points in the colours and marks of their clusters, which repeat after eight."""
    with style.style():
        figure = style.new_figure(9.6, 5.4)
        axes = figure.subplots()
        for index in range(len(style.COLOURS)):
            mine = drawn.clusters % len(style.COLOURS) == index
            for dropped in (False, True):
                places = drawn.places[mine & (drawn.dropped == dropped)]
                axes.scatter(
                    places[:, 0],
                    places[:, 1],
                    s=14,
                    marker=style.MARKERS[index],
                    facecolors="none" if dropped else style.colour(index),
                    edgecolors=style.colour(index),
                    linewidths=0.8,
                    alpha=0.55 if dropped else 0.9,
                )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        figure.tight_layout()
    clusters, gone = len(np.unique(drawn.clusters)), int(drawn.dropped.sum())
    caption = f"{len(drawn.clusters):,} documents of {clusters:,} clusters; hollow: {gone:,} that would go."
    return Picture(f"map{number}", drawn.title, figure, f"{drawn.title}: {caption}", caption)
