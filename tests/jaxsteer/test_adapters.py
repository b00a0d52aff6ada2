"""Several adapters in one batch: each token as if its own adapter were the only one."""

from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import NEW, compiled, prompts
from tiny import (
    KINDS,
    TURNS,
    all_methods,
    close,
    fast_jit,
    identical,
    layouts,
    random_steering,
    run,
    turn,
)

import jaxsteer
from jaxsteer import METHODS, LoRA, Model, NonlinearSteering, Positions, Slot, forward, stack_adapters
from jaxsteer.batches import stack_rows
from jaxsteer.inference import Decoder, Limits, Request, generate_all, score_continuations
from jaxsteer.models.config import site_dims
from jaxsteer.types import Context, Intervention, ParamSpec

pytestmark = pytest.mark.xdist_group("adapters")  # the tests share compiled programs

OTHER = {"rank": 5, "alpha": 3.0, "init_scale": 0.5, "dropout": 0.25, "penalty_start": 0.5, "l1": 0.1}
"""Settings in which adapters that share a slot may differ."""


def other_settings(method):
    return replace(method, **{field.name: OTHER[field.name] for field in fields(method) if field.name in OTHER})


@pytest.fixture(scope="module")
def plans(tiny_config):
    """All methods; the same with other ranks, scales, sites and layers; and only every third of them."""
    plan = all_methods(tiny_config, few=True, kinds=KINDS)
    sites = {slot.name: slot.sites[-1:] for slot in all_methods(tiny_config)}
    other = tuple(
        replace(slot, method=other_settings(slot.method), sites=sites[slot.name], layers=(1, 3)) for slot in plan
    )
    return {"whole": plan, "other": other, "few": plan[::3]}


@pytest.fixture(scope="module")
def own(plans, tiny_config):
    """Each adapter's plan and steering."""
    return {name: (plan, random_steering(plan, tiny_config, i)) for i, (name, plan) in enumerate(plans.items())}


@pytest.fixture(scope="module")
def stacked(own, tiny_config):
    return stack_adapters(own, tiny_config, places=4)


@pytest.fixture(scope="module")
def packed(tiny_config):
    """Rows of which one holds two examples, and the index of an adapter for each token."""
    batch, where = layouts(tiny_config.vocab_size)["packed"]
    index = np.full(batch.tokens.shape, -1, np.int32)
    for example, adapter in {3: 0, 2: 1, 0: 2, 4: 0, 1: 1}.items():
        index[where[example]] = adapter
    return batch, where, index


def see(adapters, base, batch, index=None, name="together", **rest):
    model = Model(adapters.config, adapters.plan)
    steering = turn(adapters.steering, name)
    return run(model, base, steering, batch, capture=("block", "attn.heads"), adapters=index, **rest)


def part_of(output, at):
    row, columns = at
    return output.hidden[row, columns], *(tap[:, row, columns] for tap in output.taps.values())


@pytest.mark.parametrize("name", TURNS)
def test_two_adapters_in_a_row_are_each_alone(name, own, stacked, packed, tiny_base):
    """Bit for bit as in a batch with one adapter; within rounding as its own plan and parameters."""
    batch, where, index = packed
    together = see(stacked, tiny_base, batch, index, name)
    plan, steering = own["other"]
    alone = run(Model(stacked.config, plan), tiny_base, turn(steering, name), batch, capture=("block", "attn.heads"))
    same = [see(stacked, tiny_base, batch, np.full_like(index, adapter), name) for adapter in range(3)]
    for at in where.values():
        identical(part_of(together, at), part_of(same[index[at][0]], at))
        close(part_of(same[1], at), part_of(alone, at), 1e-5)
    moved = [np.abs(same[0].hidden - other.hidden).max() for other in same[1:]]
    assert min(moved) > 1e-3


def test_no_adapter_is_the_base_model(stacked, packed, tiny_base):
    """Bit for bit: an index that is none, a place that is free, and adapters of zeros."""
    batch, _, index = packed
    plain = run(Model(stacked.config), tiny_base, {}, batch, capture=("block", "attn.heads"))
    zeros = replace(stacked, steering=jax.tree.map(jnp.zeros_like, stacked.steering))
    for adapters, none in ((stacked, -1), (stacked, 4), (stacked, 3), (zeros, 0)):
        identical(see(adapters, tiny_base, batch, np.full_like(index, none)), plain)


@pytest.mark.parametrize("shape", [(3, 1), (2, 3)])  # as few tokens as adapters, and more
def test_every_method_at_its_site(shape, tiny_config):
    """Each token as with its adapter alone; one has none."""
    plan, draw = all_methods(tiny_config, few=True), np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)
    index = jnp.asarray(draw.permutation(np.arange(shape[0] * shape[1]) % 4).reshape(shape) - 1, jnp.int32)
    given = {}
    for slot in plan:
        dims = site_dims(tiny_config, slot.sites[0])
        specs = slot.method.param_specs(dims)
        trees = [{name: array(*spec.shape) for name, spec in specs.items()} for _ in range(3)]
        axes = {name: spec.adapter_axis for name, spec in specs.items()}
        kernel = array(*dims.x, *dims.y) if slot.method.kind == "weight" else None
        given[slot.name] = trees, axes, array(*shape, *dims.x), array(*shape, *dims.y), kernel

    def apply(name, p, adapter=None):
        _, _, x, y, kernel = given[name]
        return METHODS[name]().apply(p, x, y, Context(jnp.zeros((), jnp.int32), kernel, adapter=adapter))

    @fast_jit
    def both():
        out = {}
        for name, (trees, axes, _, y, _) in given.items():
            stacked = jax.tree.map(lambda axis, *leaves: jnp.stack(leaves, axis), axes, *trees)
            alone = jnp.stack([y, *(apply(name, p) for p in trees)])
            own = (index + 1).reshape(1, *shape, *(1,) * (y.ndim - 2))
            want = jnp.take_along_axis(alone, own, axis=0)[0]
            out[name] = apply(name, stacked, index), want, y
        return out

    for got, want, y in both().values():
        close(got, want, 1e-4)
        np.testing.assert_array_equal(got[index < 0], y[index < 0])
        assert not np.any(got[index >= 0] == y[index >= 0])


# ---- a small plan: what needs programs of its own


@pytest.fixture(scope="module")
def small(tiny_config):
    """Adapters that have LoRA, steering, or both; of the first two, only some layers."""
    lora = Slot("lora", LoRA(rank=3, alpha=6.0), ("attn.q", "mlp.down"), (1, 2))
    steer = Slot("steer", NonlinearSteering(rank=2), ("block",), (1, 3))
    both = replace(lora, method=LoRA(rank=3, alpha=1.0)), replace(steer, method=NonlinearSteering(rank=4), layers=None)
    plans = {"lora": (lora,), "steer": (steer,), "both": both}
    return {
        name: (plan, random_steering(plan, tiny_config, i, scale=0.5)) for i, (name, plan) in enumerate(plans.items())
    }


@pytest.fixture(scope="module")
def three(small, tiny_config):
    return stack_adapters(small, tiny_config, places=4)


def test_common_plan(three, small):
    lora, steer = three.plan
    assert (lora.name, lora.method, lora.layers) == ("lora", LoRA(rank=3, alpha=3.0), (1, 2))
    assert (steer.name, steer.method, steer.layers) == ("steer", NonlinearSteering(rank=4), None)
    assert {name: leaf.shape for name, leaf in three.steering["lora"]["attn.q"].items()} == {
        "A": (2, 4, 3, 32),
        "B": (2, 32, 4, 3),
    }
    same = stack_adapters({"one": small["lora"], "other": small["lora"]}, three.config)
    assert same.plan == small["lora"][0]
    identical(same.alone("other"), small["lora"][1])  # nothing is scaled
    assert three.index("both") == 2
    assert three.index(1) == 1
    assert three.index(None) == -1


def test_strength_is_per_token_too(three, packed, tiny_base):
    """Bit for bit the base model at 0, and what it is in a batch of one strength."""
    batch, where, index = packed
    by_slot = lambda value: {slot.name: value for slot in three.plan}
    strength = np.where(index == 1, 0, np.where(index == 2, -0.5, 1)).astype(np.float32)
    everywhere = lambda factor: by_slot(np.full_like(strength, factor))
    got = see(three, tiny_base, batch, index, strength=by_slot(strength))
    whole, weak = (see(three, tiny_base, batch, index, strength=everywhere(factor)) for factor in (1, -0.5))
    plain = run(Model(three.config), tiny_base, {}, batch, capture=("block", "attn.heads"))
    for at in where.values():
        identical(part_of(got, at), part_of({0: whole, 1: plain, 2: weak}[index[at][0]], at))
    assert np.abs(part_of(weak, where[0])[0] - part_of(whole, where[0])[0]).max() > 1e-3


def test_slots_keep_the_order_of_each_plan(tiny_config):
    """What differs in settings or positions has a slot of its own; names stay unique."""
    one = Slot("a", NonlinearSteering(activation="relu"), ("block",))
    other = Slot("a", NonlinearSteering(activation="tanh"), ("block",))
    prompt = replace(other, positions=Positions("prompt"), name="b")
    plans = {"x": (one,), "y": (other, replace(one, name="c")), "z": (replace(one, name="z"), prompt)}
    stacked = stack_adapters(
        {name: (plan, random_steering(plan, tiny_config)) for name, plan in plans.items()}, tiny_config
    )
    assert [slot.name for slot in stacked.plan] == ["a", "a2", "b"]
    assert stacked.plan[0].method == other.method
    assert stacked.slot_names(plans["y"]) == {"a": "a", "c": "a2"}
    assert stacked.slot_names(plans["z"]) == {"z": "a2", "b": "b"}


@pytest.mark.slow
def test_derivatives_of_each_adapter_are_those_alone(three, tiny_base, tiny_config):
    """Under vmap over the index; the other adapters' are zero."""
    batch, _ = layouts(tiny_config.vocab_size)["packed"]
    model = Model(tiny_config, three.plan)
    toward = np.random.default_rng(0).standard_normal((*batch.tokens.shape, tiny_config.width), np.float32)
    hidden = lambda steering, index: forward(model, tiny_base, steering, batch, adapters=index).hidden
    loss = lambda steering, index: jnp.sum(toward * hidden(steering, index))
    rows = jnp.broadcast_to(jnp.arange(3)[:, None], (3, 5))
    gradients = fast_jit(jax.vmap(jax.grad(loss), (None, 0)))(three.steering, rows)
    alone = fast_jit(jax.grad(loss))
    for i in range(3):
        got = replace(three, steering=jax.tree.map(lambda leaf, i=i: leaf[i], gradients))
        close(got.alone(i), alone(three.alone(i), None), 1e-4)
        others = [got.alone(j) for j in range(3) if j != i]
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))


@dataclass(frozen=True)
class Scale(Intervention):
    """A method that knows nothing of adapters."""

    kind = "activation"

    def param_specs(self, dims):
        return {"s": ParamSpec(dims.y, ("width",), jax.nn.initializers.zeros)}

    def apply(self, p, x, y, ctx):
        return y + jnp.einsum("...d,d->...d", y, p["s"])


def test_any_method_can_be_stacked(tiny_config, tiny_base, monkeypatch):
    monkeypatch.setitem(METHODS, "scale", Scale)
    plan = (Slot("scale", Scale(), ("mlp",), (2,)),)
    stacked = stack_adapters({str(i): (plan, random_steering(plan, tiny_config, i)) for i in range(2)}, tiny_config)
    batch, _ = layouts(tiny_config.vocab_size)["packed"]
    index = np.array([1, 0, -1, -1, -1])
    together = run(Model(tiny_config, plan), tiny_base, stacked.steering, batch, adapters=index).hidden
    alone = [run(Model(tiny_config, plan), tiny_base, stacked.alone(i), batch).hidden for i in (1, 0)]
    close(together[:2], jnp.stack([alone[0][0], alone[1][1]]), 1e-5)
    identical(together[2:], run(Model(tiny_config), tiny_base, {}, batch).hidden[2:])


# ---- decoding

LIMITS = Limits(max_prompt=24, max_new_tokens=NEW, rows=4)
GREEDY = {"max_new_tokens": NEW, "stop_tokens": ()}

generate = fast_jit(jaxsteer.generate, static_argnames=("model", *GREEDY))


def prompts_of(requests):
    """The prompts as a batch, one in each row."""
    return stack_rows([[request.prompt] for request in requests], LIMITS.max_prompt)


@pytest.fixture(scope="module")
def asked(tiny_config):
    """Requests by turns of every adapter and of none, and the answers of each alone."""
    names = ("lora", "steer", "both", None)
    return [Request(prompt, NEW, adapter=names[i % 4]) for i, prompt in enumerate(prompts(tiny_config.vocab_size, 12))]


@pytest.fixture(scope="module")
def alone(asked, three, tiny_base):
    """The answer to each request, decoded in batches of one adapter without an axis of adapters."""
    model, batch = Model(three.config, three.plan), prompts_of(asked)
    zeros = jax.tree.map(jnp.zeros_like, three.alone(0))
    trees = {name: zeros if name is None else three.alone(name) for name in (*three.names[:3], None)}
    of = {name: np.asarray(generate(model, tiny_base, tree, batch, **GREEDY).tokens) for name, tree in trees.items()}
    answers = [of[request.adapter][i].tolist() for i, request in enumerate(asked)]
    assert len(set(map(tuple, answers))) > 6
    return answers


def test_each_request_has_its_own_adapter(asked, alone, three, small, tiny_base):
    """One more adapter, in the free place, compiles nothing; requests go on meanwhile."""
    decoder = Decoder(Model(three.config, three.plan), tiny_base, three, LIMITS)
    found = dict(generate_all(decoder, asked))
    assert [found[i].tokens.tolist() for i in range(len(asked))] == alone

    def joined_by(adapter):
        """The answer to a request with this adapter, submitted while others are answered."""
        for request in asked[:3]:
            decoder.submit(request)
        events = decoder.step()
        id = decoder.submit(replace(asked[1], adapter=adapter))
        while decoder.pending:
            events += decoder.step()
        return np.concatenate([event.tokens for event in events if event.id == id]).tolist()

    for _ in range(2):  # from the rows that `generate_all` left, and from those that this leaves
        assert joined_by(asked[1].adapter) == alone[1]
    before = compiled()
    decoder.swap(three.put("new", *small["steer"]))
    assert joined_by("new") == alone[1]
    assert compiled() == before


@pytest.mark.slow
def test_each_row_of_a_batch_has_its_own_adapter(asked, alone, three, tiny_base):
    index = np.array([three.index(request.adapter) for request in asked])
    out = generate(
        Model(three.config, three.plan), tiny_base, three.steering, prompts_of(asked), adapters=index, **GREEDY
    )
    assert np.asarray(out.tokens).tolist() == alone


@pytest.mark.slow
def test_likelihoods_of_each_adapter(asked, alone, three, tiny_base):
    texts = [[np.int32(answer[:4]), np.int32([3, 4, 5, 6])] for answer in alone]
    index = [three.index(request.adapter) for request in asked]
    scored = score_continuations(
        Model(three.config, three.plan),
        tiny_base,
        three.steering,
        [request.prompt for request in asked],
        texts,
        adapters=index,
        batch_size=8,
    )
    assert [[score.greedy for score in scores] for _, scores in sorted(scored)] == [[True, False]] * len(asked)


# ---- what is refused


def test_refusals(three, small, tiny_config, tiny_base):
    plan, steering = small["steer"]
    batch, _ = layouts(tiny_config.vocab_size)["packed"]
    with pytest.raises(ValueError, match="0 adapters for 0 places"):
        stack_adapters({}, tiny_config)
    with pytest.raises(ValueError, match="3 adapters for 2 places"):
        stack_adapters(small, tiny_config, places=2)
    with pytest.raises(ValueError, match="adapter 'x': its steering is not that of its plan, at steer/block/D"):
        three.put("x", plan, jax.tree.map(lambda leaf: leaf[..., :-1], steering))
    with pytest.raises(ValueError, match="adapter 'x': steer/block/D holds NaN"):
        three.put("x", plan, jax.tree.map(lambda leaf: leaf * np.nan, steering))
    for wrong in (NonlinearSteering(rank=5), NonlinearSteering(activation="tanh")):
        bad = (Slot("steer", wrong, ("block",)),)
        with pytest.raises(
            ValueError, match=r"adapter 'x': slot 'steer' \(nonlinear.*no place in the common plan \(lora"
        ):
            three.put("x", bad, random_steering(bad, tiny_config))
    full = three.put("x", plan, steering)
    with pytest.raises(ValueError, match="adapter 'y': all 4 places are taken"):
        full.put("y", plan, steering)
    assert full.without("lora").put("y", plan, steering).names == ("y", "steer", "both", "x")
    with pytest.raises(ValueError, match="no adapter 'lore'; there are lora, steer, both"):
        three.index("lore")
    see = lambda steering, index: forward(Model(tiny_config, three.plan), tiny_base, steering, batch, adapters=index)
    with pytest.raises(ValueError, match="give an integer for each row or token"):
        see(three.steering, np.zeros(4, int))
    with pytest.raises(ValueError, match="without an axis of adapters"):
        see(three.alone(0), np.zeros(5, int))


def test_refusals_of_decoders(asked, three, small, tiny_base):
    model = Model(three.config, three.plan)
    with pytest.raises(ValueError, match="the adapters' plan is not the model's"):
        Decoder(Model(three.config), tiny_base, three, LIMITS)
    plain = Decoder(model, tiny_base, three.alone(0), LIMITS)
    with pytest.raises(ValueError, match="here: adapter 'lora', but this decoder has no adapters"):
        plain.submit(asked[0])
    with pytest.raises(ValueError, match="made with none"):
        plain.swap(three)
    decoder = Decoder(model, tiny_base, three, LIMITS)
    with pytest.raises(ValueError, match="no adapter 'x'"):
        decoder.submit(replace(asked[0], adapter="x"))
    decoder.submit(asked[0])
    with pytest.raises(ValueError, match="no adapter 'lora'"):
        decoder.swap(three.without("lora"))
    decoder.swap(three.without("both"))
