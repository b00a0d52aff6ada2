"""What the lm-evaluation-harness's own Hugging Face model computes with two tiny random models, on PyTorch in fp32.

    python make_lm_eval.py FOLDER

writes into FOLDER: lm_eval/NAME for each model, as transformers saves it with a byte tokenizer, and lm_eval.json with
the requests and, for each model, HFLM's answers to them. Texts are longer than the models read, so that windows roll
and contexts are cut. `llama` begins every text with a token of its own, `gpt2` has learned positions and no such token.
Needs lm_eval, torch, transformers and accelerate.
"""

import json
import sys
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "train" / "data"))
from tiny_tokenizer import END_OF_TEXT, IM_START, tiny_tokenizer

LENGTH = 24
IDS = {"vocab_size": 259, "bos_token_id": IM_START, "eos_token_id": END_OF_TEXT}
LLAMA = LlamaConfig(
    **IDS,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
    initializer_range=0.6,
)
GPT2 = GPT2Config(**IDS, n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=LENGTH, initializer_range=0.6)
MODELS = {"llama": (LlamaForCausalLM, LLAMA, True), "gpt2": (GPT2LMHeadModel, GPT2, False)}

LONG = "the quick brown fox jumps over the lazy dog, and the dog does not mind"
REQUESTS = {
    "loglikelihood": [
        ("ab", "cd"),
        ("", "abc"),
        ("trailing space ", "x"),
        ("a" * 17, "bcdefg"),  # fits exactly
        ("a" * 18, "bcdefg"),
        (LONG, " at all"),
        ("<|im_start|>ab", "cd"),
        ("a", LONG[:LENGTH]),
        ("a", LONG[: LENGTH - 1]),
    ],
    "loglikelihood_rolling": [(LONG,), (LONG[:LENGTH],), (LONG[: LENGTH + 1],), ("a",)],
    "generate_until": [
        ("ab", {"until": [], "max_gen_toks": 12}),
        ("ab", {"until": ["<|im_start|>"], "max_new_tokens": 12}),
        ("ab", {"until": "z", "max_tokens": 5}),
        (LONG, {"until": ["q"], "max_gen_toks": 8}),
        (LONG, {"until": ["<|im_end|>"], "max_gen_toks": 8}),
    ],
}


def make_model(folder, kind, config, bos):
    """A random model that often says a special token, saved with its tokenizer."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[IM_START] *= 2.5
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(bos=bos)
    if bos:
        tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)


def answers(folder):
    """HFLM's answers, one at a time: a batch goes on after a special token until all of it has ended."""
    lm = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    ask = lambda kind, arguments: getattr(lm, kind)([Instance(kind, {}, arguments, 0)], disable_tqdm=True)[0]
    return {kind: [ask(kind, arguments) for arguments in asked] for kind, asked in REQUESTS.items()}


def main(folder):
    folder = Path(folder)
    result = {"requests": REQUESTS}
    for name, (kind, config, bos) in MODELS.items():
        make_model(folder / "lm_eval" / name, kind, config, bos)
        result[name] = answers(folder / "lm_eval" / name)
    (folder / "lm_eval.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
