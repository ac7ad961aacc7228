"""From the configuration's ``kernels`` to the implementation of each operation, with the reason for each choice."""

from __future__ import annotations

import torch
from megarewarm_kernels import no_triton
from megarewarm_kernels.apex import fused_adam, fused_layer_norm
from megarewarm_kernels.attention.choose import choose
from megarewarm_kernels.layer import cublaslt

from megarewarm.config.execution import KernelsConfig
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.fused import Operations


def choose_operations(
    config: KernelsConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    length: int,
    documents: bool,
    no_copies: str = "",
) -> tuple[Operations, list[str]]:
    """The operations, and a line on each choice that is not what was asked for or can't be guessed.

    ``dtype``: what layers compute in; ``length``: positions of a row; ``documents``: they are kept apart; ``no_copies``: why
    products read no copies of whole weights in ``dtype``. What can't be used here gives way to plain PyTorch. Raises
    ``UserError`` if no attention fits.
    """
    notes: list[str] = []
    missing = no_triton(device)
    # the definitions of Llama's operators keep less than plain PyTorch, and are faster on a CPU
    by_definition = config.use == "auto" and device.type == "cpu" and model.norm == "rms"

    def pick(key: str, asked: str | None) -> str:
        if asked is None and by_definition and key != "loss":
            return "triton"
        default = "reference" if config.use in ("compile", "reference") or missing else "triton"
        if asked is None and config.use == "triton" and missing:
            asked = "triton"
        if asked == "triton" and missing:
            notes.append(f"kernels.{key}: reference, not triton: {missing}")
            return "reference"
        return asked or default

    norms = pick("norms", config.norms)
    if norms == "triton" and model.residual == "sequential" and model.norm == "layer":
        if config.norms == "triton":
            notes.append("kernels.norms: reference, not triton: the sequential residual has no two norms of one sum")
        norms = "reference"
    if norms == "apex" and model.norm == "rms":
        norms = pick("norms", None)
        notes.append(f"kernels.norms: {norms}, not apex: apex's norms are used for LayerNorm only")
    if norms == "apex" and (fused_layer_norm() is None or device.type != "cuda"):
        notes.append("kernels.norms: reference, not apex: NVIDIA apex with its CUDA extensions is not here")
        norms = "reference"
    gelu = pick("gelu", config.gelu)
    if gelu == "cublaslt" and (why := _no_epilogues(config, model, device, dtype) or no_copies):
        said = len(notes)
        gelu = pick("gelu", None)
        notes[said:] = [f"kernels.gelu: {gelu}, not cublaslt: {why}"]
    loss = pick("loss", config.loss) if config.use != "compile" else config.loss or "auto"
    wanted = config.attention or ("sdpa" if config.use == "reference" else "auto")
    try:
        attention, why = choose(
            device,
            dtype,
            model.head_width,
            length=length,
            documents=documents,
            window=model.sliding_window is not None,
            deterministic=config.deterministic,
            wanted=wanted,
        )
    except ValueError as error:
        raise UserError(f"kernels.attention: {error}") from error
    if wanted not in ("auto", attention):
        notes.append(f"kernels.attention: {attention}, not {wanted}: {why}")
    return Operations(norms, gelu, attention, loss, config.deterministic), notes


def _no_epilogues(config: KernelsConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why GELU can't be part of the products of ``model``; empty where it can."""
    if model.activation != "gelu_tanh":
        return f"its GELU is the tanh approximation, model.activation is {model.activation}"
    if config.deterministic:
        return "kernels.deterministic: its sums for biases were not seen to repeat"
    return cublaslt.objection(device, dtype, model.hidden_size, model.mlp_size)


def choose_optimizer(config: KernelsConfig, device: torch.device) -> tuple[str, list[str]]:
    """'triton', 'torch' or 'apex', and a line where it is not the one that was asked for."""
    missing = no_triton(device)
    if config.optimizer == "apex" and (fused_adam() is None or device.type != "cuda"):
        return "torch", ["kernels.optimizer: torch, not apex: NVIDIA apex with its CUDA extensions is not here"]
    if missing and "triton" in (config.optimizer, config.use if config.optimizer is None else ""):
        return "torch", [f"kernels.optimizer: torch, not triton: {missing}"]
    fused = config.use in ("auto", "triton") and not missing
    return config.optimizer or ("triton" if fused else "torch"), []
