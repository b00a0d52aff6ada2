"""A tiny random model of each family, and what transformers computes with it on PyTorch in fp32.

    python make_families.py FOLDER

writes into FOLDER: families/NAME for each model, as transformers saves it, and families.npz with `ids` int32 [2, 24]
and, for each model, `NAME/logits` fp32 [2, 24, V] and `NAME/hidden` fp32 [L + 1, 2, 24, D]: the embedding (as it
enters the first block), the output of each block but the last, and the last one's after the final norm. Of the parts
of each block: `NAME/attn_in`, `NAME/attn`, `NAME/mlp_in`, `NAME/mlp` fp32 [L, 2, 24, D], what attention and MLP read
and what is added to the residual stream, and `NAME/cos`, `NAME/sin` fp32 [L, 24, H]. The windows are shorter than the
rows. NAME-mha and NAME-mqa are smaller, with a key/value head for each query head and with one for all.
Needs torch and transformers.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
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
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_inner=48, n_positions=40, eos_token_id=2),
}
HEADS = {"mha": 4, "mqa": 1}


def variant(config, kv_heads):
    """A smaller model of the same family with another grouping of the heads."""
    small = copy.deepcopy(config).to_dict()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": kv_heads, "intermediate_size": 24}
    small |= sizes | {"head_dim": 6} | ({"max_window_layers": 1} if "max_window_layers" in small else {})
    small.pop("no_rope_layers", None)
    if small.get("layer_types"):
        small["layer_types"] = ["sliding_attention", "full_attention"] if small.get("sliding_window") else None
    if config.model_type in ("mistral", "phi3"):
        small.pop("layer_types", None)
    return type(config)(**{key: value for key, value in small.items() if key != "model_type" and value is not None})


def watch(model):
    """What the parts of each block read and give, kept while the model runs."""
    kept = {name: [] for name in ("attn_in", "attn", "mlp_in", "mlp", "cos", "sin")}
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers

    def read(attention, args, kwargs):
        kept["attn_in"].append(args[0] if args else kwargs["hidden_states"])
        for name, turned in zip(("cos", "sin"), kwargs.get("position_embeddings", ()), strict=False):
            kept[name].append(turned[0])

    gives = lambda name: lambda module, args, out: kept[name].append(out[0] if isinstance(out, tuple) else out)
    for block in blocks:
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        attention.register_forward_pre_hook(read, with_kwargs=True)
        block.mlp.register_forward_pre_hook(lambda mlp, args: kept["mlp_in"].append(args[0]))
        behind = hasattr(block, "post_feedforward_layernorm")
        (block.post_attention_layernorm if behind else attention).register_forward_hook(gives("attn"))
        (block.post_feedforward_layernorm if behind else block.mlp).register_forward_hook(gives("mlp"))
    return kept


def main(folder):
    """Compute and store."""
    torch.manual_seed(0)
    ids = torch.randint(3, COMMON["vocab_size"], (2, 24))
    out = {"ids": ids.numpy().astype(np.int32)}
    llama = LlamaConfig(**COMMON)
    variants = {
        f"{name}-{kind}": variant(config, heads)
        for name, config in {"llama": llama, **MODELS}.items()
        for kind, heads in HEADS.items()
        if name != "gpt2"  # each head has its own
    }
    for name, config in {**MODELS, **variants}.items():
        config._attn_implementation = "eager"  # the fused kernel has no soft-caps
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # initial biases and norms are trivial: none may hide a mistake
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
            kept = watch(model)
            result = model(ids, output_hidden_states=True)
        model.save_pretrained(Path(folder) / "families" / name)
        out[f"{name}/logits"] = result.logits.numpy()
        out[f"{name}/hidden"] = torch.stack(result.hidden_states).numpy()
        if name in MODELS:
            out |= {f"{name}/{part}": torch.stack(values).numpy() for part, values in kept.items() if values}
    np.savez_compressed(Path(folder) / "families.npz", **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
