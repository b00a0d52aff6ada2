"""Weight methods may put their update into the kernel of the product: the same function, its derivatives narrow."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import AS_USERS_DO, FAST, close, fast_jit, identical, random_steering, slot_of, supervised_batch

from jaxsteer import METHODS, Model, Positions, parse_plan
from jaxsteer.models import sites
from jaxsteer.models.transformer import forward
from jaxsteer.objectives.supervised import mean_loss
from jaxsteer.types import PROJECTIONS, Context, SiteDims

MERGING = ("lora", "rslora", "dora", "pissa")
TOKENS, IN, OUT = (3, 5), 6, 10
MANY = (4, 13)
"""Rows and tokens for which merging pays in every projection of the tiny model."""


def drawn(method):
    draw = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float64)
    p = {name: array(*spec.shape) for name, spec in method.param_specs(SiteDims((IN,), (OUT,))).items()}
    return p, array(*TOKENS, IN), array(IN, OUT), array(OUT)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", MERGING)
def test_projecting_is_applying_and_so_are_the_derivatives(name, biased):
    method = METHODS[name](rank=4)

    def added(p, x, kernel, bias):
        y = jnp.einsum("btd,df->btf", x, kernel) + bias[None, None]
        return method.apply(p, x, y, Context(jnp.int32(0), kernel, bias))

    def projected(p, x, kernel, bias):
        return method.project(p, x, Context(jnp.int32(0), kernel, bias if biased else None))

    with jax.enable_x64():
        p, x, kernel, bias = drawn(method)
        bias = bias if biased else jnp.zeros_like(bias)
        free = {name: leaf for name, leaf in p.items() if name not in method.constants}
        held = {name: leaf for name, leaf in p.items() if name in method.constants}

        @partial(jax.jit, static_argnums=0)
        def derivatives(f):
            g = lambda free, x: jnp.sum(jnp.sin(f({**free, **held}, x, kernel, bias)))
            tangent = jax.tree.map(jnp.cos, (free, x))
            grad = jax.grad(g, (0, 1))
            return {
                "value": f(p, x, kernel, bias),
                "grad": grad(free, x),
                "grad of the kernel": jax.grad(lambda kernel: jnp.sum(jnp.sin(f(p, x, kernel, bias))))(kernel),
                "hessian times vector": jax.jvp(grad, (free, x), tangent)[1],
                "vmap": jax.vmap(lambda s: f({**jax.tree.map(lambda leaf: s * leaf, free), **held}, x, kernel, bias))(
                    jnp.arange(3.0)
                ),
            }

        close(derivatives(projected), derivatives(added), 1e-11)


def test_dropout_gives_the_update_another_input():
    method = METHODS["lora"](rank=4, dropout=0.5)
    with jax.enable_x64():
        p, x, kernel, _ = drawn(method)
        context = Context(jnp.int32(0), kernel, key=jax.random.key(0), train=True)
        assert method.project(p, x, context) is None
        assert method.project(p, x, context._replace(train=False)) is not None


@pytest.mark.cpu
def test_slots_of_one_site_together(tiny_config, tiny_base, monkeypatch):
    """The first is merged, the second is added to it; some positions, a strength or half precision merge nothing."""
    plan = tuple(slot_of(name, tiny_config, slot=name) for name in ("lora", "dora"))
    steering, batch = random_steering(plan, tiny_config), supervised_batch(tiny_config.vocab_size, *MANY)
    merged = []
    monkeypatch.setattr(
        METHODS["lora"], "product", lambda *args, wrapped=METHODS["lora"].product: merged.append(1) or wrapped(*args)
    )
    hidden = lambda plan, **kw: fast_jit(partial(forward, Model(tiny_config, plan), **kw))
    together = hidden(plan)(tiny_base, steering, batch).hidden
    assert len(merged) >= len(PROJECTIONS)
    merged.clear()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_base)
    some = (plan[0].__class__("lora", plan[0].method, plan[0].sites, None, Positions("completion")), plan[1])
    hidden(some)(tiny_base, steering, batch)
    hidden(plan, strength={"lora": 1.0})(tiny_base, steering, batch)
    hidden(plan)(half, steering, batch)
    assert not merged
    monkeypatch.setattr(sites.Interventions, "merges", lambda *args: False)
    close(together, hidden(plan)(tiny_base, steering, batch).hidden, 1e-5)


@pytest.mark.parametrize("options", [FAST, pytest.param(AS_USERS_DO, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_zeros_in_the_kernel_are_bitwise_the_base(options, tiny_config, tiny_base):
    batch = supervised_batch(tiny_config.vocab_size, *MANY)
    hidden = lambda plan, steering: (
        jax.jit(partial(forward, Model(tiny_config, plan)), compiler_options=options)(tiny_base, steering, batch).hidden
    )
    plain = hidden((), {})
    for name in MERGING:
        plan = (slot_of(name, tiny_config),)
        steering = random_steering(plan, tiny_config)
        identical(hidden(plan, jax.tree.map(jnp.zeros_like, steering)), plain)
        assert np.abs(hidden(plan, steering) - plain).max() > 1e-3


@pytest.mark.cpu
def test_no_token_meets_the_low_rank_in_the_forward_pass(tiny_config, tiny_base):
    """Products with all tokens and R columns are for the gradients of A and B alone."""
    plan = parse_plan(["lora(rank=5) @ " + ",".join(PROJECTIONS)], tiny_config)
    steering, batch = random_steering(plan, tiny_config), supervised_batch(tiny_config.vocab_size, *MANY)
    rank, tokens = plan[0].method.rank, batch.tokens.size
    narrow = lambda f: len(
        re.findall(
            rf"dot_general.*-> tensor<(?:{tokens}|{'x'.join(map(str, batch.tokens.shape))})x{rank}xf32>", lower(f)
        )
    )
    lower = lambda f: jax.jit(partial(f, Model(tiny_config, plan))).lower(tiny_base, steering, batch).as_text()
    assert narrow(forward) == 0
    assert narrow(lambda *args: jax.grad(mean_loss, argnums=2)(*args)) >= 2 * len(PROJECTIONS)
