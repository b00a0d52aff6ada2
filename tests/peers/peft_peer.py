"""Loads a PEFT folder with peft and transformers, and answers: a JSON request on stdin, a JSON response on stdout.

Request: {"path": folder, "base": folder of the base model, "tokens": [[ids]], "generate": greedy tokens after each row,
"dtype": "float32" or "bfloat16", "out": .npy file for the logits, "merged_out": another for those after merging, if it
is given}.
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
    base = AutoModelForCausalLM.from_pretrained(
        request["base"],
        dtype=getattr(torch, request["dtype"]),
        attn_implementation="eager",  # the fused kernels have no soft-caps
    )
    model = PeftModel.from_pretrained(base, request["path"]).eval()
    tokens = torch.tensor(request["tokens"])
    generated = []
    with torch.inference_mode():
        np.save(request["out"], model(input_ids=tokens).logits.float().numpy())
        for row in tokens if request["generate"] else []:
            count = request["generate"]
            settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
            answer = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], **settings)
            generated.append(answer[0, len(row) :].tolist())
        if request.get("merged_out"):
            np.save(request["merged_out"], model.merge_and_unload()(input_ids=tokens).logits.float().numpy())
    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    return {"versions": versions, "kind": "logits", "generated": generated}


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.load(sys.stdin))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
