"""The tangent model: its logits are the expansion's first two terms, and it trains by the same step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import close, fast_jit, random_steering, slot_of, supervised_batch

from jaxsteer import (
    LoRA,
    Model,
    ModelConfig,
    Params,
    Slot,
    combine,
    init_base,
    init_state,
    param_labels,
    partition,
    train_step,
)
from jaxsteer.models.transformer import forward, logits_of, output_embedding
from jaxsteer.objectives.supervised import Supervised, supervised_loss
from jaxsteer.objectives.tokens import next_tokens
from jaxsteer.theory import tangent_logits, tangent_loss

pytestmark = pytest.mark.xdist_group("theory_tangent")

SMALL = ModelConfig(
    vocab_size=13, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=10, tied_head=True, final_softcap=3.0
)
PLAN = (Slot("lora", LoRA(rank=2), ("attn.q", "mlp.down")), slot_of("nonlinear", SMALL, layers=(1,)))


@pytest.fixture(scope="module")
def whole():
    base = jax.tree.map(lambda leaf: leaf * 2, fast_jit(init_base, static_argnums=0)(SMALL, jax.random.key(0)))
    return Params(base, random_steering(PLAN, SMALL, scale=0.3))


@pytest.fixture(scope="module")
def batch():
    return supervised_batch(13, 2, 6, 2)


def away(tree, by):
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: leaf + by * draw.standard_normal(leaf.shape).astype(leaf.dtype), tree)


@pytest.mark.parametrize("everything", [False, True])
def test_logits_and_loss_are_linear_and_touch_the_model(everything, whole, batch):
    model = Model(SMALL, PLAN, train_base=everything)
    at, frozen = partition(whole, param_labels(whole, PLAN, train_base=everything))

    def logits(trained):
        params = combine(trained, frozen)
        return logits_of(forward(model, *params, batch).hidden, output_embedding(params.base), SMALL.final_softcap)

    @fast_jit
    def compare(now):
        z, dot = jax.jvp(logits, (at,), (jax.tree.map(jnp.subtract, now, at),))
        logp = jax.nn.log_softmax(z + dot)
        targets = next_tokens(batch)
        nll = -jnp.sum(targets.weights * jnp.take_along_axis(logp, targets.tokens[..., None], -1)[..., 0])
        params = combine(now, frozen)
        full = supervised_loss(model, *params, batch)
        return tangent_logits(model, at, params, batch), z + dot, tangent_loss(model, *params, batch, at=at), nll, full

    got, want, loss, nll, full = compare(away(at, 0.1))
    close(got, want, 1e-5)
    close(loss, nll, 1e-5)
    assert abs(loss - full) > 1e-3
    _, _, loss, _, full = compare(at)
    close(loss, full, 1e-5)


def test_the_training_step_takes_it(whole, batch):
    """The first step is the full model's; later ones part, and the tangent model's loss falls with each."""
    model, tx = Model(SMALL, PLAN, remat="none"), optax.sgd(0.02)
    at, frozen = partition(whole, param_labels(whole, PLAN))
    lazy = lambda at: Supervised(partial(tangent_loss, at=at))
    step = fast_jit(lambda s, at: train_step(s, batch, frozen, model=model, tx=tx, objective=lazy(at)))
    plain = fast_jit(lambda s: train_step(s, batch, frozen, model=model, tx=tx))
    state = other = init_state(at, tx, jax.random.key(0))
    losses, apart = [], []
    for _ in range(6):
        state, metrics = step(state, at)
        other, _ = plain(other)
        losses.append(float(metrics.loss))
        pairs = zip(*map(jax.tree.leaves, jax.device_get((state.params, other.params))), strict=True)
        apart.append(max(np.abs(a - b).max() for a, b in pairs))
    assert apart[0] < 1e-6
    assert apart[-1] > 1e-4
    assert all(np.diff(losses) < 0)


def test_bad_input_is_refused(whole, batch):
    lora = whole.steering["lora"]
    wrong = {"lora": lora | {"mlp.down": lora["mlp.down"] | {"A": np.zeros((2, 2, 3))}}}
    with pytest.raises(ValueError, match=r"mlp\.down.*\(2, 2, 3\)"):
        tangent_loss(Model(SMALL, PLAN), *whole, batch, at=Params(None, wrong))
