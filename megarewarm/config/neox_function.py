"""What GPT-NeoX's configuration says of a model that is already trained: whether its weights are the function that is here.

The fate of each key is in ``neox_keys.py``. Of the keys that a run may have with few values only, those of ``_TRAINING`` change
how a model is trained and not what it computes, so a checkpoint may have them with any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarewarm.config.neox_keys import HONOURED, NOT_APPLICABLE, ONLY

_TRAINING_WORDS = (
    "hidden_dropout attention_dropout z_loss curriculum_learning curriculum_seqlen train_impl dataset_impl pack_impl "
    "data_impl weight_by_num_documents weighted_sampler_alpha train_epochs exit_interval no_load_optim "
    "use_checkpoint_lr_scheduler scheduler amp use_bnb_optimizer precompute_model_name serve_model_weights lazy_mpu_init "
    "deepspeed mlp_multiple_of"
)
_TRAINING = frozenset(_TRAINING_WORDS.split())
# Of models and losses that another key makes, and which are refused by that one.
_FAMILIES = tuple(
    f"{family}_"
    for family in [
        *("moe", "mamba", "te_fp8", "rpe", "mup", "dpo", "kto", "reinforce", "zero", "train", "valid", "test"),
        *("pos_train", "pos_valid", "pos_test", "neg_train", "neg_valid", "neg_test"),
    ]
)
# Keys of older versions, from the history of its argument lists.
_HARMLESS_WORDS = (
    "detect_nvlink_pairs save_iters label_data_paths gas save_interval slurm_comment reset_position_ids "
    "reset_attention_mask greedy out_seq_length genfile max_tokens expert_interval use_tutel create_moe_param_group "
    "enable_expert_tensor_parallelism num_samples is_pipe_parallel batch_size disable_allgather aio fp32_reinforce kl_impl "
    "kl_div_beta deepspeed_activation_checkpointing weight_server_port online_dataserver_ips online_dataserver_ports"
)
_HARMLESS = frozenset(_HARMLESS_WORDS.split())
_NO = (None, False, 0)
_OLD_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "gptj_residual": (_NO, "an old name of gpt_j_residual; write that instead"),
    "apply_residual_connection_post_layernorm": (_NO, "the residual goes round the norm here"),
    "geglu": (_NO, "only GELU is known here"),
    "openai_gelu": (_NO, "an old name of the tanh approximation; write bias_gelu_fusion: true instead"),
    "sparsity": (("none", None), "only full attention is known here"),
    "mlp_type": (("regular", None), "only GPT-NeoX's own transformer is known here"),
    "num_experts": ((1, 0, None), "only GPT-NeoX's own transformer is known here"),
    "lora": ((None,), "only GPT-NeoX's own transformer is known here"),
}


def another_function(key: str, value: Any, settings: Mapping[str, Any]) -> str | None:
    """Why weights of a model with ``key: value`` are another function than here; None where they are not.

    ``settings``: all keys, which say whether this one has an effect.
    """
    if key == "attention_config":
        other = sorted(set(_words(value)) - {"global", "flash", "all"})
        return f"{other[0]!r} attention; only 'global' and 'flash' are known here" if other else None
    if key == "num_kv_heads" and value in (None, settings.get("num_attention_heads")):
        return None
    if key == "gpt_j_tied" and not settings.get("gpt_j_residual"):
        return None  # the sequential residual has no use for it
    only = {**_OLD_ONLY, **ONLY}
    if key in only:
        allowed, reason = only[key]
        return None if key in _TRAINING or key.endswith("_data_paths") or _is_among(value, allowed) else reason
    known = key in _TRAINING or key in HONOURED or key in NOT_APPLICABLE or key in _HARMLESS or key.startswith(_FAMILIES)
    if known or _is_off(value):
        return None
    return "no key of GPT-NeoX that is known here; if it leaves the function alone, remove it from the file"


def _words(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [word for item in value for word in _words(item)]
    return [value] if isinstance(value, str) else []


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", [], {}) or (isinstance(value, Mapping) and not value.get("enabled", True))


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    if isinstance(value, Mapping) or value == []:
        return _is_off(value)
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)
