"""AdamW with its state allocated at the start, so that every moment can be named, saved, kept or reset. The update is
PyTorch's fused one (Loshchilov & Hutter 2019, decoupled weight decay): one pass over each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from megarewarm_kernels import AdamWTensors
from megarewarm_kernels.apex import fused_adam
from torch import Tensor, nn

from megarewarm.config.execution import OptimizerConfig
from megarewarm.model.parameters import Card
from megarewarm.optimizers.sums import SUMS, norms, slices
from megarewarm.parallel.gradients import Gradients

_LIFT = 2.0**40  # unscaled squares of second moments would not fit into fp32
MOMENTS = ("exp_avg", "exp_avg_sq")
_EXACT = 2**24
"""torch's fused AdamW counts in fp32, where the next whole number is 2 away from here on. The count is kept beside it, and
given to it rounded: what it takes for the count is off by 2^-24 of it at most."""


def rate_factors(cards: Mapping[str, Card], layer_decay: float) -> dict[str, float]:
    """``rate_factor`` of every parameter of a model."""
    layers = 1 + max((card.layer for card in cards.values() if card.layer is not None), default=-1)
    return {name: rate_factor(card, layers, layer_decay) for name, card in cards.items()}


def rate_factor(card: Card, num_layers: int, layer_decay: float) -> float:
    """Learning-rate multiplier of a parameter: layer_decay^(L - i) in layer i of L, ^(L + 1) in the embedding. Layer-wise
    learning-rate decay (Clark et al., ELECTRA, arXiv 2003.10555, appendix)."""
    if card.layer is not None:
        return float(layer_decay ** (num_layers - card.layer))
    return float(layer_decay ** (num_layers + 1)) if card.role == "embedding" else 1.0


class AdamW:
    """AdamW over a model's parameters in groups of one weight decay (norms and biases have none, as GPT-NeoX) and one factor
    of the learning rate. Moments are fp32 tensors of the parameters' shapes, on their device."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        cards: Mapping[str, Card],
        config: OptimizerConfig,
        kind: str = "torch",
        copies: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """``parameters``: plain tensors by their names in the model, on one device, whole or parts of them. ``cards``: of the
        whole model. ``kind``: "torch", "triton" (all tensors in one launch, gradients scaled on the way), or "apex" for
        NVIDIA's FusedAdam, which must be there. ``copies``: of parameters in a lower dtype, which "triton" writes with them."""
        self.kind, self.config, self.guarded = kind, config, kind == "triton"
        self.names = {parameter: name for name, parameter in parameters.items()}
        self._parameters = parameters
        every = rate_factors(cards, config.layer_decay)
        factors = {name: every[name] for name in parameters}
        kinds: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in sorted(parameters.items(), key=lambda item: not cards[item[0]].decays):
            kinds.setdefault((cards[name].decays, factors[name]), []).append(parameter)
        present = [
            {"params": held, "weight_decay": config.weight_decay if decayed else 0.0, "factor": factor}
            for (decayed, factor), held in kinds.items()
        ] or [{"params": [], "factor": 1.0}]  # of a pipeline rank whose stages are frozen
        settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
        if kind == "apex":
            peer = fused_adam()
            assert peer is not None
            self.torch = peer(present, adam_w_mode=True, **settings)
        else:
            self.torch = torch.optim.AdamW(present, fused=True, **settings)
        self._groups = {self.names[p]: group for group in self.torch.param_groups for p in group["params"]}
        for parameter in self.names:
            self.torch.state[parameter] = {
                moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS
            }
        self.set_completed_steps(0)
        self._together: list[tuple[float, list[nn.Parameter], AdamWTensors]] = []
        if kind == "triton":
            for factor in dict.fromkeys(factors.values()):
                held = {name: p for name, p in parameters.items() if factors[name] == factor}
                first, second = ([self.torch.state[p][moment] for p in held.values()] for moment in MOMENTS)
                launch = AdamWTensors(
                    [p.detach() for p in held.values()],
                    first,
                    second,
                    decays=[config.weight_decay if cards[name].decays else 0.0 for name in held],
                    betas=config.betas,
                    eps=config.eps,
                    copies=[copies.get(name) for name in held],
                )
                self._together.append((factor, list(held.values()), launch))

    def step(self, lr: float, gradients: Gradients | None = None, scale: float | Tensor = 1.0) -> None:
        """One update at learning rate ``lr`` from the parameters' ``.grad`` times ``scale``; ``gradients`` scales them, where
        that takes a pass of its own."""
        self.set_lr(lr)
        if not self._together:
            if isinstance(scale, Tensor):
                assert self.guarded  # without parameters, as a part of Staggered may be
            elif scale != 1.0:
                assert gradients is not None
                gradients.scale_(scale)
            self.torch.step()
            torch.autograd.graph.increment_version(list(self.names))  # fused, it does not itself; copies follow it
            self._completed += 1
            if self._completed > _EXACT:  # where torch's own fp32 count no longer increases
                self.set_completed_steps(self._completed)
            return
        steps = self._completed + 1
        for factor, held, launch in self._together:
            found = [p.grad for p in held]
            launch.step([g for g in found if g is not None], step=steps, lr=lr * factor, scale=scale)
        self.set_completed_steps(steps)

    def take_back(self) -> None:
        """The newest step has changed nothing: it doesn't count."""
        self.set_completed_steps(self._completed - 1)

    def set_lr(self, lr: float) -> None:
        """Write ``lr``, times its factor, into every group."""
        for group in self.torch.param_groups:
            group["lr"] = lr * group["factor"]

    @property
    def lrs(self) -> list[float]:
        """The learning rate of each group, without its factor."""
        return [group["lr"] / group["factor"] for group in self.torch.param_groups]

    def state(self) -> dict[tuple[str, str], Tensor]:
        """The moments by (moment, parameter's name); writing to them changes the state."""
        return {
            (moment, name): self.torch.state[parameter][moment] for parameter, name in self.names.items() for moment in MOMENTS
        }

    @property
    def completed_steps(self) -> int:
        """Adam's step count, which sets the bias correction; equal for all parameters."""
        if self.kind == "apex":
            return int(self.torch.param_groups[0]["step"])
        return self._completed

    def set_completed_steps(self, steps: int) -> None:
        """Set Adam's step count for every parameter."""
        self._completed = steps
        if self.kind != "torch":  # one count for each group, a number
            for group in self.torch.param_groups:
                group["step"] = steps
            return
        for parameter, state in self.torch.state.items():
            state["step"] = torch.full((), float(steps), dtype=torch.float32, device=parameter.device)

    def influence(self, name: str, gradient: Tensor, scale: float, clip: float, direction: Tensor) -> Tensor:
        """As ``Optimizer.influence``. With P = 1 / (1 - b1^t) / (sqrt(vhat) + eps), where v includes the gradient of this step,
        the step takes lr (P (b1 m + (1 - b1) g) + d w) off the weights (arXiv 2406.11011, with Adam's P)."""
        state, decay = self.torch.state[self._parameters[name]], self._groups[name]["weight_decay"]
        beta1, beta2 = self.config.betas
        steps, factor = self.completed_steps + 1, self._groups[name]["factor"]
        root = math.sqrt(1 - beta2**steps)
        total = direction.new_zeros(4, dtype=torch.float64)
        given = (gradient, state["exp_avg"], state["exp_avg_sq"], self._parameters[name].detach())
        flat = [direction.view(-1), *(tensor.reshape(-1) for tensor in given)]
        for begin, end, _ in slices(flat[0]):
            u, g, m, v, w = (values[begin:end] for values in flat)
            g = g * scale
            squares = (v * beta2).addcmul_(g, g, value=1 - beta2)
            pulled = u * w
            # without any gradient so far: no row has one, and 1 / eps would hide what the others do
            u.div_(squares.sqrt().div_(root).add_(self.config.eps)).masked_fill_(squares == 0, 0)
            moved = u * g
            total += torch.stack([values.sum(dtype=torch.float64) for values in (moved, u * m, pulled, moved.abs())])
        bias = factor / (1 - beta1**steps)
        now = (1 - beta1) * bias
        direction.mul_(now * clip)
        return total * total.new_tensor([now, beta1 * bias, decay * factor, now])

    def sums(self, name: str, weights: Tensor, state: Mapping[str, Tensor], start: Tensor | None) -> Tensor:
        """As ``Optimizer.sums``. Moments and weights after a step say what it did: with a = lr m / (sqrt(v) + eps), the moments
        corrected for their bias, w' = (1 - lr d) w - a (Loshchilov & Hutter 2019), so w' - w = -(lr d w' + a) / (1 - lr d)."""
        lr, decay = self._groups[name]["lr"], self._groups[name]["weight_decay"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = self.config.betas
        steps, eps = self.completed_steps, self.config.eps
        mean, root = 1 - beta1**steps, math.sqrt(1 - beta2**steps)
        # lr / (sqrt(v) / root + eps) = lr root q, q = 1 / (sqrt(v) + root eps); the factors that all values share come last
        factors = [1.0, lr * root / (mean * (1 - lr * decay)), 1.0, 1 / _LIFT, 1.0]
        total = weights.new_zeros(SUMS - 1, dtype=torch.float64)
        for begin, end, row in slices(weights):
            w, m, v = (values[begin:end].view(-1, row) for values in (weights, first, second))
            q = v.sqrt().add_(root * eps).reciprocal_()
            rates = q.sum(1)
            change = q.mul_(m).add_(w, alpha=decay * mean / root)
            lengths = [norms(w), norms(change), norms(m), norms(torch.mul(v, _LIFT, out=change))]
            if start is not None:
                lengths.append(norms(torch.sub(w, start[begin:end].view(-1, row).to(w.device), out=change)))
            else:
                lengths.append(torch.zeros_like(lengths[0]))
            squares = torch.stack(lengths).double().square_().sum(1)
            total += torch.cat([squares, rates.sum(dtype=torch.float64).view(1)])
        scale = torch.tensor([*(factor**2 for factor in factors), lr * root], dtype=torch.float64, device=total.device)
        return torch.cat([total.new_full((1,), weights.numel()), total * scale])
