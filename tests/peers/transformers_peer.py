"""What transformers computes with an exported folder: JSON on stdin, JSON as the last line on stdout.

The request: {"path": the folder, "tokens": [[ids]], "generate": number of greedy tokens after each row, "dtype":
"float32" or "bfloat16", "out": an .npy file for the logits, float32 [rows, length, vocab]}. Optional: "trust": false
to load without trust_remote_code, "save": a folder to save the loaded model in, "dtypes": true to list the dtypes of
the parameters.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers


def main():
    """Answer one request."""
    request = json.load(sys.stdin)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["path"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request.get("trust", True),
        attn_implementation="eager",  # the fused kernels have no soft-caps
    ).eval()
    tokens = torch.tensor(request["tokens"])
    with torch.no_grad():
        np.save(request["out"], model(tokens, use_cache=False).logits.float().numpy())
    answer = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "kind": "logits",
        "generated": generate(model, tokens, request["generate"]) if request["generate"] else [],
    }
    if request.get("dtypes"):
        answer["dtypes"] = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()}
    if request.get("save"):
        model.save_pretrained(request["save"])
    print(json.dumps(answer))


def generate(model, tokens, count):
    """Greedy continuations of this many tokens, with the cache; nothing ends one early."""
    settings = transformers.GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    model.generation_config = settings
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return out[:, tokens.shape[1] :].tolist()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
