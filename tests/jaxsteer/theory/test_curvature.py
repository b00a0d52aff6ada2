"""Products with curvature matrices against the matrices, written out from the logits' Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tiny import close, fast_jit, layouts, random_steering

from jaxsteer import FixedVector, Model, ModelConfig, NonlinearSteering, Slot, forward, init_base, make_batch, mean_loss
from jaxsteer.models.transformer import logits_of, output_embedding
from jaxsteer.objectives.supervised import supervised_loss
from jaxsteer.objectives.tokens import next_tokens
from jaxsteer.theory import (
    dense,
    empirical_fisher_product,
    gauss_newton_product,
    hessian_product,
    per_example_gradients,
)

pytestmark = pytest.mark.xdist_group("theory_curvature")

SMALL = ModelConfig(vocab_size=13, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=10, final_softcap=3.0)
PLAN = (Slot("f", FixedVector(), ("block",), (0,)), Slot("n", NonlinearSteering(rank=2), ("mlp",), (1,)))
MODEL = Model(SMALL, PLAN)


@pytest.fixture(scope="module")
def here():
    """(base, steering, packed batch)."""
    base = jax.tree.map(lambda leaf: leaf * 2, fast_jit(init_base, static_argnums=0)(SMALL, jax.random.key(0)))
    return base, random_steering(PLAN, SMALL, scale=0.5), layouts(13)["packed"][0]


@pytest.fixture(scope="module")
def explicit(here):
    """The matrices (G, F) over the raveled steering, from the Jacobian of all logits."""
    base, steering, batch = here
    flat, unravel = ravel_pytree(steering)
    tokens, weights = next_tokens(batch)

    def logits(s):
        hidden = forward(MODEL, base, unravel(s), batch).hidden
        return logits_of(hidden, output_embedding(base), SMALL.final_softcap)

    @fast_jit
    def matrices(s):
        J, p = jax.jacrev(logits)(s), jax.nn.softmax(logits(s), axis=-1)  # [B, T, V, P]
        # Fisher: the expectation over every token that the model could have said.
        score = J - jnp.einsum("btv,btvp->btp", p, J)[:, :, None]
        G = jnp.einsum("bt,btv,btvp,btvq->pq", weights, p, score, score)
        own = jnp.take_along_axis(score, tokens[..., None, None], axis=2)[:, :, 0]
        F = jnp.einsum("bt,btp,btq->pq", weights, own, own)
        return G / weights.sum(), F / weights.sum()

    return matrices(flat)


@pytest.mark.parametrize(("which", "product"), [(0, gauss_newton_product), (1, empirical_fisher_product)])
def test_products_are_those_of_the_matrices(which, product, here, explicit):
    want = np.asarray(explicit[which])
    got = fast_jit(lambda base, s, batch: dense(lambda v: product(MODEL, base, s, batch, v), s))(*here)
    assert got.shape == want.shape == (8 + 32,) * 2
    np.testing.assert_allclose(got, want, 1e-4, 1e-5 * np.abs(want).max())
    assert np.linalg.eigvalsh(np.asarray(got, np.float64)).min() > -1e-5 * np.abs(want).max()
    assert np.abs(want - np.asarray(explicit[1 - which])).max() > 0.05 * np.abs(want).max()  # two different matrices


@pytest.mark.slow
def test_hessian_products_are_those_of_the_hessian(here, explicit):
    base, steering, batch = here
    flat, unravel = ravel_pytree(steering)
    want = np.asarray(fast_jit(jax.hessian(lambda s: mean_loss(MODEL, base, unravel(s), batch)))(flat))
    got = fast_jit(lambda s: dense(lambda v: hessian_product(MODEL, base, s, batch, v), s))(steering)
    np.testing.assert_allclose(got, want, 1e-4, 1e-5 * np.abs(want).max())
    assert np.abs(want - np.asarray(explicit[0])).max() > 0.05 * np.abs(want).max()


def test_gradients_by_example_are_those_of_the_examples(here):
    """Of packed rows: each as if it were alone; together the gradient of the batch."""
    base, steering, batch = here
    got = fast_jit(lambda batch: per_example_gradients(MODEL, base, steering, batch, examples=2))(batch)
    assert jax.tree.leaves(got)[0].shape[:2] == (5, 2)
    whole = fast_jit(jax.grad(lambda s: supervised_loss(MODEL, base, s, batch)))(steering)
    close(jax.tree.map(lambda g: g.sum((0, 1)), got), whole, 1e-4)

    @fast_jit
    def alone(row, number):
        mine = batch.segments[row] == number
        order = jnp.argsort(~mine, stable=True)
        field = lambda x: jnp.where(mine, x, jnp.zeros_like(x))[order][None]
        single = make_batch(field(batch.tokens[row]), field(mine.astype(jnp.int32)), field(batch.weights[row]))
        return jax.grad(lambda s: supervised_loss(MODEL, base, s, single))(steering)

    for row, number in ((0, 1), (0, 2), (2, 1)):
        close(jax.tree.map(lambda g, r=row, n=number: g[r, n - 1], got), alone(row, number), 1e-4)
    assert not np.any(ravel_pytree(jax.tree.map(lambda g: g[2, 1], got))[0])  # no second example there


def test_bad_input_is_refused(here):
    base, steering, batch = here
    with pytest.raises(ValueError, match="a row of this batch holds 2"):
        per_example_gradients(MODEL, base, steering, batch, examples=1)
    with pytest.raises(ValueError, match=r"under jit.*examples=n"):
        jax.jit(lambda b: per_example_gradients(MODEL, base, steering, b))(batch)
    with pytest.raises(ValueError, match=r"over 40 parameters.*1,600 entries.*maximum is 39"):
        dense(lambda v: v, steering, largest=39)
