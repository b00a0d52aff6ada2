"""Loads an MLX-LM folder with mlx_lm, and answers: a JSON request on stdin, a JSON response on stdout.

Request: {"path": folder, "base": folder of the base model, "tokens": [[ids]], "generate": greedy tokens after each row,
"dtype": "float32" or "bfloat16", "out": .npy file for the logits}. Response: {"versions": {package: version}, "kind":
"logits", "generated": [[ids]]}. Runs in an environment of mlx and mlx-lm, on Linux the CPU's.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def main(request):
    """Answer one request."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(request["base"]))
    model.set_dtype(getattr(mx, request["dtype"]))
    model = load_adapters(model, request["path"])
    model.eval()
    tokens = mx.array(request["tokens"])
    np.save(request["out"], np.array(model(tokens).astype(mx.float32)))
    rows = tokens
    for _ in range(request["generate"]):
        rows = mx.concatenate([rows, mx.argmax(model(rows)[:, -1:], -1).astype(rows.dtype)], 1)
    generated = rows[:, tokens.shape[1] :].tolist() if request["generate"] else []
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    return {"versions": versions, "kind": "logits", "generated": generated}


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.load(sys.stdin))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
