"""A real model, SmolLM2-135M-Instruct, against transformers on PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close

from jaxsteer import Model, NonlinearSteering, Slot, forward, generate, init_steering, make_batch
from jaxsteer.models.transformer import logits_of, output_embedding

pytestmark = pytest.mark.xdist_group("smollm2")  # one worker loads it

run = jax.jit(forward, static_argnames="model")

PROMPTS = 5
TOKENS = 24


@pytest.fixture(scope="module")
def theirs(golden):
    return np.load(golden / "smollm2.npz")


def padded(theirs, which, side):
    """A batch of prompts padded to the longest."""
    ids = [theirs[f"ids/{i}"] for i in which]
    width = max(map(len, ids))
    pad = lambda row, value: np.pad(value, (0, width - len(row)) if side == "right" else (width - len(row), 0))
    tokens = np.stack([pad(row, row) for row in ids])
    return make_batch(tokens, np.stack([pad(row, np.ones_like(row)) for row in ids]))


def greedy(smollm2, prompts):
    out = generate(Model(smollm2.config), smollm2.base, {}, prompts, max_new_tokens=TOKENS, stop_tokens=())
    return np.asarray(out.tokens)


def test_tokenizer_ids(smollm2, theirs):
    for i, prompt in enumerate(theirs["prompts"]):
        assert smollm2.tokenizer.encode(str(prompt), add_special_tokens=False) == theirs[f"ids/{i}"].tolist()


def test_logits(smollm2, theirs):
    batch = padded(theirs, range(PROMPTS), "left")
    hidden = run(Model(smollm2.config), smollm2.base, {}, batch).hidden
    stride = int(theirs["stride"])
    head = output_embedding(smollm2.base)
    strided = logits_of(hidden, head[::stride])
    for i in range(PROMPTS):
        want = theirs[f"logits/{i}"]
        close(strided[i, -len(want) :], want, 1e-3)
    last = logits_of(hidden[:, -1], head)
    for i in range(PROMPTS):
        top, order = jax.lax.top_k(last[i], 8)
        close(top, theirs[f"topv/{i}"], 1e-3)
        np.testing.assert_array_equal(order, theirs[f"top/{i}"])


def test_greedy_continuations_in_a_padded_batch(smollm2, theirs):
    got = greedy(smollm2, padded(theirs, range(PROMPTS), "right"))
    for i in range(PROMPTS):
        np.testing.assert_array_equal(got[i], theirs[f"greedy/{i}"], err_msg=str(theirs["prompts"][i]))


@pytest.mark.slow  # the test above has the same continuation in a batch
def test_greedy_continuation_alone(smollm2, theirs):
    got = greedy(smollm2, padded(theirs, [1], "right"))
    np.testing.assert_array_equal(got[0], theirs["greedy/1"])


def test_zero_steering_of_a_real_model_is_the_identity(smollm2, theirs):
    plan = (Slot("s", NonlinearSteering(), ("block",)),)
    batch = padded(theirs, range(PROMPTS), "left")  # as in test_logits, so that the plain model is compiled once
    steering = init_steering(plan, smollm2.config, jax.random.key(0))
    plain = run(Model(smollm2.config), smollm2.base, {}, batch).hidden
    np.testing.assert_array_equal(run(Model(smollm2.config, plan), smollm2.base, steering, batch).hidden, plain)
    assert jnp.all(jnp.isfinite(plain))
