"""Phi-3: Llama's block, with q, k and v fused in one stored tensor and gate and up in another."""

from __future__ import annotations

from jaxsteer.models.families.table import (
    DIMENSIONS,
    EMBEDDING,
    GGUF_KEYS,
    Family,
    Windows,
    after_blocks,
    norm,
    projection,
)

_QKV, _GATE_UP = ("NH", "KH", "KH"), ("F", "F")

PHI3 = Family(
    name="phi3",
    hf_type="phi3",
    hf_class="Phi3ForCausalLM",
    gguf="phi3",
    fields={
        **DIMENSIONS,
        "norm_eps": ("rms_norm_eps", 1e-5),
        "max_length": ("max_position_embeddings", 4096),
    },
    fixed={"hidden_act": "silu", "full_attn_mod": 1, "interpolate_factor": 1},
    # Read by longrope only, which is refused.
    ignored=frozenset({"original_max_position_embeddings"}),
    rows=(
        EMBEDDING,
        norm("attn_norm", "input_layernorm", "attn_norm"),
        *projection("attn/q", "self_attn.qkv_proj", "attn_qkv", ("D", "NH"), fused=_QKV, part=0),
        *projection("attn/k", "self_attn.qkv_proj", "attn_qkv", ("D", "KH"), fused=_QKV, part=1),
        *projection("attn/v", "self_attn.qkv_proj", "attn_qkv", ("D", "KH"), fused=_QKV, part=2),
        *projection("attn/o", "self_attn.o_proj", "attn_output", ("NH", "D")),
        norm("mlp_norm", "post_attention_layernorm", "ffn_norm"),
        *projection("mlp/gate", "mlp.gate_up_proj", "ffn_up", ("D", "F"), fused=_GATE_UP, part=0),
        *projection("mlp/up", "mlp.gate_up_proj", "ffn_up", ("D", "F"), fused=_GATE_UP, part=1),
        *projection("mlp/down", "mlp.down_proj", "ffn_down", ("F", "D")),
        *after_blocks(),
    ),
    windows=Windows(None, lambda raw, layer: True, listed=False),
    gguf_keys={**GGUF_KEYS, "window": ("attention.sliding_window", 0)},
)
