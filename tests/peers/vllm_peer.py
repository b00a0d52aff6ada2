"""What vLLM computes with exported folders: run with the Python of its environment, JSON on stdin, JSON on stdout.

A request, or a list of requests, each answered in a process of its own (importing vLLM takes longer than a tiny model):

    path      folder of the export: a model, or a PEFT adapter if `base` is given
    base      folder of the steerable base; null = `path` is the model
    adapters  instead of `path`: an adapter folder for each row, null = the base
    tokens    [[ids]], rows of token ids
    generate  number of greedy tokens after each row; 0 = none
    dtype     "float32" or "bfloat16"
    out       .npy file to write: log-probabilities after each token, over the vocabulary [rows, length, vocab] (rows of
              one length); null = none
    scores    .npy file to write: the log-probability of each token but the first [rows, longest - 1], NaN behind the
              end; null = none
    compiled  whether torch.compile is used; false = eager

The answer is {"versions", "kind": "logprobs", "generated": [[ids]]}; errors are a sentence on stderr and exit status 1.
"""

import json
import os
import sys
import traceback

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: less memory, and a sooner start
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""


def rank_of(folder):
    """The smallest --max-lora-rank that an adapter can be served with."""
    with open(os.path.join(folder, "adapter_config.json")) as file:
        config = json.load(file)
    largest = max([config["r"], *config.get("rank_pattern", {}).values()])
    return next(rank for rank in RANKS if rank >= largest)


def engine(request, adapters):
    """The engine for a request."""
    from vllm import LLM

    lora = {}
    if adapters:
        # One more than there are: on CPU, rows of the base get what is in the last place, which must stay empty.
        lora = {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": max(map(rank_of, adapters))}
    return LLM(
        request.get("base") or request["path"],
        dtype=request["dtype"],
        trust_remote_code=True,
        skip_tokenizer_init=True,
        enforce_eager=not request.get("compiled", False),
        max_model_len=max(map(len, request["tokens"])) + max(request["generate"], 2),
        max_num_seqs=64,
        max_logprobs=-1,
        distributed_executor_backend="uni",
        **lora,
    )


def answer(request):
    """The answer to a request."""
    import numpy as np
    import torch
    import transformers
    import vllm
    from vllm.lora.request import LoRARequest

    rows = request["tokens"]
    of_row = request.get("adapters") or [request["path"] if request.get("base") else None] * len(rows)
    folders = sorted({folder for folder in of_row if folder is not None})
    llm = engine(request, folders)
    loras = [None if folder is None else LoRARequest(folder, folders.index(folder) + 1, folder) for folder in of_row]

    def run(prompts, **options):
        prompts = [{"prompt_token_ids": list(map(int, row))} for row in prompts]
        params = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, flat_logprobs=True, **options)
        return llm.generate(prompts, params, lora_request=loras, use_tqdm=False)

    if request.get("out"):
        # One more token: log-probabilities are of the tokens that follow.
        outputs = run([[*row, 0] for row in rows], max_tokens=1, prompt_logprobs=-1)
        np.save(request["out"], np.stack([whole_vocabulary(output.prompt_logprobs) for output in outputs]))
    generated: list = [[] for _ in rows]
    if request["generate"] or request.get("scores"):
        asked = {"prompt_logprobs": 0} if request.get("scores") else {}
        outputs = run(rows, max_tokens=max(request["generate"], 1), **asked)
        generated = [list(output.outputs[0].token_ids)[: request["generate"]] for output in outputs]
    if request.get("scores"):
        np.save(request["scores"], scores_of([output.prompt_logprobs for output in outputs]))
    versions = {module.__name__: module.__version__ for module in (vllm, torch, transformers)}
    return {"versions": versions, "kind": "logprobs", "generated": generated}


def whole_vocabulary(found):
    """Log-probabilities [length, vocab] from vLLM's list of pairs, which has the token itself and then all by rank."""
    import numpy as np

    rows = []
    for start, end in zip(found.start_indices[1:], found.end_indices[1:], strict=True):
        ids = np.asarray(found.token_ids[start:end])
        row = np.full(ids.max() + 1, np.nan, np.float32)
        row[ids] = found.logprobs[start:end]
        rows.append(row)
    return np.stack(rows)


def scores_of(rows):
    """The log-probability of each token but the first [rows, longest - 1], NaN behind the end."""
    import numpy as np

    scores = np.full((len(rows), max(len(row.start_indices) for row in rows) - 1), np.nan, np.float32)
    for row, found in enumerate(rows):
        values = [found.logprobs[start] for start in found.start_indices[1:]]
        scores[row, : len(values)] = values
    return scores


def in_process(request):
    """The answer to a request from a process of its own, so that a list of them imports vLLM once."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        try:
            result = answer(request)
        except BaseException as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process was killed"}


def main():
    """Answer the request or requests on stdin."""
    os.environ.update(SETTINGS)
    requests = json.load(sys.stdin)
    if isinstance(requests, list):
        import vllm  # noqa: F401  # before the processes divide

        answers = [in_process(request) for request in requests]
        print(json.dumps(answers), flush=True)
        return
    try:
        result = answer(requests)
    except Exception as error:
        sys.exit(f"vLLM: {error}")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
