"""megarewarm: continual pre-training of language models, built around re-warming.

The Python interface (``megarewarm.train`` and others, docs/api.md) is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megarewarm.api import LoadedModel as LoadedModel
    from megarewarm.api import Outcome as Outcome
    from megarewarm.api import RecordedRun as RecordedRun
    from megarewarm.api import RunPlan as RunPlan
    from megarewarm.api import UserError as UserError
    from megarewarm.api import draw as draw
    from megarewarm.api import load_config as load_config
    from megarewarm.api import load_model as load_model
    from megarewarm.api import plan as plan
    from megarewarm.api import prepare as prepare
    from megarewarm.api import read_run as read_run
    from megarewarm.api import to_yaml as to_yaml
    from megarewarm.api import train as train
    from megarewarm.api import train_tokenizer as train_tokenizer

_INTERFACE = (
    "LoadedModel",
    "Outcome",
    "RecordedRun",
    "RunPlan",
    "UserError",
    "draw",
    "load_config",
    "load_model",
    "plan",
    "prepare",
    "read_run",
    "to_yaml",
    "train",
    "train_tokenizer",
)
__all__ = ["__version__", *_INTERFACE]


def __getattr__(name: str) -> object:
    if name not in _INTERFACE:
        raise AttributeError(f"module 'megarewarm' has no attribute '{name}'")
    from megarewarm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
