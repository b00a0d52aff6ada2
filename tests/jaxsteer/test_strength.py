"""Strength: y' = y + s · Δ for every method, against the formula computed at the site."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    AS_USERS_DO,
    KINDS,
    TURNS,
    all_methods,
    close,
    fast_jit,
    identical,
    random_steering,
    run,
    supervised_batch,
    turn,
)

from jaxsteer import METHODS, LoRA, Model, Slot, fold_weights, mean_loss
from jaxsteer.inference import per_token_shift
from jaxsteer.models.config import site_dims
from jaxsteer.models.strength import at_strength
from jaxsteer.models.transformer import forward, logits_of, output_embedding
from jaxsteer.types import Context

pytestmark = pytest.mark.xdist_group("strength")  # the tests share compiled programs

as_users_do = jax.jit(forward, static_argnames=("model", "capture"), compiler_options=AS_USERS_DO)
FACTORS = (-1.0, 0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class ByHand:
    """A method whose shift is multiplied by one of its parameters, "s"."""

    method: object

    def apply(self, p, x, y, ctx):
        rest = {name: leaf for name, leaf in p.items() if name != "s"}
        return y + p["s"] * (self.method.apply(rest, x, y, ctx) - y)


@pytest.fixture(scope="module")
def case(tiny_config):
    """A plan whose first layer steers nothing, so that the stack is split; its steering, and a batch."""
    plan = all_methods(tiny_config, ("lora", "nonlinear"), few=True, kinds=("prompt", "last:1"), layers=(1, 3))
    return Model(tiny_config, plan), random_steering(plan, tiny_config), supervised_batch(tiny_config.vocab_size)


def everywhere(model, s):
    return {slot.name: np.float32(s) for slot in model.plan}


def test_every_method_at_its_site(tiny_config):
    """Bit for bit y at 0 and y' at 1; by hand in between and beyond; with a factor for each row too."""
    plan, draw = all_methods(tiny_config, few=True), np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)
    given = {}
    for slot in plan:
        dims = site_dims(tiny_config, slot.sites[0])
        p = {name: array(*spec.shape) for name, spec in slot.method.param_specs(dims).items()}
        kernel = array(*dims.x, *dims.y) if slot.method.kind == "weight" else None
        given[slot.name] = p, array(2, 3, *dims.x), array(2, 3, *dims.y), kernel
    methods = {slot.name: slot.method for slot in plan}

    def steered(given, factor=None):
        context = lambda kernel: Context(jnp.zeros((), jnp.int32), kernel)
        at = lambda name: at_strength(methods[name].apply, factor)
        return {name: at(name)(p, x, y, context(kernel)) for name, (p, x, y, kernel) in given.items()}

    compiled = fast_jit(steered)
    plain, whole = {name: y for name, (_, _, y, _) in given.items()}, compiled(given)
    for s in FACTORS:
        got = compiled(given, jnp.float32(s))
        close(got, jax.tree.map(lambda y, out, s=s: y + s * (out - y), plain, whole), 1e-4)
        if s in (0, 1):
            identical(got, whole if s else plain)
    by_row = compiled(given, jnp.float32([0, 1]))
    identical(jax.tree.map(lambda out: out[0], by_row), jax.tree.map(lambda y: y[0], plain))
    identical(jax.tree.map(lambda out: out[1], by_row), jax.tree.map(lambda out: out[1], whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", TURNS)
def test_strength_is_a_factor_of_the_shift(name, tiny_config, tiny_base):
    """In a whole model, at selected tokens. The programs are compiled as for users: others round differently."""
    plan = all_methods(tiny_config, few=True, kinds=KINDS, layers=(1, 3))
    model, batch = Model(tiny_config, plan), supervised_batch(tiny_config.vocab_size)
    steering = turn(random_steering(plan, tiny_config), name)
    by_hand = replace(model, plan=tuple(replace(slot, method=ByHand(slot.method)) for slot in plan))
    see = partial(as_users_do, model, tiny_base, steering, batch, capture=("block",))
    for s in FACTORS:
        got = see(strength=everywhere(model, s))
        put = lambda p, s=s: p | {"s": np.full(len(next(iter(p.values()))), s, np.float32)}
        scaled = {slot: {site: put(p) for site, p in sites.items()} for slot, sites in steering.items()}
        close(got, as_users_do(by_hand, tiny_base, scaled, batch, capture=("block",)), 2e-5)
        if s == 1:
            identical(got, see())
        if s == 0:
            identical(got, as_users_do(replace(model, plan=()), tiny_base, {}, batch, capture=("block",)))
    assert np.abs(got.hidden - see().hidden).max() > 1e-4


def test_strength_by_row_and_by_token(case, tiny_base):
    model, steering, batch = case
    see = lambda factor: run(model, tiny_base, steering, batch, strength={slot.name: factor for slot in model.plan})
    one, other, none = (see(np.full(3, s, np.float32)).hidden for s in (0.5, -1, 0))
    by_row = see(np.float32([0.5, -1, 0])).hidden
    close(by_row, jnp.stack([one[0], other[1], none[2]]), 1e-5)
    identical(none, run(replace(model, plan=()), tiny_base, {}, batch).hidden)
    assert np.abs(one - none).max() > 1e-4
    close(see(np.tile(np.float32([[0.5], [-1], [0]]), (1, batch.tokens.shape[1]))).hidden, by_row, 1e-5)


@pytest.mark.slow
def test_derivatives_with_respect_to_strength(tiny_config, tiny_base):
    """At 0 and at 1 too, where the value is selected; of first and second order, and under vmap."""
    plan = all_methods(tiny_config, ("lora", "nonlinear"), few=True)
    model, steering = Model(tiny_config, plan), random_steering(plan, tiny_config, scale=0.3)
    batch = supervised_batch(tiny_config.vocab_size)
    names = [slot.name for slot in plan]
    loss = lambda s: mean_loss(model, tiny_base, steering, batch, strength=dict.fromkeys(names, s))
    points, step = jnp.array([0.0, 0.7, 1.0]), 3e-3
    values = fast_jit(jax.vmap(loss))(jnp.concatenate([points - step, points, points + step]))
    before, here, after = values.reshape(3, 3)
    both = lambda s: (jax.grad(loss)(s), jax.grad(lambda t: jax.jvp(loss, (t,), (jnp.ones_like(t),))[1])(s))
    slopes, curvatures = fast_jit(jax.vmap(both))(points)
    close(slopes, (after - before) / (2 * step), 3e-3)
    close(curvatures, (after - 2 * here + before) / step**2, 0.1)
    assert np.abs(slopes).min() > 1e-4


def test_zero_strength_switches_off_what_has_diverged(case, tiny_base):
    model, steering, batch = case
    broken = jax.tree.map(lambda leaf: leaf * np.nan, steering)
    off = dict.fromkeys(everywhere(model, 0), np.zeros(3, np.float32))
    plain = run(replace(model, plan=()), tiny_base, {}, batch)
    identical(run(model, tiny_base, broken, batch, strength=off).hidden, plain.hidden)


@pytest.mark.parametrize(
    ("strength", "message"),
    [({"lorra": 1.0}, "no slot"), ({"lora": np.ones(2)}, "use a scalar"), ({"lora": np.ones((3, 10, 1))}, "scalar")],
)
def test_strengths_that_are_refused(strength, message, case, tiny_base):
    model, steering, batch = case
    with pytest.raises(ValueError, match=message):
        forward(model, tiny_base, steering, batch, strength=strength)
    with pytest.raises(ValueError, match=message):
        fold_weights(model.plan, tiny_base, steering, strength=strength)


WEIGHTS = tuple(name for name, method in METHODS.items() if method.kind == "weight")


@pytest.mark.parametrize(
    "names", [("lora", "dora"), *(pytest.param((name,), marks=pytest.mark.slow) for name in WEIGHTS)]
)
def test_merging_bakes_the_strength_in(names, tiny_config, tiny_base):
    first, *rest = all_methods(tiny_config, names, few=True, layers=(1,))
    plan = (first, *(replace(slot, layers=(3,)) for slot in rest))
    steering = random_steering(plan, tiny_config)
    merge = fast_jit(lambda s=None: fold_weights(plan, tiny_base, steering, strength=s)[0]["blocks"])
    whole, base = merge(), tiny_base["blocks"]
    for s in (-1.0, 0.5):
        line = jax.tree.map(lambda old, new, s=s: old + s * (new - old), base, whole)
        close(merge(dict.fromkeys(names, s)), line, 1e-6)
    identical(merge(dict.fromkeys(names, 0.0)), base)
    close(merge(dict.fromkeys(names, 1.0)), whole, 1e-6)
    identical(merge({}), whole)


def test_merging_into_half_precision_rounds_once():
    """A strength of 0.5 of an update that bf16 cannot hold beside the kernel is not lost in the first rounding."""
    plan = (Slot("lora", LoRA(rank=1, alpha=1.0), ("mlp.up",)),)
    kernel = {"kernel": jnp.full((1, 4, 4), 1.0, jnp.bfloat16)}
    params = {"A": jnp.ones((1, 1, 4)), "B": jnp.full((1, 4, 1), 0.0065)}
    base = {"blocks": {"mlp": {"up": kernel}}}
    merged, _, _ = fold_weights(plan, base, {"lora": {"mlp.up": params}}, strength={"lora": 2.0})
    want = jnp.bfloat16(1.0 + 2 * 0.0065)
    np.testing.assert_array_equal(merged["blocks"]["mlp"]["up"]["kernel"], jnp.full((1, 4, 4), want))


def test_the_shift_of_each_token(case, tiny_base):
    """Against logits and streams compared in full; packed rows, and an example's first token has no prediction."""
    model, steering, batch = case
    segments = np.ones_like(batch.segments)
    segments[:, 6:] = 2
    segments[1, 8:] = 0
    batch = batch._replace(segments=segments)
    strength = everywhere(model, 0.5)
    got = fast_jit(per_token_shift, static_argnames="model")(model, tiny_base, steering, batch, strength=strength)
    plain = replace(model, plan=())
    outputs = [
        run(model, tiny_base, steering, batch, capture=("block",), strength=strength),
        run(plain, tiny_base, {}, batch, capture=("block",)),
    ]
    steered, base = (np.asarray(output.taps["block"]) for output in outputs)
    real = segments > 0
    shift = np.linalg.norm(steered - base, axis=-1) / np.linalg.norm(base, axis=-1)
    close(got.shift, np.where(real, shift, 0), 1e-4)
    assert not got.shift[0].any()  # its first layer steers nothing
    assert got.shift[1][real].any()
    of_tokens = [
        np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits_of(output.hidden[:, :-1], output_embedding(tiny_base)))),
            np.asarray(batch.tokens)[:, 1:, None],
            axis=-1,
        )[..., 0]
        for output in outputs
    ]
    follows = real[:, 1:] & (segments[:, 1:] == segments[:, :-1])
    change = np.pad(np.where(follows, of_tokens[0] - of_tokens[1], 0), ((0, 0), (1, 0)))
    close(got.change, change, 1e-4)
    assert not got.change[:, [0, 6]].any()
