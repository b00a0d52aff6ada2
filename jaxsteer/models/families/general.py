"""Fields that the config.json of any family may carry and that cannot change a logit, or only with another value.

A field belongs here if transformers' base config or common training tools write it and no model of our families reads
it in a forward pass. Families add their own. Anything else is refused: it may describe a model that is not computed
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ORIGIN = (
    *("architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
    *("auto_map", "custom_pipelines", "tokenizer_class", "prefix", "transformers.js_config"),
    *("unsloth_version", "unsloth_fixed", "is_llama_config"),
)
_STORAGE = ("dtype", "torch_dtype", "use_bfloat16", "pre_quantization_dtype", "torchscript", "xla_device")
_KERNELS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("_experts_implementation", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention"),
    *("use_flash_attention_2", "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan"),
    # Splits a matmul, without changing its result.
    *("pretraining_tp", "chunk_size_feed_forward"),
)
_CACHE_AND_OUTPUT = (
    *("use_cache", "cache_implementation", "output_past", "return_dict", "output_attentions", "output_hidden_states"),
    *("output_scores", "return_dict_in_generate"),
)
_TRAINING = (
    *("initializer_range", "initializer_factor", "gradient_checkpointing", "neftune_noise_alpha", "tf_legacy_loss"),
    *("attention_dropout", "hidden_dropout", "resid_dropout", "embedding_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),
)
_TOKENS = (
    *(f"{role}_token_id" for role in ("bos", "eos", "pad", "unk", "sep", "decoder_start")),
    *("eos_token_ids", "tokenizer_padding_side", "tokenizer_model_max_length"),
    # Repeat max_position_embeddings.
    *("max_sequence_length", "model_max_length", "seq_length"),
)
# Settings of generation, which transformers before 5 kept in config.json.
_GENERATION = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    "begin_suppress_tokens",
)
_CLASSIFICATION = (
    *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    # Of encoders with decoders, and of models that can be both; ours are decoders only.
    *("is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder"),
)

GENERAL_IGNORED = frozenset(
    {*_ORIGIN, *_STORAGE, *_KERNELS, *_CACHE_AND_OUTPUT, *_TRAINING, *_TOKENS, *_GENERATION, *_CLASSIFICATION}
    # Without a window they say nothing; the families that have one and read them come first.
    | {"use_sliding_window", "max_window_layers"}
)
"""Fields without effect on a forward pass, whatever their value."""

GENERAL_FIXED: dict[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
}
"""Fields of which the forward pass of every family supports one value; a family's own `fields` come first."""

GENERAL_EMPTY = frozenset({"quantization_config", "quantization", "compression_config", "pruned_heads"})
"""Fields that are accepted if they are empty."""

HINTS = dict.fromkeys(
    ("quantization_config", "quantization", "compression_config"),
    "the weights are stored quantised; use an unquantised copy of the model, or its GGUF file",
)
"""What to do about a field that is refused, where more can be said than that it is."""

_SAME_ACTIVATION = (
    frozenset({"silu", "swish"}),
    frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"}),
)
"""Names in transformers of one function."""


def is_neutral(name: str, value: object, raw: Mapping[str, Any], max_length: int) -> bool:
    """Whether a field that a family does not have changes nothing at this value.

    Args:
        name: the field.
        value: its value.
        raw: the whole config.
        max_length: number of positions of the model.
    """
    if name in GENERAL_IGNORED or (name in GENERAL_FIXED and value == GENERAL_FIXED[name]):
        return True
    if name in GENERAL_EMPTY:
        return not value
    if name == "sliding_window":
        return raw.get("use_sliding_window") is False or (type(value) is int and value >= max_length)
    if name == "layer_types":
        return isinstance(value, Sequence) and all(kind == "full_attention" for kind in value)
    return False


def same_value(value: object, supported: object) -> bool:
    """Whether a field has the supported value, or another name of the same activation function."""
    if value == supported and isinstance(value, bool) == isinstance(supported, bool):
        return True
    return any(value in names and supported in names for names in _SAME_ACTIVATION if isinstance(value, str))
