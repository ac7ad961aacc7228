"""Files that come with the package: example configs and Slurm scripts. And the checkout that it is used from, if any."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""Holds configs/ and slurm/."""

_BESIDE = FOLDER.parent.parent

CHECKOUT = _BESIDE if (_BESIDE / "launch.sh").is_file() else None
"""The folder of launch.sh; ``None`` where megarewarm was installed."""
