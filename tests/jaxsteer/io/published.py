"""Tiny models as others publish them: llama.cpp's names, layout and keys, made apart from the library's tables."""

import json
from functools import cache

import gguf
from gguf import TokenType
from safetensors.numpy import load_file, save_file

ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
PERMUTED = ("llama", "smollm3")  # whose queries and keys llama.cpp's converter puts into another order
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
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
    "gpt2": {
        "attention.layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attention.layer_norm_rms_epsilon", "attention.head_count_kv", "attention.key_length")),
        **dict.fromkeys(("rope.freq_base", "rope.dimension_count")),
    },
    "phi3": {"attention.sliding_window": 7, "rope.scaling.original_context_length": 128, "attention.key_length": None},
}
ARCHITECTURE = {"mistral": "llama"}  # where it is not our name of the family

# Features of the tiny models that no GGUF file of their families can say, at the value that llama.cpp takes.
SAYABLE = {
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}


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
    if name.endswith(TRANSPOSED):
        value = value.T
    return names_of(arch).get_name(name, try_suffixes=(".weight", ".bias")) or name, value


@cache
def names_of(arch):
    return gguf.get_tensor_name_map(ARCHITECTURES[arch], 4)


def into_files(folder, count):
    """The folder, its weights dealt out to `count` files with an index."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.safetensors").unlink()
    return folder


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
