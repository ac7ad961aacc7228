"""Sizes and costs of a model by arithmetic: parameters, FLOPs, memory of a training step, peak rates of known GPUs."""

from __future__ import annotations

from megarewarm.config.schema import ModelConfig

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


def count_parameters(model: ModelConfig) -> int:
    """Number of parameters: equal to what the module holds without layout padding."""
    h, ffn = model.hidden_size, model.mlp_size
    bias = 4 * h if model.attention_bias else 0
    layer = 4 * h * h + bias + 2 * h * ffn + ffn + h + 4 * h
    embeddings = model.vocab_size * h * (1 if model.tie_embeddings else 2)
    return embeddings + model.num_layers * layer + 2 * h


def count_non_embedding(model: ModelConfig) -> int:
    """Parameters without embedding and head matrices, the N of most scaling laws."""
    return count_parameters(model) - model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 per matrix weight, and causal attention.

    Matrix weights are those of the layers and of the head; the embedding is a lookup. Attention costs 2 (QK^T) + 2 (PV)
    FLOPs per pair of positions and channel forward, twice that backward; causal masking halves the pairs: 6 L h s a token.
    """
    h = model.hidden_size
    weights = model.num_layers * (4 * h * h + 2 * h * model.mlp_size) + model.vocab_size * h
    return 6.0 * weights + 6.0 * model.num_layers * h * sequence_length


def peak_tflops(gpu_name: str) -> float | None:
    """Dense bf16 TFLOP/s of the GPU called ``gpu_name`` by its driver; None for one that is not in the table."""
    return next((peak for name, peak in _PEAKS.items() if name in gpu_name), None)


def estimate_memory(model: ModelConfig, micro_batch: int, sequence_length: int, loss_memory: int) -> dict[str, float]:
    """Bytes that one data-parallel rank holds at the end of a forward pass, by what they are for; fp32 throughout.

    Activations a layer keeps for backward, in units of t x h values (t = micro_batch x s): input of both norms 1 and
    their outputs 2, QKV 3 (rotated in a copy: q and k again 2, v laid out again 1), attention output 1; the MLP's two
    inner tensors of width ffn; the fp32 statistics of norms and attention are left out. Embedding output, final norm and
    the gradient of the hidden states add 3; the loss holds one chunk of logits (``loss_memory`` at most).
    """
    parameters = count_parameters(model)
    tokens = micro_batch * sequence_length
    h, ffn = model.hidden_size, model.mlp_size
    per_layer = tokens * (10 * h + 2 * ffn)
    logits = min(loss_memory, 4 * tokens * model.vocab_size)
    return {
        "weights": 4.0 * parameters,
        "gradients": 4.0 * parameters,
        "optimizer": 8.0 * parameters,
        "activations": 4.0 * (model.num_layers * per_layer + 3 * tokens * h),
        "loss": float(logits),
    }
