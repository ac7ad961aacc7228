"""Groups of things that are connected by pairs (union-find)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


class Groups:
    """``parent``, (n,): of each thing one of its group; a root is its own parent, and the smallest number of its group."""

    def __init__(self, parent: Numbers) -> None:
        self.parent = parent

    def root(self, thing: int) -> int:
        """The root of the group of ``thing``."""
        parent = self.parent
        root = thing
        while (above := int(parent[root])) != root:
            root = above
        while (above := int(parent[thing])) != root:
            parent[thing], thing = root, above
        return root

    def roots(self, things: Numbers) -> Numbers:
        """The roots of the groups of ``things``, (k,)."""
        found = self.parent[things]
        while not np.array_equal(above := self.parent[found], found):
            found = above
        return found

    def join(self, one: int, other: int) -> None:
        """Make their groups one."""
        a, b = self.root(one), self.root(other)
        self.parent[max(a, b)] = min(a, b)

    def flatten(self) -> Numbers:
        """Make every thing's parent its root; returns ``parent``."""
        while not np.array_equal(above := self.parent[self.parent], self.parent):
            self.parent = above
        return self.parent
