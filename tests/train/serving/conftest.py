"""A tiny model with a byte tokenizer, steering files that it can be served with, and engines that serve it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_clients import NEW, prompt
from tiny import fast_jit, random_steering
from tiny_model import TINY
from tiny_serving import SETTINGS, plans
from tiny_tokenizer import tiny_tokenizer

from jaxsteer.batches import make_batch
from jaxsteer.io import LoadedModel, fingerprint, load_steering, save_steering
from jaxsteer.models.transformer import Model, forward, init_base, logits_of, output_embedding
from train.serving.engine import Engine
from train.serving.models import Candidate, Roster

WIDTH, TIE = 48, 1e-4


@pytest.fixture(scope="session")
def tiny_loaded():
    """Scaled up as `tiny_base` is, so that logits are not all alike."""
    base = fast_jit(init_base, static_argnums=0)(TINY, jax.random.key(3))
    base = base | {"embed": {"embedding": base["embed"]["embedding"] * 20}}
    return LoadedModel(TINY, base, tiny_tokenizer(), "tiny", fingerprint(TINY), "llama", ())


@pytest.fixture(scope="session")
def steering_files(tmp_path_factory):
    """A folder of steering files a, b, c and d."""
    folder = tmp_path_factory.mktemp("steering")
    for seed, (name, plan) in enumerate(plans().items()):
        steering = random_steering(plan, TINY, seed, scale=0.5)
        notes = {"template": "{prompt}>", "max_new_tokens": 5}
        save_steering(Path(folder) / f"{name}.safetensors", steering, plan, model_name="tiny", config=TINY, notes=notes)
    return folder


@pytest.fixture(scope="session")
def alone(steering_files, tiny_loaded):
    """(name, prompt's number, strength) -> the tokens that a model with this adapter alone gives."""
    step = fast_jit(
        lambda model, base, steering, batch, strength, last: logits_of(
            forward(model, base, steering, batch, strength=strength).hidden[:, last], output_embedding(base), None
        )[0],
        static_argnames="model",
    )

    def answer(name, number, strength=1.0):
        plan, steering = (), {}
        if name != "tiny":
            file = load_steering(steering_files / f"{name}.safetensors")
            plan, steering = file.plan, file.steering
        factors = strength if isinstance(strength, dict) else dict.fromkeys([slot.name for slot in plan], strength)
        factors = {slot.name: jnp.float32(factors.get(slot.name, 1.0)) for slot in plan}
        ids, margins = prompt(number).ids.tolist(), []
        length = len(ids)
        for _ in range(NEW):
            row, segments, weights = (np.zeros((1, WIDTH), kind) for kind in (np.int32, np.int32, np.float32))
            row[0, : len(ids)], segments[0, : len(ids)], weights[0, length : len(ids)] = ids, 1, 1
            batch = make_batch(row, segments, weights)
            logits = np.asarray(
                step(Model(TINY, plan), tiny_loaded.base, steering, batch, factors, np.int32(len(ids) - 1))
            )
            second, first = np.sort(logits)[-2:]
            margins.append(first - second)
            ids.append(int(logits.argmax()))
        assert min(margins) > TIE, "choose another prompt: rounding decides here"
        return ids[length:]

    return answer


@pytest.fixture
def roster(tiny_loaded, steering_files):
    """The base with a and b, and two free places."""
    roster = Roster(tiny_loaded, "tiny", places=4, folders=[steering_files])
    roster.start_with(Candidate(name, load_steering(steering_files / f"{name}.safetensors")) for name in "ab")
    return roster


@pytest.fixture
def engine(roster):
    with Engine(roster, SETTINGS) as engine:
        engine.start()
        yield engine


@pytest.fixture
def waiting(roster):
    """An engine whose thread is not started yet, so that jobs wait."""
    with Engine(roster, SETTINGS) as engine:
        yield engine
