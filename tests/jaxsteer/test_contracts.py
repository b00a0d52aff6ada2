"""What every method must satisfy, whatever it computes. A method that is added to METHODS is tested here.

Compilation dominates the time, so the methods share programs: one plan holds them all, and the test of one of them
switches the others off.
"""

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path

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
    layouts,
    random_steering,
    rows,
    run,
    supervised_batch,
    turn,
)

import jaxsteer
from jaxsteer import METHODS, Model, Positions, fold_weights, init_base, init_steering, make_batch
from jaxsteer.models.config import site_dims
from jaxsteer.models.transformer import forward, init_cache
from jaxsteer.types import PROJECTIONS, Batch, Context

pytestmark = pytest.mark.xdist_group("contracts")  # the tests share compiled programs

COMPILED = {
    "fast": run,
    "as users do": jax.jit(forward, static_argnames=("model", "capture"), compiler_options=AS_USERS_DO),
}
START_RANDOM = ("loreft", "direft")
WEIGHTS = tuple(name for name, method in METHODS.items() if method.kind == "weight")

# ---- zeros and fresh parameters


@pytest.fixture(scope="module")
def fresh(tiny_config, tiny_base):
    init = fast_jit(lambda key: init_steering(all_methods(tiny_config), tiny_config, key, base=tiny_base))
    return init(jax.random.key(3))


@pytest.mark.parametrize("compiled", ["fast", pytest.param("as users do", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_zero_and_fresh_parameters_are_bitwise_the_base(name, compiled, fresh, tiny_config, tiny_base):
    """LoReFT and DiReFT start with random parameters, as in their paper."""
    forwards = COMPILED[compiled]
    batch = supervised_batch(tiny_config.vocab_size)
    plain = forwards(Model(tiny_config), tiny_base, {}, batch, capture=("block",))
    model = Model(tiny_config, all_methods(tiny_config))
    steer = lambda steering: forwards(model, tiny_base, steering, batch, capture=("block",))
    fresh = turn(fresh, name)
    if name in START_RANDOM:
        assert np.abs(steer(fresh).hidden - plain.hidden).max() > 1e-3
    else:
        identical(steer(fresh), plain)
    identical(steer(jax.tree.map(jnp.zeros_like, fresh)), plain)
    moved = steer(turn(random_steering(model.plan, tiny_config), name))
    assert np.abs(moved.hidden - plain.hidden).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_apply_with_zeros_returns_y(dtype, tiny_config):
    """At every site, bit for bit and in the dtype of the input."""
    draw = np.random.default_rng(0)
    with jax.enable_x64(dtype == jnp.float64):
        array = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)
        given = {}
        for slot in all_methods(tiny_config):
            for site in slot.sites:
                dims = site_dims(tiny_config, site)
                specs = slot.method.param_specs(dims)
                assert all(len(spec.axes) == len(spec.shape) for spec in specs.values())
                kernel, bias = (array(*dims.x, *dims.y), array(*dims.y)) if site in PROJECTIONS else (None, None)
                zeros = {k: jnp.zeros(spec.shape, dtype) for k, spec in specs.items()}
                given[slot.name, site] = zeros, array(2, 3, *dims.x), array(2, 3, *dims.y), kernel, bias
        apply = lambda at, p, x, y, kernel, bias: METHODS[at[0]]().apply(
            p, x, y, Context(jnp.zeros((), jnp.int32), kernel, bias)
        )
        out = jax.jit(lambda given: {at: apply(at, *arrays) for at, arrays in given.items()})(given)
        identical(out, {at: y for at, (_, _, y, _, _) in given.items()})
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(dtype)}


# ---- packing, padding, decoding


@pytest.mark.parametrize("name", TURNS)
def test_packed_padded_single(name, tiny_config, tiny_base):
    plan = all_methods(tiny_config, kinds=KINDS)
    model, steering = Model(tiny_config, plan), turn(random_steering(plan, tiny_config), name)
    see = lambda batch: run(model, tiny_base, steering, batch, capture=("block", "attn.heads"))
    seen = {}
    for layout, (batch, where) in layouts(tiny_config.vocab_size).items():
        out = jax.tree.map(np.asarray, see(batch))
        seen[layout] = {
            i: (out.hidden[row, part], out.taps["block"][:, row, part], out.taps["attn.heads"][:, row, part])
            for i, (row, part) in where.items()
        }
    close(seen["left"], seen["right"], 1e-5)
    close(seen["packed"], seen["right"], 1e-5)
    # Alone and without padding: examples 0 and 1 have the same length, to compile once.
    batch, where = layouts(tiny_config.vocab_size)["right"]
    for i in (0, 1):
        alone = jax.tree.map(lambda field, i=i: np.asarray(field)[i : i + 1, where[i][1]], batch)
        out = jax.tree.map(np.asarray, see(make_batch(alone.tokens, None, alone.weights)))
        got = out.hidden[0], out.taps["block"][:, 0], out.taps["attn.heads"][:, 0]
        close(got, seen["right"][i], 1e-5)


@pytest.mark.parametrize("name", TURNS)
def test_cached_decoding_is_the_full_forward_pass(name, tiny_config, tiny_base):
    """Prompts of two lengths, one padded on the right and one on the left; then the completion, token by token."""
    plan = all_methods(tiny_config, few=True, kinds=KINDS)
    model, steering = Model(tiny_config, plan), turn(random_steering(plan, tiny_config), name)
    full, _ = layouts(tiny_config.vocab_size)["right"]
    want = np.asarray(run(model, tiny_base, steering, full).hidden)
    whole, lengths = (3, 0), (6, 4)  # the examples, and the lengths of their prompts
    tokens = np.asarray(full.tokens)

    prompts = [(tokens[i, :n], 0) for i, n in zip(whole, lengths, strict=True)]
    start, _ = rows([(0, [(0, prompts[0])]), (2, [(1, prompts[1])])], 6)
    out = run(model, tiny_base, steering, start, cache=init_cache(tiny_config, 2, 9))
    hidden = np.asarray(out.hidden)
    close(hidden[0], want[3, :6], 1e-5)
    close(hidden[1, 2:], want[0, :4], 1e-5)
    prompt_lengths = np.array(lengths, np.int32)[:, None]
    for step in range(3):
        new = [[tokens[i, n + step]] for i, n in zip(whole, lengths, strict=True)]
        ones = np.ones((2, 1), np.int32)
        one = Batch(np.int32(new), ones, prompt_lengths + step, prompt_lengths, ones > 0, ones.astype(np.float32))
        out = run(model, tiny_base, steering, one, cache=out.cache)
        for row, (i, n) in enumerate(zip(whole, lengths, strict=True)):
            close(np.asarray(out.hidden)[row, 0], want[i, n + step], 1e-5)


# ---- folding


@partial(fast_jit, static_argnums=0)
def merge_all(plan, base, steering):
    """The base with every slot merged."""
    merged, rest, left = fold_weights(plan, base, steering)
    assert rest == ()
    assert left == {}
    return merged


def merged_and_unmerged(plan, config, base, steering):
    """The hidden states with everything merged, and with nothing merged."""
    merged = merge_all(plan, base, steering)
    batch = supervised_batch(config.vocab_size)
    unmerged = run(Model(config, plan), base, steering, batch).hidden
    assert np.abs(unmerged - run(Model(config), base, {}, batch).hidden).max() > 1e-3
    return run(Model(config), merged, {}, batch).hidden, unmerged


@pytest.mark.parametrize("name", [*WEIGHTS, "together"])
def test_merged_is_unmerged(name, tiny_config, tiny_base):
    plan = (
        *all_methods(tiny_config, [name for name in WEIGHTS if name != "dora"], layers=(0, 2)),
        *all_methods(tiny_config, ["dora"], layers=(1, 3)),
    )
    steering = turn(random_steering(plan, tiny_config), name)
    close(*merged_and_unmerged(plan, tiny_config, tiny_base, steering), 1e-5)


def test_merged_dora_scales_no_bias(tiny_config):
    config = dataclasses.replace(tiny_config, layers=2, attn_bias=True, mlp_bias=True)
    base = random_base(config)
    plan = all_methods(config, ["dora"])
    close(*merged_and_unmerged(plan, config, base, random_steering(plan, config)), 1e-5)


def random_base(config):
    """A base tree whose biases and norms are random too."""
    base = fast_jit(init_base, static_argnums=0)(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(base)
    draw = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + 0.1 * draw.standard_normal(x.shape, np.float32) for x in leaves])


def test_what_cannot_be_merged_stays(tiny_config, tiny_base):
    """Activation methods, and weight methods that do not act on every token."""
    plan = tuple(
        dataclasses.replace(slot, positions=Positions("prompt")) if slot.method.kind == "weight" else slot
        for slot in all_methods(tiny_config)
    )
    steering = random_steering(plan, tiny_config)
    merged, rest, left = fold_weights(plan, tiny_base, steering)
    assert rest == plan
    identical(left, steering)
    identical(merged, tiny_base)


@pytest.mark.parametrize("names", [("lora", "dora"), ("dora", "pissa")])
def test_dora_and_its_neighbours_are_not_merged(names, tiny_config, tiny_base):
    """Its norms are those of the base weights, which a merged neighbour would change."""
    one, other = all_methods(tiny_config, names)
    plan = (dataclasses.replace(one, layers=(0, 2)), dataclasses.replace(other, sites=("mlp.down",)))
    merged, rest, _ = fold_weights(plan, tiny_base, random_steering(plan, tiny_config))
    assert rest == plan
    identical(merged, tiny_base)


# ---- devices

SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxsteer import METHODS, Model, ModelConfig, init_base
from tiny import all_methods, close, fast_jit, loss_and_grads, random_steering, supervised_batch

config = ModelConfig(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
base = fast_jit(init_base, static_argnums=0)(config, jax.random.key(0))
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
assert mesh.size == 8
batch = supervised_batch(61, B=16)
plan = all_methods(config, few=True)
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
    """Eight CPU devices, in a separate process."""
    root, here = Path(jaxsteer.__file__).parents[1], Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(here)!r}]\n{SHARDED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "for", *METHODS]
