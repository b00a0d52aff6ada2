"""A server that is killed while it loads an adapter: nothing is left that the next start could stumble over."""

import hashlib
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from server_process import server_process
from tiny import random_steering
from tiny_model import TINY
from tiny_server import eventually

from jaxsteer.io import save_steering
from jaxsteer.plans import parse_plan


def digests(folder):
    """Of all that is in a folder."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ask(url, model):
    body = {"model": model, "prompt": "ab", "temperature": 0, "max_tokens": 8}
    response = httpx2.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def load(url, path):
    body = {"lora_name": "late", "lora_path": str(path)}
    return httpx2.post(f"{url}/v1/load_lora_adapter", json=body, timeout=600)


@pytest.mark.slow
def test_killed_while_loading_an_adapter(served_folder, tmp_path):
    """The adapter has another plan, for which the server compiles programs, and keeps them in a cache."""
    path, plan = tmp_path / "adapters" / "late.safetensors", parse_plan(("loreft(rank=2) @ block",), TINY)
    path.parent.mkdir()
    steering = random_steering(plan, TINY, 5, scale=0.5)
    save_steering(path, steering, plan, model_name=str(served_folder / "tiny"), config=TINY)
    before = digests(served_folder) | digests(path.parent)
    sizes = ("--rows", 1, "--max-prompt", 48, "--max-new-tokens", 16, "--places", 2, "--adapter-folders", path.parent)
    start = lambda port=0: server_process(
        served_folder / "steered.safetensors", *sizes, port=port, JAXSTEER_CACHE=str(tmp_path / "cache")
    )
    with start() as server:
        answer, compiled, failed = ask(server.url, "steered"), digests(tmp_path / "cache"), []

        def load_until_killed():
            with pytest.raises(httpx2.TransportError):
                load(server.url, path)
            failed.append(True)

        loading = threading.Thread(target=load_until_killed)
        loading.start()
        eventually(lambda: len(digests(tmp_path / "cache")) > len(compiled) + 2)
        server.process.kill()
        loading.join()
        assert failed
    assert digests(served_folder) | digests(path.parent) == before
    with start(urlsplit(server.url).port) as server:
        assert [model["id"] for model in httpx2.get(f"{server.url}/v1/models").json()["data"]] == ["tiny", "steered"]
        assert ask(server.url, "steered") == answer
        assert load(server.url, path).status_code == 200
        assert ask(server.url, "late") != answer == ask(server.url, "steered")
