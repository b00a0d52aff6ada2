"""Directions from pairs against transcriptions of their definitions, and what a tiny model's stream says of texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import Prompt

from jaxsteer import Model, Positions, forward, validate_plan
from jaxsteer.batches import make_batch, stack_rows
from jaxsteer.contrast import (
    Directions,
    contrast_directions,
    contrast_steering,
    project_on,
    read_stream,
    token_projections,
    told_apart,
)


@pytest.fixture(scope="module")
def sides():
    """[L, N, D] of 9 pairs in 3 layers, about a hundred from 0."""
    draw = np.random.default_rng(0)
    shared = 100 + draw.normal(size=(3, 9, 6))
    shift = draw.normal(size=(3, 1, 6)) + 0.3 * draw.normal(size=(3, 9, 6))
    return (shared + shift).astype(np.float32), shared.astype(np.float32)


@pytest.mark.parametrize("direction", ["mean", "pca", "pca_pairs"])
def test_directions_are_their_definitions(sides, direction):
    found = contrast_directions(*map(jnp.asarray, sides), direction)
    for layer, (positive, negative) in enumerate(zip(*(side.astype(np.float64) for side in sides), strict=True)):
        d = positive - negative
        mean = d.mean(axis=0)
        expected = mean
        if direction != "mean":
            about = d - mean if direction == "pca" else np.concatenate([d, -d])
            u = np.linalg.eigh(about.T @ about)[1][:, -1]
            expected = np.linalg.norm(mean) * u * np.sign(u @ mean)
        np.testing.assert_allclose(found.vectors[layer], expected, atol=2e-4)
        np.testing.assert_allclose(found.centres[layer], (positive + negative).mean(axis=0) / 2, rtol=1e-5)


def test_the_means_of_the_sides_are_at_one_and_minus_one(sides):
    directions = contrast_directions(*map(jnp.asarray, sides))
    positive, negative = (project_on(directions, jnp.asarray(side)) for side in sides)
    np.testing.assert_allclose(positive.mean(axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(negative.mean(axis=1), -1, atol=1e-3)


def test_sides_are_told_apart_by_their_order(sides):
    directions = contrast_directions(*map(jnp.asarray, sides))
    positive, negative = map(jnp.asarray, sides)
    mixed = (
        jnp.concatenate([positive[:, :6], negative[:, 6:]], axis=1),
        jnp.concatenate([negative[:, :6], positive[:, 6:]], axis=1),
    )
    np.testing.assert_allclose(told_apart(directions, positive, negative), 1)
    np.testing.assert_allclose(told_apart(directions, *mixed), 6 / 9, rtol=1e-6)


def test_no_direction_projects_to_zero(sides):
    nothing = Directions(jnp.zeros((3, 6)), jnp.zeros((3, 6)))
    assert not project_on(nothing, jnp.asarray(sides[0])).any()


@pytest.mark.parametrize(
    ("shapes", "direction", "message"),
    [
        (((3, 1, 6), (3, 1, 6)), "mean", "at least 2 pairs, got 1"),
        (((3, 4, 6), (3, 5, 6)), "mean", "one shape"),
        (((3, 4, 6), (3, 4, 6)), "median", "use mean, pca or pca_pairs"),
    ],
)
def test_what_gives_no_direction_is_refused(shapes, direction, message):
    with pytest.raises(ValueError, match=message):
        contrast_directions(*(jnp.zeros(shape) for shape in shapes), direction)


def text(ids, answer):
    weights = np.zeros(len(ids), np.float32)
    weights[-answer:] = 1
    return Prompt(np.array(ids, np.int32), weights > 0, weights, len(ids) - answer)


@pytest.fixture(scope="module")
def network(tiny_config, tiny_base):
    return Model(tiny_config), tiny_base


@pytest.mark.parametrize("reading", ["last", "all"])
def test_packed_texts_are_read_as_if_alone(network, reading):
    texts = [text([5, 9, 11, 30], 1), text([7, 8, 20, 21, 22], 3), text([40, 3], 1)]
    packed = stack_rows([texts[:2], texts[2:]], 12)
    read = read_stream(*network, jax.tree.map(jnp.asarray, packed), 2, reading)
    assert read.shape == (4, 2, 2, 32)
    assert not read[:, 1, 1].any()
    for each, place in zip(texts, [(0, 0), (0, 1), (1, 0)], strict=True):
        taps = forward(*network, {}, make_batch(each.ids[None]), capture=("block",)).taps["block"][:, 0]
        expected = taps[:, -1] if reading == "last" else taps[:, each.weights != 0].mean(axis=1)
        np.testing.assert_allclose(read[:, place[0], place[1]], expected, rtol=2e-4, atol=2e-5)


def test_an_unknown_reading_is_refused(network):
    with pytest.raises(ValueError, match="last or all, got 'first'"):
        read_stream(*network, make_batch(np.array([[5, 9]])), 1, "first")


def test_steering_moves_the_block_by_the_vector(network, tiny_config):
    model, base = network
    draw = np.random.default_rng(3)
    directions = Directions(*(jnp.asarray(draw.normal(size=(4, 32)), jnp.float32) for _ in range(2)))
    plan, steering = contrast_steering(directions, 2, 1.5)
    validate_plan(plan, tiny_config)
    batch = make_batch(np.array([[5, 9, 11, 30]]))
    stream = lambda plan, steering: forward(Model(tiny_config, plan), base, steering, batch, capture=("block",)).taps[
        "block"
    ]
    moved = stream(plan, steering) - stream((), {})
    assert not moved[:2].any()
    np.testing.assert_allclose(moved[2, 0], np.broadcast_to(1.5 * directions.vectors[2], (4, 32)), rtol=1e-4, atol=1e-5)
    # A step of s · v along v is a projection that grows by 2 s.
    before, after = (
        token_projections(model, base, batch, directions)[2],
        project_on(directions, stream(plan, steering))[2],
    )
    np.testing.assert_allclose(after - before, 3, rtol=1e-3)


def test_only_the_chosen_positions_are_steered(sides):
    plan, _ = contrast_steering(contrast_directions(*map(jnp.asarray, sides)), 1, positions=Positions("completion"))
    assert plan[0].positions == Positions("completion")
    assert plan[0].layers == (1,)


def test_a_layer_that_is_not_there_is_refused(sides):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        contrast_steering(contrast_directions(*map(jnp.asarray, sides)), 3)
