"""Megatron-LM's arguments, and which of them leave the function of a GPT-NeoX or a Llama-like model alone. From the argument
lists of Megatron-LM between 2021 and 2026 (megatron/training/arguments.py, TransformerConfig, GPTModel)."""

from __future__ import annotations

from typing import Any

from megarewarm.checkpoint.foreign.recorded_keys import NO, Keys, names

_READ_WORDS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention num_query_groups "
    "seq_length max_position_embeddings position_embedding_type use_rotary_position_embeddings rotary_percent rotary_base "
    "norm_epsilon layernorm_epsilon bias_gelu_fusion openai_gelu untie_embeddings_and_output_weights padded_vocab_size "
    "tensor_model_parallel_size pipeline_model_parallel_size model_parallel_size softmax_scale attention_dropout "
    "hidden_dropout"
)
_READ = frozenset(_READ_WORDS.split())

_PLAIN = "the MLP here is two layers with GELU between them"
_ROTARY = "rotary positions here are neither scaled nor interpolated"
_ATTENTION = "attention here is a softmax over all earlier positions"
_LAYERS = "all layers here are attention and MLP, and of one kind"
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "normalization": (("LayerNorm", None), "only LayerNorm can be computed here"),
    "apply_layernorm_1p": (NO, "the norms' weights would be one less than here; save the model with 1 added to them"),
    "layernorm_zero_centered_gamma": (
        NO,
        "the norms' weights would be one less than here; save the model with 1 added to them",
    ),
    "apply_residual_connection_post_layernorm": (NO, "the residual here goes round the norm"),
    "swiglu": (NO, _PLAIN),
    "gated_linear_unit": (NO, _PLAIN),
    "squared_relu": (NO, _PLAIN),
    "quick_geglu": (NO, _PLAIN),
    "glu_linear_offset": (NO, _PLAIN),
    "activation_func_clamp_value": (NO, _PLAIN),
    "rotary_interleaved": (NO, "rotary pairs here are the two halves of a head, not neighbours"),
    "rotary_seq_len_interpolation_factor": ((None, 0, 1), _ROTARY),
    "use_rope_scaling": (NO, _ROTARY),
    "rope_type": ((None, "rope"), _ROTARY),
    "no_rope_freq": (NO, "every layer here has rotary positions"),
    "window_size": (NO, _ATTENTION),
    "window_attn_skip_freq": (NO, _ATTENTION),
    "softmax_type": (("vanilla", None), _ATTENTION),
    "qk_layernorm": (NO, _ATTENTION),
    "qk_l2_norm": (NO, _ATTENTION),
    "attention_output_gate": (NO, _ATTENTION),
    "experimental_attention_variant": (NO, _ATTENTION),
    "linear_attention_freq": (NO, _ATTENTION),
    "multi_latent_attention": (NO, _ATTENTION),
    "num_experts": (NO, _LAYERS),
    "num_moe_experts": (NO, _LAYERS),
    "mtp_num_layers": (NO, "there is one head here, which predicts the next token"),
    "heterogeneous_layers_config_path": (NO, _LAYERS),
    "heterogeneous_layers_config_encoded_json": (NO, _LAYERS),
    "heterogeneous_block_specs": (NO, _LAYERS),
    "is_hybrid_model": (NO, _LAYERS),
    "hybrid_layer_pattern": (NO, _LAYERS),
    "hybrid_override_pattern": (NO, _LAYERS),
    "hybrid_attention_ratio": (NO, _LAYERS),
    "hybrid_mlp_ratio": (NO, _LAYERS),
    "retro_add_retriever": (NO, _LAYERS),
    "spec": (NO, _LAYERS),
    "model_spec": (NO, _LAYERS),
    "enable_mhc_connections": (NO, "there is one residual stream here"),
    "num_unique_layers": (NO, _LAYERS),
    "use_mup": (NO, "embedding, attention and head are not scaled here"),
}

_FAMILIES = (
    # training, its data and its records
    "adam_ adaptive_muon_ adlr_ app_tag_ data_ dataloader_ dist_ckpt_ ckpt_ async_ lr_ lion_ muon_ soap_ sgd_ train_ valid_ "
    "eval_ exit_ fim_ grpo_ rl_ langrl_ sft iter_ log_ logits_ one_logger wandb_ tensorboard otel_ profile pytorch_profiler_ "
    "nvtx_ save load non_persistent_ override_ rerun_ result_ straggler_ ft_ inprocess_ flight_recorder_ error_injection_ "
    "replication tokenizer_ tiktoken_ null_tokenizer_ bert_ biencoder_ ict_ dino_ img_ swin_ vision_ retriever_ check_for_ "
    # how ranks share the work, memory and kernels
    "accumulate_ activations_checkpoint_ recompute_ checkpoint_ cpu_offloading offload_ optimizer cuda_graph cross_entropy_ "
    "ddp_ fsdp_ megatron_fsdp_ use_megatron_fsdp overlap_ tp_comm_ nccl_ gtp_ high_priority_ inference_ kitchen_ use_kitchen "
    "pipeline_ virtual_pipeline_ context_parallel_ expert_ account_for_ fp8 fp4 fp16 fp32_ bf16 embedding_init_ init_method "
    # of models that are refused by the key which makes one
    "moe_ mamba_ mla_ mtp_ mhc_ mup_ dsa_ gdp_ linear_ hybrid_ heterogeneous_ retro_ yarn_ rope_scaling_ relative_attention_ "
    "encoder_ decoder_ indexer_ qk_clip"
)

_HARMLESS = names(
    "DDP_impl activation_func_fp8_input_store activation_offload_fraction add_bias_linear add_position_embedding "
    "add_qkv_bias align_grad_reduce align_param_gather allow_ambiguous_pad_tokens apply_query_key_layer_scaling "
    "apply_rope_fusion apply_wd_to_qk_layernorm attention_backend attention_softmax_in_fp32 auto_detect_ckpt_format "
    "autocast_dtype average_in_collective barrier_with_L1_time batch_invariant_mode batch_p2p_comm batch_p2p_sync "
    "batch_size beta_fast beta_slow bias_activation_fusion bias_dropout_fusion bias_swiglu_fusion block_data_path "
    "bucket_size cache_dir cache_mla_latents calc_ft_timeouts calculate_per_token_loss chat_template "
    "check_weight_hash_across_dp_replicas_interval classes_fraction clip_grad clone_scatter_output_in_embedding cloze_eval "
    "config_logger_dir consumed_train_samples consumed_valid_samples cp_comm_type create_all_gather_group "
    "create_attention_mask_in_dataloader deallocate_pipeline_outputs decode_only_cuda_graphs decoupled_lr decoupled_min_lr "
    "decoupled_weight_decay decrease_batch_size_if_needed deep_init defer_embedding_wgrad_compute delay_grad_reduce "
    "delay_offload_until_cuda_graph delay_param_gather delay_wgrad_compute delim deprecated_use_mcore_models "
    "deterministic_mode disable_bf16_reduced_precision_matmul disable_chunked_prefill disable_jit_fuser "
    "disable_mamba_mem_eff_path disable_msc_deprecated disable_parameter_transpose_cache disable_straggler_on_startup "
    "disable_symmetric_registration distrib_optim_fully_reshardable_mem_efficient distribute_checkpointed_activations "
    "distribute_saved_activations distributed_backend distributed_timeout_minutes distributed_timeout_seconds_after_init "
    "dump_param_to_param_group_map dynamic_loss_scale embedding_path embedding_weights_in_fp32 empty_unused_memory_level "
    "enable_autocast enable_chunked_prefill enable_cuda_graph enable_experimental enable_ft_package "
    "enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc enable_one_logger end_weight_decay eod_mask_loss "
    "evidence_data_path exp_avg_dtype exp_avg_sq_dtype external_cuda_graph faiss_use_gpu fake_process_group filter_warnings "
    "fine_grained_activation_offloading finetune first_last_layers_bf16 first_pipeline_num_layers flash_attention_version "
    "flash_decode freeze_all_layers full_validation fully_parallel_load fully_parallel_save fused_residual_rmsnorm "
    "fused_single_qkv_rope genfile global_batch_size gpu_sniff_test_interval grad_norm_skip_threshold grad_reduce_in_bf16 "
    "grad_reduce_in_fp32 gradient_accumulation_fusion gradient_reduce_div_fusion greedy hash_data_path head_lr_mult "
    "hierarchical_context_parallel_sizes hysteresis init_model_with_meta_device initial_loss_scale initialize_socket_comms "
    "input_data_sizes_file intermediate_size iteration iterations_to_skip keep_fp8_transpose_cache "
    "keep_fp8_transpose_cache_when_using_custom_fsdp kv_lora_rank last_pipeline_num_layers lazy_mpu_init legacy_tokenizer "
    "local_rank logging_level logit_dtype loose_json loss_scale loss_scale_window lr main_grads_dtype main_params_dtype "
    "make_vocab_size_divisible_by manual_gc manual_gc_eval manual_gc_interval mask_factor mask_prob mask_type "
    "masked_softmax_fusion max_num_samples max_preds_per_seq max_seqlen_per_dp_cp_rank max_tokens_to_oom "
    "memory_efficient_layer_norm memory_keys memory_snapshot_path merge_file metadata_path micro_batch_size "
    "microbatch_group_size_per_vp_stage mid_level_dataset_surplus min_loss_scale min_lr min_offloaded_tensor_size min_scale "
    "mlp_chunks_for_prefill mlp_chunks_for_training mmap_bin_files mmap_warmup mock_data most_recent_k mscale "
    "mscale_all_dim multiple_validation_sets no_async_tensor_model_parallel_allreduce no_load_optim no_load_rng "
    "no_persist_layer_norm no_save_optim no_save_rng no_weight_decay_cond_type num_buckets num_channels num_classes "
    "num_dataset_builder_threads num_distributed_optimizer_instances num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage num_samples "
    "num_speculative_tokens num_virtual_stages_per_pipeline_rank num_workers object_storage_cache_path "
    "offset_sampling_seed_by_dp_rank onnx_safe original_max_position_embeddings out_seq_length outer_dp_sharding_strategy "
    "output_bert_embeddings output_layer_init_method overlapping_eval pad_buckets_for_high_nccl_busbw pad_vocab_size "
    "param_name_patterns_for_fp32_local_accumulation param_sharing_style params_dtype patch_dim per_dataset_sequences_path "
    "per_split_data_args_path perform_initialization perform_rl_step persist_layer_norm phase_transition_iterations "
    "pin_cpu_grads pin_cpu_params preserve_fp32_weights presplit_sentences pretrained_bert pretrained_checkpoint "
    "q_lora_rank qk_head_dim qk_pos_emb_head_dim query_in_block_prob rampup_batch_size rank recompute record_memory_history "
    "record_shapes reduce_scatter_with_fp32_accumulation refit_method renormalize_blend_weights report_topk_accuracies "
    "reset_attention_mask reset_position_ids return_log_probs reuse_grad_buf_for_mxfp8_param_ag rotary_scaling_factor "
    "run_workload_inspector_server runtime_time_unit s3_cache_path sample_input_file sample_output_file sample_rate "
    "scaled_masked_softmax_fusion scaled_upper_triang_masked_softmax_fusion scatter_gather_tensors_in_pipeline seed "
    "sequence_parallel set_level_for_all_loggers sharp_enabled_group short_seq_prob shuffle skip_prompt_log_probs "
    "skip_train skipped_train_samples special_tokens split standalone_embedding_stage start_eval_at_iter start_weight_decay "
    "step_batch_size_schedule store_param_remainders strict_fsdp_dtensor_load strict_lambada "
    "suggested_communication_unit_size symmetric_ar_type te_rng_tracker temperature test_data test_data_path test_mode "
    "text_key throughput_window_size timing_log_level timing_log_option titles_data_path top_k top_p "
    "torch_fsdp2_reshard_after_forward tp_only_amax_red train_samples transformer_impl "
    "transformer_pipeline_model_parallel_size trust_remote_code use_checkpoint_args use_checkpoint_lr_scheduler "
    "use_checkpoint_opt_param_scheduler use_contiguous_buffers_in_local_ddp use_cpu_initialization use_custom_fsdp "
    "use_dist_ckpt use_distributed_optimizer use_flash_attn use_flashinfer_fused_rope use_fused_weighted_squared_relu "
    "use_gigatoken use_gloo_process_groups use_grouped_gemm_for_dense_mlp use_inference_optimized_layers "
    "use_layer_wise_distributed_optimizer use_layer_wise_param_layout use_legacy_models use_legacy_static_engine "
    "use_mamba_mem_eff_path use_mcore_models use_mp_args_from_checkpoint_args use_nsys_profiler use_one_sent_docs "
    "use_persistent_ckpt_worker use_precision_aware_optimizer use_pytorch_profiler use_ring_exchange_p2p use_sharp "
    "use_te_activation_func use_te_rng_tracker use_tokenizer_model_from_checkpoint_args use_torch_fsdp2 "
    "use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_transformer_engine_op_fuser v_head_dim "
    "validation_set_names variable_seq_lengths verify_integrity vocab_extra_ids vocab_file vocab_size warmup wd_incr_steps "
    "weight_decay weight_decay_incr_style wgrad_deferral_limit world_size wsd_decay_steps yaml_cfg",
    *_FAMILIES.split(),
)

_REMEDY = "if it leaves the function alone, remove it from 'args' in the files (torch.load, delattr, torch.save)"
KEYS = Keys(_READ, _ONLY, _HARMLESS, _REMEDY)
_LLAMA_READS = frozenset({"swiglu", "qk_layernorm", "use_rope_scaling", "rope_scaling_factor", "window_size"})
LLAMA_KEYS = Keys(
    (_READ | _LLAMA_READS) - {"rotary_percent"},
    {key: value for key, value in _ONLY.items() if key not in _LLAMA_READS}
    | {
        "normalization": (("RMSNorm",), "only RMSNorm goes with a SwiGLU here"),
        "gated_linear_unit": ((None, False, True), _PLAIN),
        "rotary_percent": ((None, 1, 1.0), "with RMSNorm every channel of a head is rotated here"),
    },
    _HARMLESS,
    _REMEDY,
)
"""With ``normalization`` RMSNorm and ``swiglu``."""
