"""Shared by the core tests: methods at all their sites, random steering, rows of examples, compiled functions."""

import dataclasses
import math
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.batches import make_batch
from jaxsteer.interventions import METHODS
from jaxsteer.models.config import site_dims
from jaxsteer.models.transformer import forward
from jaxsteer.objectives.supervised import mean_loss
from jaxsteer.steering import steering_shapes
from jaxsteer.types import ACTIVATIONS, ALL, PROJECTIONS, Positions, Slot

TURNS = (*METHODS, "together")
"""The methods one at a time: `turn` switches off all others of a plan of all methods, so they share one program."""

KINDS = ("all", "prompt", "completion", "last", "first:2+last:2", "first:3", "last:1")

ON_CPU = jax.config.jax_platforms == "cpu"
"""Whether this process computes on a CPU; XLA's other compilers have no fast mode."""

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if ON_CPU else {}
"""Compiler options: tests on tiny shapes are mostly compile time."""

AS_USERS_DO = (
    {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
        "xla_cpu_parallel_codegen_split_count": 32,
    }
    if ON_CPU
    else {}
)
"""XLA's own defaults, against FAST and the flags in conftest.py."""
if ON_CPU and "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:  # a flag of older versions
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True

fast_jit = partial(jax.jit, compiler_options=FAST)
run = fast_jit(forward, static_argnames=("model", "capture", "train"))
loss_and_grads = fast_jit(jax.value_and_grad(mean_loss, argnums=2), static_argnums=0)


class Calling:
    """What a block asks at its sites, answered by f(site, x, y, kernel, bias) -> y'."""

    def __init__(self, f):
        self.f = f

    def __call__(self, site, x, y):
        return self.f(site, x, y, None, None)

    def projection(self, site, x, kernel, bias, product):
        return self.f(site, x, product(), kernel, bias)


def close(got, want, tolerance):
    """Assert that two trees agree, every leaf within this relative and absolute tolerance."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=jax.tree_util.keystr(path))


def identical(got, want):
    """Assert that two trees agree bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def sites_of(method, config):
    """All sites where a method can be used."""

    def fits(site):
        try:
            return bool(method.param_specs(site_dims(config, site)))
        except ValueError:
            return False

    return tuple(site for site in (PROJECTIONS if method.kind == "weight" else ACTIVATIONS) if fits(site))


def slot_of(name, config, *, slot="s", layers=None, positions=ALL, sites=None):
    """A slot with METHODS[name] at its default settings; by default at every site where it can be used."""
    method = METHODS[name]()
    return Slot(slot, method, sites or sites_of(method, config), layers, positions)


def method_of(name, *, draws=False):
    """METHODS[name] at its default settings; with dropout, if it has any, for `draws`."""
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    return METHODS[name](**({"dropout": 0.5} if draws and "dropout" in fields else {}))


DRAW = tuple(name for name in METHODS if name == "jola" or method_of(name, draws=True) != METHODS[name]())
"""The methods that draw random numbers while training."""


def all_methods(config, names=METHODS, *, few=False, kinds=("all",), layers=None, draws=False):
    """A plan with a slot for each method, named after it, at all its sites; or with `few` at one, dealt out in turn.

    The kinds of positions are dealt out in turn as well.
    """
    plan = []
    for i, name in enumerate(names):
        method = method_of(name, draws=draws)
        sites = sites_of(method, config)
        sites = (sites[i % len(sites)],) if few else sites
        plan.append(Slot(name, method, sites, layers, Positions.parse(kinds[i % len(kinds)])))
    return tuple(plan)


def turn(steering, name):
    """The steering with only the slot of this name switched on (zeros are the identity), or with all "together"."""
    if name == "together":
        return steering
    return {slot: p if slot == name else jax.tree.map(np.zeros_like, p) for slot, p in steering.items()}


def every_kind(name, config):
    """A plan with one slot for each kind of positions."""
    return tuple(slot_of(name, config, slot=kind, positions=Positions.parse(kind)) for kind in KINDS)


def random_steering(plan, config, seed=1, scale=0.1):
    """Steering with every leaf random: an initial zero could hide a mistake."""
    shapes = steering_shapes(plan, config)
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw.standard_normal(leaf.shape, np.float32)), shapes)


def examples(vocab, seed=0):
    """Examples (tokens, weights) of 3 to 9 tokens, one with several turns, one without a completion."""
    draw = np.random.default_rng(seed)
    spans = [(7, [(4, 7)]), (7, [(2, 3), (5, 7)]), (3, [(2, 3)]), (9, [(6, 9)]), (4, [])]
    out = []
    for length, supervised in spans:
        weights = np.zeros(length, np.float32)
        for start, stop in supervised:
            weights[start:stop] = draw.uniform(0.5, 1.5, stop - start)
        out.append((draw.integers(3, vocab, length), weights))
    return out


def rows(layout, width):
    """A batch from rows of examples, each (offset, [examples]), and the position of each example: (row, slice)."""
    tokens, segments = np.zeros((2, len(layout), width), np.int32)
    weights = np.zeros((len(layout), width), np.float32)
    where = {}
    for row, (start, members) in enumerate(layout):
        for number, (index, (ids, own)) in enumerate(members, 1):
            part = slice(start, start + len(ids))
            tokens[row, part], segments[row, part], weights[row, part] = ids, number, own
            where[index] = (row, part)
            start = part.stop
    return make_batch(tokens, segments, weights), where


def layouts(vocab, width=12):
    """The same examples padded on the right, on the left, and packed; all [5, width], to compile once."""
    all_of = list(enumerate(examples(vocab)))
    right = [(0, [example]) for example in all_of]
    left = [(width - len(example[1][0]), [example]) for example in all_of]
    packed = [(0, [all_of[3], all_of[2]]), (1, [all_of[0], all_of[4]]), (2, [all_of[1]]), (0, []), (0, [])]
    return {"right": rows(right, width), "left": rows(left, width), "packed": rows(packed, width)}


def supervised_batch(vocab, B=3, T=10, prompt=4, seed=0):
    """A batch of full rows, each with a prompt of `prompt` tokens and a completion."""
    draw = np.random.default_rng(seed)
    weights = np.zeros((B, T), np.float32)
    weights[:, prompt:] = 1
    return make_batch(draw.integers(3, vocab, (B, T)), None, weights)


def naive_loss(hidden, head, targets):
    """Cross-entropy from all logits at once."""
    logp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head))
    return -jnp.sum(jnp.take_along_axis(logp, targets.tokens[..., None], -1)[..., 0] * targets.weights)


def product_shapes(text, over):
    """Shapes, without axes of size 1, of the results of a program's matrix products whose sums have more terms than
    `over`: the update of a kernel is a product too, with a sum over the rank.
    """
    found = set()
    operand = r"tensor<([0-9x]+)x[a-z]\w*>"
    for types in re.findall(rf"stablehlo\.dot_general.* : \({operand}, {operand}\) -> {operand}", text):
        left, right, result = ([int(n) for n in shape.split("x")] for shape in types)
        if math.prod(left) * math.prod(right) > math.prod(result) * over**2:
            found.add(tuple(n for n in result if n != 1))
    return found
