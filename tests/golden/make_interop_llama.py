"""Write a LoRA and a control vector for tiny_llama, and what llama.cpp computes with them: interop/llama/.

Run with the Python of llama.cpp's environment (`make peers`). The files are written by the gguf package alone, with
the keys of llama.cpp's converter of PEFT adapters and of repeng's `export_gguf`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).resolve().parent
OUT = HERE / "interop" / "llama"
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)


def tensors_of(path):
    """The fp32 tensors of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    part = lambda entry: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
    return {name: np.frombuffer(part(entry), "<f4").reshape(entry["shape"]) for name, entry in header.items()}


def permuted(rows, heads):
    """llama.cpp's order of the rows of q and k: row 2j of a head is row j, row 2j + 1 its rotary partner."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + s * half + j for h in range(heads) for j in range(half) for s in (0, 1)]
    return np.ascontiguousarray(rows[order])


def save(writer, tensors):
    """Write the header and the tensors."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model(path, config):
    """The base model in GGUF."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, value in tensors_of(HERE / "tiny_llama" / "model.safetensors").items():
        count = next((count for part, count in heads.items() if part in name), None)
        tensors[NAMES.get_name(name, (".weight",))] = value if count is None else permuted(value, count)
    save(writer, tensors)


def main():
    """Write the files and ask llama.cpp."""
    OUT.mkdir(parents=True, exist_ok=True)
    config = json.loads((HERE / "tiny_llama" / "config.json").read_text())
    draw = np.random.default_rng(0)
    random = lambda *shape: (0.1 * draw.standard_normal(shape)).astype(np.float32)
    width, inner = config["hidden_size"], config["intermediate_size"]
    factors = {
        "blk.0.attn_q.weight": (random(2, width), permuted(random(width, 2), config["num_attention_heads"])),
        "blk.2.ffn_down.weight": (random(3, inner), random(width, 3)),
    }
    lora = gguf.GGUFWriter(OUT / "adapter.gguf", "llama")
    lora.add_type("adapter")
    lora.add_string("adapter.type", "lora")
    lora.add_float32("adapter.lora.alpha", 6.0)
    save(
        lora,
        {
            f"{name}.lora_{part}": value
            for name, pair in factors.items()
            for part, value in zip("ab", pair, strict=True)
        },
    )
    control = gguf.GGUFWriter(OUT / "control.gguf", "controlvector")
    control.add_string("controlvector.model_hint", "llama")
    control.add_uint32("controlvector.layer_count", 2)
    save(control, {f"direction.{i}": random(width) for i in (1, 2)})

    tokens = draw.integers(3, config["vocab_size"], (2, 12))
    answers = {"tokens": tokens.astype(np.int32)}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "model.gguf"
        model(base, config)
        for name, path in {"base": base, "lora": OUT / "adapter.gguf", "control": OUT / "control.gguf"}.items():
            out = Path(folder) / f"{name}.npy"
            request = {"path": str(path), "base": str(base), "tokens": tokens.tolist(), "out": str(out)}
            peer = [sys.executable, HERE.parent / "peers" / "llama_peer.py"]
            subprocess.run(peer, input=json.dumps(request), text=True, check=True)
            answers[f"{name}/logits"] = np.load(out)
    np.savez_compressed(OUT / "answers.npz", **answers)


if __name__ == "__main__":
    main()
