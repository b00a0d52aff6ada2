"""Loads an AdapterHub folder with adapters, and answers: a JSON request on stdin, a JSON response on stdout.

Request: {"path": folder, "base": folder of the base model, "tokens": [[ids]], "generate": greedy tokens after each row,
"dtype": "float32" or "bfloat16", "out": .npy file for the logits}. Response: {"versions": {package: version}, "kind":
"logits", "generated": [[ids]]}. Runs in an environment of adapters, which needs an older transformers.
"""

import json
import sys
from importlib.metadata import version

import adapters
import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(request):
    """Answer one request."""
    model = AutoModelForCausalLM.from_pretrained(
        request["base"], dtype=getattr(torch, request["dtype"]), attn_implementation="eager"
    )
    adapters.init(model)
    report = {}
    name = model.load_adapter(request["path"], use_safetensors=True, set_active=True, loading_info=report)
    if report["missing_keys"] or not model.active_adapters:
        raise ValueError(f"{name} was not loaded: {report}")
    model = model.to(getattr(torch, request["dtype"])).eval()
    tokens = torch.tensor(request["tokens"])
    with torch.inference_mode():
        np.save(request["out"], model(input_ids=tokens, use_cache=False).logits.float().numpy())
        generated = [continued(model, row[None], request["generate"]) for row in tokens] if request["generate"] else []
    versions = {name: version(name) for name in ("adapters", "transformers", "torch")}
    return {"versions": versions, "kind": "logits", "generated": generated}


def continued(model, tokens, count):
    """Greedy continuation, which nothing ends early."""
    start = tokens.shape[1]
    for _ in range(count):
        best = model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], 1)
    return tokens[0, start:].tolist()


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.load(sys.stdin))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
