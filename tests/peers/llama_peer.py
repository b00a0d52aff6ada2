"""llama.cpp as a peer: a model's, an adapter's or a control vector's logits by llama-cpp-python.

The request, JSON on stdin: {"path": the export, or a .gguf file, "base": the same of an adapter's or a control vector's
base, "tokens": [[ids]], "generate": number of greedy tokens after each row, "out": an .npy file for the logits, float32
[rows, length, vocab]}; optional: "cache": ggml's type of the key/value cache (0, fp32), "text": texts to tokenize. The
answer is JSON on the last line of stdout.
"""

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

F32 = 0  # ggml's type number


def files_of(path, base):
    """The model file, and what is loaded on top of it: (model, adapter, control vector)."""
    path = Path(path)
    if path.is_file():
        kind = gguf.GGUFReader(path).fields
        name = kind["general.architecture"].contents()
        if name == "controlvector":
            return model_of(base), None, path
        if "adapter.type" in kind:
            return model_of(base), path, None
        return path, None, None
    for name in ("adapter.gguf", "control.gguf"):
        if (path / name).is_file():
            return files_of(path / name, base)
    return model_of(path), None, None


def model_of(path):
    """The model file of an export, or the file itself."""
    if path is None:
        sys.exit("an adapter or control vector needs a base: a .gguf file, or a folder with model.gguf")
    path = Path(path)
    path = path / "model.gguf" if path.is_dir() else path
    if not path.is_file():
        sys.exit(f"{path}: no such file")
    return path


def apply_control(llama, path):
    """Apply a control vector as `llama-cli --control-vector` does."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    width = llama_cpp.llama_model_n_embd(llama._model.model)
    layers = llama_cpp.llama_model_n_layer(llama._model.model)
    data = np.zeros((layers, width), np.float32)
    for name, vector in tensors.items():
        layer = int(name.removeprefix("direction."))
        if layer < 1:
            sys.exit(f"{path}: {name}: llama.cpp has no control vector for layer 0")
        data[layer - 1] = vector
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama_cpp.llama_set_adapter_cvec(llama._ctx.ctx, pointer, data.size, width, 1, layers - 1):
        sys.exit(f"{path}: llama.cpp refuses this control vector")


def main():
    """Answer one request."""
    request = json.load(sys.stdin)
    model, adapter, control = files_of(request["path"], request.get("base"))
    rows = request["tokens"]
    length = max(map(len, rows)) + request.get("generate", 0) + 1
    llama = llama_cpp.Llama(
        str(model),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=2,
        n_gpu_layers=0,
        type_k=request.get("cache", F32),
        type_v=request.get("cache", F32),
        flash_attn=False,
        logits_all=True,
        verbose=request.get("verbose", False),
    )
    if control is not None:
        apply_control(llama, control)
    logits, generated = [], []
    for row in rows:
        llama.reset()
        llama.eval(row)
        logits.append(llama.scores[: len(row)].copy())
        ids = []
        for _ in range(request.get("generate", 0)):
            ids.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(ids[-1:])
        generated.append(ids)
    np.save(request["out"], np.stack(logits).astype(np.float32))
    answer = {"versions": {"llama-cpp-python": llama_cpp.__version__}, "kind": "logits", "generated": generated}
    if text := request.get("text"):
        answer["text_tokens"] = [llama.tokenize(one.encode(), add_bos=True, special=True) for one in text]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
