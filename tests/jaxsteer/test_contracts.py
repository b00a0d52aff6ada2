"""What every method must keep, whatever it computes. A method that joins METHODS joins these tests."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    KINDS,
    close,
    every_kind,
    fast_jit,
    identical,
    layouts,
    loss_and_grads,
    random_steering,
    rows,
    run,
    sites_of,
    slot_of,
    supervised_batch,
)

import jaxsteer
from jaxsteer import METHODS, Model, Positions, fold, init_steering, make_batch
from jaxsteer.batches import select
from jaxsteer.models.attention import Span
from jaxsteer.models.config import site_dims
from jaxsteer.models.layers import Block, Embed, Inputs, RMSNorm, rotary_angles
from jaxsteer.models.transformer import forward, init_cache
from jaxsteer.types import PROJECTIONS, SITES, Batch, Context

methods = pytest.mark.parametrize("name", METHODS)


RUN = jax.jit(forward, static_argnames=("model", "capture"))  # compiled as users compile it

# ---- zeros and fresh parameters


@methods
def test_zero_and_fresh_parameters_are_bitwise_the_base(name, tiny_config, tiny_base):
    run = RUN
    batch = supervised_batch(tiny_config.vocab_size)
    plain = run(Model(tiny_config), tiny_base, {}, batch, capture=("block",))
    model = Model(tiny_config, (slot_of(name, tiny_config),))
    steer = partial(run, model, tiny_base, batch=batch, capture=("block",))
    fresh = init_steering(model.plan, tiny_config, jax.random.key(3))
    identical(steer(steering=jax.tree.map(jnp.zeros_like, fresh)), plain)
    identical(steer(steering=fresh), plain)
    moved = steer(steering=random_steering(model.plan, tiny_config))
    assert np.abs(moved.hidden - plain.hidden).max() > 1e-3


@methods
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_apply_with_zeros_returns_y(name, dtype, tiny_config):
    """At every site, bit for bit and in the dtype that came."""
    method = METHODS[name]()
    draw = np.random.default_rng(0)
    with jax.enable_x64(dtype == jnp.float64):
        array = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)
        given = {}
        for site in sites_of(method, tiny_config):
            dims = site_dims(tiny_config, site)
            specs = method.param_specs(dims)
            assert all(len(spec.axes) == len(spec.shape) for spec in specs.values())
            kernel = array(*dims.x, *dims.y) if site in PROJECTIONS else None
            zeros = {k: jnp.zeros(spec.shape, dtype) for k, spec in specs.items()}
            given[site] = zeros, array(2, 3, *dims.x), array(2, 3, *dims.y), kernel
        layer = jnp.zeros((), jnp.int32)
        out = jax.jit(lambda g: {s: method.apply(p, x, y, Context(layer, w)) for s, (p, x, y, w) in g.items()})(given)
        identical(out, {site: y for site, (_, _, y, _) in given.items()})
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(dtype)}


# ---- token selection

# Two turns: prompt a, reply b, question c, reply d; then an example of its own without a reply, then padding.
SEGMENTS = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]
WEIGHTS = [0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]
SELECTED = {
    "prompt": [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
    "completion": [0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0],
    "last": [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0],
    "first:2+last:2": [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0],
    "first:1+last:2": [1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0],
    "first:3": [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
    "last:1": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
}


@pytest.mark.parametrize("kind", SELECTED)
def test_selected_tokens(kind):
    batch = make_batch(np.arange(14)[None], np.array([SEGMENTS]), np.array([WEIGHTS], np.float32))
    got = select(Positions.parse(kind), batch)
    np.testing.assert_array_equal(np.asarray(got[0], int), SELECTED[kind])


def test_all_tokens_need_no_mask():
    assert select(Positions(), make_batch(np.ones((1, 3), int))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_only_selected_tokens_are_steered(kind, tiny_config, tiny_base):
    """At one layer a shift reaches the selected tokens, and no other."""
    batch, _ = layouts(tiny_config.vocab_size)["packed"]
    slot = slot_of("fixed", tiny_config, sites=("block",), layers=(3,), positions=Positions.parse(kind))
    model = Model(tiny_config, (slot,))
    tap = lambda scale: run(
        model, tiny_base, random_steering(model.plan, tiny_config, scale=scale), batch, capture=("block",)
    ).taps["block"][3]
    moved = np.any(np.asarray(tap(1.0) != tap(0.0)), axis=-1)
    mask = select(slot.positions, batch)
    np.testing.assert_array_equal(moved, np.ones_like(moved) if mask is None else mask)


PLANS = [(name, "every kind") for name in METHODS] + [("nonlinear", kind) for kind in KINDS[:5]]


def plan_for(name, kind, config):
    if kind == "every kind":
        return every_kind(name, config)
    return (slot_of(name, config, positions=Positions.parse(kind)),)


@pytest.mark.parametrize(("name", "kind"), PLANS)
def test_packed_padded_single(name, kind, tiny_config, tiny_base):
    plan = plan_for(name, kind, tiny_config)
    model, steering = Model(tiny_config, plan), random_steering(plan, tiny_config)
    see = lambda batch: run(model, tiny_base, steering, batch, capture=("block", "attn.heads"))
    seen = {}
    for layout, (batch, where) in layouts(tiny_config.vocab_size).items():
        out = see(batch)
        seen[layout] = {
            i: (out.hidden[row, part], out.taps["block"][:, row, part], out.taps["attn.heads"][:, row, part])
            for i, (row, part) in where.items()
        }
    close(seen["left"], seen["right"], 1e-5)
    close(seen["packed"], seen["right"], 1e-5)
    # Alone and without padding: examples 0 and 1 are of one length, so that one compile serves both.
    batch, where = layouts(tiny_config.vocab_size)["right"]
    for i in (0, 1):
        alone = Batch(*(field[i : i + 1, where[i][1]] for field in batch))
        out = see(make_batch(alone.tokens, None, alone.weights))
        got = out.hidden[0], out.taps["block"][:, 0], out.taps["attn.heads"][:, 0]
        close(got, seen["right"][i], 1e-5)


@pytest.mark.parametrize(("name", "kind"), PLANS)
def test_cached_decoding_is_the_full_forward_pass(name, kind, tiny_config, tiny_base):
    """Prompts of two lengths, on the two sides of their rows; the completion comes token by token."""
    plan = plan_for(name, kind, tiny_config)
    model, steering = Model(tiny_config, plan), random_steering(plan, tiny_config)
    draw = np.random.default_rng(5)
    prompts, new = [draw.integers(3, 61, n) for n in (6, 3)], draw.integers(3, 61, (2, 3))

    whole = []
    for prompt, completion in zip(prompts, new, strict=True):
        ids, weights = np.append(prompt, completion), np.repeat([0.0, 1.0], [len(prompt), 3])
        whole.append((0, [(len(whole), (ids, weights))]))
    full, _ = rows(whole, 9)
    want = run(model, tiny_base, steering, full).hidden

    start, _ = rows([(0, [(0, (prompts[0], 0))]), (3, [(1, (prompts[1], 0))])], 6)
    cache = init_cache(tiny_config, 2, 8)
    out = run(model, tiny_base, steering, start, cache=cache)
    close(out.hidden[0, :6], want[0, :6], 1e-5)
    close(out.hidden[1, 3:], want[1, :3], 1e-5)
    lengths = jnp.array([[6], [3]], jnp.int32)
    for step in range(2):
        one = Batch(
            jnp.asarray(new[:, step : step + 1], jnp.int32),
            jnp.ones((2, 1), jnp.int32),
            lengths + step,
            lengths,
            jnp.ones((2, 1), jnp.float32),
        )
        out = run(model, tiny_base, steering, one, cache=out.cache)
        for row, length in enumerate((6, 3)):
            close(out.hidden[row, 0], want[row, length + step], 1e-5)


# ---- the scan


def unrolled(model, base, steering, batch):
    """The stack as a plain loop over blocks, with the interventions applied as their contract says."""
    config = model.config
    h = Embed(config).apply({"params": base["embed"]}, batch.tokens)
    span = Span(batch.segments, batch.positions)
    inputs = Inputs(*rotary_angles(config, batch.positions), span)
    for layer in range(config.layers):

        def steer(site, x, y, kernel=None, layer=layer):
            for slot in model.plan:
                active = slot.active_layers(config.layers)
                if site in slot.sites and layer in active:
                    p = {k: v[active.index(layer)] for k, v in steering[slot.name][site].items()}
                    out = slot.method.apply(p, x, y, Context(jnp.array(layer, jnp.int32), kernel))
                    mask = select(slot.positions, batch)
                    if mask is not None:
                        out = jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - 2)), out, y)
                    y = out
            return y

        weights = jax.tree.map(lambda leaf, i=layer: leaf[i], base["blocks"])
        h, _ = Block(config).apply({"params": weights}, h, inputs, None, steer)
    return RMSNorm(config.norm_eps).apply({"params": base["final_norm"]}, h)


@methods
def test_scan_is_the_unrolled_loop(name, tiny_config, tiny_base):
    plan = (
        slot_of(name, tiny_config, slot="a", layers=(1, 3)),
        slot_of(name, tiny_config, slot="b", layers=(2, 3), positions=Positions("prompt")),
    )
    model, steering = Model(tiny_config, plan), random_steering(plan, tiny_config)
    batch = supervised_batch(tiny_config.vocab_size)
    want = fast_jit(unrolled, static_argnums=0)(model, tiny_base, steering, batch)
    close(run(model, tiny_base, steering, batch).hidden, want, 1e-5)


@methods
def test_split_and_rematerialised_scans_agree(name, tiny_config, tiny_base):
    plan = (slot_of(name, tiny_config, layers=(2, 3)),)
    steering = random_steering(plan, tiny_config)
    batch = supervised_batch(tiny_config.vocab_size)
    unsplit = Model(tiny_config, plan, remat="none", train_base=True)
    want = loss_and_grads(unsplit, tiny_base, steering, batch)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(want[1]))
    for remat in ("selective", "full"):
        close(loss_and_grads(Model(tiny_config, plan, remat), tiny_base, steering, batch), want, 1e-5)


@pytest.mark.parametrize(("layers", "remats"), [(None, ("selective", "full")), ((2, 3), ("none",))])
def test_other_pairs_of_split_and_rematerialisation(layers, remats, tiny_config, tiny_base):
    plan = (slot_of("nonlinear", tiny_config, layers=layers),)
    steering = random_steering(plan, tiny_config)
    batch = supervised_batch(tiny_config.vocab_size)
    want = loss_and_grads(Model(tiny_config, plan, "none", train_base=True), tiny_base, steering, batch)
    for remat in remats:
        close(loss_and_grads(Model(tiny_config, plan, remat), tiny_base, steering, batch), want, 1e-5)


# ---- folding


@methods
def test_merged_is_unmerged(name, tiny_config, tiny_base):
    plan = (slot_of(name, tiny_config, layers=(0, 2)),)
    steering = random_steering(plan, tiny_config)
    merged, rest, left = fold(plan, tiny_base, steering)
    batch = supervised_batch(tiny_config.vocab_size)
    want = run(Model(tiny_config, plan), tiny_base, steering, batch).hidden
    close(run(Model(tiny_config, rest), merged, left, batch).hidden, want, 1e-5)
    if METHODS[name].kind == "weight":
        assert rest == ()
        assert left == {}
    else:
        assert rest == plan


def test_what_is_not_steered_everywhere_is_not_merged(tiny_config, tiny_base):
    plan = (slot_of("lora", tiny_config, positions=Positions("prompt")),)
    merged, rest, _ = fold(plan, tiny_base, random_steering(plan, tiny_config))
    assert rest == plan
    identical(merged, tiny_base)


# ---- taps


def test_every_site_is_captured_once_per_layer(tiny_config, tiny_base):
    batch = supervised_batch(tiny_config.vocab_size, B=2, T=5)
    out = run(Model(tiny_config), tiny_base, {}, batch, capture=SITES)
    assert set(out.taps) == set(SITES)
    for site in SITES:
        assert out.taps[site].shape == (4, 2, 5, *site_dims(tiny_config, site).y), site
    # Each tap is the value of its own layer and site: recompute every layer from the one before.
    taps = out.taps
    embedded = tiny_base["embed"]["embedding"][batch.tokens]
    before = jnp.concatenate([embedded[None], taps["block"][:-1]])
    close(taps["block"], before + taps["attn"] + taps["mlp"], 1e-5)
    for site, source in (("gate", taps["mlp.in"]), ("up", taps["mlp.in"])):
        kernel = tiny_base["blocks"]["mlp"][site]["kernel"]
        close(taps[f"mlp.{site}"], jnp.einsum("lbtd,ldf->lbtf", source, kernel), 1e-5)
    close(taps["mlp"], taps["mlp.down"], 0)
    heads = taps["attn.heads"].reshape(4, 2, 5, -1)
    close(taps["attn"], jnp.einsum("lbtd,ldf->lbtf", heads, tiny_base["blocks"]["attn"]["o"]["kernel"]), 1e-5)


def test_taps_of_a_split_scan_and_after_the_intervention(tiny_config, tiny_base):
    plan = (slot_of("fixed", tiny_config, sites=("mlp",), layers=(3,)),)
    steering = random_steering(plan, tiny_config)
    batch = supervised_batch(tiny_config.vocab_size, B=2, T=5)
    plain = run(Model(tiny_config), tiny_base, {}, batch, capture=SITES).taps
    steered = run(Model(tiny_config, plan), tiny_base, steering, batch, capture=("mlp", "block")).taps
    assert sorted(steered) == ["block", "mlp"]
    close(steered["mlp"][:3], plain["mlp"][:3], 1e-5)
    shift = steering["s"]["mlp"]["v"]
    close(steered["mlp"][3] - plain["mlp"][3], jnp.broadcast_to(shift[:, None], (2, 5, 32)), 1e-5)


def test_unknown_site_and_wrong_steering_raise(tiny_config, tiny_base):
    batch = supervised_batch(tiny_config.vocab_size)
    with pytest.raises(ValueError, match=r"mlp\.out"):
        run(Model(tiny_config), tiny_base, {}, batch, capture=("mlp.out",))
    plan = (slot_of("fixed", tiny_config, slot="mine"),)
    with pytest.raises(ValueError, match="mine"):
        run(Model(tiny_config, plan), tiny_base, {}, batch)
    with pytest.raises(ValueError, match="mine"):
        run(Model(tiny_config), tiny_base, random_steering(plan, tiny_config), batch)


# ---- devices

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxsteer import METHODS, Model, ModelConfig, init_base
from tiny import close, loss_and_grads, random_steering, slot_of, supervised_batch

config = ModelConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
base = init_base(config, jax.random.key(0))
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
assert mesh.size == 8
batch = supervised_batch(61, B=16)
plan = tuple(slot_of(name, config, slot=name) for name in METHODS)
steering = random_steering(plan, config)
model = Model(config, plan)
want = loss_and_grads(model, base, steering, batch)
put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
got = loss_and_grads(model, put(base, P()), put(steering, P()), put(batch, P("data")))
assert len(got[0].sharding.device_set) == 8
close(got, want, 1e-5)
print("equal for", *METHODS)
"""


def test_sharded_over_data_is_one_device():
    """Eight CPU devices in a process of their own."""
    root, here = Path(jaxsteer.__file__).parents[1], Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(here)!r}]\n{SHARDED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "for", *METHODS]
