"""A vLLM server with a steerable base, adapters loaded while it runs, and many requests at once.

JSON on stdin: {"python": that of vLLM's environment, "base": folder, "adapters": {name: folder}, "requests":
[{"model": name of an adapter or "base", "tokens": [ids], "generate": number of greedy tokens}], "concurrent": number
of requests at a time, "dtype": "float32" or "bfloat16", "log": file for the server's output}. JSON on stdout:
{"version", "models": names that it serves at the end, "answers": [[ids]], "seconds"}. Only the standard library.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from vllm_peer import SETTINGS, rank_of

START_SECONDS = 900


def call(port, path, body=None):
    """The answer of the server, parsed if it is JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:500]}") from None
    return json.loads(text) if text.startswith(("{", "[")) else text


@contextmanager
def serving(request):
    """Start a server on a free port, and stop it in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [rank_of(folder) for folder in request["adapters"].values()]
    options = {
        "served-model-name": "base",
        "dtype": request["dtype"],
        "port": port,
        "host": "127.0.0.1",
        "max-model-len": 512,
        "max-num-seqs": 32,
        # One more than there are: on CPU, requests for the base get what is in the last place, which must stay empty.
        "max-loras": len(ranks) + 1,
        "max-lora-rank": max(ranks),
    }
    # The command `vllm serve` looks for a package of that name, which the wheel for CPUs does not have.
    command = [request["python"], "-m", "vllm.entrypoints.openai.api_server", "--model", request["base"]]
    command += ["--enable-lora", "--trust-remote-code", "--enforce-eager"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = os.environ | SETTINGS | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with open(request["log"], "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait(server, port)
            yield port
        finally:
            server.terminate()
            server.wait(60)


def _wait(server, port):
    """Wait until the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            call(port, "/health")
        except (OSError, RuntimeError):
            time.sleep(1)
        else:
            return
    raise RuntimeError("the server did not start; see its log")


def main(request):
    """Answer the request on stdin."""
    with serving(request) as port:
        for name, folder in request["adapters"].items():
            call(port, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

        def complete(one):
            body = {"model": one["model"], "prompt": one["tokens"], "max_tokens": one["generate"], "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            return call(port, "/v1/completions", body)["choices"][0]["token_ids"]

        start = time.monotonic()
        with ThreadPoolExecutor(request["concurrent"]) as pool:
            answers = list(pool.map(complete, request["requests"]))
        seconds = time.monotonic() - start
        models = [model["id"] for model in call(port, "/v1/models")["data"]]
        version = call(port, "/version")["version"]
    return {"version": version, "models": models, "answers": answers, "seconds": seconds}


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.load(sys.stdin))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
