"""Copies of weights in the dtype of products, in every layout that keeps them: the run of autocast's casts, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarewarm.parallel.laid_out import LaidOutModel
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.parallel.test_layouts import LAYOUTS, STEPS, _settings
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet
from tests.training.test_bad_steps import weights

NAMES = ("data", "tensor_tied", "tensor_sequence", "pipeline_tied", "pipeline_interleaved")


def _train_both(ranks: Ranks, place: str) -> tuple[int, int]:
    """Saves of models with copies and without."""
    kept: list[bool] = []
    for name in NAMES:
        parallel, changes = LAYOUTS[2][name]
        changes = {**changes, "training": {**changes.get("training", {}), "precision": "bf16", "recompute": "selective"}}
        for copies in (True, False):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(LaidOutModel, "check_copies", lambda self: kept.append(bool(self.low)))
                if not copies:
                    patched.setattr(LaidOutModel, "_keep_low", lambda self, *_, **__: setattr(self, "low", {}))
                made = _settings(Path(place), f"{name}_{copies}", parallel, changes)
                train(made, ranks, quiet())
    return sum(kept), len(kept) - sum(kept)


@pytest.mark.slow
def test_layouts_compute_what_casts_compute(tmp_path: Path) -> None:
    config(tmp_path)
    assert run_ranks(_train_both, 2, str(tmp_path), timeout=600) == [(len(NAMES), len(NAMES))] * 2
    for name in NAMES:
        copied, cast = (tmp_path / f"{name}_{copies}" for copies in (True, False))
        losses = [[(line["loss"], line["grad_norm"]) for line in events(folder, "train")] for folder in (copied, cast)]
        assert losses[0] == losses[1] and len(losses[0]) == STEPS, name
        one, other = weights(copied, STEPS), weights(cast, STEPS)
        assert all(torch.equal(weight, other[key]) for key, weight in one.items()), name
