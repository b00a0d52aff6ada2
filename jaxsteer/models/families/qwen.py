"""Qwen2 and 2.5 (biases of q, k, v) and Qwen3 (norms of queries and keys)."""

from __future__ import annotations

from dataclasses import replace

from jaxsteer.models.families.table import (
    DIMENSIONS,
    EMBEDDING,
    Family,
    Windows,
    after_blocks,
    gated_mlp,
    layer_count,
    norm,
    projection,
)

_FIELDS = {**DIMENSIONS, "max_length": ("max_position_embeddings", 32_768)}
_NORMS = (norm("attn_norm", "input_layernorm", "attn_norm"), norm("mlp_norm", "post_attention_layernorm", "ffn_norm"))

QWEN2 = Family(
    name="qwen2",
    hf_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    gguf="qwen2",
    fields={**_FIELDS, "kv_heads": ("num_key_value_heads", 32)},
    fixed={"hidden_act": "silu", "use_mrope": False},
    # Qwen2 has its biases whatever attention_bias says; chunked attention is for contexts beyond those of training, and
    # transformers has none.
    ignored=frozenset({"attention_bias", "dual_chunk_attention_config"}),
    rows=(
        EMBEDDING,
        *_NORMS,
        *projection("attn/q", "self_attn.q_proj", "attn_q", ("D", "NH"), "always"),
        *projection("attn/k", "self_attn.k_proj", "attn_k", ("D", "KH"), "always"),
        *projection("attn/v", "self_attn.v_proj", "attn_v", ("D", "KH"), "always"),
        *projection("attn/o", "self_attn.o_proj", "attn_output", ("NH", "D")),
        *gated_mlp(),
        *after_blocks(),
    ),
    features={"qkv_bias": True},
    windows=Windows(
        4096,
        lambda raw, layer: layer >= layer_count(raw, "max_window_layers", default=28, minimum=0),
        "use_sliding_window",
        frozenset({"max_window_layers"}),
    ),
)

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    hf_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    gguf="qwen3",
    fields={**_FIELDS, "kv_heads": ("num_key_value_heads", 32), "head_dim": ("head_dim", 128)}
    | {"attn_bias": ("attention_bias", False)},
    rows=(
        EMBEDDING,
        *_NORMS,
        *projection("attn/q", "self_attn.q_proj", "attn_q", ("D", "NH"), "attn_bias"),
        *projection("attn/k", "self_attn.k_proj", "attn_k", ("D", "KH"), "attn_bias"),
        *projection("attn/v", "self_attn.v_proj", "attn_v", ("D", "KH"), "attn_bias"),
        *projection("attn/o", "self_attn.o_proj", "attn_output", ("NH", "D"), "attn_bias"),
        norm("attn/q_norm", "self_attn.q_norm", "attn_q_norm", "H"),
        norm("attn/k_norm", "self_attn.k_norm", "attn_k_norm", "H"),
        *gated_mlp(),
        *after_blocks(),
    ),
    features={"qk_norm": "head"},
)
