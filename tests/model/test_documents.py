"""Documents within a sequence: against megatron-core's masks and transformers, and each document against itself alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarewarm_kernels.attention.flash_attention import visible
from torch import Tensor
from torch.nn import functional as F

from megarewarm.errors import UserError
from megarewarm.model.documents import IGNORE, DocumentRules
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.model.test_neox import pair
from tests.support.tiny import config, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
EOD = 3
RULES = DocumentRules(EOD, reset=True, mask_loss=True)


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(2, 5), min_size=2, max_size=24))
def test_the_masks_are_megatron_cores(tokens):
    data = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    inputs = torch.tensor(tokens)
    mask, loss_mask, places = data._get_ltor_masks_and_position_ids(inputs, EOD, True, True, True, True)
    starts = RULES.starts(inputs[None])
    assert starts is not None
    assert torch.equal(torch.arange(len(tokens)) - starts[0], places)
    ours = visible(len(tokens), starts.int(), inputs.device)
    assert torch.equal(ours[0], ~mask), "theirs is true where a position does not attend"
    targets = RULES.targets(inputs[None], torch.ones(1, len(tokens), dtype=torch.int64))
    assert torch.equal((targets[0] != IGNORE).float(), loss_mask)


def packed(seed: int, length: int = 20) -> Tensor:
    """Rows of s + 1 ids of documents of 1 to 9 tokens, each ended by EOD."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, 61, (3, length + 1), generator=random)
    return rows.masked_fill(torch.rand(rows.shape, generator=random) < 0.2, EOD)


def test_hidden_states_and_loss_are_transformers():
    ours, theirs = pair({}, torch.float64)
    rows = packed(1)
    inputs, targets = rows[:, :-1], RULES.targets(rows[:, :-1], rows[:, 1:])
    starts = RULES.starts(inputs)
    assert starts is not None
    place = torch.arange(inputs.shape[1])
    allowed = (place <= place[:, None]) & (place >= starts[..., None])
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    logits = theirs(inputs, attention_mask=bias[:, None], position_ids=place - starts).logits
    mine = F.linear(ours(inputs, starts), ours.head)
    # the angles are fp32 in both, so they differ a little where the libraries round them otherwise
    assert torch.allclose(mine, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine, ours.logits(inputs), rtol=1e-2, atol=1e-2), "documents do not see each other"
    assert (targets == IGNORE).sum() == (inputs == EOD).sum() > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_document_is_as_it_would_be_alone(seed):
    ours, _ = pair({}, torch.float64)
    (row,) = packed(seed)[:1, :-1]
    together = ours(row[None], RULES.starts(row[None]))[0]
    ends = [i + 1 for i, token in enumerate(row.tolist()) if token == EOD and i + 1 < len(row)]
    for first, last in zip([0, *ends], [*ends, len(row)], strict=True):
        alone = ours(row[None, first:last])[0]
        assert torch.allclose(together[first:last], alone, rtol=1e-9, atol=1e-9)


def test_the_mean_is_over_what_is_left(tmp_path):
    """One step from the same weights: the loss that is logged is the mean over targets whose input is not the end."""
    from megarewarm.training.setup import build
    from megarewarm.training.start.plan import make_plan
    from megarewarm.training.step import training_step

    data = {"eod": 5, "mask_eod_loss": True, "reset_at_eod": True}
    run = build(make_plan(config(tmp_path, data=data)), ALONE)
    rows = torch.from_numpy(run.data.rows(0, 8))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    model: Any = run.model._modules[0]
    starts = DocumentRules(5, True, True).starts(inputs)
    losses = F.cross_entropy(F.linear(model(inputs, starts), model.head).flatten(0, 1), targets.flatten(), reduction="none")
    kept = losses[inputs.flatten() != 5]
    assert 0 < len(kept) < len(losses)
    wanted = torch.autograd.grad(kept.mean(), list(run.model.parameters.values()))
    norm = torch.stack([gradient.norm() for gradient in wanted]).norm()
    result = training_step(run, 0.0)
    loss, measured = result.loss, result.norm
    assert loss == pytest.approx(float(kept.mean()), rel=1e-6) and measured == pytest.approx(float(norm), rel=1e-5)
    run.batches.close()


def test_the_end_of_a_document_has_to_be_known(tmp_path):
    with pytest.raises(UserError, match="give 'eod' or 'tokenizer'"):
        config(tmp_path, data={"reset_at_eod": True})
    with pytest.raises(UserError, match=r"data.eod: 64 is outside of the model's vocabulary of 64 ids"):
        train(config(tmp_path, data={"mask_eod_loss": True, "eod": 64}), ALONE, quiet())
    assert not (tmp_path / "tiny").exists()
