"""A tiny model with two steering files, an engine for them, and the command in this process."""

import io
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from chat_session import CONFIG, PLAN, Session
from tiny_tokenizer import tiny_tokenizer

from jaxsteer import init_steering
from jaxsteer.io import save_hf, save_steering
from jaxsteer.models.transformer import init_base
from train.chat import __main__ as command
from train.cli import run_main
from train.serving.engine import Engine
from train.serving.models import open_roster


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A model, and steering for chats (`talk`) and for plain prompts (`plain`)."""
    folder = tmp_path_factory.mktemp("chat")
    save_hf(folder / "tiny", CONFIG, init_base(CONFIG, jax.random.key(3)), "llama", tiny_tokenizer())
    zeros = init_steering(PLAN, CONFIG, jax.random.key(0))
    for seed, (name, notes) in enumerate({"talk": {"chat": True}, "plain": {"template": "{prompt}>"}}.items()):
        draw = np.random.default_rng(seed)
        steering = jax.tree.map(lambda leaf, draw=draw: np.float32(2 * draw.standard_normal(leaf.shape)), zeros)
        notes = {**notes, "max_new_tokens": 6}
        save_steering(
            folder / f"{name}.safetensors", steering, PLAN, model_name=str(folder / "tiny"), config=CONFIG, notes=notes
        )
    return folder


@pytest.fixture(scope="session")
def engine(files):
    """With the programs of `jaxsteer chat --context 128`, so that they are compiled once."""
    sources = tuple(str(files / f"{name}.safetensors") for name in ("talk", "plain"))
    start = command.prepare(command.ChatConfig(sources, context=128))
    with Engine(open_roster(start.sources, places=2), start.sizes) as engine:
        engine.start()
        yield engine


@pytest.fixture
def session(engine):
    return Session(engine)


@pytest.fixture
def asked(engine, monkeypatch):
    """The requests that reach the engine."""
    requests, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, *rest: (requests.append(request), submit(request, *rest))[1])
    return requests


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command as its own process would; gives what it prints, and what it reports if it fails."""

    def call(*arguments, stdin=b"", fails=False):
        monkeypatch.setattr(sys, "argv", ["chat", *map(str, arguments)])
        stream = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) if fails else nullcontext() as exit:
            run_main(command.main)
        printed = capsys.readouterr()
        assert not fails or exit.value.code == 1
        return " ".join(printed.err.split()) if fails else printed.out

    return call
