"""The gradients that an optimizer reads, as far as it changes them."""

from __future__ import annotations

from typing import Protocol


class Scaled(Protocol):
    """Gradients that can be multiplied by a number."""

    def scale_(self, factor: float) -> None: ...
