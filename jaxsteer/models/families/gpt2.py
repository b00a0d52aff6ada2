"""GPT-2: LayerNorms, learned positions, an MLP without a gate; q, k and v in one tensor of layout [in, out]."""

from __future__ import annotations

from typing import Any

from jaxsteer.models.families.table import GGUF_KEYS, REQUIRED, TRANSPOSE, Family, LlamaCpp, Row

_QKV = ("NH", "NH", "NH")


def _affine(path: str, hf: str, gguf: str) -> tuple[Row, ...]:
    """Scale and bias of a norm, in a block or after the last one."""
    return (
        Row(f"{path}/scale", ("D",), f"transformer.{hf}.weight", f"{gguf}.weight"),
        Row(f"{path}/bias", ("D",), f"transformer.{hf}.bias", f"{gguf}.bias"),
    )


def _projection(path: str, hf: str, gguf: str, axes: tuple[str, str], **layout: Any) -> tuple[Row, ...]:
    """Kernel and bias of a projection, stored [in, out] in safetensors and transposed in GGUF; `layout` as in `Row`."""
    ours, hf, gguf = f"blocks/{path}", f"transformer.h.{{i}}.{hf}", f"blk.{{i}}.{gguf}"
    return (
        Row(f"{ours}/kernel", axes, f"{hf}.weight", f"{gguf}.weight", gguf_transform=TRANSPOSE, **layout),
        Row(f"{ours}/bias", axes[1:], f"{hf}.bias", f"{gguf}.bias", **layout),
    )


GPT2 = Family(
    name="gpt2",
    hf_type="gpt2",
    hf_class="GPT2LMHeadModel",
    gguf="gpt2",
    llama_cpp=LlamaCpp(("attn_bias", "mlp_bias")),
    hf_classes={"block": "GPT2Block"},
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "width": ("n_embd", REQUIRED),
        "layers": ("n_layer", REQUIRED),
        "heads": ("n_head", REQUIRED),
        "mlp_width": ("n_inner", lambda read: 4 * read["width"]),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied_head": ("tie_word_embeddings", True),
        "max_length": ("n_positions", 1024),
    },
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    # n_ctx repeats n_positions, reorder_and_upcast_attn is about half precision, the rest is for classification.
    ignored=frozenset(
        {"n_ctx", "reorder_and_upcast_attn", "n_special", "predict_special_tokens"}
        | {f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")}
    ),
    rows=(
        Row("embed/embedding", ("V", "D"), "transformer.wte.weight", "token_embd.weight"),
        Row("embed/positions", ("P", "D"), "transformer.wpe.weight", "position_embd.weight"),
        *_affine("blocks/attn_norm", "h.{i}.ln_1", "blk.{i}.attn_norm"),
        *_projection("attn/q", "attn.c_attn", "attn_qkv", ("D", "NH"), fused=_QKV, part=0),
        *_projection("attn/k", "attn.c_attn", "attn_qkv", ("D", "NH"), fused=_QKV, part=1),
        *_projection("attn/v", "attn.c_attn", "attn_qkv", ("D", "NH"), fused=_QKV, part=2),
        *_projection("attn/o", "attn.c_proj", "attn_output", ("NH", "D")),
        *_affine("blocks/mlp_norm", "h.{i}.ln_2", "blk.{i}.ffn_norm"),
        *_projection("mlp/up", "mlp.c_fc", "ffn_up", ("D", "F")),
        *_projection("mlp/down", "mlp.c_proj", "ffn_down", ("F", "D")),
        *_affine("final_norm", "ln_f", "output_norm"),
        Row("head/embedding", ("V", "D"), "lm_head.weight", "output.weight", unless="tied_head"),
    ),
    # The causal mask, which old versions stored.
    harmless=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    features={
        **dict.fromkeys(("attn_bias", "mlp_bias", "learned_positions"), True),
        "norm": "layer",
        "gated": False,
        "activation": "gelu_tanh",
    },
    gguf_keys={ours: key for ours, key in GGUF_KEYS.items() if ours != "rope_theta"}
    | {"norm_eps": ("attention.layer_norm_epsilon", REQUIRED)},
    prefix="transformer.",
)
