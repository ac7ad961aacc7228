"""What other trainers call the keys of a run: Hugging Face's Trainer and models, GPT-NeoX, Megatron-LM, axolotl, litgpt."""

from __future__ import annotations

_NAMES: dict[str, str] = {
    # ours: theirs
    "schedule.max_lr": "learning_rate lr peak_lr base_lr",
    "schedule.min_lr": "lr_min minimum_lr end_lr",
    "schedule.curve": "lr_scheduler_type lr_scheduler lr_decay_style lr_schedule",
    "schedule.warmup": "warmup_ratio warmup_steps warmup_iters lr_warmup_iters lr_warmup_steps lr_warmup_fraction "
    "lr_warmup_samples warmup_tokens",
    "schedule.length": "lr_decay_iters lr_decay_steps lr_decay_samples",
    "training.budget": "max_steps train_iters train_steps train_samples total_steps num_steps num_train_steps max_tokens "
    "max_iters num_train_epochs num_epochs epochs max_duration",
    "training.global_batch": "global_batch_size train_batch_size gradient_accumulation_steps accumulate_grad_batches "
    "gradient_accumulation gas batch_size effective_batch_size",
    "training.micro_batch": "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu "
    "device_train_microbatch_size per_gpu_train_batch_size",
    "training.precision": "bf16 fp16 mixed_precision dtype torch_dtype amp",
    "training.recompute": "gradient_checkpointing checkpoint_activations activation_checkpointing recompute_granularity "
    "recompute_activations",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.weight_decay": "wd",
    "optimizer.clip_norm": "max_grad_norm gradient_clipping clip_grad grad_clip gradient_clip_val",
    "evaluation.every": "eval_steps eval_interval evaluation_strategy eval_strategy eval_every evals_per_epoch do_eval",
    "evaluation.micro_batch": "per_device_eval_batch_size eval_micro_batch_size eval_batch_size",
    "evaluation.at_start": "eval_on_start",
    "data.train": "data_path train_data_paths train_data_path train_file dataset datasets dataset_name train_data",
    "data.validation": "valid_data_paths valid_data_path test_data_paths validation_file eval_iters eval_dataset val_set_size "
    "eval_data",
    "data.sequence_length": "seq_length seq_len sequence_len max_seq_length max_seq_len block_size max_length context_length",
    "data.tokenizer": "vocab_file tokenizer_name tokenizer_type tokenizer_dir tokenizer_path tokenizer_model",
    "data.seed": "data_seed shuffle_seed",
    "replay": "replay_fraction replay_ratio rehearsal",
    "start.from": "load resume_from_checkpoint model_name_or_path base_model initial_checkpoint_dir init_from load_path "
    "pretrained_checkpoint checkpoint_path",
    "start.intent": "finetune resume",
    "start.moments": "no_load_optim reset_optimizer load_optimizer",
    "folder": "output_dir save save_folder out_dir logging_dir run_dir",
    "checkpoint.every": "save_steps save_interval checkpoint_factor save_strategy checkpoint_interval",
    "checkpoint.keep_last": "save_total_limit keep_last_n_checkpoints save_num_checkpoints_to_keep",
    "checkpoint.keep_best": "load_best_model_at_end metric_for_best_model",
    "checkpoint.asynchronous": "async_save",
    "export.huggingface": "save_safetensors push_to_hub",
    "logging.every": "logging_steps log_interval steps_per_print log_every",
    "logging.wandb": "wandb_project report_to use_wandb wandb_group wandb_entity",
    "logging.tensorboard": "tensorboard_dir",
    "kernels.use": "torch_compile",
    "kernels.attention": "flash_attention attn_implementation attention_config use_flash_attn",
    "parallel.tensor": "tensor_model_parallel_size model_parallel_size tensor_parallel_degree tp tp_size tensor_parallel_size",
    "parallel.pipeline": "pipeline_model_parallel_size pipe_parallel_size pp pp_size pipeline_parallel_size",
    "parallel.sequence": "sequence_parallel",
    "parallel.sharding": "zero_stage zero_optimization fsdp fsdp_config deepspeed sharding_strategy use_distributed_optimizer",
    "parallel.timeout_minutes": "distributed_timeout_minutes ddp_timeout",
    "reliability.max_wall_time": "exit_duration_in_mins max_time",
    "model.num_layers": "num_hidden_layers n_layer n_layers",
    "model.hidden_size": "n_embd d_model",
    "model.num_heads": "num_attention_heads n_head n_heads",
    "model.ffn_size": "intermediate_size ffn_hidden_size",
    "model.vocab_size": "padded_vocab_size",
    "model.max_positions": "max_position_embeddings n_positions",
    "model.rotary_fraction": "rotary_pct rotary_percent",
    "model.rotary_base": "rotary_emb_base rope_theta rotary_base_value",
    "model.activation": "hidden_act",
    "model.residual": "use_parallel_residual gpt_j_residual",
    "model.tie_embeddings": "tie_word_embeddings no_weight_tying untie_embeddings_and_output_weights",
    "model.layernorm_eps": "layer_norm_eps layernorm_epsilon",
    "model.init_std": "initializer_range init_method_std",
}
OURS = {name: ours for ours, names in _NAMES.items() for name in names.split()}


def ours(name: str) -> str | None:
    """The key of a run that another trainer calls ``name``, in any of its spellings; None for a name that is not known."""
    return OURS.get(name.lstrip("-").replace("-", "_").lower())
