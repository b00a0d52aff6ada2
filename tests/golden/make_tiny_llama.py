"""Two tiny random Llamas and what transformers computes with them on PyTorch in fp32.

    python make_tiny_llama.py FOLDER

writes into FOLDER: tiny_llama_mha (as many key/value heads as heads, tied head) and tiny_llama_rope
(llama3-scaled rotary positions, grouped heads of a width of their own, free head, biases everywhere), each as
transformers saves it, and tiny_llama.npz with `ids` int32 [2, 24] and, for each model, `NAME/logits` fp32
[2, 24, V] and `NAME/hidden` fp32 [L + 1, 2, 24, D]: the embedding, the output of each block but the last, and
the last one's after the final norm. Needs torch and transformers.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

COMMON = {
    "vocab_size": 97,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "tiny_llama_mha": LlamaConfig(
        **COMMON,
        hidden_size=48,
        num_hidden_layers=2,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "tiny_llama_rope": LlamaConfig(
        **COMMON,
        hidden_size=40,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        # So short an original context that every kind of frequency is met: kept, blended, divided.
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


def main(folder):
    """Compute and store."""
    torch.manual_seed(0)
    ids = torch.randint(3, COMMON["vocab_size"], (2, 24))
    out = {"ids": ids.numpy().astype(np.int32)}
    for name, config in MODELS.items():
        model = LlamaForCausalLM(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # initial biases and norms are trivial: none may hide a mistake
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
            result = model(ids, output_hidden_states=True)
        model.save_pretrained(Path(folder) / name)
        out[f"{name}/logits"] = result.logits.numpy()
        out[f"{name}/hidden"] = torch.stack(result.hidden_states).numpy()
    np.savez_compressed(Path(folder) / "tiny_llama.npz", **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
