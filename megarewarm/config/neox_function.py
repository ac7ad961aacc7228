"""What GPT-NeoX's configuration says of a model that is already trained: whether its weights are the function that is here.

Today's keys are in ``neox_keys.py``. A checkpoint may be of an older version, whose keys are here, or of a newer one: a key
that is in no table has to be off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarewarm.config.neox_keys import NO, is_among, is_known, is_off, other_function, words

# From the history of GPT-NeoX's argument lists, and of DeepSpeed's: keys that are gone.
_OLD_HARMLESS = frozenset(
    words(
        "detect_nvlink_pairs label_data_paths save_interval slurm_comment reset_position_ids reset_attention_mask greedy "
        "out_seq_length genfile max_tokens train_data_path valid_data_path test_data_path disable_allgather aio "
        "zero_allow_comm_data_type zero_force_ds_cpu_optimizer seq_parallel_communication_data_type memory_breakdown "
        "tensorboard_writer data_loader"
    )
)
# Of several experts, which the key that asks for them refuses.
_OLD_EXPERTS = ("moe_", "expert_interval", "use_tutel", "create_moe_param_group", "enable_expert_tensor_parallelism")
_ANOTHER = "only GPT-NeoX's own transformer is known here"
_OLD_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "gptj_residual": (NO, "an old name of gpt_j_residual; write that instead"),
    "apply_residual_connection_post_layernorm": (NO, "the residual goes round the norm here"),
    "geglu": (NO, "only GELU is known here"),
    "openai_gelu": (NO, "an old name of the tanh approximation; write bias_gelu_fusion: true instead"),
    "sparsity": (("none", None), "only full attention is known here"),
    "num_experts": ((1, 0, None), _ANOTHER),
    "lora": ((None,), _ANOTHER),
}


def another_function(settings: Mapping[str, Any]) -> dict[str, str]:
    """Keys under which weights of a model with ``settings`` are another function than here, each with the reason.

    ``settings``: the configuration of a checkpoint, keys with underscores.
    """
    found = other_function(settings)
    for key, value in settings.items():
        if key in _OLD_ONLY:
            allowed, reason = _OLD_ONLY[key]
            if not is_among(value, allowed):
                found[key] = reason
        elif not (is_known(key) or key in _OLD_HARMLESS or key.startswith(_OLD_EXPERTS) or _says_nothing(value)):
            found[key] = "no key of GPT-NeoX that is known here; if it leaves the function alone, remove it from the file"
    return found


def _says_nothing(value: Any) -> bool:
    return value in (*NO, "", [], {}) or (isinstance(value, dict) and is_off(value))
