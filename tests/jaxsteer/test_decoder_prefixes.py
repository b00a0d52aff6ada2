"""Beginnings that prompts share are read once, where that cannot change an answer."""

from dataclasses import replace

import numpy as np
import pytest
from decoding import NEW, Prompt, Reader, answers_of
from tiny import random_steering, rows, slot_of

from jaxsteer import Model, Positions, generate, stack_adapters
from jaxsteer.inference import Decoder, Limits, Request, layouts

LIMITS = Limits(max_prompt=48, max_new_tokens=NEW, rows=4, chunk=1, prefix_tokens=1000)
COMMON = 36


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Prefills of as few columns as the rest of a tiny prompt has."""
    monkeypatch.setattr(layouts, "PREFILL_LENGTH", 8)


def prompt_of(ids, completion=()):
    """A prompt with completions at some places."""
    marks = np.isin(np.arange(len(ids)), completion)
    return Prompt(np.int32(ids), marks, np.float32(marks), min(completion, default=len(ids)))


@pytest.fixture(scope="module")
def asked(tiny_config):
    """Prompts of which the first COMMON tokens are the same, and one of its own."""
    draw = np.random.default_rng(5)
    token = lambda count: draw.integers(3, tiny_config.vocab_size, count)
    common = token(COMMON)
    return [prompt_of([*common, *token(count)]) for count in (4, 1, 8, 4)] + [prompt_of(token(40))]


def model_of(config, *kinds):
    plan = tuple(slot_of("linear", config, slot=k, positions=Positions.parse(k), sites=("block",)) for k in kinds)
    return Model(config, plan), random_steering(plan, config)


def wanted(model, base, steering, asked, **given):
    batch, _ = rows([(0, [(0, (prompt.ids, prompt.weights))]) for prompt in asked], 48)
    out = generate(model, base, steering, batch, max_new_tokens=NEW, stop_tokens=(), **given)
    return np.asarray(out.tokens).tolist()


def one_by_one(decoder, asked):
    """The answers to requests each of which comes when the one before has ended."""
    return [answers_of(decoder, [request])[0] for request in asked]


def requests(asked, **settings):
    return [Request(prompt, NEW, **settings) for prompt in asked]


@pytest.mark.parametrize("kinds", [(), ("all", "prompt", "completion")])
@pytest.mark.parametrize("at_once", [True, False])
def test_prompts_that_begin_alike(kinds, at_once, asked, tiny_config, tiny_base):
    model, steering = model_of(tiny_config, *kinds)
    decoder = Decoder(model, tiny_base, steering, LIMITS)
    answer = answers_of if at_once else one_by_one
    assert answer(decoder, requests(asked)) == wanted(model, tiny_base, steering, asked)
    assert (decoder.prefix_hits, decoder.prefix_tokens_reused) == (3, 3 * COMMON)
    assert one_by_one(decoder, requests(asked[:1])) == wanted(model, tiny_base, steering, asked[:1])
    assert decoder.prefix_tokens_reused == 3 * COMMON + len(asked[0].ids) - 1  # all but the last token


@pytest.mark.parametrize("kind", ["last", "first:1+last:2"])
def test_steering_that_depends_on_what_follows_is_not_shared(kind, asked, tiny_config, tiny_base):
    """Unless it is switched off."""
    model, steering = model_of(tiny_config, "all", kind)
    decoder = Decoder(model, tiny_base, steering, LIMITS)
    assert one_by_one(decoder, requests(asked)) == wanted(model, tiny_base, steering, asked)
    assert decoder.prefix_hits == 0
    off = {kind: 0.0}
    want = wanted(model, tiny_base, steering, asked, strength=off)
    assert one_by_one(decoder, requests(asked, strength=off)) == want
    assert decoder.prefix_hits == 3


def test_second_turns_share_what_selects_the_same_tokens(asked, tiny_config, tiny_base):
    """The prompt ends where the first completion begins."""
    model, steering = model_of(tiny_config, "prompt", "completion")
    ids = asked[0].ids
    turns = [prompt_of(ids), prompt_of(ids, [34, 35]), prompt_of([*ids, 9, 8], [34, 35]), prompt_of(ids, [10])]
    decoder = Decoder(model, tiny_base, steering, LIMITS)
    assert one_by_one(decoder, requests(turns)) == wanted(model, tiny_base, steering, turns)
    assert decoder.prefix_tokens_reused == 34 + len(ids)
    assert decoder.prefix_hits == 2


def test_each_adapter_and_strength_has_its_own(asked, tiny_config, tiny_base):
    """And a new adapter of an old name shares nothing with the old one."""
    plans = {"one": ("all",), "two": ("all",), "late": ("last",)}
    trees = {name: model_of(tiny_config, *kinds) for name, kinds in plans.items()}
    given = {
        name: (model.plan, random_steering(model.plan, tiny_config, i))
        for i, (name, (model, _)) in enumerate(trees.items())
    }
    adapters = stack_adapters(given, tiny_config)
    model = Model(tiny_config, adapters.plan)
    decoder = Decoder(model, tiny_base, adapters, LIMITS)

    def check(name, strength=1.0):
        """Ask with an adapter, and count what was reused."""
        before, scale = decoder.prefix_hits, {slot.name: strength for slot in model.plan}
        index = np.full(2, decoder.adapters.index(name))
        want = wanted(model, tiny_base, decoder.adapters.steering, asked[:2], adapters=index, strength=scale)
        assert one_by_one(decoder, requests(asked[:2], adapter=name, strength=scale)) == want
        return decoder.prefix_hits - before

    assert check("one") == 1
    assert check("one", 0.5) == 1
    assert check("one") == 2
    assert check("two") == 1
    assert check("late") == 0
    assert check(None) == 1
    assert check(None, 0.5) == 2  # nothing steers it
    assert check("late", 0.0) == 2  # nor this
    decoder.swap(adapters.put("two", model.plan[:1], random_steering(model.plan[:1], tiny_config, 9)))
    assert check("two") == 1
    assert check("one") == 2
    assert check(None) == 2


def test_what_was_not_used_for_long_is_given_up(asked, tiny_config, tiny_base):
    model, steering = model_of(tiny_config)
    decoder = Decoder(model, tiny_base, steering, replace(LIMITS, prefix_tokens=100))  # two prompts of 48 slots
    first, _, _, again, own = requests(asked)
    other = Request(prompt_of(asked[4].ids[::-1]), NEW)
    one_by_one(decoder, [first, own, again])
    assert decoder.prefix_hits == 1
    one_by_one(decoder, [other, own])  # the place of `own` was the oldest
    assert decoder.prefix_hits == 1
    small = Decoder(model, tiny_base, steering, replace(LIMITS, prefix_tokens=40))
    one_by_one(small, [first, again])
    assert small.prefix_hits == 0


def test_prompts_that_are_not_finite_are_not_kept(asked, tiny_config, tiny_base):
    model, steering = model_of(tiny_config)
    decoder = Decoder(model, tiny_base, steering, LIMITS)
    outside = prompt_of([*asked[0].ids[:COMMON], 1000])
    reader = Reader(decoder)
    for request in requests([outside, *asked]):
        decoder.submit(request)
        reader.drain()
    assert reader.finished[0] == "nonfinite"
    assert [reader.tokens(id) for id in range(1, 6)] == wanted(model, tiny_base, steering, asked)
    assert decoder.prefix_hits == 3


def test_sharing_is_off_by_default(asked, tiny_config, tiny_base):
    model, steering = model_of(tiny_config)
    decoder = Decoder(model, tiny_base, steering, Limits(48, NEW, rows=4))
    one_by_one(decoder, requests(asked))
    assert decoder.prefix_hits == 0
