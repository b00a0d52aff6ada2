"""Serve steered models in OpenAI's protocol: `python -m train.serve runs/mine`, then http://127.0.0.1:8000.

The same address shows a page to talk to them. Each steering file is a model of its own, besides the base model, and
requests say which one answers and how strongly it is steered (steering_strength). Ctrl-C lets running answers finish.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import jax
import tyro

from jaxsteer.io import compute_dtype
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import init_cache
from jaxsteer.ranges import Count, Natural, Positive, Range, check_ranges
from train.devices.machine import enable_compilation_cache, memory_bytes
from train.display.console import Bar, print_facts, progress
from train.serve.app import make_app
from train.serve.listener import Listener, serve
from train.serve.protocol import MAX_STRENGTH
from train.serve.security import LOCAL_NAMES, check_exposed, is_loopback
from train.serve.service import ServeSettings
from train.serving.engine import CLIENTS, Engine, EngineSettings
from train.serving.models import Roster, open_roster, parse_sources

KEY = "JAXSTEER_API_KEY"
"""Environment variable of the API key."""


@dataclass(frozen=True)
class ServeConfig:
    """Serve a base model and steering files."""

    steering: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Steering files (*.safetensors) or folders of runs that have one, each as PATH or NAME=PATH; or "none" for the
    base model alone."""
    model: str | None = None
    """Base model; by default the one named in the first steering file."""
    other_base: bool = False
    """Steer a model of the same shape whose weights are not those that the steering was trained on."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach, such as 0.0.0.0, needs an API key."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0: any that is free."""
    api_key: str | None = field(default=None, repr=False)
    """Key that requests must have as `Authorization: Bearer KEY`; by default that in JAXSTEER_API_KEY, which other
    users of this machine cannot see in the list of processes."""
    rows: Count = 32
    """Answers generated at a time."""
    max_prompt: Count = 1024
    """Maximum number of tokens in a prompt."""
    max_new_tokens: Count = 512
    """Maximum number of tokens in an answer, as far as the model's context allows."""
    places: Count = 8
    """Number of adapters that there is room for at a time."""
    queue: Natural = 256
    """Answers that may wait; further requests get status 429."""
    prefix_tokens: Natural = 4096
    """Maximum number of prompt tokens whose keys and values are kept, for prompts that begin alike."""
    timeout: Positive = 300.0
    """Seconds after which a request ends with an error, waiting or not."""
    strength: Annotated[float, Range(-MAX_STRENGTH, MAX_STRENGTH)] = 1.0
    """Strength of the steering for requests that do not give one: 0 the base, 1 as trained, 2 twice the shift."""
    adapter_folders: tuple[str, ...] = ()
    """Folders from which steering files may be loaded while the server runs (POST /v1/load_lora_adapter); without any,
    none can be."""
    max_body: Count = 1 << 20
    """Maximum size of a request, in bytes."""
    log_requests: bool = False
    """Log prompts and answers. Otherwise only names of models, numbers of tokens and times are logged."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""

    @property
    def key(self) -> str | None:
        """The API key, from wherever it is given."""
        return self.api_key if self.api_key is not None else os.environ.get(KEY) or None

    def check(self) -> None:
        """Reject settings with which nothing could be served, and addresses that are open to everybody.

        Raises:
            ValueError: names the option.
        """
        check_ranges(self)
        check_exposed(self.host, self.key)

    @property
    def sizes(self) -> EngineSettings:
        """Sizes of the engine."""
        limits = replace(
            CLIENTS,
            rows=self.rows,
            max_prompt=self.max_prompt,
            max_new_tokens=self.max_new_tokens,
            prefix_tokens=self.prefix_tokens,
        )
        return EngineSettings(limits, queue=self.queue)

    @property
    def settings(self) -> ServeSettings:
        """How requests are answered."""
        guarded = self.key is not None or not is_loopback(self.host)
        return ServeSettings(
            timeout=self.timeout,
            max_body=self.max_body,
            api_key=self.key,
            strength=self.strength,
            loading=bool(self.adapter_folders),
            log_requests=self.log_requests,
            allowed_hosts=() if guarded else (*LOCAL_NAMES, self.host),
        )


def main() -> None:
    """Serve until the process is told to stop."""
    config = tyro.cli(ServeConfig, prog="python -m train.serve", description=__doc__)
    config.check()
    sources = parse_sources(config.steering)
    listener = Listener.bind(config.host, config.port)  # before a model is loaded for nothing
    enable_compilation_cache()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("jaxsteer").setLevel(logging.INFO)
    roster = _open(config, sources)
    check_memory(config, roster.loaded.config)
    engine = Engine(roster, config.sizes)
    print_facts(_facts(config, roster, engine, listener))
    _start(engine)
    serve(make_app(engine, config.settings), engine, listener)


def _open(config: ServeConfig, sources: Mapping[str, str]) -> Roster:
    return open_roster(
        sources,
        config.model,
        dtype=config.dtype,
        places=config.places,
        folders=config.adapter_folders,
        other_base=config.other_base,
    )


def check_memory(config: ServeConfig, model: ModelConfig) -> None:
    """Refuse more rows than there is memory for, before programs are compiled for them.

    Raises:
        ValueError: keys and values of all rows would not fit into the whole memory.
    """
    answer = min(config.max_new_tokens, model.max_length)
    token = jax.eval_shape(lambda: init_cache(model, 1, 1, compute_dtype(config.dtype)))
    bytes_of_token = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(token))
    needed, there = config.rows * (config.max_prompt + answer) * bytes_of_token, memory_bytes()
    if needed > there:
        raise ValueError(
            f"{config.rows:,} answers at a time, with {config.max_prompt:,} tokens of prompt and {answer:,} of answer: "
            f"their keys and values would take {needed / 1e9:,.1f} GB, but there are {there / 1e9:,.1f} GB; lower "
            "--rows, --max-prompt or --max-new-tokens"
        )


def _start(engine: Engine) -> None:
    """Compile everything, showing progress."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress(total, "Compiling")))
            bars[0].update(done)

        engine.start(show)


def _facts(config: ServeConfig, roster: Roster, engine: Engine, listener: Listener) -> dict[str, str]:
    """What is about to be served."""
    base, *adapters = roster.names()
    limits = engine.limits
    facts = {
        "address": f"{listener.url}/v1" + (", with an API key" if config.key else ""),
        "page": listener.url,
        "base model": base,
        "adapters": _shown(adapters),
        "answers": f"{config.rows} at a time, {config.queue} more may wait, {config.timeout:g} s each",
        "limits": f"{limits.max_prompt:,} tokens in a prompt, {limits.max_new_tokens:,} in an answer",
    }
    if config.adapter_folders:
        facts["loaded from"] = ", ".join(config.adapter_folders)
    return facts


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
