"""Keys of a Hugging Face ``config.json``, and which of them leave the function of a model alone. From the configuration classes
of transformers 4 and 5."""

from __future__ import annotations

from typing import Any

from megarewarm.checkpoint.foreign.recorded_keys import NO, Keys, names

_READ_WORDS = (
    "model_type num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size max_position_embeddings "
    "hidden_act layer_norm_eps initializer_range use_parallel_residual tie_word_embeddings attention_bias rotary_pct "
    "rotary_emb_base rope_theta partial_rotary_factor rope_parameters rope_scaling head_dim attention_dropout "
    "hidden_dropout"
)
_READ = frozenset(_READ_WORDS.split())

_CODE = "the model is computed by code that comes with it, which is not run here"
_DECODER = "the model here is a decoder alone"
NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True, None), "attention here is over earlier positions only"),
    "is_encoder_decoder": (NO, _DECODER),
    "add_cross_attention": (NO, _DECODER),
    "tie_encoder_decoder": (NO, _DECODER),
    "pruned_heads": (NO, "heads were removed; save the model with all of them"),
    "quantization_config": (NO, "the weights are quantized; take the unquantized model"),
    "compression_config": (NO, "the weights are quantized; take the unquantized model"),
    "auto_map": (NO, _CODE),
    "custom_pipelines": (NO, _CODE),
    "transformers_weights": (
        NO,
        "it names another file of weights than the usual ones; rename that file and leave the key out",
    ),
    "attention_chunk_size": (NO, "attention here is over all earlier positions"),
}
"""What no model here does: the values that a key may have, and why not others."""
_NEOX_ONLY = NOT_HERE | {
    "sliding_window": (NO, "attention here is over all earlier positions"),
    "layer_types": (NO, "all layers here are of one kind"),
}

# the second half steers generation, which is no part of the model
HARMLESS = names(
    "architectures exported_by transformers_version torch_dtype dtype use_bfloat16 use_cache torchscript return_dict "
    "output_hidden_states output_attentions output_router_logits tf_legacy_loss chunk_size_feed_forward is_decoder "
    "finetuning_task id2label label2id num_labels task_specific_params problem_type classifier_dropout tokenizer_class "
    "prefix bos_token_id pad_token_id eos_token_id unk_token_id sep_token_id cls_token_id mask_token_id "
    "decoder_start_token_id gradient_checkpointing attn_implementation keys_to_ignore_at_inference unsloth_fixed "
    "unsloth_version model_name license max_length max_new_tokens min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
    "suppress_tokens begin_suppress_tokens renormalize_logits generation_config pretraining_tp is_llama_config "
    "transformers.js_config max_sequence_length",
    "_",
)

KEYS = Keys(_READ, _NEOX_ONLY, HARMLESS, "if it leaves the function alone, remove it from the file")
