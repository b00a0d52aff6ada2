"""What serving in bf16 costs: vLLM in bf16 against vLLM in fp32, for the base model and with steering.

bf16 changes the base model's own answers; this says by how much more it changes those of a steered one. All adapters
and the base are rows of one batch. Writes JSON, for the base, each adapter and the static folder: the absolute error of
the prompt tokens' log-probabilities (mean, 99th percentile, largest), and the shares of prompts whose first greedy
token, and whose whole greedy answer, is that of fp32.

    .venv/bin/python tests/peers/bf16_noise.py --prompts prompts.txt --base exports/base \
        --adapter block=exports/block --adapter lora=exports/lora --static exports/static --out bf16.json
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent


def main():
    """Measure, print and write."""
    args = arguments()
    tokenizer = Tokenizer.from_file(str(args.base / "tokenizer.json"))
    rows = [tokenizer.encode(text, add_special_tokens=False).ids[: args.length] for text in prompts(args)]
    adapters = dict(pair.split("=", 1) for pair in args.adapter)
    of_name = {"base": None} | adapters
    mixed = {
        "base": str(args.base),
        "adapters": [folder for folder in of_name.values() for _ in rows],
        "tokens": rows * len(of_name),
    }
    found = compare(args, mixed)
    results = dict(zip(of_name, np.array_split(np.arange(len(mixed["tokens"])), len(of_name)), strict=True))
    report = {name: summary(*(part[at] for part in found)) for name, at in results.items()}
    if args.static:
        report["static"] = summary(*compare(args, {"path": str(args.static), "tokens": rows}))
    report = {"prompts": len(rows), "tokens": args.generate, "results": report}
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--prompts", type=Path, required=True, help="a prompt a line, or JSON lines with a field prompt"
    )
    parser.add_argument("--base", type=Path, required=True, help="steerable base")
    parser.add_argument("--adapter", action="append", default=[], help="name=folder; repeat it")
    parser.add_argument("--static", type=Path, help="a model with its steering (hf-steered)")
    parser.add_argument("--count", type=int, default=200, help="number of prompts")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt at most")
    parser.add_argument("--generate", type=int, default=8, help="greedy tokens after each prompt")
    parser.add_argument("--python", type=Path, default=HERE.parents[1] / ".peers/vllm/bin/python")
    parser.add_argument("--out", type=Path, default=Path("bf16.json"))
    return parser.parse_args()


def prompts(args):
    """The texts."""
    lines = [line for line in args.prompts.read_text().splitlines() if line.strip()][: args.count]
    return [json.loads(line)["prompt"] for line in lines] if args.prompts.suffix == ".jsonl" else lines


def compare(args, request):
    """Log-probabilities and greedy tokens of all rows, in fp32 and in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{dtype}.npy" for dtype in ("float32", "bfloat16")]
        requests = [{"generate": args.generate, "dtype": Path(file).stem, "scores": file, **request} for file in files]
        command = [args.python, HERE / "vllm_peer.py"]
        done = subprocess.run(command, input=json.dumps(requests), stdout=subprocess.PIPE, text=True, check=True)
        answers = json.loads(done.stdout.splitlines()[-1])
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            raise SystemExit(errors[0])
        return [np.load(file) for file in files] + [np.array(answer["generated"]) for answer in answers]


def summary(wide, narrow, wanted, got):
    """What bf16 changed in some rows."""
    error = np.abs(wide - narrow)
    error = error[np.isfinite(error)]
    same = wanted == got
    return {
        "logprob_error_mean": float(error.mean()),
        "logprob_error_p99": float(np.quantile(error, 0.99)),
        "logprob_error_max": float(error.max()),
        "first_token_agreement": float(same[:, 0].mean()),
        "answer_agreement": float(same.all(1).mean()),
    }


if __name__ == "__main__":
    main()
