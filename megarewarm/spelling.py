"""Numbers, durations and lists as readable text."""

from __future__ import annotations

import math
from collections.abc import Iterable

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def tokens_text(tokens: float) -> str:
    """2500000000 -> '2.5B'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size * 0.9995:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def bytes_text(size: float) -> str:
    """1536 -> '2 KiB', 3000000000 -> '2.8 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def duration_text(seconds: float | None) -> str:
    """95 -> '1m35s', 4000 -> '1h07m', 200000 -> '2d07h'; a question mark for none."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    for size, unit, small, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{below}"
    return f"{whole}s"


def counted(number: int, noun: str) -> str:
    """'1 run', '2 runs', '1,000 runs'."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(words: Iterable[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    told = list(words)
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"


def rate_text(rate: float | None) -> str:
    """0.0003 -> '3e-4'."""
    if rate is None:
        return DASH
    if rate == 0:
        return "0"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def loss_text(loss: float | None) -> str:
    """Three decimals; a dash for none."""
    return DASH if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def signed_text(difference: float | None) -> str:
    """Three decimals with a sign; a dash for none."""
    if difference is None:
        return DASH
    if not math.isfinite(difference):
        return "diverged"
    text = f"{abs(difference):.3f}"
    return text if float(text) == 0 else f"{'+' if difference > 0 else MINUS}{text}"
