"""Plans and the steering tree: invalid plans, initialisation, and plans as JSON and as text."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import KINDS, all_methods, fast_jit, identical, random_steering

from jaxsteer import (
    METHODS,
    FixedVector,
    LinearSteering,
    LoRA,
    NonlinearSteering,
    Positions,
    Slot,
    count_parameters,
    init_steering,
    parse_plan,
    plan_from_json,
    plan_to_json,
    validate_plan,
)
from jaxsteer.interventions import DiReFT, DoRA, JoLA, LoFiT, LoReFT, PiSSA, select_heads, strongest_heads
from jaxsteer.steering import count_trained, keep_kind, steering_shapes

pytestmark = pytest.mark.xdist_group("steering")  # the tests share draws


def slot(method=FixedVector(), sites=("block",), name="mine", **rest):  # noqa: B008  # frozen
    return Slot(name, method, sites, **rest)


@pytest.mark.parametrize(
    ("plan", "culprits"),
    [
        ([slot(sites=("blok",))], ["mine", "blok", "block"]),
        ([slot(LoRA(), ("block",))], ["mine", "lora", "block", "mlp.down"]),
        ([slot(NonlinearSteering(), ("mlp.down",))], ["mine", "nonlinear", "mlp.down"]),
        ([slot(LinearSteering(), ("attn.heads",))], ["mine", "attn.heads"]),
        ([slot(LoReFT(), ("attn.heads",))], ["mine", "LoReFT", "attn.heads"]),
        ([slot(JoLA())], ["mine", "JoLA", "block", "attn.heads"]),
        ([slot(LoFiT(), ("attn.heads", "mlp"))], ["mine", "LoFiT", "mlp", "attn.heads"]),
        ([slot(DoRA(), ("attn.heads",))], ["mine", "dora", "attn.heads", "attn.o"]),
        ([slot(JoLA(), ("attn.o",))], ["mine", "jola", "attn.o", "attn.heads"]),
        ([slot(), slot(sites=("mlp",))], ["mine", "two slots"]),
        ([slot(layers=(0, 4))], ["mine", "4", "0 to 3"]),
        ([slot(layers=(-1, 2))], ["mine", "-1"]),
        ([slot(layers=(2, 1))], ["mine", "[2, 1]", "ascending"]),
        ([slot(layers=(1, 1))], ["mine", "[1, 1]"]),
        ([slot(layers=())], ["mine", "at least one"]),
        ([slot(sites=())], ["mine", "at least one site"]),
        ([slot(sites=("mlp", "mlp"))], ["mine", "each once"]),
        ([slot(NonlinearSteering(rank=0))], ["mine", "rank 0", "32"]),
        ([slot(NonlinearSteering(rank=33))], ["mine", "rank 33", "32"]),
        ([slot(DiReFT(rank=33))], ["mine", "rank 33", "32"]),
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


@pytest.mark.parametrize("method", [NonlinearSteering, LoReFT, DiReFT])
def test_unknown_activation_is_refused(method):
    with pytest.raises(ValueError, match="swish"):
        method(activation="swish")


@pytest.mark.parametrize("method", [LoRA, DoRA, PiSSA, LoReFT, DiReFT])
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_dropout_is_refused(method, rate):
    with pytest.raises(ValueError, match=f"dropout.*{rate}"):
        method(dropout=rate)


def test_pissa_without_weights_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"'mine'.*pissa.*base"):
        init_steering((slot(PiSSA(), ("attn.q",)),), tiny_config, jax.random.key(0))


# ---- shapes, counts, draws


init = fast_jit(init_steering, static_argnames=("plan", "config", "dtype"))


@pytest.fixture(scope="module")
def drawn(tiny_config, tiny_base):
    """Steering of all methods at all layers, and at two."""
    plans = {layers: all_methods(tiny_config, few=True, layers=layers) for layers in (None, (1, 3))}
    return {layers: init(plan, tiny_config, jax.random.key(4), base=tiny_base) for layers, plan in plans.items()}


@pytest.mark.parametrize("name", METHODS)
def test_shapes_counts_and_dtypes(name, drawn, tiny_config):
    plan = tuple(slot for slot in all_methods(tiny_config, few=True, layers=(1, 3)) if slot.name == name)
    two, all_four = drawn[1, 3][name], drawn[None][name]
    shapes = steering_shapes(plan, tiny_config)[name]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), two) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(two)} == {jnp.dtype("float32")}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(two)} == {2}
    assert 2 * count_parameters(two) == count_parameters(all_four) > 0
    constants = [p[name] for p in two.values() for name in plan[0].method.constants]
    for steering in ({name: two}, {name: shapes}):
        assert count_trained(plan, steering) == count_parameters(two) - count_parameters(constants) > 0
        assert count_trained(plan, steering, frozen=[name]) == 0


def test_keys_depend_on_the_path_alone(drawn, tiny_config, tiny_base):
    """Leaving out layers or slots, or changing their order, changes no parameter."""
    identical(drawn[1, 3], jax.tree.map(lambda leaf: leaf[jnp.array([1, 3])], drawn[None]))
    plan = all_methods(tiny_config, few=True)
    for some in (plan[::-2], plan[-2::-2]):
        got = init(some, tiny_config, jax.random.key(4), base=tiny_base)
        identical(got, {slot.name: drawn[None][slot.name] for slot in some})


def test_low_precision_is_the_rounded_draw(drawn, tiny_config, tiny_base):
    """Also for methods that start from an SVD or QR, which exist in fp32 and fp64 only."""
    plan = all_methods(tiny_config, few=True, layers=(1, 3))
    low = init(plan, tiny_config, jax.random.key(4), jnp.bfloat16, base=tiny_base)
    identical(low, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn[1, 3]))


def test_counts_by_hand(tiny_config):
    plan = (slot(NonlinearSteering(rank=3), ("block",), layers=(1, 2)), slot(LoRA(rank=2), ("attn.k",), name="lora"))
    shapes = jax.eval_shape(lambda: init_steering(plan, tiny_config, jax.random.key(0)))
    assert count_parameters(shapes) == 2 * (3 * 32 + 32 * 3) + 4 * (2 * 32 + 16 * 2)


def test_every_leaf_layer_site_and_key_draws_its_own(tiny_config):
    plan = (slot(LinearSteering(), ("block", "mlp")), slot(LinearSteering(), ("block",), name="other"))
    first, again, second = (init_steering(plan, tiny_config, jax.random.key(i)) for i in (0, 0, 1))
    identical(first, again)
    drawn = [first["mine"]["block"]["D"], first["mine"]["mlp"]["D"], first["other"]["block"]["D"]]
    drawn.append(second["mine"]["block"]["D"])
    layers = np.concatenate(drawn)
    assert len(np.unique(layers.reshape(len(layers), -1), axis=0)) == 16


def test_initial_values(tiny_config):
    """Kaiming uniform for what reads, ±init_scale/√width; zeros for what writes."""
    plan = (slot(NonlinearSteering(init_scale=0.5)), slot(LoRA(), ("mlp.down",), name="lora"), slot(name="v"))
    steering = init_steering(plan, tiny_config, jax.random.key(0))
    for leaf, bound in (
        (steering["mine"]["block"]["D"], 0.5 / 32**0.5),
        (steering["lora"]["mlp.down"]["A"], 1 / 48**0.5),
    ):
        assert 0.95 * bound < np.abs(leaf).max() <= bound
        assert abs(np.mean(leaf)) < 0.1 * bound
    for leaf in (steering["mine"]["block"]["U"], steering["lora"]["mlp.down"]["B"], steering["v"]["block"]["v"]):
        assert not np.any(leaf)


def test_reft_starts_orthonormal_and_pissa_at_the_weights(drawn, tiny_base):
    for name in ("loreft", "direft"):
        (p,) = drawn[None][name].values()
        r = p["R"]
        gram = np.einsum("lrd,lsd->lrs", r, r)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(8), gram.shape), atol=1e-5)
    ((site, p),) = drawn[None]["pissa"].items()
    group, projection = site.split(".")
    kernel = np.asarray(tiny_base["blocks"][group][projection]["kernel"])
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    best = np.einsum("lir,lr,lro->lio", u[..., :8], s[:, :8], vt[:, :8])
    np.testing.assert_allclose(np.einsum("lor,lri->lio", p["B"], p["A"]), best, atol=1e-5)
    identical((p["A"], p["B"]), (p["A0"], p["B0"]))


def test_only_one_kind(tiny_config):
    plan = all_methods(tiny_config, few=True)
    steering = random_steering(plan, tiny_config)
    for kind in ("weight", "activation"):
        kept = keep_kind(plan, steering, kind)
        for each in plan:
            same = (
                steering[each.name] if each.method.kind == kind else jax.tree.map(jnp.zeros_like, steering[each.name])
            )
            identical(kept[each.name], same)


# ---- heads


def test_strongest_heads():
    scales = jnp.zeros((2, 3, 4)).at[0, 2].set(1.0).at[1, 0, 1].set(-3.0).at[1, 1].set(1.0)
    np.testing.assert_array_equal(strongest_heads(scales, 1), [[0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(strongest_heads(scales, 2), [[0, 0, 1], [1, 0, 0]])  # of two equals the earlier
    np.testing.assert_array_equal(strongest_heads(scales, 6), np.ones((2, 3)))
    for count in (0, -1, 7):
        with pytest.raises(ValueError, match=f"{count} heads of 2 layers with 3"):
            strongest_heads(scales, count)


def test_selected_heads_are_those_that_train(tiny_config):
    plan = (slot(LoFiT(), ("attn.heads",), layers=(1, 3)),)
    steering = init_steering(plan, tiny_config, jax.random.key(0))
    assert count_trained(plan, steering) == 2 * 4 * 8
    chosen = select_heads((1, 3), 4, ((3, 0), (1, 2), (3, 3)))
    np.testing.assert_array_equal(chosen, [[0, 0, 1, 0], [1, 0, 0, 1]])
    steering["mine"]["attn.heads"]["selected"] = chosen
    assert count_trained(plan, steering) == 3 * 8


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (((2, 0),), r"\(2, 0\).*\[1, 3\]"),
        (((1, 0), (3, 4)), r"\(3, 4\).*0 to 3"),
        (((1, -1),), r"\(1, -1\).*0 to 3"),
        ((), "at least one"),
    ],
)
def test_heads_out_of_range_are_refused(chosen, words):
    with pytest.raises(ValueError, match=words):
        select_heads((1, 3), 4, chosen)


# ---- plans as JSON and as text


def test_plans_as_json(tiny_config):
    plan = (
        slot(NonlinearSteering(rank=3, alpha=0.5, activation="tanh"), ("block", "mlp"), layers=(0, 2)),
        slot(LoRA(rank=2, alpha=5.0), ("attn.q",), name="lora2", positions=Positions("ends", 2, 3)),
        *all_methods(tiny_config, kinds=KINDS, draws=True),
    )
    back = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    assert back == plan
    assert hash(back) == hash(plan)


@pytest.mark.parametrize("name", METHODS)
def test_plans_as_text(name, tiny_config):
    """Every setting of every method can be written as text."""
    (made,) = all_methods(tiny_config, [name], layers=(0, 2, 3), kinds=("first:2+last:1",), draws=True)
    settings = ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(made.method).items())
    text = f"{name}({settings}) @ {','.join(made.sites)} layers=0,2-3 positions=first:2+last:1"
    assert parse_plan([text, f"{name} @ {made.sites[0]} name=other"], tiny_config) == (
        made,
        Slot("other", METHODS[name](), made.sites[:1]),
    )


def test_json_of_another_version_is_refused():
    entry = plan_to_json((slot(NonlinearSteering()),))[0]
    with pytest.raises(ValueError, match=r"mine.*telepathy.*nonlinear"):
        plan_from_json([entry | {"method": {"name": "telepathy"}}])
    with pytest.raises(ValueError, match=r"mine.*nonlinear.*strength"):
        plan_from_json([entry | {"method": entry["method"] | {"strength": 2}}])


@pytest.mark.parametrize("field", ["name", "method", "sites", "layers", "positions"])
def test_json_of_a_damaged_file_is_refused(field):
    entry = plan_to_json((slot(NonlinearSteering()),))[0]
    with pytest.raises(ValueError, match=f"{field} is missing"):
        plan_from_json([{key: value for key, value in entry.items() if key != field}])
    with pytest.raises(ValueError, match=f"{field} is 3.5"):
        plan_from_json([entry | {field: 3.5}])
    with pytest.raises(ValueError, match=r"rank is '8'.*int"):
        plan_from_json([entry | {"method": entry["method"] | {"rank": "8"}}])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nonlinaer @ block", "did you mean nonlinear?"),
        ("LoRA(rank=2) @ attn.q", "did you mean lora?"),
        ("linear(rnk=2) @ block", "did you mean rank?"),
        ("linear @ blocks", "did you mean block?"),
        ("lora @ projection", "did you mean projections?"),
        ("linear @ block position=all", "did you mean positions?"),
        ("linear @ block layers=lst:8", "did you mean last?"),
        ("linear @ block positions=complete", "did you mean completion?"),
        ("linear @ block positions=frist:7+last:7", "did you mean first?"),
    ],
)
def test_the_nearest_known_word_is_named(text, hint, tiny_config):
    with pytest.raises(ValueError, match=re.escape(hint)) as refused:
        parse_plan([text], tiny_config)
    assert repr(text) in str(refused.value)
