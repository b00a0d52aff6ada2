"""Bottleneck folders that adapters wrote over tiny models of `tiny_llama/` and `families/`, and what it computes.

    python make_interop_adapters.py GOLDEN

writes into GOLDEN/interop/adapters: a folder for each case, as adapters saves it, logits.npz with `ids` int32 [2, 12]
and `CASE` fp32 [2, 12, V], and bases.json, which says which model each case is for. The weights are random, the biases
zero. Needs torch, adapters 1.3.0 and the transformers that it needs.
"""

import json
import sys
from pathlib import Path

import adapters
import numpy as np
import torch
from adapters import BnConfig, SeqBnConfig
from transformers import AutoModelForCausalLM

AFTER = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True}
CASES = {
    "plain": (
        "tiny_llama",
        BnConfig(
            **AFTER, original_ln_after=False, residual_before_ln=False, reduction_factor=12, non_linearity="swish"
        ),
    ),
    "seq-bn": ("tiny_llama", SeqBnConfig(reduction_factor={"1": 16, "default": 24}, scaling=0.7)),
    "mistral": ("mistral", SeqBnConfig(reduction_factor=32 / 3, non_linearity="gelu", leave_out=[0, 2], scaling=-2.0)),
    "linear": ("mistral", SeqBnConfig(reduction_factor=16, non_linearity="linear")),
}


def make(golden, case, ids):
    """Write one case; its logits."""
    base, config = CASES[case]
    path = golden / (base if base == "tiny_llama" else f"families/{base}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapters.init(model)
    with torch.inference_mode():
        plain = model.eval()(input_ids=ids, use_cache=False).logits
    model.add_adapter("task", config=config, set_active=True)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data = 0.2 * torch.randn_like(parameter) if "weight" in name else torch.zeros_like(parameter)
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    folder = golden / "interop" / "adapters" / case
    folder.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(folder), "task", use_safetensors=True)
    for other in folder.glob("*"):
        if other.name not in ("adapter_config.json", "adapter.safetensors"):
            other.unlink()
    saved = json.loads((folder / "adapter_config.json").read_text()) | {"model_name": None}
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n")
    print(f"{case}: {(logits - plain).abs().max():.2f} from the base")
    return logits.numpy()


def main(golden):
    """Write all cases."""
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 12))
    logits = {case: make(golden, case, ids) for case in CASES}
    folder = golden / "interop" / "adapters"
    np.savez_compressed(folder / "logits.npz", ids=ids.numpy().astype(np.int32), **logits)
    (folder / "bases.json").write_text(json.dumps({case: base for case, (base, _) in CASES.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
