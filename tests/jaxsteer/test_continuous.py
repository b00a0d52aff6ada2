"""Continuous batching against one prompt at a time."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from tiny import every_kind, random_steering, rows

from jaxsteer import Model, Sampling, generate
from jaxsteer.continuous import generate_all

NEW = 7
TIE = 1e-4


@dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    weights: np.ndarray
    prompt_length: int
    source: str = "here"


def prompts(vocab, count=23, longest=40):
    """Lengths over several buckets; every fourth is a second turn, with a completion before it."""
    draw = np.random.default_rng(0)
    made = []
    for i in range(count):
        ids = draw.integers(3, vocab, draw.integers(1, longest)).astype(np.int32)
        weights = np.zeros(len(ids), np.float32)
        if i % 4 == 0 and len(ids) > 6:
            weights[3:5] = 1
        made.append(Prompt(ids, weights, 3 if weights.any() else len(ids)))
    return made


@pytest.fixture(scope="module")
def steered(tiny_config):
    """Every kind of positions at once."""
    plan = every_kind("nonlinear", tiny_config)
    return Model(tiny_config, plan), random_steering(plan, tiny_config)


@pytest.fixture(scope="module")
def alone(steered, tiny_base):
    """Each prompt by itself, and stop tokens that end some answers: at once, in between, never."""
    model, steering = steered

    def ask(prompt, stops):
        batch, _ = rows([(0, [(0, (prompt.ids, prompt.weights))])], 40)
        return generate(model, tiny_base, steering, batch, max_new_tokens=NEW, stop_tokens=stops)

    asked = prompts(model.config.vocab_size)
    said = [np.asarray(ask(prompt, (-1, -1)).tokens[0]) for prompt in asked]
    stops = (int(said[1][0]), int(said[2][3]))
    return asked, stops, [jax.device_get(ask(prompt, stops)) for prompt in asked]


@pytest.mark.parametrize("at_a_time", [1, 4, 40])
def test_answers_are_those_of_one_at_a_time(at_a_time, steered, tiny_base, alone):
    model, steering = steered
    asked, stops, want = alone
    found = dict(
        generate_all(
            model, tiny_base, steering, asked, max_new_tokens=NEW, stop_tokens=stops, rows=at_a_time
        )
    )
    assert sorted(found) == list(range(len(asked)))
    lengths = set()
    for index, one in enumerate(want):
        if found[index].margin > TIE:
            np.testing.assert_array_equal(found[index].tokens, one.tokens[0, : one.lengths[0]], str(index))
            assert found[index].stopped == bool(one.stopped[0])
        lengths.add(len(found[index].tokens))
    assert sum(found[index].margin <= TIE for index in found) <= 1
    assert {0, NEW} < lengths  # rows end at different times


def test_the_margin_is_how_far_the_first_is_ahead(tiny_config, tiny_base):
    """Two equal vectors in the output embedding are two tokens that always draw."""
    asked, model = prompts(tiny_config.vocab_size, 3), Model(tiny_config)
    ask = lambda base: dict(
        generate_all(model, base, {}, asked, max_new_tokens=1, stop_tokens=(-1,), rows=2)
    )
    plain = ask(tiny_base)
    said = int(plain[0].tokens[0])
    assert plain[0].margin > TIE
    head = tiny_base["head"]["embedding"]
    twin = (said + 1) % tiny_config.vocab_size
    drawn = ask(tiny_base | {"head": {"embedding": head.at[twin].set(head[said])}})
    assert drawn[0].margin == 0.0


def test_draws_depend_on_the_prompt_and_not_on_its_neighbours(tiny_config, tiny_base):
    asked, model = prompts(tiny_config.vocab_size, 9), Model(tiny_config)

    def ask(at_a_time, seed):
        answers = generate_all(
            model,
            tiny_base,
            {},
            asked,
            jax.random.key(seed),
            max_new_tokens=NEW,
            stop_tokens=(-1, -1),
            rows=at_a_time,
            sampling=Sampling(temperature=5.0),
        )
        return [answer.tokens.tolist() for _, answer in sorted(answers)]

    first = ask(4, 0)
    assert first == ask(9, 0)
    assert first != ask(4, 1)
    assert len({token for answer in first for token in answer}) > NEW


def test_impossible_requests_raise(tiny_config, tiny_base):
    ask = lambda asked=(), **rest: list(
        generate_all(Model(tiny_config), tiny_base, {}, asked, **({"max_new_tokens": 1, "stop_tokens": ()} | rest))
    )
    assert ask() == []
    with pytest.raises(ValueError, match="at least 1"):
        ask(max_new_tokens=0)
    with pytest.raises(ValueError, match="at least 1"):
        ask(rows=0)
    with pytest.raises(ValueError, match="key"):
        ask(sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="here: an empty prompt"):
        ask([Prompt(np.zeros(0, np.int32), np.zeros(0, np.float32), 0)])
