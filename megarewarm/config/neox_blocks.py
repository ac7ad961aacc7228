"""The keys inside of GPT-NeoX's blocks (most of them DeepSpeed's) and what becomes of each here, under dotted names.

A mapping that is no block of these tables (``comet_others``) has the fate of its key, whatever it holds.
"""

from __future__ import annotations

from typing import Any

from megarewarm.config.neox_keys import ENGINE, NO, OTHER_LOGGER, UNREAD, Honoured, words

_NUMBER = (int, float)
HONOURED: dict[str, Honoured] = {
    key: Honoured(*rest)
    for key, rest in {
        "fp16.enabled": ((bool,), False, "training.precision: fp16"),
        "fp16.type": (
            (str,),
            None,
            "training.precision; GPT-NeoX up to 2.0 obeys 'bfloat16' there, as for Pythia 1B; later ones read it nowhere",
        ),
        "fp16.loss_scale": (_NUMBER, 0, "training.loss_scale.fixed; 0 is dynamic"),
        "fp16.initial_scale_power": ((int,), 16, "training.loss_scale.initial, as a power of two"),
        "fp16.loss_scale_window": (_NUMBER, 1000, "training.loss_scale.window"),
        "fp16.hysteresis": ((int,), 2, "training.loss_scale.hysteresis"),
        "fp16.consecutive_hysteresis": ((bool,), False, "training.loss_scale.refill"),
        "fp16.min_loss_scale": (_NUMBER, 1, "training.loss_scale.smallest"),
        "bf16.enabled": ((bool,), False, "training.precision: bf16"),
        "optimizer.type": ((str,), "Adam", "checked: only Adam (with decoupled weight decay) is known"),
        "optimizer.params": ((dict,), None, "the section optimizer, schedule.max_lr"),
        "optimizer.params.lr": (_NUMBER, None, "schedule.max_lr"),
        "optimizer.params.betas": ((list,), [0.9, 0.999], "optimizer.betas"),
        "optimizer.params.eps": (_NUMBER, 1e-8, "optimizer.eps"),
        "zero_optimization.stage": ((int,), 0, "parallel.sharding: none for stage 0, zero2 for 1 and 2, zero3 for 3"),
    }.items()
}

# ---- without effect on what is computed here ------------------------------------------------------------------------

_DEVICE = "the state stays on the device here; parallel.sharding divides it among the ranks"
_MEMORY = "of memory and communication: gradients and weights are the same"
_MEASURED = "a measurement of DeepSpeed's engine"
_SAVED = "checkpoints here are named, written and checked in another way"
_OFF = "the block is switched off"
_OPTIMIZERS = "of optimizers that DeepSpeed makes; GPT-NeoX makes its own"

_GROUPS: list[tuple[str, str, str]] = [
    # block, why its keys have no effect, keys
    ("fp16", UNREAD, "fp16"),
    ("fp16", "inputs are token ids, which are not cast", "auto_cast"),
    (
        "bf16",
        "bf16 needs no loss scale",
        "bf16 loss_scale loss_scale_window initial_scale_power hysteresis consecutive_hysteresis min_loss_scale",
    ),
    ("bf16", "gradients are looked at before every step here (reliability.non_finite)", "check_grad_overflow"),
    ("bf16", "inputs are token ids, which are not cast", "auto_cast"),
    ("bf16", ENGINE, "immediate_grad_update accumulate_grads_via_hooks"),
    ("optimizer", _OPTIMIZERS, "legacy_fusion"),
    ("optimizer.params", "how gradients are cleared between steps: they are the same", "set_grad_none"),
    (
        "zero_optimization",
        _MEMORY,
        "contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
        "allgather_bucket_size overlap_comm load_from_fp32_weights elastic_checkpoint sub_group_size prefetch_bucket_size "
        "stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold "
        "model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters "
        "max_reuse_distance stage3_max_reuse_distance gather_16bit_weights_on_model_save "
        "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save module_granularity_threshold "
        "stage3_module_granularity_threshold use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params "
        "allgather_sequential stage3_allgather_sequential ignore_unused_parameters legacy_stage1 round_robin_gradients "
        "parameter_alignment zero_hpz_partition_size mics_shard_size mics_hierarchical_params_gather "
        "memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
        "enable_sanity_checks leaf_module save_muon_momentum_buffer_in_memory",
    ),
    (
        "zero_optimization",
        _DEVICE,
        "cpu_offload cpu_offload_params cpu_offload_param cpu_offload_use_pin_memory offload_param offload_optimizer",
    ),
    ("zero_optimization.offload_param", _DEVICE, "device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    (
        "zero_optimization.offload_optimizer",
        _DEVICE,
        "device nvme_path buffer_count pin_memory pipeline pipeline_read pipeline_write fast_init ratio super_offload "
        "cpuadam_cores_perc",
    ),
    (
        "activation_checkpointing",
        "recomputation is layer by layer (training.recompute)",
        "partition_activations contiguous_memory_optimization cpu_checkpointing number_checkpoints "
        "synchronize_checkpoint_boundary profile",
    ),
    (
        "flops_profiler",
        _MEASURED,
        "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    ),
    ("comms_logger", _MEASURED, "enabled verbose prof_all debug prof_ops"),
    ("data_types", "gradients are added up in fp32 here", "grad_accum_dtype"),
    (
        "autotuning",
        "a search for settings of DeepSpeed's engine",
        "enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step start_step end_step metric "
        "metric_path tuner_type tuner_early_stopping tuner_num_trials arg_mappings max_train_batch_size "
        "min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu "
        "num_tuning_micro_batch_sizes mp_size model_info model_info_path",
    ),
    ("tensorboard", OTHER_LOGGER, "enabled output_path job_name"),
    ("wandb", OTHER_LOGGER, "enabled group team project"),
    ("csv_monitor", OTHER_LOGGER, "enabled output_path job_name"),
    ("checkpoint", _SAVED, "tag_validation use_node_local_storage parallel_write"),
    ("checkpoint.parallel_write", _SAVED, "pipeline_stage"),
    (
        "deepspeed_extra_args",
        ENGINE,
        "memory_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer disable_allgather disable_python_gc "
        "seq_parallel_communication_data_type zero_allow_comm_data_type aio log_level dump_state prescale_gradients "
        "gradient_predivide_factor sparse_gradients steps_per_print wall_clock_breakdown flops_profiler comms_logger "
        "tensorboard wandb csv_monitor activation_checkpointing data_types communication_data_type fp32_allreduce "
        "checkpoint autotuning",
    ),
    (
        "elasticity",
        _OFF,
        "enabled max_train_batch_size micro_batch_sizes min_gpus max_gpus min_time version ignore_non_elastic_batch_info "
        "num_gpus_per_node model_parallel_size prefer_larger_batch",
    ),
    (
        "compression_training",
        _OFF,
        "weight_quantization activation_quantization sparse_pruning row_pruning head_pruning channel_pruning layer_reduction",
    ),
    ("data_efficiency", _OFF, "enabled seed data_sampling data_routing"),
    (
        "curriculum_learning",
        _OFF,
        "enabled curriculum_type min_difficulty max_difficulty schedule_type schedule_config",
    ),
    ("curriculum_learning.schedule_config", _OFF, "total_curriculum_step difficulty_step root_degree difficulty max_step"),
    ("soft_prompt_tuning", _OFF, "enabled n_tokens init_string init_range"),
]
NOT_APPLICABLE: dict[str, str] = {f"{block}.{key}": reason for block, reason, keys in _GROUPS for key in keys.split()}

# ---- accepted with these values only ---------------------------------------------------------------------------------

_MASTERS = "weights and moments are fp32 here; leave it out"
_TOP = "GPT-NeoX itself would not see it there; write it at the top level"
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16.fp16_master_weights_and_grads": (NO, _MASTERS),
    "bf16.bf16_master_weights_and_grads": (NO, _MASTERS),
    "bf16.bf16_optimizer_states": (NO, _MASTERS),
    "bf16.type": ((None, "bfloat16", "bf16"), "the block is bf16's; say another precision in 'fp16' or 'precision'"),
    "data_types.param_dtype": ((None, "fp32"), _MASTERS),
    "data_types.buffer_dtype": ((None, "fp32"), _MASTERS),
    "data_types.keep_in_fp32_modules": ((None, "auto"), _MASTERS),
    "optimizer.params.weight_decay": (
        (),
        "weight_decay belongs outside: GPT-NeoX reads the top-level key of that name; move it there",
    ),
    "optimizer.params.bias_correction": ((True,), "Adam's moments are always corrected here; leave it out"),
    "optimizer.params.adam_w_mode": ((True,), "weight decay is always decoupled here; leave it out"),
    "optimizer.params.amsgrad": (NO, "AMSGrad is not known here; leave it out"),
    "zero_optimization.compute_grad_norm": ((True,), "the gradient norm is always measured here; leave it out"),
    "zero_optimization.zero_quantized_weights": (NO, "nothing is quantized here; leave it out"),
    "zero_optimization.zero_quantized_nontrainable_weights": (NO, "nothing is quantized here; leave it out"),
    "zero_optimization.zero_quantized_gradients": (NO, "nothing is quantized here; leave it out"),
    "zero_optimization.zenflow": ((None,), "updates are never delayed here; leave it out"),
    "checkpoint.load_universal": (NO, "give the checkpoint's folder itself in 'load'"),
} | {
    f"deepspeed_extra_args.{key}": ((), _TOP)
    for key in words(
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler fp16 bf16 amp "
        "gradient_clipping zero_optimization curriculum_learning elasticity data_efficiency compression_training"
    )
}

BLOCKS = frozenset(key.rpartition(".")[0] for key in (*HONOURED, *NOT_APPLICABLE, *ONLY))
"""Keys whose value is a mapping of which every key is known."""
