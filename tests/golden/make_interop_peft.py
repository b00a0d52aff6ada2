"""LoRA folders that peft wrote over the tiny models of `families/` and `tiny_llama/`, and what it computes with them.

    python make_interop_peft.py GOLDEN

writes into GOLDEN/interop/peft: a folder for each case, as peft saves it, and logits.npz with `ids` int32 [2, 12] and
`CASE` fp32 [2, 12, V] for each case; bases.json says which model each case is for. All factors are random. `pickled` is
the adapter of `excluded` again, as peft saves it without safetensors. Needs torch, transformers and peft.

    python make_interop_peft.py GOLDEN pickled

writes `pickled` alone.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

QKV = ["q_proj", "k_proj", "v_proj"]
CASES = {
    "lora": ("tiny_llama", {"r": 3, "lora_alpha": 7, "target_modules": [*QKV, "o_proj", "gate_proj", "down_proj"]}),
    "all-linear": ("mistral", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
    "rslora": (
        "qwen3",
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
        | {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    ),
    "dora": ("gemma2", {"r": 2, "use_dora": True, "target_modules": r".*\.(layers\.[02]\..*|3\.self_attn)\.[ko]_proj"}),
    "patterns": (
        "olmo2",
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj", "mlp.up_proj"]}
        | {"rank_pattern": {"o_proj": 3, r"layers\.[12]\.self_attn\.q_proj": 1}}
        | {"alpha_pattern": {"0.mlp.up_proj": 9, "model.layers.3.self_attn.o_proj": 1}},
    ),
    "excluded": (
        "smollm3",
        {"r": 2, "target_modules": ["k_proj", "down_proj"], "exclude_modules": r".*\.(1|2)\.mlp\..*"}
        | {"layers_to_transform": 2},
    ),
    "pissa": ("qwen2", {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa", "target_modules": [*QKV, "down_proj"]}),
    "pissa-converted": ("gemma3", {"r": 2, "init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "conv1d": ("gpt2", {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "mlp.c_proj", "c_fc"]}),
    "conv1d-dora": ("gpt2", {"r": 2, "use_dora": True, "target_modules": ["attn.c_proj", "c_attn"]}),
    "conv1d-pissa": ("gpt2", {"r": 2, "init_lora_weights": "pissa", "target_modules": ["c_attn"]}),
    "fused": (
        "phi3",
        {"r": 2, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "rank_pattern": {"gate_up_proj": 3}},
    ),
    "fused-dora": ("phi3", {"r": 2, "use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}


def randomise(model):
    """Random factors, and magnitudes near those of the base; PiSSA's near its initial ones."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        elif "lora_" in name:
            parameter.data += (0.3 if "lora_B" in name else 0.1) * torch.randn_like(parameter)


def make(golden, case, ids):
    """Write one case; its logits, from the folder as it was written."""
    base, settings = CASES[case]
    base = golden / (base if base == "tiny_llama" else f"families/{base}")
    folder = golden / "interop" / "peft" / case
    # The fused kernels have no soft-caps.
    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", **settings))
    options = {}
    if case == "pissa-converted":
        initial = folder / "initial"
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = "pissa"
        options["path_initial_model_for_weight_conversion"] = str(initial)
    randomise(model)
    with torch.inference_mode():
        before = model.eval()(input_ids=ids).logits
    model.save_pretrained(folder, **options)
    for path in (folder / "README.md", *(folder / "initial").glob("*")):
        path.unlink(missing_ok=True)
    if (folder / "initial").is_dir():
        (folder / "initial").rmdir()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    if isinstance(config["target_modules"], list):  # written from a set, in any order
        config["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(load(), folder).eval()
        logits, plain = loaded(input_ids=ids).logits, load()(input_ids=ids).logits
    trained, base = (logits - before).abs().max(), (logits - plain).abs().max()
    print(f"{case}: from the trained {trained:.1e}, from the base {base:.2f}")
    return logits.numpy()


def pickle_again(golden):
    """Save the adapter of a case again with torch.save."""
    source, folder = (golden / "interop" / "peft" / case for case in ("excluded", "pickled"))
    base = AutoModelForCausalLM.from_pretrained(golden / "families" / CASES["excluded"][0], dtype=torch.float32)
    PeftModel.from_pretrained(base, source).save_pretrained(folder, safe_serialization=False)
    (folder / "README.md").unlink()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())


def main(golden):
    """Write all cases."""
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 12))
    logits = {case: make(golden, case, ids) for case in CASES}
    folder = golden / "interop" / "peft"
    np.savez_compressed(folder / "logits.npz", ids=ids.numpy().astype(np.int32), **logits)
    bases = {case: base for case, (base, _) in CASES.items()}
    (folder / "bases.json").write_text(json.dumps(bases, indent=2) + "\n")
    pickle_again(golden)


if __name__ == "__main__":
    (pickle_again if sys.argv[2:] == ["pickled"] else main)(Path(sys.argv[1]))
