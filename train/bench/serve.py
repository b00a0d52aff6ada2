"""The serving benchmark: what clients of `jaxsteer serve` wait for, and what the server costs against no server."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from jaxsteer.inference import Decoder, Limits, Request, generate_all
from jaxsteer.io import LoadedModel, SteeringFile
from jaxsteer.models.transformer import Model
from jaxsteer.ranges import Count, check_ranges
from train.base_models import load_steered
from train.bench.eval import questions
from train.devices.programs import started
from train.display.console import say
from train.serving.models import parse_sources
from train.serving.prompts import Prompt, plain_prompt

if TYPE_CHECKING:  # a package of the extra `serve`, which the other benchmarks do without
    import httpx2

BASE = "smollm2-135m-instruct"
"""Base model without steering, unless another is named."""
FEWEST = 16
"""Minimum number of prompts for each number of clients."""


@dataclass(frozen=True)
class ServeBench:
    """Measure a server under load: throughput, the time to first token, and the time for each further one."""

    steering: str = "none"
    """Steering file or folder of a run, which answers; or "none" for the base model."""
    model: str | None = None
    """Base model; by default the one named in the steering file, or smollm2-135m-instruct."""
    url: str | None = None
    """Address of a server that runs already, such as http://127.0.0.1:8000, which serves the steering under its name;
    by default one is started for the measurement."""
    clients: tuple[Count, ...] = (1, 8, 32)
    """Numbers of clients, each of which asks for one answer after the other; all are measured."""
    prompts: Count = 4
    """Prompts of each client; at least 16 are asked."""
    data: str | None = None
    """A JSONL file with prompts; by default random tokens, as long as GSM8K's questions."""
    prompt: str = "question"
    """Field of the JSONL file that holds the prompt."""
    new_tokens: Count = 64
    """Maximum number of tokens in an answer."""
    compare: bool = True
    """Also answer the same prompts in this process by `generate_all`, before and after."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    json: str | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)


class _Answered(NamedTuple):
    """One answer: its number of tokens, and the seconds until its first piece and until its end."""

    tokens: int
    first: float
    end: float


class _Refused(Exception):
    """A server did not answer a request."""


def bench_serve(config: ServeBench) -> dict[str, dict[str, float]]:
    """Run the serving benchmark.

    Returns:
        Figures by number of clients.
    """
    sources = parse_sources([config.steering])
    model = config.model or (None if sources else BASE)
    loaded, file = load_steered(next(iter(sources.values()), "none"), model, config.dtype)
    counts = [max(FEWEST, config.prompts * clients) for clients in config.clients]
    prompts = _prompts(config, loaded, sum(counts))
    figures = {}
    with _server(config, loaded, file, max(len(each.tokens.ids) for each in prompts)) as url:
        for clients, count in zip(config.clients, counts, strict=True):
            asked, prompts = prompts[:count], prompts[count:]  # no prompt twice: servers keep what they have read
            named = f"{clients} client{'s' * (clients > 1)}"
            say(f"{named}: {count} prompts")
            figures[named] = _measure(config, loaded, file, url, asked, clients)
    return figures


def _prompts(config: ServeBench, loaded: LoadedModel, count: int) -> list[Prompt]:
    tokens = questions(config.data, config.prompt, count, loaded.require_tokenizer())
    if len(tokens) < count:
        raise ValueError(f"{config.data}: {len(tokens)} prompts, but {count} are needed; fewer --clients or --prompts")
    return [plain_prompt(loaded, each.ids.tolist(), each.source) for each in tokens]


@contextmanager
def _server(config: ServeBench, loaded: LoadedModel, file: SteeringFile | None, longest: int) -> Iterator[str]:
    """The address of a server: the given one, or that of a process of its own.

    Raises:
        ValueError: it does not start.
    """
    if config.url is not None:
        yield config.url.rstrip("/").removesuffix("/v1")
        return
    command = [sys.executable, "-m", "train", "serve", config.steering, "--port", "0", "--dtype", config.dtype]
    command += ["--model", config.model or (file.model_name if file else BASE)]
    command += ["--rows", str(max(config.clients))]
    for option, default, needed in (("--max-prompt", 1024, longest), ("--max-new-tokens", 512, config.new_tokens)):
        command += [option, str(max(default, needed))]  # as users start it, if that is enough
    with started(command, "jaxsteer serve", subprocess.DEVNULL, None, os.environ) as process:
        ready = next((line for line in process.stdout or () if line.startswith(b"Ready: ")), None)
        if ready is None:
            raise ValueError(f"the server did not start; see why: {shlex.join(command)}")
        yield ready.decode().split()[1]


def _measure(
    config: ServeBench,
    loaded: LoadedModel,
    file: SteeringFile | None,
    url: str,
    prompts: Sequence[Prompt],
    clients: int,
) -> dict[str, float]:
    """Figures for one number of clients. Without a server, the prompts are answered before and after."""
    alone = _Alone(config, loaded, file, prompts, clients) if config.compare else None
    before = alone.tokens_per_second() if alone else 0.0
    began = time.perf_counter()
    answers = asyncio.run(_ask_all(config, url, prompts, clients))
    seconds, tokens = time.perf_counter() - began, sum(answer.tokens for answer in answers)
    further = [(each.end - each.first) / (each.tokens - 1) for each in answers if each.tokens > 1]
    firsts = [1000 * each.first for each in answers]
    figures = {
        "requests/s": len(prompts) / seconds,
        "tokens/s": tokens / seconds,
        "tokens in an answer, mean": tokens / len(answers),
        "first token, ms, median": statistics.median(firsts),
        "first token, ms, 95 % below": float(np.percentile(firsts, 95)),
        "further token, ms, median": 1000 * statistics.median(further) if further else 0.0,
    }
    if alone is None:
        return figures
    rate = statistics.mean((before, alone.tokens_per_second()))
    return figures | {"generate_all, tokens/s": rate, "server / generate_all": tokens / seconds / rate}


class _Alone:
    """The same prompts answered in this process."""

    def __init__(
        self, config: ServeBench, loaded: LoadedModel, file: SteeringFile | None, prompts: Sequence[Prompt], rows: int
    ) -> None:
        self._model = Model(loaded.config, file.plan if file else ())
        self._trees = loaded.base, file.steering if file else {}
        self._limits = Limits(max(len(prompt.tokens.ids) for prompt in prompts), config.new_tokens, rows)
        self._requests = [Request(prompt.tokens, config.new_tokens, prompt.stop) for prompt in prompts]
        self._answer()  # compiles

    def tokens_per_second(self) -> float:
        """Answer all."""
        began = time.perf_counter()
        tokens = self._answer()
        return tokens / (time.perf_counter() - began)

    def _answer(self) -> int:
        decoder = Decoder(self._model, *self._trees, self._limits)
        return sum(len(answer.tokens) for _, answer in generate_all(decoder, self._requests))


async def _ask_all(config: ServeBench, url: str, prompts: Sequence[Prompt], clients: int) -> list[_Answered]:
    """Answers to all prompts, from clients that each ask one at a time.

    Raises:
        ValueError: the server cannot be reached, does not serve the steering, or refuses a prompt.
    """
    import httpx2

    from train.serve.command import KEY

    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    waiting, answers = iter(prompts), list[_Answered]()
    try:
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=600) as http:
            name = await _served_name(http, config.steering)

            async def client() -> None:
                for prompt in waiting:
                    answer = await _ask(http, name, prompt, config.new_tokens)
                    answers.append(answer)

            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(client())
    except* (httpx2.HTTPError, _Refused) as errors:
        raise ValueError(f"{url}: {errors.exceptions[0]}") from None
    return answers


async def _served_name(http: httpx2.AsyncClient, steering: str) -> str:
    """The name under which a server has the steering, or its base model."""
    response = await http.get("/v1/models")
    await _check(response)
    names = [each["id"] for each in response.json()["data"]]
    name = next(iter(parse_sources([steering])), names[0])
    if name not in names:
        raise _Refused(
            f"has no model {name!r}, only {', '.join(names)}; name the steering as the server does: NAME=PATH"
        )
    return name


async def _ask(http: httpx2.AsyncClient, model: str, prompt: Prompt, new_tokens: int) -> _Answered:
    """One greedy answer, read as it comes."""
    body = {"model": model, "prompt": prompt.tokens.ids.tolist(), "max_tokens": new_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, tokens = time.perf_counter(), None, 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        await _check(response)
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - began
            usage = json.loads(line.removeprefix("data: ")).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
    end = time.perf_counter() - began
    return _Answered(tokens, first or end, end)


async def _check(response: httpx2.Response) -> None:
    """Raise what a server says when it refuses."""
    if response.is_error:
        text = (await response.aread()).decode(errors="replace")
        raise _Refused(f"answered with status {response.status_code}: {text[:500]}")
