"""GPT-NeoX's configuration keys, all of them, and what becomes of each here; ``docs/neox_config.md`` shows these tables.

The keys inside of blocks (``fp16.type``) are in ``neox_blocks.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megarewarm.config.neox_family import not_here


class Honoured(NamedTuple):
    """A key that ``neox_translate.py`` turns into ours: what GPT-NeoX takes there, its default, and what the key is here."""

    types: tuple[type, ...]
    default: Any
    meaning: str


def words(text: str) -> list[str]:
    """The names in a text, as these tables list them."""
    return text.split()


_NUMBER = (int, float)
HONOURED: dict[str, Honoured] = {
    key: Honoured(*rest)
    for key, rest in {
        "pipe_parallel_size": ((int,), 0, "parallel.pipeline; 0 and 1 are the same"),
        "model_parallel_size": ((int,), 1, "parallel.tensor"),
        "sequence_parallel": ((bool,), False, "parallel.sequence, where model_parallel_size is above 1"),
        "num_layers": ((int,), None, "model.num_layers"),
        "hidden_size": ((int,), None, "model.hidden_size"),
        "num_attention_heads": ((int,), None, "model.num_heads"),
        "norm": ((str,), "layernorm", "model.family: 'rmsnorm' with 'activation: swiglu' is llama, with a window mistral"),
        "activation": ((str,), "gelu", "model.family, with norm: 'gelu' beside 'layernorm', 'swiglu' beside 'rmsnorm'"),
        "mlp_type": ((str,), "regular", "model.family; 'llama' with 'activation: silu' is GPT-NeoX's SwiGLU up to 2024"),
        "num_kv_heads": ((int,), None, "model.num_kv_heads, with 'norm: rmsnorm'"),
        "sliding_window_width": (
            (int,),
            None,
            "model.sliding_window, with 'norm: rmsnorm': one more, as GPT-NeoX does not count the position itself",
        ),
        "intermediate_size": (
            (int,),
            None,
            "model.ffn_size; with 'activation: swiglu' GPT-NeoX makes the gate a third as wide, rounded up to mlp_multiple_of",
        ),
        "mlp_multiple_of": ((int,), 1, "model.ffn_size: see intermediate_size"),
        "expansion_factor": (_NUMBER, None, "model.ffn_size, as a multiple of hidden_size"),
        "seq_length": ((int,), None, "data.sequence_length"),
        "max_position_embeddings": ((int,), None, "model.max_positions"),
        "layernorm_epsilon": (_NUMBER, 1e-5, "model.layernorm_eps"),
        "rms_norm_epsilon": (_NUMBER, 1e-8, "model.layernorm_eps, with 'norm: rmsnorm'"),
        "no_weight_tying": ((bool,), False, "model.tie_embeddings, inverted"),
        "make_vocab_size_divisible_by": ((int,), 128, "model.vocab_size, with the tokenizer's size, where nothing is loaded"),
        "padded_vocab_size": ((int,), None, "model.vocab_size, where nothing is loaded"),
        "bias_gelu_fusion": ((bool,), False, "model.activation: gelu_tanh where true, gelu_erf where false"),
        "rotary_pct": (_NUMBER, 1.0, "model.rotary_fraction"),
        "rotary_emb_base": (_NUMBER, 10000, "model.rotary_base"),
        "init_method": ((str,), "normal", "model.init"),
        "output_layer_init_method": ((str,), "scaled_normal", "model.output_init"),
        "init_method_std": (_NUMBER, 0.02, "model.init_std"),
        "gpt_j_residual": ((bool,), False, "model.residual"),
        "use_bias_in_attn_linear": ((bool,), True, "model.attention_bias"),
        "use_bias_in_mlp": ((bool,), True, "model.mlp_bias; with LayerNorm it has to be true"),
        "attention_config": ((list,), None, "checked: 'global' and 'flash' are what every layer does here"),
        "optimizer": ((dict,), None, "the section optimizer, schedule.max_lr"),
        "weight_decay": (_NUMBER, 0.1, "optimizer.weight_decay"),
        "gradient_clipping": (_NUMBER, 1.0, "optimizer.clip_norm; 0 is off"),
        "lr_decay_style": ((str,), "linear", "schedule.curve"),
        "lr_decay_iters": ((int,), None, "schedule.length"),
        "lr_decay_fraction": (_NUMBER, None, "schedule.length, as a share of train_iters"),
        "min_lr": (_NUMBER, 0.0, "schedule.min_lr"),
        "warmup": (_NUMBER, 0.01, "schedule.warmup, a share of the decay's length"),
        "train_iters": ((int,), None, "training.budget"),
        "train_batch_size": ((int,), None, "training.global_batch"),
        "train_micro_batch_size_per_gpu": ((int,), None, "training.micro_batch"),
        "gradient_accumulation_steps": ((int,), 1, "training.global_batch"),
        "precision": ((str,), None, "training.precision"),
        "fp16": ((dict,), None, "training.precision, training.loss_scale"),
        "bf16": ((dict,), None, "training.precision"),
        "checkpoint_activations": ((bool,), False, "training.recompute: full"),
        "zero_optimization": ((dict,), None, "parallel.sharding"),
        "seed": ((int,), 1234, "data.seed and training.seed"),
        "eod_mask_loss": (
            (bool,),
            False,
            "data.mask_eod_loss; the mean is over the tokens of the global batch, not of each micro-batch",
        ),
        "data_path": ((str,), None, "data.train and two validation sets, one by each part of 'split'"),
        "train_data_paths": ((list,), None, "data.train"),
        "valid_data_paths": ((list,), None, "validation set 'valid'"),
        "test_data_paths": ((list,), None, "validation set 'test', evaluated at the end"),
        "train_data_weights": ((list,), None, "weight of each source of data.train"),
        "valid_data_weights": ((list,), None, "weight of each source of 'valid'"),
        "test_data_weights": ((list,), None, "weight of each source of 'test'"),
        "split": ((str,), "969, 30, 1", "split of each source"),
        "vocab_file": (
            (str,),
            None,
            "data.tokenizer: a tokenizer.json, a .model, GPT-2's vocab.json; a note for others",
        ),
        "merge_file": ((str,), None, "data.tokenizer: the merges.txt beside GPT-2's vocab_file; elsewhere a note"),
        "tokenizer_type": ((str,), "GPT2BPETokenizer", "what vocab_file is; how its size is read, where nothing is loaded"),
        "eval_interval": ((int,), 1000, "evaluation.every; 0 is never"),
        "eval_iters": ((int,), 100, "tokens of the validation sets, in global batches"),
        "checkpoint_factor": (_NUMBER, None, "checkpoint.every"),
        "checkpoint_scale": ((str,), "linear", "checkpoint.every, or for 'log' checkpoint.extra_steps"),
        "extra_save_iters": ((list,), None, "checkpoint.extra_steps"),
        "keep_last_n_checkpoints": ((int,), None, "checkpoint.keep_last; without it all stay"),
        "save": ((str,), None, "folder"),
        "load": ((str,), None, "start.from"),
        "finetune": ((bool,), False, "start.intent: rewarm (weights only, everything else reset)"),
        "no_load_rng": ((bool,), False, "start.rng: reseed"),
        "override_lr_scheduler": ((bool,), False, "start.schedule: this file's curve at the checkpoint's position"),
        "log_interval": ((int,), 100, "logging.every"),
        "tensorboard_dir": ((str,), None, "logging.tensorboard; the folder is RUN/tensorboard"),
        "use_wandb": ((bool,), None, "logging.wandb; null is off, whatever keys to Weights & Biases there are"),
        "wandb_project": ((str,), "neox", "logging.wandb.project"),
        "wandb_team": ((str,), None, "logging.wandb.entity"),
    }.items()
}

PATHS = frozenset(words("data_path train_data_paths valid_data_paths test_data_paths vocab_file merge_file save load"))
"""Honoured keys that are paths, or lists of them."""

# ---- without effect on what is computed here: listed at the start with the reason -----------------------------------

_LAUNCH = "ranks are started by deepspeed, torchrun, srun or mpirun, with their own options"
_FUSED = "a choice of kernel: the mathematics is the same"
_PROFILE = "a measurement of GPT-NeoX's engine"
OTHER_LOGGER = "metrics.jsonl, TensorBoard and Weights & Biases are what is written"
_TEXT = "of text generation and evaluation; use lm-eval on the exported model"
ENGINE = "a setting of DeepSpeed's engine, which is not the engine here; the gradients and weights are the same"
UNREAD = "GPT-NeoX reads it nowhere"
FILLED_IN = "GPT-NeoX fills it in itself"

_BY_REASON: dict[str, str] = {
    _LAUNCH: (
        "hostfile include exclude num_nodes num_gpus master_port master_addr launcher force_multi no_ssh_check comment "
        "account deepspeed_mpi deepspeed_slurm detect_nvlink_pairs user_script local_rank rank world_size "
        "global_num_gpus autotuning_run distributed_backend"
    ),
    _FUSED: (
        "scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion rope_fusion "
        "layernorm_fusion rmsnorm_fusion use_flashattn_swiglu attention_softmax_in_fp32 apply_query_key_layer_scaling "
        "rotary_save_freqs_buffer "
        "fused_kernels_build_path"
    ),
    "the exact GELU in other operations: the mathematics is the same": "onnx_safe",
    "the loss is computed in fp32 here": "fp16_lm_cross_entropy",
    "gradients are added up in fp32 here": "fp32_allreduce communication_data_type data_types",
    "initial weights are drawn per parameter, whatever the device and layout": "use_cpu_initialization",
    "layers are divided among the stages by their cost, the head included": "pipe_partition_method",
    "the head is divided by vocabulary rows": "output_layer_parallelism",
    "recomputation is layer by layer (training.recompute)": (
        "checkpoint_num_layers partition_activations synchronize_each_layer contiguous_checkpointing checkpoint_in_cpu "
        "activation_checkpointing deepspeed_activation_checkpointing"
    ),
    _PROFILE: (
        "wall_clock_breakdown steps_per_print flops_profiler comms_logger memory_profiling memory_profiling_path profile "
        "profile_backward profile_step_start profile_step_stop peak_theoretical_tflops log_grad_pct_zeros log_param_norm "
        "log_grad_norm log_optimizer_states log_gradient_noise_scale gradient_noise_scale_n_batches "
        "gradient_noise_scale_cpu_offload char_level_ppl dump_state"
    ),
    OTHER_LOGGER: (
        "use_comet comet_workspace comet_project comet_experiment_name comet_tags comet_others comet_experiment "
        "wandb_group wandb_run_name wandb_host wandb_init_all_ranks wandb tensorboard csv_monitor log_dir"
    ),
    _TEXT: (
        "text_gen_type temperature top_p top_k return_logits maximum_tokens prompt_end sample_input_file "
        "sample_output_file num_samples recompute eval_results_prefix eval_tasks"
    ),
    ENGINE: (
        "prescale_gradients gradient_predivide_factor sparse_gradients checkpoint autotuning zero_allow_untested_optimizer "
        "deepspeed_extra_args"
    ),
    "GPT-NeoX sets it from zero_optimization": (
        "zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size"
    ),
    UNREAD: (
        "hysteresis loss_scale loss_scale_window min_scale dynamic_loss_scale short_seq_prob no_save_optim num_unique_layers "
        "param_sharing_style sparse_attention deepscale deepscale_config"
    ),
    "GPT-NeoX reads it nowhere: its LayerNorm has biases, its RMSNorm has none": "use_bias_in_norms",
    "token files are read where they are needed": "use_shared_fs num_workers mmap_warmup",
    "checkpoints have checksums that are verified when they are loaded": "checkpoint_validation_with_forward_pass",
    "checkpoints always hold the random state": "no_save_rng",
    "samples are cut out of the stream of documents, as 'packed' always does": "allow_chopped",
    "checkpoints are written to the run folder; copy them from there": "s3_path s3_chunk_size",
    "the checkpoint holds a run's position": "iteration",
    "follows from the data that are given": "do_train do_valid do_test",
    FILLED_IN: "config_files git_hash curriculum_seqlen",
    "GPT-NeoX makes it from checkpoint_factor": "save_iters",
    "the same command continues an interrupted run by itself": "adlr_autoresume adlr_autoresume_interval",
    "only used with weight_by_num_documents, which is refused": "weighted_sampler_alpha",
    "only used by another train_impl, which is refused": (
        "dpo_fp32 dpo_reference_free dpo_beta kto_fp32 kto_desirable_weight kto_undesirable_weight kto_beta fp32_reinforce "
        "kl_impl kl_div_beta reinforce_leave_one_out z_loss"
    ),
    "only used by dataset_impl 'online', which is refused": "online_dataserver_ips online_dataserver_ports",
    "only used with serve_model_weights, which is refused": "weight_server_port",
    "only used with use_mup, which is refused": (
        "coord_check save_base_shapes base_shapes_file mup_init_scale mup_attn_temp mup_output_temp mup_embedding_mult "
        "mup_rp_embedding_mult mup_width_scale"
    ),
    "only used with several experts (moe_num_experts), which are refused": (
        "moe_expert_interval moe_top_k moe_router_type moe_lbl_in_fp32 moe_jitter_eps"
    ),
    "only used by Mamba's or RWKV's layers, which attention_config may not name": (
        "mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion mamba_selective_fp32_params "
        "mamba_use_bias_in_conv mamba_use_bias_in_linears dim_att head_size ffn_dim"
    ),
    "only used by sparse or gMLP attention, which attention_config may not name": "sparsity_config gmlp_attn_dim",
    "only used by other norms, which are refused": "scalenorm_epsilon",
    "only used by other positions (pos_emb), which are refused": "rpe_num_buckets rpe_max_distance opt_pos_emb_offset",
    "only used by Transformer Engine's layers, which are refused": (
        "te_fp8_format te_fp8_wgrad te_fp8_amax_history_len te_fp8_amax_compute_algo te_fp8_margin"
    ),
}
NOT_APPLICABLE: dict[str, str] = {key: reason for reason, keys in _BY_REASON.items() for key in words(keys)}

# ---- accepted with these values only: anything else would be another model, loss or schedule -------------------------

NO = (None, False, 0, 0.0)
_EMPTY: tuple[Any, ...] = (None, [])
_ANOTHER_MODEL = "only GPT-NeoX's own transformer is trained here"
_ANOTHER_LOSS = "only next-token prediction is trained here"
_TE = "Transformer Engine is not used here; leave it out"
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "pos_emb": (("rotary",), "only rotary positions are known here; GPT-NeoX's default is 'learned', so say it"),
    "gpt_j_tied": (NO, "the two norms of the parallel residual are separate here"),
    "use_qk_layernorm": (NO, _ANOTHER_MODEL),
    "hidden_dropout": (NO, "there is no dropout here; set it to 0"),
    "attention_dropout": (NO, "there is no dropout here; set it to 0"),
    "use_mup": (NO, "mup is not known here"),
    "moe_num_experts": ((None, 0, 1), _ANOTHER_MODEL),
    "soft_prompt_tuning": ((None, {}), _ANOTHER_MODEL),
    "te_columnparallel": (NO, _TE),
    "te_rowparallel": (NO, _TE),
    "te_layernorm_mlp": (NO, _TE),
    "te_mha": (NO, _TE),
    "te_fp8_mha": (NO, _TE),
    "curriculum_learning": ((None, {}), "the sequence length does not change during training here"),
    "elasticity": ((None, {}), "the batch is what the file says, whatever the number of ranks; leave it out"),
    "data_efficiency": ((None, {}), "every token is trained on, in sequences of one length, here; leave it out"),
    "compression_training": ((None, {}), "nothing is quantized or pruned here; leave it out"),
    "train_impl": (("normal", None), _ANOTHER_LOSS),
    "dataset_impl": (("gpt2", None), _ANOTHER_LOSS),
    "pack_impl": (("packed", None), "samples are cut out of the stream of documents here"),
    "data_impl": (("mmap", "infer", None), "only the mapped format (.bin and .idx with MMIDIDX) is read; convert it"),
    "weight_by_num_documents": (NO, "give the weights themselves, in train_data_weights"),
    "train_epochs": ((None, 0), "give the length as train_iters"),
    "exit_interval": ((None, 0), "stop the run by a signal: it saves, and the same command continues it"),
    "no_load_optim": (NO, "GPT-NeoX trains nothing with it (its optimizer is a dummy); for weights only say 'finetune: true'"),
    "use_checkpoint_lr_scheduler": (
        NO,
        "say the schedule in the file: the same as the checkpoint's, or another with 'override_lr_scheduler: true'",
    ),
    "scheduler": ((None, {}), "give the schedule by lr_decay_style, warmup and min_lr"),
    "amp": ((None, {}), "use fp16 or bf16"),
    "use_bnb_optimizer": (NO, "8-bit optimizers are not known here"),
    "precompute_model_name": ((None,), _ANOTHER_LOSS),
    "serve_model_weights": (NO, "weights are not served during training here; read them from the run's checkpoints"),
    "lazy_mpu_init": (NO, "the ranks meet before the model is built here; leave it out"),
    "deepspeed": ((True,), "GPT-NeoX itself trains with DeepSpeed only; leave it out"),
} | {
    f"{kind}{part}_{what}data_paths": (_EMPTY, _ANOTHER_LOSS)
    for part in ("train", "valid", "test")
    for kind, what in (("", "label_"), ("", "reward_"), ("pos_", ""), ("neg_", ""), ("pos_", "label_"), ("neg_", "label_"))
}

# Keys that GPT-NeoX overwrites: what it says beside the key that counts is an error here, where it differs.
OVERWRITTEN: dict[str, tuple[Any, str]] = {
    # key: (its own default, the key that counts)
    "lr": (None, "optimizer.params.lr"),
    "clip_grad": (1.0, "gradient_clipping"),
    "optimizer_type": ("adam", "optimizer.type"),
    "zero_stage": (None, "zero_optimization.stage"),
    "batch_size": (None, "train_micro_batch_size_per_gpu"),
    "gas": (None, "gradient_accumulation_steps"),
    "is_pipe_parallel": (False, "pipe_parallel_size"),
}

# ---- what a checkpoint's own configuration says of its model ---------------------------------------------------------

FUNCTION = frozenset(
    words(
        "num_layers hidden_size num_attention_heads num_kv_heads intermediate_size expansion_factor mlp_multiple_of "
        "layernorm_epsilon rms_norm_epsilon mlp_type no_weight_tying bias_gelu_fusion rotary_pct rotary_emb_base "
        "gpt_j_residual gpt_j_tied "
        "use_bias_in_attn_linear use_bias_in_mlp use_qk_layernorm attention_config sliding_window_width pos_emb norm "
        "activation use_mup moe_num_experts soft_prompt_tuning te_columnparallel te_rowparallel te_layernorm_mlp te_mha "
        "te_fp8_mha"
    )
)
"""Keys on which the predictions of a model with given weights depend. All others leave its function alone: they are of the
training, or without effect unless one of these has a value that is refused."""


def is_known(key: str) -> bool:
    """Whether ``key``, with underscores, is one of GPT-NeoX's."""
    return key in HONOURED or key in NOT_APPLICABLE or key in ONLY or key in OVERWRITTEN


def refusal(key: str, value: Any, values: Mapping[str, Any]) -> str | None:
    """Why ``value`` can't be honoured; None where it can, or has no effect beside the other ``values``.

    ``key`` with underscores, at the top level.
    """
    if key not in ONLY:
        return not_here(values).get(key)
    allowed, reason = ONLY[key]
    if is_among(value, allowed):
        return None
    if key == "gpt_j_tied" and not values.get("gpt_j_residual"):
        return None
    return reason


def other_function(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a checkpoint's own configuration by which the same weights are another function than the one computed here,
    each with the reason.

    ``values``: as GPT-NeoX's YAML or its pickled arguments have them, keys with underscores; a missing key is not judged.
    """
    found = {key: reason for key in FUNCTION if key in values and (reason := refusal(key, values[key], values))}
    if other := sorted(set(_words(values.get("attention_config"))) - {"global", "flash", "all"}):
        found["attention_config"] = f"{other[0]!r}: only 'global' and 'flash' attention is known"
    return found


def _words(value: Any) -> list[str]:
    """All texts in nested lists: GPT-NeoX expands [[["flash"], 2]] to ["flash", "flash"]."""
    if isinstance(value, str):
        return [value]
    return [word for item in value for word in _words(item)] if isinstance(value, list | tuple) else []


def is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether ``value`` is one of ``allowed``, or a block that is switched off where a block may be empty."""
    if isinstance(value, dict):
        return {} in allowed and (not value or is_off(value))
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)


def is_off(block: Any) -> bool:
    """Whether a block says ``enabled: false``, at whatever depth, and nowhere otherwise."""
    found: list[Any] = []

    def visit(value: Any) -> None:
        for key, item in value.items() if isinstance(value, dict) else ():
            if key == "enabled":
                found.append(item)
            visit(item)

    visit(block)
    return bool(found) and not any(item is not False for item in found)
