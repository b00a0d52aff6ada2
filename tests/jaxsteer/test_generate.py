"""Decoding against a naive loop that reads the whole row again for every token; sampling against its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import every_kind, fast_jit, random_steering, rows, run

import jaxsteer
from jaxsteer import Model, Sampling, make_batch
from jaxsteer.inference.draws import likeliest, sample
from jaxsteer.models.transformer import logits_of, output_embedding

generate = fast_jit(jaxsteer.generate, static_argnames=("model", "max_new_tokens", "stop_tokens", "sampling"))

NEW = 6
PROMPTS = [np.array([5, 9, 30, 31, 7]), np.array([11, 3, 42]), np.array([60])]


@pytest.fixture(scope="module")
def steered(tiny_config):
    """All kinds of positions at once: generated tokens must count as completion."""
    plan = every_kind("nonlinear", tiny_config)
    return Model(tiny_config, plan), random_steering(plan, tiny_config)


@pytest.fixture(scope="module")
def naive(steered, tiny_base):
    """Greedy continuations by running prompt and completion from the start for every new token."""
    model, steering = steered
    head, answers = output_embedding(tiny_base), []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW):
            weights = np.arange(len(ids)) >= len(prompt)
            batch, _ = rows([(0, [(0, (np.array(ids), weights))])], 11)
            hidden = run(model, tiny_base, steering, batch).hidden[0, len(ids) - 1]
            ids.append(int(jnp.argmax(logits_of(hidden, head))))
        answers.append(ids[len(prompt) :])
    return np.array(answers)


def prompts(side, width=6):
    """The prompts, padded on one side, and a row without tokens."""
    layout = [(0 if side == "right" else width - len(p), [(i, (p, 0))]) for i, p in enumerate(PROMPTS)]
    return rows([*layout, (0, [])], width)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_the_naive_loop(side, steered, tiny_base, naive):
    model, steering = steered
    out = generate(model, tiny_base, steering, prompts(side), max_new_tokens=NEW, stop_tokens=())
    np.testing.assert_array_equal(out.tokens[:3], naive)
    np.testing.assert_array_equal(out.lengths, [NEW, NEW, NEW, 0])
    np.testing.assert_array_equal(out.stopped, [False, False, False, True])  # nothing to continue
    np.testing.assert_array_equal(out.tokens[3], np.zeros(NEW))


def test_steering_changes_the_answers(tiny_config, tiny_base, naive):
    out = generate(Model(tiny_config), tiny_base, {}, prompts("right"), max_new_tokens=NEW, stop_tokens=())
    assert np.any(np.asarray(out.tokens[:3]) != naive)


def test_rows_stop_at_their_stop_tokens(steered, tiny_base, naive):
    model, steering = steered
    stops = (int(naive[0, 2]), int(naive[1, 4]))
    out = generate(model, tiny_base, steering, prompts("right"), max_new_tokens=NEW, stop_tokens=stops)
    for row, answer in enumerate(naive):
        ends = [i for i, token in enumerate(answer) if token in stops]
        length = ends[0] if ends else NEW
        assert out.lengths[row] == length
        assert out.stopped[row] == bool(ends)
        np.testing.assert_array_equal(out.tokens[row], np.where(np.arange(NEW) < length, answer, 0))
    assert np.any(np.asarray(out.lengths[:3]) < NEW)


def test_the_likeliest_token_is_the_first_of_equals():
    rows = [[1, 3, 3, 0], [np.nan, 0, 1, 0], [0, np.inf, 0, np.inf], [-np.inf] * 4]
    token, highest = likeliest(jnp.array(rows, jnp.float32))
    np.testing.assert_array_equal(token, [1, 3, 1, 0])  # some token of the vocabulary where there is none
    np.testing.assert_array_equal(highest, [3, np.nan, np.inf, -np.inf])


def frequencies(logits, draws=20_000, **settings):
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    tokens = sample(many, Sampling(**settings), jax.random.key(0))
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / draws


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        ({"temperature": 2.0}, PROBABILITIES**0.5 / np.sum(PROBABILITIES**0.5)),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_k": 99}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_distribution_of_samples(settings, want):
    got = frequencies(np.log(PROBABILITIES), **settings)
    np.testing.assert_allclose(got, want, atol=0.015)  # four standard deviations of 20,000 draws
    np.testing.assert_array_equal(got[np.asarray(want) == 0], 0)


def test_samples_depend_on_the_key_and_the_step(tiny_config, tiny_base):
    draw = fast_jit(
        lambda key: (
            jaxsteer.generate(
                Model(tiny_config),
                tiny_base,
                {},
                prompts("right"),
                key,
                max_new_tokens=NEW,
                stop_tokens=(),
                sampling=Sampling(temperature=5.0),
            ).tokens
        )
    )
    first, again, other = (np.asarray(draw(jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert len(np.unique(first[:3])) > NEW


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_raises(settings):
    with pytest.raises(ValueError, match="sampling"):
        Sampling(**settings)


def test_impossible_requests_raise(tiny_config, tiny_base):
    ask = lambda **rest: generate(
        Model(tiny_config), tiny_base, {}, make_batch(np.ones((1, 2), int)), stop_tokens=(), **rest
    )
    with pytest.raises(ValueError, match="max_new_tokens"):
        ask(max_new_tokens=0)
    with pytest.raises(ValueError, match="key"):
        ask(max_new_tokens=1, sampling=Sampling(temperature=1.0))
