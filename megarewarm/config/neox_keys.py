"""GPT-NeoX's configuration keys, all of them, and what becomes of each here; ``docs/neox_config.md`` shows these tables."""

from __future__ import annotations

from typing import Any

# ---- honoured: neox_translate.py turns them into ours ---------------------------------------------------------------

_NUMBER = (int, float)
HONOURED: dict[str, tuple[tuple[type, ...], str]] = {
    # key: (types, what it is here)
    "pipe_parallel_size": ((int,), "parallel.pipeline; 0 and 1 are the same"),
    "model_parallel_size": ((int,), "parallel.tensor"),
    "sequence_parallel": ((bool,), "parallel.sequence"),
    "num_layers": ((int,), "model.num_layers"),
    "hidden_size": ((int,), "model.hidden_size"),
    "num_attention_heads": ((int,), "model.num_heads"),
    "intermediate_size": ((int,), "model.ffn_size"),
    "expansion_factor": (_NUMBER, "model.ffn_size, as a multiple of hidden_size"),
    "seq_length": ((int,), "data.sequence_length"),
    "max_position_embeddings": ((int,), "model.max_positions"),
    "layernorm_epsilon": (_NUMBER, "model.layernorm_eps"),
    "no_weight_tying": ((bool,), "model.tie_embeddings, turned round"),
    "make_vocab_size_divisible_by": ((int,), "model.vocab_size, with the tokenizer's size, where nothing is loaded"),
    "padded_vocab_size": ((int,), "model.vocab_size, where nothing is loaded"),
    "bias_gelu_fusion": ((bool,), "model.activation: gelu_tanh where true, gelu_erf where false"),
    "rotary_pct": (_NUMBER, "model.rotary_fraction"),
    "rotary_emb_base": (_NUMBER, "model.rotary_base"),
    "init_method": ((str,), "model.init"),
    "output_layer_init_method": ((str,), "model.output_init"),
    "init_method_std": (_NUMBER, "model.init_std"),
    "gpt_j_residual": ((bool,), "model.residual"),
    "use_bias_in_attn_linear": ((bool,), "model.attention_bias"),
    "attention_config": ((list,), "checked: 'global' and 'flash' are what every layer does here"),
    "optimizer": ((dict,), "schedule.max_lr, optimizer.betas, optimizer.eps"),
    "lr": (_NUMBER, "schedule.max_lr, where 'optimizer' does not say it"),
    "weight_decay": (_NUMBER, "optimizer.weight_decay"),
    "gradient_clipping": (_NUMBER, "optimizer.clip_norm; 0 is off"),
    "clip_grad": (_NUMBER, "optimizer.clip_norm; 0 is off"),
    "lr_decay_style": ((str,), "schedule.curve"),
    "lr_decay_iters": ((int,), "schedule.length"),
    "lr_decay_fraction": (_NUMBER, "schedule.length, as a share of train_iters"),
    "min_lr": (_NUMBER, "schedule.min_lr"),
    "warmup": (_NUMBER, "schedule.warmup, a share of the decay's length"),
    "train_iters": ((int,), "training.budget"),
    "train_batch_size": ((int,), "training.global_batch"),
    "train_micro_batch_size_per_gpu": ((int,), "training.micro_batch"),
    "gradient_accumulation_steps": ((int,), "training.global_batch"),
    "precision": ((str,), "training.precision"),
    "fp16": ((dict,), "training.precision"),
    "bf16": ((dict,), "training.precision"),
    "checkpoint_activations": ((bool,), "training.recompute: full"),
    "zero_optimization": ((dict,), "parallel.sharding: none for stage 0, zero2 for 1 and 2, zero3 for 3"),
    "seed": ((int,), "data.seed and training.seed"),
    "eod_mask_loss": ((bool,), "data.mask_eod_loss; the mean is over the tokens of the global batch, not of each micro-batch"),
    "data_path": ((str,), "data.train and two validation sets, one by each part of 'split'"),
    "train_data_paths": ((list,), "data.train"),
    "valid_data_paths": ((list,), "validation set 'valid'"),
    "test_data_paths": ((list,), "validation set 'test', evaluated at the end"),
    "train_data_weights": ((list,), "weight of each source of data.train"),
    "valid_data_weights": ((list,), "weight of each source of 'valid'"),
    "test_data_weights": ((list,), "weight of each source of 'test'"),
    "split": ((str,), "split of each source"),
    "vocab_file": ((str,), "data.tokenizer, where it is a tokenizer.json"),
    "tokenizer_type": ((str,), "how the tokenizer's size is read, where nothing is loaded"),
    "merge_file": ((str,), "kept for the tokenizer; token files need none"),
    "eval_interval": ((int,), "evaluation.every"),
    "eval_iters": ((int,), "tokens of the validation sets, in global batches"),
    "checkpoint_factor": (_NUMBER, "checkpoint.every"),
    "checkpoint_scale": ((str,), "checkpoint.every, or for 'log' checkpoint.extra_steps"),
    "extra_save_iters": ((list,), "checkpoint.extra_steps"),
    "keep_last_n_checkpoints": ((int,), "checkpoint.keep_last; without it all stay"),
    "save": ((str,), "folder"),
    "load": ((str,), "start.from"),
    "finetune": ((bool,), "start.intent: rewarm (weights only, everything else anew)"),
    "no_load_rng": ((bool,), "start.rng: reseed"),
    "override_lr_scheduler": ((bool,), "start.schedule: this file's curve at the checkpoint's position"),
    "log_interval": ((int,), "logging.every"),
    "tensorboard_dir": ((str,), "logging.tensorboard; the folder is RUN/tensorboard"),
    "use_wandb": ((bool,), "logging.wandb"),
    "wandb_project": ((str,), "logging.wandb.project"),
    "wandb_team": ((str,), "logging.wandb.entity"),
}

# ---- without effect on what is computed here: listed at the start with the reason -----------------------------------

_LAUNCH = "ranks are started by deepspeed, torchrun, srun or mpirun, with their own options"
_FUSED = "a choice of kernel: the mathematics is the same"
_PROFILE = "a measurement of GPT-NeoX's engine"
_OTHER_LOGGER = "metrics.jsonl, TensorBoard and Weights & Biases are what is written"
_TEXT = "of text generation and evaluation; use lm-eval on the exported model"
_ENGINE = "a setting of DeepSpeed's engine, which is not the engine here"
_ALWAYS = "always so here"

_BY_REASON: dict[str, str] = {
    _LAUNCH: (
        "hostfile include exclude num_nodes num_gpus master_port master_addr launcher force_multi no_ssh_check comment "
        "account deepspeed_mpi deepspeed_slurm detect_nvlink_pairs user_script local_rank rank world_size "
        "global_num_gpus deepspeed_extra_args autotuning_run distributed_backend"
    ),
    _FUSED: (
        "scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion rope_fusion "
        "layernorm_fusion rmsnorm_fusion use_flashattn_swiglu attention_softmax_in_fp32 apply_query_key_layer_scaling "
        "rotary_save_freqs_buffer use_triton"
    ),
    "the loss is computed in fp32 here": "fp16_lm_cross_entropy",
    "initial weights are drawn per parameter, whatever the device and layout": "use_cpu_initialization",
    "stages are cut so that the dearest is as cheap as can be": "pipe_partition_method",
    "the head is cut by vocabulary rows": "output_layer_parallelism",
    "recomputation is layer by layer (training.recompute)": (
        "checkpoint_num_layers partition_activations synchronize_each_layer contiguous_checkpointing checkpoint_in_cpu "
        "activation_checkpointing"
    ),
    _PROFILE: (
        "wall_clock_breakdown steps_per_print memory_breakdown flops_profiler comms_logger memory_profiling "
        "memory_profiling_path profile profile_step_start profile_step_stop peak_theoretical_tflops log_grad_pct_zeros "
        "log_param_norm log_grad_norm log_optimizer_states log_gradient_noise_scale gradient_noise_scale_n_batches "
        "gradient_noise_scale_cpu_offload char_level_ppl"
    ),
    _OTHER_LOGGER: (
        "use_comet comet_workspace comet_project comet_experiment_name comet_tags comet_others comet_experiment "
        "wandb_group wandb_run_name wandb_host wandb_init_all_ranks wandb tensorboard csv_monitor log_dir "
        "tensorboard_writer"
    ),
    _TEXT: (
        "text_gen_type temperature top_p top_k return_logits maximum_tokens prompt_end sample_input_file "
        "sample_output_file num_samples recompute eval_results_prefix eval_tasks short_seq_prob"
    ),
    _ENGINE: (
        "fp32_allreduce prescale_gradients gradient_predivide_factor sparse_gradients dump_state disable_allgather "
        "communication_data_type zero_allow_untested_optimizer zero_allow_comm_data_type data_types checkpoint "
        "elasticity autotuning zero_force_ds_cpu_optimizer seq_parallel_communication_data_type aio "
        "compression_training data_efficiency zero_stage zero_reduce_scatter zero_contiguous_gradients "
        "zero_reduce_bucket_size zero_allgather_bucket_size optimizer_type sparse_attention"
    ),
    "the loss scaler doubles after 1000 finite steps, halves after one": "hysteresis loss_scale_window min_scale",
    "token files are mapped and read where they are needed": "use_shared_fs num_workers mmap_warmup data_loader",
    "checkpoints have checksums that are verified when they are loaded": "checkpoint_validation_with_forward_pass",
    "checkpoints always hold the optimizer, so that a run can be resumed": "no_save_optim",
    "checkpoints always hold the random state": "no_save_rng",
    "samples are cut out of the stream of documents, as GPT-NeoX does by default": "allow_chopped",
    "checkpoints are written to the run folder; copy them from there": "s3_path s3_chunk_size",
    _ALWAYS: "is_pipe_parallel",
    "GPT-NeoX sets it from train_micro_batch_size_per_gpu": "batch_size",
    "where a run stands is in its checkpoint": "iteration",
    "follows from the data that are given": "do_train do_valid do_test",
    "GPT-NeoX makes it from checkpoint_factor": "save_iters",
    "GPT-NeoX makes it from gradient_accumulation_steps": "gas",
    "the same command continues an interrupted run by itself": "adlr_autoresume adlr_autoresume_interval",
    "of GPT-NeoX": "git_hash",
}
NOT_APPLICABLE: dict[str, str] = {key: reason for reason, keys in _BY_REASON.items() for key in keys.split()}

# ---- accepted with these values only: anything else would be another model, loss or schedule -------------------------

_NO = (None, False, 0, 0.0)
_ANOTHER_MODEL = "only GPT-NeoX's own transformer is trained here"
_ANOTHER_LOSS = "only next-token prediction is trained here"
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "pos_emb": (("rotary",), "only rotary positions are known here; GPT-NeoX's default is 'learned', so say it"),
    "norm": (("layernorm",), "only LayerNorm is known here"),
    "activation": (("gelu",), "only GELU is known here"),
    "gpt_j_tied": (_NO, "the two norms of the parallel residual are separate here"),
    "use_bias_in_norms": ((True, None), "norms have biases here"),
    "use_bias_in_mlp": ((True, None), "the MLP has biases here"),
    "use_qk_layernorm": (_NO, _ANOTHER_MODEL),
    "num_kv_heads": ((None,), "every head has its own keys and values here; leave it out"),
    "sliding_window_width": ((None,), _ANOTHER_MODEL),
    "mlp_multiple_of": ((1, None), "the MLP's width is taken as it is; give it with intermediate_size"),
    "num_unique_layers": ((None,), _ANOTHER_MODEL),
    "param_sharing_style": ((None, "grouped"), _ANOTHER_MODEL),
    "opt_pos_emb_offset": (_NO, _ANOTHER_MODEL),
    "hidden_dropout": (_NO, "there is no dropout here; set it to 0"),
    "attention_dropout": (_NO, "there is no dropout here; set it to 0"),
    "use_mup": (_NO, "mup is not known here"),
    "moe_num_experts": ((None, 0, 1), _ANOTHER_MODEL),
    "soft_prompt_tuning": ((None,), _ANOTHER_MODEL),
    "sparsity_config": ((None,), "only full attention is known here"),
    "z_loss": (_NO, _ANOTHER_LOSS),
    "curriculum_learning": ((None, {"enabled": False}), "the sequence length does not change during training here"),
    "curriculum_seqlen": (_NO, "the sequence length does not change during training here"),
    "train_impl": (("normal", None), _ANOTHER_LOSS),
    "dataset_impl": (("gpt2", None), _ANOTHER_LOSS),
    "pack_impl": (("packed", None), "samples are cut out of the stream of documents here"),
    "data_impl": (("mmap", "infer", None), "only the mapped format (.bin and .idx with MMIDIDX) is read; convert it"),
    "weight_by_num_documents": (_NO, "give the weights themselves, in train_data_weights"),
    "weighted_sampler_alpha": ((1.0, 1, 0.3, None), "only used with weight_by_num_documents, which is not known here"),
    "train_epochs": ((None,), "give the length as train_iters"),
    "exit_interval": ((None,), "stop the run by a signal: it saves, and the same command continues it"),
    "no_load_optim": (_NO, "GPT-NeoX trains nothing with it (its optimizer is a dummy); for weights only say 'finetune: true'"),
    "use_checkpoint_lr_scheduler": (
        _NO,
        "say the schedule in the file: the same as the checkpoint's, or another with 'override_lr_scheduler: true'",
    ),
    "scheduler": ((None,), "give the schedule by lr_decay_style, warmup and min_lr"),
    "amp": ((None, {"enabled": False}), "use fp16 or bf16"),
    "use_bnb_optimizer": (_NO, "only AdamW is known here"),
    "precompute_model_name": ((None,), _ANOTHER_LOSS),
    "lora": ((None,), _ANOTHER_MODEL),
    "gmlp_attn_dim": ((None, 64), _ANOTHER_MODEL),
    "rpe_num_buckets": ((None, 32), _ANOTHER_MODEL),
    "rpe_max_distance": ((None, 128), _ANOTHER_MODEL),
    "rms_norm_epsilon": ((None, 1e-8), "only LayerNorm is known here"),
    "scalenorm_epsilon": ((None, 1e-8), "only LayerNorm is known here"),
}

# Families of keys that belong to other models or losses: refused whatever they say.
FAMILIES: dict[str, str] = {
    "moe_": _ANOTHER_MODEL,
    "mamba_": _ANOTHER_MODEL,
    "te_": "Transformer Engine is not used here",
    "rwkv_": _ANOTHER_MODEL,
    "rpe_": _ANOTHER_MODEL,
    "mup_": "mup is not known here",
    "coord_check": "mup is not known here",
    "dpo_": _ANOTHER_LOSS,
    "kto_": _ANOTHER_LOSS,
    "reinforce_": _ANOTHER_LOSS,
    "pos_train": _ANOTHER_LOSS,
    "pos_valid": _ANOTHER_LOSS,
    "pos_test": _ANOTHER_LOSS,
    "neg_train": _ANOTHER_LOSS,
    "neg_valid": _ANOTHER_LOSS,
    "neg_test": _ANOTHER_LOSS,
    "train_label_data": _ANOTHER_LOSS,
    "valid_label_data": _ANOTHER_LOSS,
    "test_label_data": _ANOTHER_LOSS,
    "train_reward_data": _ANOTHER_LOSS,
    "valid_reward_data": _ANOTHER_LOSS,
    "test_reward_data": _ANOTHER_LOSS,
}


def refusal_of_family(key: str) -> str | None:
    """Why ``key`` is refused, if it belongs to a family of another model or loss."""
    return next((reason for prefix, reason in FAMILIES.items() if key.startswith(prefix)), None)


def is_known(key: str) -> bool:
    """Whether ``key``, with underscores, is one of GPT-NeoX's."""
    return key in HONOURED or key in NOT_APPLICABLE or key in ONLY or refusal_of_family(key) is not None
