"""A writer of tiny GGUF files: llama.cpp's layout, made independently of the library's table."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import quantize

from jaxsteer.io.safetensors_file import open_safetensors

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


def to_gguf(name, value, heads, kv_heads):
    """llama.cpp's name and row order of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}", value
    _, _, layer, part = stem.split(".", 3)
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        count = heads if part == "self_attn.q_proj" else kv_heads
        half = value.shape[0] // count // 2
        # Row 2j of a head is its rotary partner j of the first half, row 2j + 1 that of the second.
        order = [h * 2 * half + s * half + j for h in range(count) for j in range(half) for s in (0, 1)]
        value = value[order]
    return f"blk.{layer}.{NAMES[part]}.{kind}", value


@pytest.fixture
def write_gguf(tmp_path):
    """(folder, **changes) -> path of a GGUF with the folder's weights; a change of None leaves a key out."""

    def write(folder, config, kind="F32", factors=None, tokenizer=True, name="tiny.gguf", **changes):
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, "llama")
        metadata = {
            "block_count": config.layers,
            "context_length": config.max_length,
            "embedding_length": config.width,
            "feed_forward_length": config.mlp_width,
            "attention.head_count": config.heads,
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.freq_base": config.rope_theta,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        for key, value in metadata.items():
            add = {
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            if value is not None:
                add[type(value)](f"llama.{key}", value)
        if tokenizer:
            add_tokenizer(writer)
        for hf, tensor in open_safetensors(folder / "model.safetensors")[0].items():
            theirs, value = to_gguf(hf, tensor.read(), config.heads, config.kv_heads)
            value = np.ascontiguousarray(value)
            target = GGMLQuantizationType[kind]
            if target == GGMLQuantizationType.F32 or value.ndim == 1:
                writer.add_tensor(theirs, value)
            else:
                writer.add_tensor(theirs, quantize(value, target), raw_dtype=target)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<eos>", "<tool>", "a", "b", "c", "1", "2", "Ġ", "ab", "Ġab"]
    kinds = [TokenType.CONTROL, TokenType.USER_DEFINED] + [TokenType.NORMAL] * 8
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")
