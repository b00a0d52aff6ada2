"""Plans and the steering pytree: what is refused, how it is drawn, and plans as JSON."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import KINDS, identical, slot_of

from jaxsteer import (
    METHODS,
    Fixed,
    Linear,
    LoRA,
    Nonlinear,
    Positions,
    Slot,
    count_parameters,
    init_steering,
    plan_from_json,
    plan_to_json,
    validate_plan,
)


def slot(method=Fixed(), sites=("block",), name="mine", **rest):  # noqa: B008  # frozen
    return Slot(name, method, sites, **rest)


@pytest.mark.parametrize(
    ("plan", "culprits"),
    [
        ([slot(sites=("blok",))], ["mine", "blok", "block"]),
        ([slot(LoRA(), ("block",))], ["mine", "lora", "block", "mlp.down"]),
        ([slot(Nonlinear(), ("mlp.down",))], ["mine", "nonlinear", "mlp.down"]),
        ([slot(Linear(), ("attn.heads",))], ["mine", "attn.heads"]),
        ([slot(), slot(sites=("mlp",))], ["mine", "two slots"]),
        ([slot(layers=(0, 4))], ["mine", "4", "0 to 3"]),
        ([slot(layers=(-1, 2))], ["mine", "-1"]),
        ([slot(layers=(2, 1))], ["mine", "[2, 1]", "ascending"]),
        ([slot(layers=(1, 1))], ["mine", "[1, 1]"]),
        ([slot(layers=())], ["mine", "at least one"]),
        ([slot(sites=())], ["mine", "at least one site"]),
        ([slot(sites=("mlp", "mlp"))], ["mine", "each once"]),
        ([slot(Nonlinear(rank=0))], ["mine", "rank 0", "32"]),
        ([slot(Nonlinear(rank=33))], ["mine", "rank 33", "32"]),
        ([slot(LoRA(rank=17), ("attn.k",))], ["mine", "attn.k", "rank 17", "16"]),
        ([slot(name="a/b")], ["a/b"]),
    ],
)
def test_refused_plans_name_the_culprit(plan, culprits, tiny_config):
    with pytest.raises(ValueError, match=re.escape(culprits[0])) as raised:
        validate_plan(tuple(plan), tiny_config)
    for culprit in culprits:
        assert culprit in str(raised.value)
    with pytest.raises(ValueError, match=re.escape(culprits[0])):
        init_steering(tuple(plan), tiny_config, jax.random.key(0))


@pytest.mark.parametrize("text", ["first", "first:", "first:-1", "middle:2", "first:0", "first:1+first:2", "Last", ""])
def test_refused_positions(text):
    with pytest.raises(ValueError, match="positions"):
        Positions.parse(text)


@pytest.mark.parametrize("text", KINDS)
def test_positions_as_text(text):
    assert str(Positions.parse(text)) == text


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="swish"):
        Nonlinear(activation="swish")


@pytest.mark.parametrize("name", METHODS)
def test_shapes_counts_and_dtypes(name, tiny_config):
    one = init_steering((slot_of(name, tiny_config, layers=(1,)),), tiny_config, jax.random.key(0))
    three = init_steering((slot_of(name, tiny_config, layers=(0, 1, 3)),), tiny_config, jax.random.key(0))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(three)} == {3}
    assert {leaf.dtype for leaf in jax.tree.leaves(three)} == {jnp.dtype("float32")}
    assert count_parameters(three) == 3 * count_parameters(one) > 0


def test_counts_by_hand(tiny_config):
    plan = (slot(Nonlinear(rank=3), ("block",), layers=(1, 2)), slot(LoRA(rank=2), ("attn.k",), name="lora"))
    shapes = jax.eval_shape(lambda: init_steering(plan, tiny_config, jax.random.key(0)))
    assert count_parameters(shapes) == 2 * (3 * 32 + 32 * 3) + 4 * (2 * 32 + 16 * 2)


@pytest.mark.parametrize("name", METHODS)
def test_keys_depend_on_the_path_alone(name, tiny_config):
    """Leaving out layers, or adding slots, changes no other parameter."""
    key = jax.random.key(4)
    whole = init_steering((slot_of(name, tiny_config, slot="x"),), tiny_config, key)["x"]
    plan = (slot_of("nonlinear", tiny_config, slot="w"), slot_of(name, tiny_config, slot="x", layers=(1, 3)))
    some = init_steering(plan, tiny_config, key)["x"]
    identical(some, jax.tree.map(lambda leaf: leaf[jnp.array([1, 3])], whole))


def test_every_leaf_layer_site_and_key_draws_its_own(tiny_config):
    plan = (slot(Linear(), ("block", "mlp")), slot(Linear(), ("block",), name="other"))
    first, again, second = (init_steering(plan, tiny_config, jax.random.key(i)) for i in (0, 0, 1))
    identical(first, again)
    drawn = [first["mine"]["block"]["D"], first["mine"]["mlp"]["D"], first["other"]["block"]["D"]]
    drawn.append(second["mine"]["block"]["D"])
    layers = np.concatenate(drawn)
    assert len(np.unique(layers.reshape(len(layers), -1), axis=0)) == 16


def test_initial_values(tiny_config):
    """Kaiming uniform for what reads, ±init_scale/√width; zeros for what writes."""
    plan = (slot(Nonlinear(init_scale=0.5)), slot(LoRA(), ("mlp.down",), name="lora"), slot(name="v"))
    steering = init_steering(plan, tiny_config, jax.random.key(0))
    for leaf, bound in (
        (steering["mine"]["block"]["D"], 0.5 / 32**0.5),
        (steering["lora"]["mlp.down"]["A"], 1 / 48**0.5),
    ):
        assert 0.95 * bound < np.abs(leaf).max() <= bound
        assert abs(np.mean(leaf)) < 0.1 * bound
    for leaf in (steering["mine"]["block"]["U"], steering["lora"]["mlp.down"]["B"], steering["v"]["block"]["v"]):
        assert not np.any(leaf)


def test_plans_as_json(tiny_config):
    plan = (
        slot(Nonlinear(rank=3, alpha=0.5, activation="tanh"), ("block", "mlp"), layers=(0, 2)),
        slot(LoRA(rank=2, alpha=5.0), ("attn.q",), name="lora", positions=Positions("ends", 2, 3)),
        *(
            slot_of(name, tiny_config, slot=name, positions=Positions.parse(kind))
            for name, kind in zip(METHODS, KINDS, strict=False)
        ),
    )
    back = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    assert back == plan
    assert hash(back) == hash(plan)


def test_json_of_another_version_is_refused():
    entry = plan_to_json((slot(Nonlinear()),))[0]
    with pytest.raises(ValueError, match=r"mine.*telepathy.*nonlinear"):
        plan_from_json([entry | {"method": {"name": "telepathy"}}])
    with pytest.raises(ValueError, match=r"mine.*nonlinear.*strength"):
        plan_from_json([entry | {"method": entry["method"] | {"strength": 2}}])
