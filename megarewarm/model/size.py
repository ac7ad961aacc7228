"""Sizes and costs of a model by arithmetic: parameters, FLOPs, memory of a training step, peak rates of known GPUs."""

from __future__ import annotations

from typing import Literal

from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import cards

# Dense bf16 tensor rates without sparsity, in TFLOP/s, from the vendors' data sheets; the first name contained wins.
_PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}

PASSES = {"none": 3.0, "selective": 3.05, "full": 4.0}
"""Forward passes that a training step costs, by training.recompute; the backward pass is two."""


def count_parameters(model: ModelConfig) -> int:
    """Number of parameters: equal to what the module holds without layout padding."""
    return sum(card.numel for card in cards(model).values())


def stage_costs(model: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """(FLOPs of one layer, FLOPs of the head) per token, forward. The embedding is a lookup and costs nothing. 2 per matrix
    weight, and causal attention: 2 (QK^T) + 2 (PV) per pair of positions and channel, half of the pairs, or those within the
    window. A layer costs what it does on the mean: some may have a window and others none."""
    layer = sum(card.numel for card in cards(model).values() if card.layer == 0 and card.is_matrix)
    pairs = sum(_pairs(sequence_length, model.window_of(i)) for i in range(model.num_layers)) / model.num_layers
    attention = 4.0 * model.num_heads * model.head_width * pairs / sequence_length
    return 2.0 * layer + attention, 2.0 * model.vocab_size * model.hidden_size


def _pairs(length: int, window: int | None) -> float:
    """Pairs of positions of a sequence, of which the later one attends to the earlier, less half of one at each of the first
    ``window`` positions: without a window half of all."""
    window = min(window or length, length)
    return window * length - window * window / 2


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of the forward pass for one token; see ``stage_costs``."""
    layer, head = stage_costs(model, sequence_length)
    return model.num_layers * layer + head


def training_flops_per_token(model: ModelConfig, sequence_length: int, teacher: ModelConfig | None = None) -> float:
    """FLOPs of forward and backward, which costs twice as much, for one token, and of the forward pass of a ``teacher``."""
    taught = forward_flops_per_token(teacher, sequence_length) if teacher is not None else 0.0
    return 3.0 * forward_flops_per_token(model, sequence_length) + taught


def peak_tflops(gpu_name: str) -> float | None:
    """Dense bf16 TFLOP/s of the GPU called ``gpu_name`` by its driver; None for one that is not in the table."""
    return next((peak for name, peak in _PEAKS.items() if name in gpu_name), None)


def activation_bytes(
    model: ModelConfig,
    tokens: int,
    *,
    recompute: Literal["none", "selective", "full"] = "none",
    tensor: int = 1,
    sequence: bool = False,
    stream_bytes: int = 4,
    work_bytes: int = 4,
    layers: int | None = None,
    last: bool = True,
    fused: bool = True,
    checkpointed: bool = False,
) -> float:
    """Bytes that ``layers`` (None: all) and, where ``last``, the last norm keep of ``tokens`` tokens for the backward pass.

    A layer keeps, in values per token: the input h of each sublayer (with the parallel residual both have one), the norms'
    outputs 2h, queries, keys and values, again where they are normed, the attention's output, and the MLP's activation
    before (f, or gate and up, 2f) and after (f), which ``selective`` and fused SwiGLU recompute. Norms after the sublayers keep
    their inputs, 2h, and no outputs, for these are the stream. ``full`` keeps the input alone. Then come the last norm's input
    and output, 2h. ``fused`` False: of plain PyTorch, whose RMSNorm also keeps what it scales, and whose SwiGLU silu(gate).
    ``checkpointed``: of a layer that ``full`` computes again, whose fused SwiGLU keeps its result.

    ``tensor`` ranks divide what lies between a layer's entrance and exit. With ``sequence`` they also divide the inputs; of
    LayerNorms, what both norms' scales and shifts are applied to is kept once in place of the outputs. The statistics of norms
    and attention, some values per token, are left out. A value of the residual stream, and what a plain RMSNorm keeps, takes
    ``stream_bytes``, any other ``work_bytes``, and so does the stream of fused layers, but for the sequential residual of NeoX.
    """
    h, f = model.hidden_size, model.mlp_size
    inputs = 1 if model.residual == "parallel" else 2
    divided_stream = tensor if sequence else 1
    plain_norms = model.norm == "rms" and not fused
    exact_bytes = stream_bytes
    # what fused layers pass on, and the inputs of linear layers that no norm precedes, are in autocast's dtype
    rounds = fused and (model.norm == "rms" or model.residual == "parallel")
    last_bytes = work_bytes if rounds and model.norm_place == "before" else stream_bytes
    stream_bytes = work_bytes if rounds else stream_bytes
    if recompute == "full":
        per_layer = stream_bytes * h / divided_stream
    else:
        stream = (inputs + (2 if plain_norms else 0)) * h / divided_stream
        normed = inputs * h if sequence and model.norm == "layer" else 2 * h
        mlp = 2 * f if model.activation == "swiglu" else f
        if recompute == "none":
            if model.activation == "swiglu":
                mlp += 2 * f if not fused else f if checkpointed else 0
            else:
                mlp += f
        inner = work_bytes * mlp + _attention_bytes(model, fused, tensor, exact_bytes, work_bytes)
        per_layer = stream_bytes * stream + work_bytes * normed + inner / tensor
    after = last_bytes * (3 if plain_norms else 2) * h / divided_stream if last else 0.0
    return tokens * ((model.num_layers if layers is None else layers) * per_layer + after)


def _attention_bytes(model: ModelConfig, fused: bool, tensor: int, exact_bytes: int, work_bytes: int) -> float:
    """Bytes per token that the attention of one layer keeps on all ``tensor`` ranks, its input aside; see
    ``activation_bytes``. Ranks that add up the squares of a width norm them by plain PyTorch."""
    q, k = model.num_heads * model.head_width, model.kv_heads * model.head_width
    values, exact = 2 * q + 2 * k, 0
    if model.qk_norm != "none":
        if fused and (model.qk_norm == "head" or tensor == 1):
            values += q + 2 * k
        elif model.qk_norm == "width" or work_bytes < exact_bytes:
            exact = 2 * (q + k)  # copies of queries and keys, and what is scaled
        else:
            values, exact = values + q + 2 * k, q + k
    return float(work_bytes * values + exact_bytes * exact)
