"""AdamW with its state laid out from the first moment, so that every moment can be named, saved, kept or reset.

The update is PyTorch's fused one (Loshchilov & Hutter 2019, decoupled weight decay): one pass over each tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megarewarm.config.schema import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW over a model's parameters in two groups: decayed, and not decayed (norms and biases, as GPT-NeoX).

    Embeddings and the head are decayed. Moments are fp32 tensors of the parameters' shapes, on their device.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        undecayed = {
            parameter
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if name == "bias" or isinstance(module, nn.LayerNorm)
        }
        groups = [
            {"params": [p for p in self.names if p not in undecayed], "weight_decay": config.weight_decay},
            {"params": [p for p in self.names if p in undecayed], "weight_decay": 0.0},
        ]
        self.torch = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=config.betas, eps=config.eps, fused=True
        )
        for parameter in self.names:
            self.torch.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS},
            }

    def step(self, lr: float) -> None:
        """One update at learning rate ``lr`` from the parameters' ``.grad``."""
        self.set_lr(lr)
        self.torch.step()

    def set_lr(self, lr: float) -> None:
        """Write ``lr`` into every group."""
        for group in self.torch.param_groups:
            group["lr"] = lr

    @property
    def lrs(self) -> list[float]:
        """The learning rate in each group."""
        return [group["lr"] for group in self.torch.param_groups]

    def tensors(self) -> dict[str, Tensor]:
        """The moments as ``optimizer.exp_avg.NAME`` and ``optimizer.exp_avg_sq.NAME``; writing to them changes the state."""
        return {
            f"optimizer.{moment}.{name}": self.torch.state[parameter][moment]
            for parameter, name in self.names.items()
            for moment in MOMENTS
        }

    @property
    def completed_steps(self) -> int:
        """Adam's step count, which sets the bias correction; equal for all parameters."""
        return int(next(iter(self.torch.state.values()))["step"])

    def set_completed_steps(self, steps: int) -> None:
        """Set Adam's step count for every parameter."""
        for state in self.torch.state.values():
            state["step"].fill_(steps)

    def reset_moments(self, which: tuple[str, ...] = MOMENTS) -> None:
        """Set the named moments to zero."""
        for state in self.torch.state.values():
            for moment in which:
                state[moment].zero_()
