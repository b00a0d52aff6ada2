"""Loads a PEFT folder with peft and transformers, and answers: a JSON request on stdin, a JSON response on stdout.

Request: {"path": folder, "base": folder of the base model, "tokens": [[ids]], "generate": greedy tokens after each row,
"dtype": "float32" or "bfloat16", "out": .npy file for the logits, "merged": true to merge the update first}.
Response: {"versions": {package: version}, "kind": "logits", "generated": [[ids]]}. Runs in peft's environment.
"""

import json
import sys
from importlib.metadata import version

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(request):
    """Answer one request."""
    model = AutoModelForCausalLM.from_pretrained(request["base"], dtype=getattr(torch, request.get("dtype", "float32")))
    model = PeftModel.from_pretrained(model, request["path"]).eval()
    if request.get("merged"):
        model = model.merge_and_unload()
    tokens = torch.tensor(request["tokens"])
    generated = []
    with torch.inference_mode():
        np.save(request["out"], model(input_ids=tokens).logits.float().numpy())
        for row in tokens if request["generate"] else []:
            settings = {"max_new_tokens": request["generate"], "do_sample": False, "eos_token_id": None}
            answer = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], **settings)
            generated.append(answer[0, len(row) :].tolist())
    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    return {"versions": versions, "kind": "logits", "generated": generated}


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.load(sys.stdin))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
