"""Reference numbers of SmolLM2-135M-Instruct, computed by transformers on PyTorch in fp32 from its GGUF file.

    python make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2.npz

Nothing of jaxsteer is used: weights come through gguf's reader and dequantiser, the rotary order of q and k
is undone here, and texts are split and merged by the plain byte-pair algorithm below. Needs torch,
transformers, gguf, regex.

In the file, for each prompt i of `prompts` (an array of texts):
    ids/i         int32 [T]           token ids
    logits/i      fp32 [T, ⌈V/97⌉]    logits of tokens 0, 97, 194, ...
    last/i        fp16 [V]            logits at the last position (fp16: 3 digits)
    top/i         int32 [8], topv/i fp32 [8]: the eight highest at the last position, in full precision
    greedy/i      int32 [24]          greedy continuation
"""

import sys
from itertools import pairwise

import gguf
import numpy as np
import regex
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

STRIDE = 97
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = [
    "The quick brown fox jumps over the lazy dog. In 1984,",
    CHAT,
    "[MAX 2 [MIN 3 4 ] ]\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Größe \u2013 naïve café, 東京 и Москва 🙂",
]


def load(path):
    """The model in fp32, its tokens and its ranked merges."""
    reader = gguf.GGUFReader(path)

    def said(key):
        return reader.get_field(key).contents()

    heads, kv_heads = said("llama.attention.head_count"), said("llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=len(said("tokenizer.ggml.tokens")),
        hidden_size=said("llama.embedding_length"),
        intermediate_size=said("llama.feed_forward_length"),
        num_hidden_layers=said("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=said("llama.context_length"),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": said("llama.rope.freq_base")},
        tie_word_embeddings=True,
    )
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "embed_tokens",
        "output_norm": "norm",
    }
    state = {}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight").split(".")
        prefix = f"model.layers.{name[1]}" if name[0] == "blk" else "model"
        if name[-1] in ("attn_q", "attn_k"):
            count = heads if name[-1] == "attn_q" else kv_heads
            head_dim = value.shape[0] // count
            # llama.cpp rotates neighbours (0, 1), (2, 3), ...; transformers (0, H/2), (1, H/2 + 1), ...
            order = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
            value = value[(np.arange(count)[:, None] * head_dim + order).reshape(-1)]
        state[f"{prefix}.{parts[name[-1]]}.weight"] = torch.tensor(value)
    model = LlamaForCausalLM(config).float().eval()
    missing, surplus = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]), missing
    assert not surplus, surplus
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens, kinds = said("tokenizer.ggml.tokens"), said("tokenizer.ggml.token_type")
    merges = {tuple(line.split(" ")): rank for rank, line in enumerate(said("tokenizer.ggml.merges"))}
    return model, tokens, kinds, merges


def byte_alphabet():
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, spare = {}, 256
    for byte in range(256):
        if byte in printable:
            table[byte] = chr(byte)
        else:
            table[byte], spare = chr(spare), spare + 1
    return table


def encode(text, tokens, kinds, merges):
    """Token ids: specials, then single digits, then GPT-2's pattern, then merges in order of rank."""
    index = {token: i for i, token in enumerate(tokens)}
    specials = sorted((t for t, kind in zip(tokens, kinds, strict=True) if kind == 3), key=len, reverse=True)
    alphabet = byte_alphabet()
    pattern = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ids = []
    for piece in regex.split("(" + "|".join(map(regex.escape, specials)) + ")", text):
        if piece in specials:
            ids.append(index[piece])
            continue
        for part in regex.split(r"(\p{N})", piece):
            for word in pattern.findall(part):
                symbols = [alphabet[byte] for byte in word.encode()]
                while len(symbols) > 1:
                    ranks = [merges.get(pair, len(merges)) for pair in pairwise(symbols)]
                    at = int(np.argmin(ranks))
                    if ranks[at] == len(merges):
                        break
                    symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
                ids.extend(index[symbol] for symbol in symbols)
    return ids


def main(source, target):
    """Compute and store."""
    model, tokens, kinds, merges = load(source)
    out = {"prompts": np.array(PROMPTS), "stride": np.array(STRIDE)}
    for i, prompt in enumerate(PROMPTS):
        ids = encode(prompt, tokens, kinds, merges)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float().numpy()
            greedy = list(ids)
            for _ in range(24):
                greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
        top = np.argsort(-logits[-1])[:8]
        out |= {
            f"ids/{i}": np.array(ids, np.int32),
            f"logits/{i}": logits[:, ::STRIDE],
            f"last/{i}": logits[-1].astype(np.float16),
            f"top/{i}": top.astype(np.int32),
            f"topv/{i}": logits[-1][top],
            f"greedy/{i}": np.array(greedy[len(ids) :], np.int32),
        }
        print(i, len(ids), repr("".join(tokens[t] for t in greedy[len(ids) :])))
    np.savez_compressed(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
