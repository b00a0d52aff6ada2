"""Scores of continuations against forward passes over the whole text, and the divergence against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import Prompt, prompts
from tiny import random_steering, rows, run, slot_of

from jaxsteer import Model, Positions
from jaxsteer.inference.likelihood import score_continuations
from jaxsteer.models.transformer import logits_of, output_embedding
from jaxsteer.theory.compare import kl_from_base

WIDTH = 36


@pytest.fixture(scope="module")
def steered(tiny_config):
    kinds = ("first:2+last:2", "last", "completion")
    plan = tuple(slot_of("linear", tiny_config, slot=k, positions=Positions.parse(k), sites=("block",)) for k in kinds)
    return Model(tiny_config, plan), random_steering(plan, tiny_config)


def test_scores_are_those_of_whole_texts(steered, tiny_base):
    model, steering = steered
    draw = np.random.default_rng(1)
    asked = prompts(61, 9)
    texts = [[draw.integers(3, 61, draw.integers(1, 9)).astype(np.int32) for _ in range(2 + i % 2)] for i in range(9)]
    scored = dict(score_continuations(model, tiny_base, steering, asked, texts, batch_size=4))
    assert sorted(scored) == list(range(9))
    lengths, greedy = set(), 0
    for i, (prompt, continuations) in enumerate(zip(asked, texts, strict=True)):
        for text, score in zip(continuations, scored[i], strict=True):
            n = len(prompt.ids)
            ids = np.concatenate([prompt.ids, text])
            batch, _ = rows([(0, [(0, (ids, np.concatenate([prompt.weights, np.ones(len(text))])))])], WIDTH)
            logp = jax.nn.log_softmax(
                logits_of(run(model, tiny_base, steering, batch).hidden[0], output_embedding(tiny_base))
            )
            each = logp[jnp.arange(n - 1, len(ids) - 1), text]
            np.testing.assert_allclose(score.log_probability, each.sum(), atol=1e-4)
            assert score.greedy == bool(jnp.all(each == logp[n - 1 : len(ids) - 1].max(axis=-1)))
            assert score.tokens == len(text)
            lengths.add(n)
            greedy += score.greedy
    assert len(lengths) > 5


def test_the_likeliest_token_is_greedy(steered, tiny_base):
    model, steering = steered
    asked = prompts(61, 1)
    every = [np.array([token], np.int32) for token in range(61)]
    [(_, scores)] = score_continuations(model, tiny_base, steering, asked, [every])
    assert sum(score.greedy for score in scores) == 1
    assert max(scores).greedy
    np.testing.assert_allclose(sum(np.exp(score.log_probability) for score in scores), 1, rtol=1e-4)


def test_empty_texts_raise(steered, tiny_base):
    model, steering = steered
    for continuations in ([], [np.zeros(0, np.int32)]):
        with pytest.raises(ValueError, match="here: a prompt"):
            list(score_continuations(model, tiny_base, steering, prompts(61, 1), [continuations]))
    nothing = Prompt(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32), 0)
    with pytest.raises(ValueError, match="here: a prompt"):
        list(score_continuations(model, tiny_base, steering, [nothing], [[np.array([1])]]))


def test_divergence_by_its_definition(steered, tiny_base, tiny_config):
    model, steering = steered
    draw = np.random.default_rng(2)
    examples = [(draw.integers(3, 61, n), np.arange(n) >= 4) for n in (12, 8)]
    batch, _ = rows([(0, [(i, each)]) for i, each in enumerate(examples)], 12)
    got = np.asarray(kl_from_base(model, tiny_base, steering, batch))
    zeros = jax.tree.map(jnp.zeros_like, steering)
    p, q = (
        np.asarray(
            jax.nn.log_softmax(logits_of(run(model, tiny_base, s, batch).hidden, output_embedding(tiny_base))),
            np.float64,
        )
        for s in (zeros, steering)
    )
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    np.testing.assert_allclose(got, [kl[0, 3:11].mean(), kl[1, 3:7].mean()], rtol=1e-4)
    assert got.min() > 1e-3
    np.testing.assert_array_equal(kl_from_base(model, tiny_base, zeros, batch), [0, 0])
