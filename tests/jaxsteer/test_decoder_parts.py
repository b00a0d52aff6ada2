"""Prompts that are read in parts, while other requests are decoded."""

from dataclasses import replace

import numpy as np
import pytest
from decoding import LIMITS, NEW, Prompt, Reader, answers_of, mixed, prompts, requests
from tiny import every_kind, random_steering, rows

from jaxsteer import Model, generate, stack_adapters
from jaxsteer.inference import Decoder, Request, generate_all
from jaxsteer.models.quantise import quantise

PARTS = replace(LIMITS, prefill_chunk=6, chunk=1)


def alone_answers(model, base, steering, asked, **given):
    """The answer to each prompt by itself."""
    batch, _ = rows([(0, [(0, (p.ids, p.weights))]) for p in asked], 24)
    out = generate(model, base, steering, batch, max_new_tokens=NEW, stop_tokens=(), **given)
    return np.asarray(out.tokens).tolist()


def test_parts_answer_as_whole_prompts(make, alone):
    """Steering that counts from the prompt's start and end, second turns, and short prompts beside."""
    asked, stops, want = alone
    assert answers_of(make(PARTS), requests(asked)) == [answer.tolist() for answer in want]
    both = mixed(asked, stops)
    assert answers_of(make(replace(PARTS, prefill_chunk=2)), both) == answers_of(make(), both)


@pytest.mark.parametrize("kind", ["window", "positions", "int8", "kinds"])
def test_parts_of_other_models(kind, tiny_config, tiny_base):
    """Sliding windows, learned positions, a quantised base, and every kind of positions."""
    config, base, plan = tiny_config, tiny_base, ()
    if kind == "window":
        config = replace(config, window=5, local_layers=(True, False, True, False))
    if kind == "positions":
        config = replace(config, learned_positions=True)
        table = np.random.default_rng(0).standard_normal((config.max_length, config.width))
        base = base | {"embed": base["embed"] | {"positions": np.float32(table)}}
    if kind == "int8":
        base = quantise(base)
    if kind == "kinds":
        plan = every_kind("linear", config)
    model, steering = Model(config, plan), random_steering(plan, config, scale=0.05)
    asked = prompts(config.vocab_size, 9)
    decoder = Decoder(model, base, steering, PARTS)
    assert answers_of(decoder, requests(asked)) == alone_answers(model, base, steering, asked)


def test_parts_have_strengths_and_adapters(tiny_config, tiny_base):
    plan = every_kind("linear", tiny_config)[3:5]
    adapters = stack_adapters(
        {name: (plan, random_steering(plan, tiny_config, i)) for i, name in enumerate("ab")}, tiny_config
    )
    model, asked = Model(tiny_config, adapters.plan), prompts(tiny_config.vocab_size, 8)
    names, factors = ("a", "b", None), np.float32([1, 0.5, 0, -1])
    slot = plan[0].name
    together = [
        Request(prompt, NEW, strength={slot: float(factors[i % 4])}, adapter=names[i % 3])
        for i, prompt in enumerate(asked)
    ]
    index = np.array([adapters.index(request.adapter) for request in together])
    strength = {slot: factors[np.arange(8) % 4]}
    want = alone_answers(model, tiny_base, adapters.steering, asked, strength=strength, adapters=index)
    assert answers_of(Decoder(model, tiny_base, adapters, PARTS), together) == want


def test_others_go_on_between_parts(make, alone):
    """A long prompt delays neither those that are decoded, nor short ones behind it, by more than a part."""
    asked, _, want = alone
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
    (short, other, *_), (*_, long) = by_length, by_length
    reader = Reader(make(PARTS))
    decoder = reader.decoder
    ids = {decoder.submit(requests([asked[i]])[0]): i for i in (short,)}
    reader.step()
    ids |= {decoder.submit(requests([asked[i]])[0]): i for i in (long, other)}
    counts = []
    while 1 not in reader.parts:
        reader.step()
        counts.append(len(reader.parts[0]))
        assert decoder.pending == decoder.active + decoder.waiting
        assert decoder.waiting == (1 not in reader.parts)
        assert 2 in reader.parts
    assert counts == list(range(2, 2 + len(counts)))
    assert len(counts) == -(-(len(asked[long].ids) - 6) // 5) + 1
    reader.drain()
    assert {i: reader.tokens(id) for id, i in ids.items()} == {i: want[i].tolist() for i in ids.values()}


def test_a_prompt_is_cancelled_between_parts(make, alone):
    asked, _, want = alone
    long = max(range(len(asked)), key=lambda i: len(asked[i].ids))
    reader = Reader(make(replace(PARTS, rows=1)))
    reader.decoder.submit(requests([asked[long]])[0])
    reader.step()
    assert (reader.decoder.active, reader.decoder.waiting) == (0, 1)
    assert reader.decoder.cancel(0)
    assert reader.decoder.pending == 0
    reader.decoder.submit(requests([asked[long]])[0])
    assert reader.drain() == [[], want[long].tolist()]
    assert reader.finished == {0: "cancelled", 1: "length"}


def test_draining_ends_what_was_begun_in_parts(make, alone):
    asked, _, want = alone
    long = max(range(len(asked)), key=lambda i: len(asked[i].ids))
    decoder = make(PARTS)
    decoder.submit(requests([asked[long]])[0])
    events = decoder.step()
    while decoder.pending:
        events += decoder.step(draining=True)
    assert np.concatenate([event.tokens for event in events]).tolist() == want[long].tolist()
    ((_, answer),) = generate_all(decoder, requests([asked[long]]))
    assert answer.tokens.tolist() == want[long].tolist()


def test_a_part_that_is_not_finite_ends_that_prompt_alone(make, alone):
    asked, _, want = alone
    ids = np.int32([*range(3, 15), 1000, *range(3, 10)])
    outside = Prompt(ids, np.zeros(20, bool), np.zeros(20, np.float32), 20)
    reader = Reader(make(replace(PARTS, rows=2)))
    for prompt in (asked[1], outside, *asked[2:6]):
        reader.decoder.submit(requests([prompt])[0])
    answers = reader.drain()
    assert answers == [answer.tolist() for answer in (want[1], want[1][:0], *want[2:6])]
    assert [id for id, end in reader.finished.items() if end == "nonfinite"] == [1]
