"""What jaxsteer is measured against: training and decoding with transformers and peft, one request a line.

Each request is a JSON object with an "op", on a line of standard input; each answer is a line of JSON. The process
keeps its model, its trainer and its batches between requests. Times are in seconds, without what prepares a request.

    load      {"model": folder, "threads": n} -> {"versions": {package: version}}
    train     {"method": "post-block", "lora", "joint" or "full", "rank", "alpha", "lr", "initial": .npz or null}
              -> {"trained": number of parameters}
    batches   {"collate": see COLLATES, "rows", "length", "steps": [[row, ...], ...]}
              -> {"batches": [examples of each]}; a row is a list of examples {"ids": [...], "targets": [0 or 1, ...]}
    check     the same -> {"loss": mean over all targets of all batches, "grad_norm"}; nothing is kept or updated
    step      {"collate", "index": of one of its batches} -> {"seconds", "loss"}
    generate  {"prompts": [[ids]], "new_tokens", "margins": bool} -> {"seconds", "tokens": [[ids]], "margins": [[...]]}
    encode    {"path": JSONL of prompt and completion, "rows", "length"} -> {"batches": [examples]}: the first, padded
    memory    {} -> {"peak": bytes}
"""

import json
import os
import sys
import time
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

PROJECTIONS = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


class PostBlock(torch.nn.Module):
    """h + α U silu(D h) at the output of a decoder layer, as a forward hook."""

    def __init__(self, width, rank, alpha):
        super().__init__()
        self.alpha = alpha
        self.D = torch.nn.Parameter(torch.empty(rank, width).uniform_(-1e-3, 1e-3) / width**0.5)
        self.U = torch.nn.Parameter(torch.zeros(width, rank))

    def forward(self, layer, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        steered = hidden + self.alpha * torch.nn.functional.silu(hidden @ self.D.T) @ self.U.T
        return (steered, *output[1:]) if isinstance(output, tuple) else steered


def padded(steps, rows, length, pad):
    """Every example in a row of its own, in order, padded to the maximum length."""
    examples = [example for step in steps for row in step for example in row]
    return [right_padded(examples[at : at + rows], length, pad) for at in range(0, len(examples), rows)]


def grouped(steps, rows, length, pad):
    """Examples of similar length together, padded to the longest of each batch."""
    examples = sorted((e for step in steps for row in step for e in row), key=lambda e: -len(e["ids"]))
    groups = [examples[at : at + rows] for at in range(0, len(examples), rows)]
    return [right_padded(group, len(group[0]["ids"]), pad) for group in groups]


def flattened(steps, rows, length, pad):
    """Without padding: all examples of a step in one long row, by transformers' own collator."""
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
    batches = []
    for step in steps:
        examples = [example for row in step for example in row]
        made = collate([{"input_ids": e["ids"], "labels": labels_of(e)} for e in examples])
        batches.append((len(examples), dict(made)))
    return batches


def packed(steps, rows, length, pad):
    """Examples packed into rows as given; positions that restart make transformers mask one from another."""
    batches = []
    for step in steps:
        ids, positions = np.full((len(step), length), pad), np.zeros((len(step), length), int)
        labels = np.full((len(step), length), -100)
        for r, row in enumerate(step):
            at = 0
            for e in row:
                part = slice(at, at := at + len(e["ids"]))
                ids[r, part], labels[r, part], positions[r, part] = e["ids"], labels_of(e), range(len(e["ids"]))
            positions[r, at:] = range(length - at)
        fields = {"input_ids": ids, "labels": labels, "position_ids": positions}
        batches.append((sum(map(len, step)), {name: torch.from_numpy(values) for name, values in fields.items()}))
    return batches


COLLATES = {"padded": padded, "grouped": grouped, "flattened": flattened, "packed": packed}


def right_padded(examples, length, pad):
    """(number of examples, batch) with a row for each; the mask is left out where nothing is padded."""
    shape = (len(examples), length)
    ids, mask, labels = np.full(shape, pad), np.zeros(shape, int), np.full(shape, -100)
    for r, e in enumerate(examples):
        count = len(e["ids"])
        ids[r, :count], mask[r, :count], labels[r, :count] = e["ids"], 1, labels_of(e)
    fields = {"input_ids": ids, "labels": labels} | ({} if mask.all() else {"attention_mask": mask})
    return len(examples), {name: torch.from_numpy(values) for name, values in fields.items()}


def labels_of(example):
    """The ids of the targets, -100 elsewhere; nothing predicts the first token."""
    targets = [0, *example["targets"][1:]]
    return [token if target else -100 for token, target in zip(example["ids"], targets, strict=True)]


def targets_in(batch):
    """Number of tokens that a batch has a loss at."""
    return int((batch["labels"][:, 1:] != -100).sum())


class Peer:
    """Model, trainer and batches."""

    def load(self, model, threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        transformers.utils.logging.set_verbosity_error()
        self.folder, self.made = model, {}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        packages = ("torch", "transformers", "peft", "numpy")
        return {"versions": {name: version(name) for name in packages}}

    def train(self, method, rank, alpha, lr, initial):
        if method not in ("post-block", "lora", "joint", "full"):
            raise ValueError(f"no method {method!r}")
        self.steering = []
        self.model.requires_grad_(method == "full")
        layers = self.model.model.layers
        if method in ("post-block", "joint"):
            self.steering = [PostBlock(self.model.config.hidden_size, rank, alpha) for _ in layers]
            for layer, steering in zip(layers, self.steering, strict=True):
                layer.register_forward_hook(steering)
        if method in ("lora", "joint"):
            self.model = with_lora(self.model, rank, alpha)
        if initial is not None:
            self.take(layers, np.load(initial))
        parameters = {id(p): p for module in (self.model, *self.steering) for p in module.parameters()}
        self.trained = [p for p in parameters.values() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=True)
        self.model.train()
        return {"trained": sum(p.numel() for p in self.trained)}

    @torch.no_grad()
    def take(self, layers, initial):
        """Start from the values of an .npz file, SITE/NAME [layers, ...]."""
        for key, values in initial.items():
            site, name = key.rsplit("/", 1)
            for number, layer in enumerate(layers):
                if site == "block":
                    place = getattr(self.steering[number], name)
                else:
                    place = getattr(layer.get_submodule(PROJECTIONS[site]), f"lora_{name}")["default"].weight
                place.copy_(torch.from_numpy(values[number]))

    def batches(self, collate, rows, length, steps):
        self.made[collate] = COLLATES[collate](steps, rows, length, self.pad())
        return {"batches": [count for count, _ in self.made[collate]]}

    def pad(self):
        return self.model.config.pad_token_id or 0

    def check(self, collate, rows, length, steps):
        made = COLLATES[collate](steps, rows, length, self.pad())
        total, loss = sum(targets_in(batch) for _, batch in made), 0.0
        for _, batch in made:
            share = self.model(**batch, use_cache=False).loss * (targets_in(batch) / total)
            share.backward()
            loss += share.item()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, float("inf")).item()
        self.optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    def step(self, collate, index):
        _, batch = self.made[collate][index]
        began = time.perf_counter()
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "seconds": time.perf_counter() - began}

    def generate(self, prompts, new_tokens, margins=False):
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad()] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = transformers.GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.pad(),
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=margins,
        )
        self.model.eval().generation_config = settings
        began = time.perf_counter()
        with torch.inference_mode():
            made = self.model.generate(ids, attention_mask=mask, generation_config=settings)
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "tokens": made.sequences[:, longest:].tolist()}
        if margins:
            best = torch.stack(made.logits, 1).topk(2).values
            answer["margins"] = (best[..., 0] - best[..., 1]).tolist()
        return answer

    def encode(self, path, rows, length):
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line) for line in file]
        prompts = tokenizer([text["prompt"] for text in texts], add_special_tokens=False).input_ids
        completions = tokenizer([text["completion"] for text in texts], add_special_tokens=False).input_ids
        examples = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = [*prompt, *completion, tokenizer.eos_token_id]
            if len(ids) <= length:
                examples.append({"ids": ids, "targets": [0] * len(prompt) + [1] * (len(ids) - len(prompt))})
        return self.batches("padded", rows, length, [[[example] for example in examples[:rows]]])

    def memory(self):
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
        return {"peak": 1024 * peak}


def with_lora(model, rank, alpha):
    """peft's LoRA at all seven projections."""
    import peft

    targets = [name.rsplit(".", 1)[1] for name in PROJECTIONS.values()]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def main():
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is not an answer
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(peer, request.pop("op"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
