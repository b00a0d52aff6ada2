"""Continuous batching against one prompt at a time."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from tiny import random_steering, rows, slot_of

from jaxsteer import Model, Positions, Sampling, generate
from jaxsteer.inference import continuous
from jaxsteer.inference.continuous import generate_all
from jaxsteer.inference.likelihood import score_continuations

NEW = 7
TIE = 1e-4


@dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    completion: np.ndarray
    weights: np.ndarray
    prompt_length: int
    source: str = "here"


def prompts(vocab, count=23, longest=24):
    """Lengths over several buckets; every fourth is a second turn, with a completion before it."""
    draw = np.random.default_rng(0)
    made = []
    for i in range(count):
        ids = draw.integers(3, vocab, draw.integers(1, longest)).astype(np.int32)
        weights = np.zeros(len(ids), np.float32)
        if i % 4 == 0 and len(ids) > 6:
            weights[3:5] = 1
        made.append(Prompt(ids, weights > 0, weights, 3 if weights.any() else len(ids)))
    return made


@pytest.fixture(scope="module")
def steered(tiny_config):
    """Kinds of positions that count from the prompt's start, from its end, and in the answer."""
    kinds = ("first:2+last:2", "last", "completion")
    plan = tuple(slot_of("linear", tiny_config, slot=k, positions=Positions.parse(k), sites=("block",)) for k in kinds)
    return Model(tiny_config, plan), random_steering(plan, tiny_config)


@pytest.fixture(scope="module")
def alone(steered, tiny_base):
    """Each prompt by itself, and stop tokens that end some answers: at once, in between, never."""
    model, steering = steered

    def ask(prompt):
        batch, _ = rows([(0, [(0, (prompt.ids, prompt.weights))])], 24)
        return generate(model, tiny_base, steering, batch, max_new_tokens=NEW, stop_tokens=())

    asked = prompts(model.config.vocab_size)
    said = [np.asarray(ask(prompt).tokens[0]) for prompt in asked]
    return asked, (int(said[1][0]), int(said[2][3])), said


def upto(said, stops):
    """What is said before the first stop token, and whether there is one."""
    ends = [i for i, token in enumerate(said) if token in stops]
    return said[: ends[0]] if ends else said, bool(ends)


@pytest.mark.parametrize("at_a_time", [3, 40])
def test_answers_are_those_of_one_at_a_time(at_a_time, steered, tiny_base, alone, monkeypatch):
    model, steering = steered
    kept, keep_rows = [], continuous.keep_rows
    counted = lambda state, rows: kept.append(len(rows)) or keep_rows(state, rows)
    monkeypatch.setattr(continuous, "keep_rows", counted)
    asked, stops, want = alone
    found = dict(generate_all(model, tiny_base, steering, asked, max_new_tokens=NEW, stop_tokens=stops, rows=at_a_time))
    assert sorted(found) == list(range(len(asked)))
    lengths = set()
    for index, said in enumerate(want):
        tokens, stopped = upto(said, stops)
        if found[index].margin > TIE:
            np.testing.assert_array_equal(found[index].tokens, tokens, str(index))
            assert found[index].stopped == stopped
        lengths.add(len(found[index].tokens))
    assert sum(found[index].margin <= TIE for index in found) <= 1
    assert kept == ([11] if at_a_time == 40 else [])  # half of the 23 rows, once the others are done
    assert {0, NEW} < lengths  # rows end at different times


def test_the_margin_is_how_far_the_first_is_ahead(tiny_config, tiny_base):
    """Two equal vectors in the output embedding are two tokens that always draw."""
    asked, model = prompts(tiny_config.vocab_size, 3), Model(tiny_config)
    ask = lambda base: dict(generate_all(model, base, {}, asked, max_new_tokens=1, stop_tokens=(-1,), rows=2))
    plain = ask(tiny_base)
    said = int(plain[0].tokens[0])
    assert plain[0].margin > TIE
    head = tiny_base["head"]["embedding"]
    twin = (said + 1) % tiny_config.vocab_size
    drawn = ask(tiny_base | {"head": {"embedding": head.at[twin].set(head[said])}})
    assert drawn[0].margin == 0.0


@pytest.mark.slow
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
    assert first != ask(9, 1)
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
        ask([Prompt(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32), 0)])


def test_learned_positions_end(tiny_config):
    """Rotary positions go on, learned ones do not."""
    model = Model(replace(tiny_config, learned_positions=True, max_length=20))
    asked = [Prompt(np.arange(3, 17, dtype=np.int32), np.zeros(14, bool), np.zeros(14, np.float32), 14, "mine:3")]
    answers = generate_all(model, {}, {}, asked, max_new_tokens=7, stop_tokens=())
    with pytest.raises(ValueError, match=r"mine:3: takes up to 21 tokens, but .* learned positions for 20 only"):
        next(answers)
    with pytest.raises(ValueError, match="mine:3: takes up to 21 tokens"):
        next(score_continuations(model, {}, {}, asked, [[np.arange(7, dtype=np.int32)]]))
