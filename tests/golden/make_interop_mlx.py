"""LoRA folders that MLX-LM wrote over tiny models of `tiny_llama/` and `families/`, and what it computes with them.

    python make_interop_mlx.py GOLDEN

writes into GOLDEN/interop/mlx: a folder for each case with what mlx_lm.lora saves, logits.npz with `ids` int32 [2, 7]
and `CASE` fp32 [2, 7, V], and bases.json, which says which model each case is for. The factors are random. Needs mlx
and mlx-lm.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config

CASES = {
    "lora": (
        "tiny_llama",
        "lora",
        2,
        {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]},
    ),
    "all": ("qwen3", "lora", 16, {"rank": 2, "scale": 20.0, "dropout": 0.1}),
    "dora": (
        "tiny_llama",
        "dora",
        -1,
        {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.o_proj", "mlp.down_proj"]},
    ),
    "fused": (
        "phi3",
        "lora",
        3,
        {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.qkv_proj", "mlp.gate_up_proj"]},
    ),
}


def make(golden, case, ids):
    """Write one case; its logits, from the folder as it was written."""
    base, kind, layers, parameters = CASES[case]
    path = golden / (base if base == "tiny_llama" else f"families/{base}")
    model, _ = load_model(path)
    model.freeze()
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")

    def random(name, leaf):
        if name == "m":
            return leaf * (1 + 0.3 * mx.random.normal(leaf.shape))
        return 0.15 * mx.random.normal(leaf.shape)

    weights = {key: random(key.rpartition(".")[2], leaf) for key, leaf in tree_flatten(model.trainable_parameters())}
    folder = golden / "interop" / "mlx" / case
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    settings = {"model": "owner/model", "train": True, "fine_tune_type": kind, "num_layers": layers, "seed": 0}
    save_config(settings | {"lora_parameters": parameters}, folder / "adapter_config.json")
    loaded = load_adapters(load_model(path)[0], str(folder))
    loaded.eval()
    logits, plain = np.array(loaded(ids)), np.array(load_model(path)[0](ids))
    print(f"{case}: {abs(logits - plain).max():.2f} from the base")
    return logits


def main(golden):
    """Write all cases."""
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    ids = mx.random.randint(3, 60, (2, 7))  # no longer than the window of Phi-3, which MLX-LM does not have
    logits = {case: make(golden, case, ids) for case in CASES}
    folder = golden / "interop" / "mlx"
    np.savez_compressed(folder / "logits.npz", ids=np.array(ids).astype(np.int32), **logits)
    bases = {case: base for case, (base, *_) in CASES.items()}
    (folder / "bases.json").write_text(json.dumps(bases, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
