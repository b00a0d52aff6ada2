"""A tiny random model of each family, and what transformers computes with it on PyTorch in fp32.

    python make_families.py FOLDER

writes into FOLDER: families/NAME for each model, as transformers saves it, and families.npz with `ids` int32 [2, 24]
and, for each model, `NAME/logits` fp32 [2, 24, V] and `NAME/hidden` fp32 [L + 1, 2, 24, D]: the embedding (as it
enters the first block), the output of each block but the last, and the last one's after the final norm. The windows
are shorter than the rows. Needs torch and transformers.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "mistral": MistralConfig(**COMMON, sliding_window=7),
    "smollm3": SmolLM3Config(**COMMON, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "qwen2": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "qwen3": Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**COMMON, head_dim=16, sliding_window=7, query_pre_attn_scalar=24),
    "gemma3": Gemma3TextConfig(
        **COMMON,
        head_dim=16,
        sliding_window=7,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "olmo2": Olmo2Config(**COMMON),
    "phi3": Phi3Config(**COMMON, sliding_window=7),
}


def main(folder):
    """Compute and store."""
    torch.manual_seed(0)
    ids = torch.randint(3, COMMON["vocab_size"], (2, 24))
    out = {"ids": ids.numpy().astype(np.int32)}
    for name, config in MODELS.items():
        config._attn_implementation = "eager"  # the fused kernel has no soft-caps
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # initial biases and norms are trivial: none may hide a mistake
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
            result = model(ids, output_hidden_states=True)
        model.save_pretrained(Path(folder) / "families" / name)
        out[f"{name}/logits"] = result.logits.numpy()
        out[f"{name}/hidden"] = torch.stack(result.hidden_states).numpy()
    np.savez_compressed(Path(folder) / "families.npz", **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
