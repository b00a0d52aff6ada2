"""OLMo 2: norms after attention and MLP instead of before, and over all queries and all keys of a token."""

from __future__ import annotations

from jaxsteer.models.families.table import (
    DIMENSIONS,
    EMBEDDING,
    Family,
    after_blocks,
    gated_mlp,
    norm,
    projection,
)

OLMO2 = Family(
    name="olmo2",
    hf_type="olmo2",
    hf_class="Olmo2ForCausalLM",
    gguf="olmo2",
    fields={**DIMENSIONS, "norm_eps": ("rms_norm_eps", 1e-5), "attn_bias": ("attention_bias", False)},
    fixed={"hidden_act": "silu"},
    rows=(
        EMBEDDING,
        *projection("attn/q", "self_attn.q_proj", "attn_q", ("D", "NH"), "attn_bias"),
        *projection("attn/k", "self_attn.k_proj", "attn_k", ("D", "KH"), "attn_bias"),
        *projection("attn/v", "self_attn.v_proj", "attn_v", ("D", "KH"), "attn_bias"),
        *projection("attn/o", "self_attn.o_proj", "attn_output", ("NH", "D"), "attn_bias"),
        norm("attn/q_norm", "self_attn.q_norm", "attn_q_norm", "NH"),
        norm("attn/k_norm", "self_attn.k_norm", "attn_k_norm", "KH"),
        norm("attn/post_norm", "post_attention_layernorm", "post_attention_norm"),
        *gated_mlp(),
        norm("mlp/post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
        *after_blocks(),
    ),
    features={"qk_norm": "whole", "pre_norm": False, "post_norm": True},
)
