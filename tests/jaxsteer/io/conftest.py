"""A writer of tiny GGUF files: llama.cpp's layout, made independently of the library's table."""

import json
import shutil
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import quantize

from jaxsteer.io import load_config
from jaxsteer.io.safetensors_file import open_safetensors

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
PERMUTED = ("llama", "smollm3")  # whose queries and keys llama.cpp's converter puts into another order
SHIFTED = ("gemma2", "gemma3")  # whose norms it adds one to

# What a converted model of each family says besides the keys of `write_gguf`; None = it does not say it.
KEYS = {
    "mistral": {"attention.sliding_window": 7},
    "gemma2": {
        "attention.sliding_window": 7,
        "attention.value_length": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope.freq_base": None,
        "rope.dimension_count": None,
    },
    "gemma3": {
        "attention.sliding_window": 7,
        "attention.sliding_window_pattern": [True, True, False, True],
        "attention.value_length": 16,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "rope.dimension_count": None,
    },
    "phi3": {"attention.sliding_window": 7, "rope.scaling.original_context_length": 128, "attention.key_length": None},
}
# Features of the tiny models that no GGUF file of their families can say, at the value that llama.cpp takes.
SAYABLE = {
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


def to_gguf(name, value, arch, heads, kv_heads):
    """llama.cpp's name and layout of a Hugging Face tensor, after its converter."""
    if arch in PERMUTED and (".q_proj." in name or ".k_proj." in name):
        count = heads if "q_proj" in name else kv_heads
        half = value.shape[0] // count // 2
        # Row 2j of a head is its rotary partner j of the first half, row 2j + 1 that of the second.
        order = [h * 2 * half + s * half + j for h in range(count) for j in range(half) for s in (0, 1)]
        value = value[order]
    if arch in SHIFTED and name.endswith("norm.weight"):
        value = value + 1
    return names_of(arch).get_name(name, try_suffixes=(".weight", ".bias")), value


@cache
def names_of(arch):
    return gguf.get_tensor_name_map(ARCHITECTURES[arch], 4)


@pytest.fixture
def write_gguf(tmp_path):
    """(folder, **changes) -> path of a GGUF with the folder's weights; a change of None leaves a key out."""

    def write(
        folder,
        config,
        kind="F32",
        factors=None,
        tokenizer=True,
        name="tiny.gguf",
        arch="llama",
        tensors=None,
        **changes,
    ):
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
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
                add[type(value)](f"{arch}.{key}", value)
        if tokenizer:
            (add_pieces if tokenizer == "pieces" else add_tokenizer)(writer)
        for hf, tensor in open_safetensors(folder / "model.safetensors")[0].items():
            theirs, value = to_gguf(hf, tensor.read(), arch, config.heads, config.kv_heads)
            value = np.ascontiguousarray(value)
            target = GGMLQuantizationType[kind]
            if target == GGMLQuantizationType.F32 or value.ndim == 1 or value.shape[-1] % 32:
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


@pytest.fixture
def family_files(golden, tmp_path, write_gguf):
    """(family) -> a tiny random model of it as a Hugging Face folder and as a GGUF file."""

    def make(family):
        source = golden / "tiny_llama" if family == "llama" else golden / "families" / family
        folder = shutil.copytree(source, tmp_path / family)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | SAYABLE.get(family, {})))
        arch = "llama" if family == "mistral" else family
        return folder, write_gguf(folder, load_config(folder), arch=arch, name=f"{family}.gguf", **KEYS.get(family, {}))

    return make


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


def add_pieces(writer):
    """SentencePiece's vocabulary: every byte, the space, two letters and what they merge to."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁ab"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-6.0, -7.0, -8.0, -2.0, -1.0])
    writer.add_token_types(
        [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 5]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)
