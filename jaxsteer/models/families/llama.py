"""Llama 2 and 3, and the families that share its block: Mistral (window), SmolLM3 (layers without rotary positions)."""

from __future__ import annotations

import reprlib
from dataclasses import replace

from jaxsteer.models.families.table import (
    DIMENSIONS,
    EMBEDDING,
    GGUF_KEYS,
    ROTARY,
    Family,
    LlamaCpp,
    RawConfig,
    Windows,
    after_blocks,
    gated_mlp,
    layer_count,
    norm,
    projection,
)

LLAMA = Family(
    name="llama",
    hf_type="llama",
    hf_class="LlamaForCausalLM",
    gguf="llama",
    fields={**DIMENSIONS, "attn_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False)},
    fixed={"hidden_act": "silu"},
    rows=(
        EMBEDDING,
        norm("attn_norm", "input_layernorm", "attn_norm"),
        *projection("attn/q", "self_attn.q_proj", "attn_q", ("D", "NH"), "attn_bias", gguf_transform=ROTARY),
        *projection("attn/k", "self_attn.k_proj", "attn_k", ("D", "KH"), "attn_bias", gguf_transform=ROTARY),
        *projection("attn/v", "self_attn.v_proj", "attn_v", ("D", "KH"), "attn_bias"),
        *projection("attn/o", "self_attn.o_proj", "attn_output", ("NH", "D"), "attn_bias"),
        norm("mlp_norm", "post_attention_layernorm", "ffn_norm"),
        *gated_mlp("mlp_bias"),
        *after_blocks(),
    ),
    llama_cpp=LlamaCpp(("attn_bias", "mlp_bias"), rope_factors=True),
    harmless=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    hf_type="mistral",
    hf_class="MistralForCausalLM",
    gguf="llama",
    fields={**DIMENSIONS, "kv_heads": ("num_key_value_heads", 8), "max_length": ("max_position_embeddings", 131_072)},
    windows=Windows(4096, lambda raw, layer: True, listed=False),
    gguf_keys={**GGUF_KEYS, "window": ("attention.sliding_window", 0)},
)


def _unrotated(raw: RawConfig, layer: int) -> bool:
    """Whether a layer has no rotary positions: SmolLM3's `no_rope_layers` is 1 if it has them, despite its name."""
    flags = raw.get("no_rope_layers")
    if flags is not None and not (isinstance(flags, list) and all(flag in (0, 1) for flag in flags)):
        raise ValueError(f"no_rope_layers is {reprlib.repr(flags)}; expected a list of 0 and 1")
    if flags is not None and layer < len(flags):
        return not flags[layer]
    return (layer + 1) % layer_count(raw, "no_rope_layer_interval", default=4) == 0


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    hf_type="smollm3",
    hf_class="SmolLM3ForCausalLM",
    gguf="smollm3",
    llama_cpp=LlamaCpp(),
    fields={
        **LLAMA.fields,
        "kv_heads": ("num_key_value_heads", 4),
        "tied_head": ("tie_word_embeddings", True),
        "max_length": ("max_position_embeddings", 32_768),
    },
    theta=2_000_000.0,
    windows=Windows(None, _unrotated, "use_sliding_window"),
    unrotated=_unrotated,
)
