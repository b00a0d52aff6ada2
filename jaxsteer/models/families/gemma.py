"""Gemma 2 (norms before and after each sublayer, soft-capping, every second layer local) and Gemma 3's text models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jaxsteer.models.families.table import (
    DIMENSIONS,
    EMBEDDING,
    GGUF_KEYS,
    ONE_ADDED,
    REQUIRED,
    Family,
    Fields,
    LlamaCpp,
    Windows,
    after_blocks,
    gated_mlp,
    layer_count,
    norm,
    projection,
)

_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")
_GELU = "gelu_pytorch_tanh"
_norm = partial(norm, gguf_transform=ONE_ADDED)


def _query_scale(largest: int) -> Callable[[Fields], float]:
    """1/√H, but 1/√(D/N) in the largest model, which has `largest` layers: GGUF files do not give the scale."""

    def scale(read: Fields) -> float:
        size = read["width"] // max(read["heads"], 1) if read["layers"] == largest else read["head_dim"]
        return float(max(size, 1)) ** -0.5

    return scale


GEMMA2 = Family(
    name="gemma2",
    hf_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    gguf="gemma2",
    llama_cpp=LlamaCpp(windowed=True),
    fields={
        **DIMENSIONS,
        "kv_heads": ("num_key_value_heads", 4),
        "head_dim": ("head_dim", 256),
        "tied_head": ("tie_word_embeddings", True),
        "max_length": ("max_position_embeddings", 8192),
        "query_scale": ("query_pre_attn_scalar", 256),
        "attn_softcap": ("attn_logit_softcapping", 50.0),
        "final_softcap": ("final_logit_softcapping", 30.0),
    },
    fixed={"hidden_activation": _GELU},
    # Of two fields for the activation, only hidden_activation is read; sliding_window_size is an old name that the
    # first Gemma 2 files repeat.
    ignored=frozenset({"hidden_act", "sliding_window_size"}),
    rows=(
        EMBEDDING,
        _norm("attn_norm", "input_layernorm", "attn_norm"),
        *projection("attn/q", "self_attn.q_proj", "attn_q", ("D", "NH")),
        *projection("attn/k", "self_attn.k_proj", "attn_k", ("D", "KH")),
        *projection("attn/v", "self_attn.v_proj", "attn_v", ("D", "KH")),
        *projection("attn/o", "self_attn.o_proj", "attn_output", ("NH", "D")),
        _norm("attn/post_norm", "post_attention_layernorm", "post_attention_norm"),
        _norm("mlp_norm", "pre_feedforward_layernorm", "ffn_norm"),
        *gated_mlp(),
        _norm("mlp/post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
        *after_blocks(gguf_transform=ONE_ADDED),
    ),
    features={"norm_plus_one": True, "post_norm": True, "activation": "gelu_tanh", "scaled_embedding": True},
    windows=Windows(4096, lambda raw, layer: layer % 2 == 0),
    gguf_keys={
        **GGUF_KEYS,
        "window": ("attention.sliding_window", 4096),
        "local_layers": ("attention.sliding_window_pattern", 2),
        "query_scale": ("attention.scale", _query_scale(46)),
        "attn_softcap": ("attn_logit_softcapping", 50.0),
        "final_softcap": ("final_logit_softcapping", 30.0),
    },
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    hf_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    gguf="gemma3",
    llama_cpp=LlamaCpp(windowed=True, ignored=("attn_softcap",)),
    hf_classes={"config": "Gemma3TextConfig", "backbone": "Gemma3TextModel"},
    fields={
        **GEMMA2.fields,
        "max_length": ("max_position_embeddings", 131_072),
        "attn_softcap": ("attn_logit_softcapping", None),
        "final_softcap": ("final_logit_softcapping", None),
    },
    rows=(
        *GEMMA2.rows,
        _norm("attn/q_norm", "self_attn.q_norm", "attn_q_norm", "H"),
        _norm("attn/k_norm", "self_attn.k_norm", "attn_k_norm", "H"),
    ),
    features={**GEMMA2.features, "qk_norm": "head"},
    windows=Windows(
        4096,
        lambda raw, layer: (layer + 1) % layer_count(raw, *_PATTERN, default=6) > 0,
        ignored=frozenset(_PATTERN),
    ),
    theta=1_000_000.0,
    local_theta=10_000.0,
    gguf_keys={
        **GGUF_KEYS,
        "window": ("attention.sliding_window", REQUIRED),
        "local_layers": ("attention.sliding_window_pattern", 6),
        "local_rope_theta": ("rope.freq_base_swa", 10_000.0),
        "query_scale": ("attention.scale", _query_scale(62)),
        "attn_softcap": ("attn_logit_softcapping", 0.0),
        "final_softcap": ("final_logit_softcapping", 0.0),
    },
)
