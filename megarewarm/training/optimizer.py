"""AdamW with its state laid out from the first moment, so that every moment can be named, saved, kept or reset.

The update is PyTorch's fused one (Loshchilov & Hutter 2019, decoupled weight decay): one pass over each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from megarewarm_kernels import AdamWTensors
from megarewarm_kernels.apex import fused_adam
from torch import Tensor, nn

from megarewarm.config.execution import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter: to matrices, embeddings and head among them, not to norms and biases."""
    return not (name.endswith(".bias") or "layernorm" in name or "layer_norm" in name)


class Scaled(Protocol):
    """Gradients that can be multiplied by a number."""

    def scale_(self, factor: float) -> None: ...


class AdamW:
    """AdamW over a model's parameters in two groups: decayed, and not decayed (norms and biases, as GPT-NeoX).

    Moments are fp32 tensors of the parameters' shapes, on their device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, kind: str = "torch") -> None:
        """``parameters``: plain tensors by their names in the model, on one device, whole or parts of them. ``kind``: "torch",
        "triton" (all tensors in one launch, gradients scaled on the way), or "apex" for NVIDIA's FusedAdam, which must be
        there."""
        self.kind, self.config = kind, config
        self.names = {parameter: name for name, parameter in parameters.items()}
        groups = [
            {"params": [p for name, p in parameters.items() if decays(name)], "weight_decay": config.weight_decay},
            {"params": [p for name, p in parameters.items() if not decays(name)], "weight_decay": 0.0},
        ]
        present = [group for group in groups if group["params"]]
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
        self._together: AdamWTensors | None = None
        if kind == "triton":
            self._ordered = list(parameters.values())
            first, second = ([self.torch.state[p][moment] for p in self._ordered] for moment in MOMENTS)
            self._together = AdamWTensors(
                [p.detach() for p in self._ordered],
                first,
                second,
                decays=[config.weight_decay if decays(name) else 0.0 for name in parameters],
                betas=config.betas,
                eps=config.eps,
            )

    def step(self, lr: float, gradients: Scaled | None = None, scale: float = 1.0) -> None:
        """One update at learning rate ``lr`` from the parameters' ``.grad`` times ``scale``; ``gradients`` scales them, where
        that takes a pass of its own."""
        self.set_lr(lr)
        if self._together is None:
            if scale != 1.0:
                assert gradients is not None
                gradients.scale_(scale)
            self.torch.step()
            return
        steps = self.completed_steps + 1
        found = [p.grad for p in self._ordered]
        self._together.step([g for g in found if g is not None], step=steps, lr=lr, scale=scale)
        self.set_completed_steps(steps)

    def set_lr(self, lr: float) -> None:
        """Write ``lr`` into every group."""
        for group in self.torch.param_groups:
            group["lr"] = lr

    def settings(self, name: str) -> tuple[float, float]:
        """The learning rate and the weight decay that hold for parameter ``name`` now."""
        group = self._groups[name]
        return group["lr"], group["weight_decay"]

    @property
    def lrs(self) -> list[float]:
        """The learning rate in each group."""
        return [group["lr"] for group in self.torch.param_groups]

    def moments(self) -> dict[tuple[str, str], Tensor]:
        """The moments by (moment, parameter's name); writing to them changes the state."""
        return {
            (moment, name): self.torch.state[parameter][moment] for parameter, name in self.names.items() for moment in MOMENTS
        }

    @property
    def completed_steps(self) -> int:
        """Adam's step count, which sets the bias correction; equal for all parameters."""
        if self.kind != "torch":
            return int(self.torch.param_groups[0]["step"])
        return int(next(iter(self.torch.state.values()))["step"])

    def set_completed_steps(self, steps: int) -> None:
        """Set Adam's step count for every parameter."""
        if self.kind != "torch":  # one count for each group, a number
            for group in self.torch.param_groups:
                group["step"] = steps
            return
        for parameter, state in self.torch.state.items():
            state["step"] = torch.full((), float(steps), dtype=torch.float32, device=parameter.device)

    def reset_moments(self, which: tuple[str, ...] = MOMENTS) -> None:
        """Set the named moments to zero."""
        for state in self.torch.state.values():
            for moment in which:
                state[moment].zero_()
