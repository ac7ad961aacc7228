"""What Megatron-LM calls the parameters of models that are here, in both generations of its names.

Queries, keys and values lie group by group, as here; the two halves of a SwiGLU one after the other in each rank's part, the
gate first (``MLP`` in megatron/core/transformer/mlp.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from megarewarm.checkpoint.foreign.tensor_parts import Arrangement
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD, Card

_IGNORED = re.compile(r"(_extra_state|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq)$")
_LAYER = re.compile(r"(?:decoder\.|encoder\.|transformer\.)?layers\.(\d+)\.(.+)")
_ROLES = {
    "input_layernorm": "first norm",
    "input_norm": "first norm",
    "self_attention.linear_qkv.layer_norm": "first norm",
    "post_attention_layernorm": "second norm",
    "post_attention_norm": "second norm",
    "pre_mlp_layernorm": "second norm",
    "mlp.linear_fc1.layer_norm": "second norm",
    "self_attention.query_key_value": "attention.query_key_value",
    "attention.query_key_value": "attention.query_key_value",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.q_layernorm": "attention.query_norm",
    "self_attention.k_layernorm": "attention.key_norm",
    "self_attention.dense": "attention.dense",
    "attention.dense": "attention.dense",
    "self_attention.linear_proj": "attention.dense",
    "mlp.dense_h_to_4h": "into the MLP",
    "mlp.linear_fc1": "into the MLP",
    "mlp.dense_4h_to_h": "out of the MLP",
    "mlp.linear_fc2": "out of the MLP",
}
_NEOX = {
    "first norm": "input_layernorm",
    "second norm": "post_attention_layernorm",
    "into the MLP": "mlp.dense_h_to_4h",
    "out of the MLP": "mlp.dense_4h_to_h",
}
_LLAMA = {
    "first norm": "attention_norm",
    "second norm": "mlp_norm",
    "into the MLP": "mlp.gate_up",
    "out of the MLP": "mlp.down",
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "word_embeddings.weight": EMBEDDING,
    "word_embeddings_for_head.weight": EMBEDDING,
    "word_embeddings_for_head.word_embeddings.weight": EMBEDDING,
    "output_layer.weight": HEAD,
    "final_layernorm.weight": "final_layer_norm.weight",
    "final_layernorm.bias": "final_layer_norm.bias",
    "final_norm.weight": "final_layer_norm.weight",
    "final_norm.bias": "final_layer_norm.bias",
}


def our_name(keys: tuple[str, ...], file: Path, *, llama: bool) -> tuple[str | None, int | None]:
    """(megarewarm's name, None) outside the layers, (name within the layer, its number in the file) inside, (None, None) for
    buffers. ``keys``: the path to the tensor in the file; ``llama``: the model is Llama-like."""
    dotted = ".".join(keys)
    if _IGNORED.search(dotted):
        return None, None
    plain = re.sub(r"^model\.(module\.)*(language_model\.)?", "", dotted)
    if match := _LAYER.fullmatch(plain):
        module, _, parameter = match[2].rpartition(".")
        if parameter.startswith("layer_norm_"):
            module, parameter = f"{module}.layer_norm", parameter.removeprefix("layer_norm_")
        role = _ROLES.get(module)
        if role is not None and parameter in ("weight", "bias"):
            return f"{(_LLAMA if llama else _NEOX).get(role, role)}.{parameter}", int(match[1])
    outside = re.sub(r"^(decoder|encoder|transformer)\.", "", plain)
    if outside in _OUTSIDE:
        return _OUTSIDE[outside], None
    raise UserError(
        f"{file}: '{dotted}' is no part of a model that is here; only GPT models with LayerNorm and GELU, or with RMSNorm and "
        f"SwiGLU, can be read"
    )


def arrangement_of(card: Card) -> Arrangement | None:
    """How the rows of a parameter lie in a rank's part of a file; None where they lie as here."""
    return None if card.interleaved is None or card.by_head else Arrangement(card.interleaved, (0, 1))
