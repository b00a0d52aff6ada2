"""A tiny model with two steering files, served: by an app in this process, and at a port."""

import jax
import pytest
from starlette.testclient import TestClient
from tiny import random_steering
from tiny_model import TINY
from tiny_server import PLAN, SETTINGS, SIZES, serving
from tiny_tokenizer import tiny_tokenizer

from jaxsteer.io import save_hf, save_steering
from jaxsteer.models.transformer import init_base
from train.serve.app import make_app
from train.serving.engine import Engine
from train.serving.models import open_roster


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory):
    """A model whose logits are not all alike, and steering files of one plan: steered and other."""
    folder = tmp_path_factory.mktemp("served")
    base = init_base(TINY, jax.random.key(3))
    base = base | {"embed": {"embedding": base["embed"]["embedding"] * 20}}
    save_hf(folder / "tiny", TINY, base, "llama", tiny_tokenizer())
    for seed, name in enumerate(("steered", "other")):
        notes = {"template": "{prompt}>", "max_new_tokens": 6}
        steering, path = random_steering(PLAN, TINY, seed, scale=0.5), folder / f"{name}.safetensors"
        save_steering(path, steering, PLAN, model_name=str(folder / "tiny"), config=TINY, notes=notes)
    return folder


@pytest.fixture(scope="session")
def engine(served_folder):
    sources = {"steered": str(served_folder / "steered.safetensors")}
    with Engine(open_roster(sources, places=2, folders=[served_folder]), SIZES) as engine:
        engine.start()
        yield engine


@pytest.fixture(scope="session")
def app(engine):
    return make_app(engine, SETTINGS)


@pytest.fixture
def client(app):
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="session")
def url(app):
    """The address of a server."""
    with serving(app) as url:
        yield url
