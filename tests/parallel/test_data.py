"""Data parallelism: several ranks compute the run of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megarewarm.checkpoint.own import state
from megarewarm.errors import UserError
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.gradients import FlatGradients
from megarewarm.parallel.mesh import Layout, Mesh
from megarewarm.parallel.placement import Placement
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


def _flat(parameters: dict[str, torch.nn.Parameter], ranks: Ranks) -> FlatGradients:
    placements = {name: Placement(name, tuple(p.shape), None, 0, 1, partial=False) for name, p in parameters.items()}
    return FlatGradients(parameters, placements, Mesh(ranks, Layout(replicate=ranks.world_size)))


def _sums(ranks: Ranks) -> tuple[list[float], list[bool], list[float], float]:
    linear = torch.nn.Linear(3, 2)
    gradients = _flat(dict(linear.named_parameters()), ranks)
    (linear(torch.ones(1, 3)).sum() * (ranks.rank + 1)).backward()
    gradients.reduce()
    norm = gradients.norm()
    gradients.scale_(0.5)
    assert linear.bias.grad is not None
    return (
        all_reduce_sums([ranks.rank + 0.1, 1e17 if ranks.rank == 0 else -1e17 if ranks.rank == 1 else 1.0]),
        [count > 0 for count in all_reduce_sums([ranks.rank == 1, False])],
        linear.bias.grad.tolist(),
        norm,
    )


def test_collectives_on_three_ranks() -> None:
    for sums, flags, gradient, norm in run_ranks(_sums, 3):
        assert sums[0] == pytest.approx(3.3) and sums[1] == pytest.approx(1.0, abs=17)
        assert flags == [True, False]
        assert gradient == [3.0, 3.0] and norm == pytest.approx((8 * 6**2) ** 0.5)


def test_gradients_of_micro_batches_add_up_in_the_buffer() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.float()
    gradients = _flat(dict(model.named_parameters()), ALONE)
    for part in x.float().split(2):
        model(part).square().sum().backward()
    for parameter, want in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), want, rtol=1e-5, atol=1e-5)
    whole = torch.cat([want.flatten() for want in expected]).norm()
    assert gradients.norm() == pytest.approx(float(whole), rel=1e-5)
    gradients.zero()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def _train(ranks: Ranks, folder: str, run: str) -> dict[str, float]:
    return train(config(Path(folder), folder=run), ranks, quiet()).losses


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process(tmp_path: Path, world_size: int) -> None:
    """Losses of 20 steps within fp32 rounding, validation too (its windows don't divide evenly by 4 ranks x micro-batch)."""
    alone = train(config(tmp_path, folder=str(tmp_path / "alone")), ALONE, quiet())
    together = run_ranks(_train, world_size, str(tmp_path), str(tmp_path / "together"))
    assert all(losses == together[0] for losses in together)
    assert together[0] == pytest.approx(alone.losses, rel=1e-5)
    one, many = (events(tmp_path / name, "train") for name in ("alone", "together"))
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in many] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)
    assert len(events(tmp_path / "together", "start")) == 1


def test_a_checkpoint_of_two_ranks_continues_on_one(tmp_path: Path) -> None:
    alone = train(config(tmp_path, folder=str(tmp_path / "alone")), ALONE, quiet())
    run_ranks(_train, 2, str(tmp_path), str(tmp_path / "run"))
    for step in (15, 20):
        newest = state.read_state(tmp_path / f"run/checkpoints/step_{step}")
        assert newest.samples == 8 * step
    shutil.rmtree(tmp_path / "run/checkpoints/step_20")
    outcome = train(config(tmp_path, folder=str(tmp_path / "run")), ALONE, quiet())
    assert outcome.losses == pytest.approx(alone.losses, rel=1e-5)


def _refused(ranks: Ranks, folder: str) -> str:
    try:
        train(config(Path(folder), training={"global_batch": 9}), ranks, quiet())
    except UserError as error:
        return str(error)
    return ""


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    config(tmp_path)
    messages = run_ranks(_refused, 2, str(tmp_path))
    assert all("9 sequences can't be shared evenly by 2 data-parallel ranks" in message for message in messages)
    assert not (tmp_path / "tiny").exists()
