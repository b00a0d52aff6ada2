"""Random numbers in training (dropout, JoLA's gates): they depend on an explicit key, and on nothing else."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import DRAW, all_methods, fast_jit, identical, random_steering, run, supervised_batch, turn

from jaxsteer import Model, Params, Slot, init_state, param_labels, partition, train_step
from jaxsteer.interventions import FixedVector

pytestmark = pytest.mark.xdist_group("randomness")  # the tests share compiled programs


@pytest.fixture(scope="module")
def hidden(tiny_config, tiny_base):
    """Hidden states with one method of DRAW switched on at a time."""
    plan = all_methods(tiny_config, DRAW, few=True, draws=True)
    steering, batch = random_steering(plan, tiny_config), supervised_batch(tiny_config.vocab_size)
    return lambda name, **settings: run(Model(tiny_config, plan), tiny_base, turn(steering, name), batch, **settings)[0]


@pytest.mark.parametrize("name", DRAW)
def test_the_key_decides_and_nothing_is_drawn_without_it(name, hidden):
    draw = lambda seed, train=True: hidden(name, key=jax.random.key(seed), train=train)
    identical(draw(0), draw(0))
    assert np.abs(draw(0) - draw(1)).max() > 1e-3
    still = hidden(name, train=False)
    assert np.abs(draw(0) - still).max() > 1e-3
    identical(hidden(name, train=True), still)  # no key
    identical(draw(0, train=False), still)


@dataclass(frozen=True)
class Die(FixedVector):
    """Replaces y by one number drawn from its key."""

    def apply(self, p, x, y, ctx):
        return jnp.full_like(y, jax.random.uniform(ctx.key))


def test_every_slot_site_and_layer_has_a_key_of_its_own(tiny_config, tiny_base):
    sites, batch, key = ("attn", "mlp", "block"), supervised_batch(tiny_config.vocab_size), jax.random.key(0)

    def thrown(name):
        model = Model(tiny_config, (Slot(name, Die(), sites),))
        taps = run(model, tiny_base, random_steering(model.plan, tiny_config), batch, capture=sites, key=key).taps
        return np.stack([taps[site][:, 0, 0, 0] for site in sites])

    one, other = thrown("one"), thrown("other")
    assert len(np.unique([one, other])) == 2 * 3 * 4
    np.testing.assert_array_equal(thrown("one"), one)


def test_microbatches_and_steps_draw_their_own(tiny_config, tiny_base):
    """The same rows in a second microbatch, or in a second step, get different random numbers."""
    plan = all_methods(tiny_config, ("loreft",), few=True, draws=True)
    model, tx = Model(tiny_config, plan), optax.sgd(0.0)
    params = Params(tiny_base, random_steering(plan, tiny_config))
    trained, frozen = partition(params, param_labels(params, plan))
    step = fast_jit(partial(train_step, model=model, tx=tx))
    state = init_state(trained, tx, jax.random.key(0))
    rows = supervised_batch(tiny_config.vocab_size)
    twice = jax.tree.map(lambda field: jnp.stack([field, field]), rows)
    after, once = step(state, rows, frozen)
    assert abs(step(state, twice, frozen)[1].loss - once.loss) > 1e-5
    assert abs(step(after, rows, frozen)[1].loss - once.loss) > 1e-5
    assert step(state, rows, frozen)[1].loss == once.loss
