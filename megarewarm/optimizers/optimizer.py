"""The protocol of optimizers, and the one place that makes the one that ``optimizer.kind`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from megarewarm.config.execution import OptimizerConfig
from megarewarm.optimizers.adamw import AdamW
from megarewarm.optimizers.muon import Muon
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.gradients import Gradients


class Optimizer(Protocol):
    """Parameters of a model (those that train) and their optimizer state. All ranks call every method alike."""

    kind: str
    """The implementation of the update, as ``kernels.optimizer``: "torch", "triton" or "apex"."""

    guarded: bool
    """Whether ``step`` takes a ``scale`` on the device, () fp32, for which nothing waits, and changes no tensor where it is
    NaN; then ``take_back`` is due."""

    def step(self, lr: float, gradients: Gradients | None = None, scale: float | Tensor = 1.0) -> None:
        """One update at learning rate ``lr`` from the parameters' ``.grad`` times ``scale``; ``gradients`` scales them, where
        that takes a pass of its own. Gradients are undefined afterwards."""

    def take_back(self) -> None:
        """The newest step has changed nothing: it doesn't count."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""

    @property
    def lrs(self) -> list[float]:
        """The present learning rates, without layer-wise factors."""

    def state(self) -> dict[tuple[str, str], Tensor]:
        """Tensors of the shapes of what trains by (what, parameter's name), see ``states_of``; writing to them changes it."""

    @property
    def completed_steps(self) -> int:
        """Steps whose gradients are in the state; sets the bias correction."""

    def set_completed_steps(self, steps: int) -> None:
        """Set it for every parameter."""

    def influence(self, name: str, gradient: Tensor, scale: float, clip: float, direction: Tensor) -> Tensor:
        """Of parameter ``name``, before a step from ``gradient`` times ``scale``: turn ``direction``, the gradient of some
        loss, in place into u, so that by <u, g> the step lowers that loss, to first order and per unit of learning rate,
        because of a part g of the step's gradient that is multiplied by ``clip``. Returns (4,) fp64: by how much all of
        ``gradient``, the momentum and the weight decay lower it, and sum |u o g| of all g. All tensors are laid out as the
        parameter."""

    def sums(self, name: str, weights: Tensor, state: Mapping[str, Tensor], start: Tensor | None) -> Tensor:
        """Sums over the values of one parameter after a step, (7,) fp64: their number; squares of weights, of the change, of
        first and second moments, and of the distance from ``start``; effective learning rates. All tensors are flat, parts of
        those here that this rank counts; ``state`` by what it is."""


_MAKERS: dict[str, Callable[[ParallelModel, Mapping[str, nn.Parameter], OptimizerConfig, str], Optimizer]] = {
    "adamw": lambda model, parameters, config, kind: AdamW(parameters, model.cards, config, kind, model.trained_copies),
    "muon": Muon,
}


@collective
def make_optimizer(
    model: ParallelModel, config: OptimizerConfig, kind: str = "torch", only: Callable[[str], bool] = lambda name: True
) -> Optimizer:
    """The optimizer that ``config`` names over what trains of ``model``, or those parameters whose names are ``only`` wanted.
    ``kind``: see ``Optimizer.kind``. All ranks call it."""
    parameters = {name: parameter for name, parameter in model.trained.items() if only(name)}
    return _MAKERS[config.kind](model, parameters, config, kind)
