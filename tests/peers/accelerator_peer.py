"""Times LoRA training steps with peft on a model of random weights: a JSON request on stdin, JSON as the last line.

Request: {"config": a Llama's config.json, "dtype": "bfloat16" or "float32", "rows", "length": of a batch, "rank": of
LoRA at all seven projections, "steps": number of timed steps, "checkpointing": whether the blocks are recomputed}.
Response: {"versions": {package: version}, "seconds": of each step, "loss": of the last, "peak_bytes", "trainable"}, or
{"versions", "out_of_memory": what torch said}.

A strong opponent: fused attention and AdamW, bf16 autocast around LoRA's fp32 parameters as in transformers' Trainer,
TF32, no dropout, and all tokens of a row real, so that there is no mask.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less is lost between blocks

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(request, device):
    """The model with LoRA, made on the device."""
    torch.manual_seed(0)
    dtype = getattr(torch, request["dtype"])
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(
            LlamaConfig.from_dict(request["config"]), dtype=dtype, attn_implementation="sdpa"
        )
    base.config.use_cache = False
    rank = request["rank"]
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS, lora_dropout=0.0))
    if request["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(device).train()


def step_of(model, request, device):
    """A training step as a function; returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=on_gpu)
    shape = (request["rows"], request["length"])
    tokens = torch.randint(0, model.config.vocab_size, shape, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=request["dtype"] == "bfloat16")

    def step():
        with autocast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return step, sum(p.numel() for p in trained)


def main(request):
    """Answer one request."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    answer = {"versions": {name: version(name) for name in ("torch", "transformers", "peft")}}
    try:
        step, trainable = step_of(build(request, device), request, device)
        seconds, loss = [], 0.0
        for _ in range(2):  # chooses kernels, touches the memory
            step()
        for _ in range(request["steps"]):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        return answer | {"out_of_memory": str(error).split("\n")[0]}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return answer | {"seconds": seconds, "loss": loss, "peak_bytes": peak, "trainable": trainable}


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.load(sys.stdin))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
