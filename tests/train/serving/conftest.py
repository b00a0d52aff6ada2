"""A tiny model with a byte tokenizer, and steering files that it can be served with."""

from pathlib import Path

import jax
import pytest
from tiny import fast_jit, random_steering
from tiny_model import TINY
from tiny_serving import plans
from tiny_tokenizer import tiny_tokenizer

from jaxsteer.io import LoadedModel, fingerprint, save_steering
from jaxsteer.models.transformer import init_base


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
