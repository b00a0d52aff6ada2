"""The loss against a naive one, and the promise that no logits are computed for unsupervised positions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, fast_jit, naive_loss

from jaxsteer import make_batch
from jaxsteer.objectives import supervised, tokens
from jaxsteer.objectives.supervised import cross_entropy
from jaxsteer.objectives.tokens import Targets, next_tokens, scan_counted, token_nll, total_weight

B, T, D, V = 2, 20, 6, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five positions of each row at a time, so that T = 20 is four chunks and 18 does not divide."""
    monkeypatch.setattr(tokens, "CPU_CHUNK_TOKENS", 10)
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 10)


def problem(T=T, share=0.5, seed=0):
    draw = np.random.default_rng(seed)
    hidden, head = draw.standard_normal((B, T, D)), draw.standard_normal((V, D))
    weights = draw.uniform(0.5, 2, (B, T)) * (draw.uniform(size=(B, T)) < share)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    return f32(hidden), f32(head), Targets(jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32), f32(weights))


@pytest.mark.parametrize("length", [20, 18, 3])
def test_value_and_gradients(length):
    hidden, head, targets = problem(length)
    both = lambda f: fast_jit(jax.value_and_grad(f, (0, 1)))(hidden, head, targets)
    close(both(cross_entropy), both(naive_loss), 1e-5)


def test_second_derivatives():
    hidden, head, targets = problem()
    tangent = (problem(seed=1)[0], problem(seed=2)[1])

    def jvp_of_grad(f):
        grad = lambda h, w: jax.grad(f, (0, 1))(h, w, targets)
        return fast_jit(lambda: jax.jvp(grad, (hidden, head), tangent))()

    close(jvp_of_grad(cross_entropy), jvp_of_grad(naive_loss), 1e-5)
    reverse = lambda f: fast_jit(jax.grad(lambda h: jnp.vdot(jax.grad(f)(h, head, targets), tangent[0])))(hidden)
    close(reverse(cross_entropy), reverse(naive_loss), 1e-5)


def test_forward_derivative():
    hidden, head, targets = problem()
    tangent = (problem(seed=1)[0], problem(seed=2)[1])
    jvp = lambda f: fast_jit(lambda: jax.jvp(lambda h, w: f(h, w, targets), (hidden, head), tangent))()
    close(jvp(cross_entropy), jvp(naive_loss), 1e-5)


def test_token_nll_is_the_log_softmax():
    hidden, head, targets = problem()
    got = token_nll(hidden[0], head, targets.tokens[0])
    logp = jax.nn.log_softmax(hidden[0] @ head.T)
    close(got, -logp[jnp.arange(T), targets.tokens[0]], 1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_temperature(softcap):
    """Values and gradients in both arguments; a soft-cap comes before the temperature."""
    hidden, head, targets = problem()
    hidden, ids = hidden[0], targets.tokens[0]

    def naive(hidden, head):
        logits = hidden @ head.T
        capped = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return -jnp.sum(jax.nn.log_softmax(capped / 0.6)[jnp.arange(T), ids])

    ours = lambda hidden, head: jnp.sum(token_nll(hidden, head, ids, softcap, 0.6))
    both = lambda f: fast_jit(jax.value_and_grad(f, (0, 1)))(hidden, head)
    close(both(ours), both(naive), 2e-5)


def test_nothing_supervised_is_zero():
    hidden, head, targets = problem(share=0.0)
    value, grads = fast_jit(jax.value_and_grad(cross_entropy, (0, 1)))(hidden, head, targets)
    assert value == 0
    assert not any(np.any(g) for g in grads)


def test_a_fully_masked_row():
    hidden, head, targets = problem(share=1.0)
    masked = targets._replace(weights=targets.weights.at[0].set(0))
    grads = fast_jit(jax.grad(cross_entropy))(hidden, head, masked)
    close(grads, fast_jit(jax.grad(naive_loss))(hidden, head, masked), 1e-5)
    assert not np.any(grads[0])


def test_weights_below_zero_count_with_their_sign():
    hidden, head, targets = problem()
    signed = targets._replace(weights=targets.weights * jnp.where(jnp.arange(T) % 2, 1.0, -0.5)[None])
    both = lambda loss: fast_jit(jax.value_and_grad(loss, (0, 1)))(hidden, head, signed)
    close(both(cross_entropy), both(naive_loss), 1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_unsupervised_positions_never_meet_the_vocabulary(poison):
    hidden, head, targets = problem()
    poisoned = jnp.where(targets.weights[..., None] > 0, hidden, poison)
    both = fast_jit(jax.value_and_grad(cross_entropy, (0, 1)))
    got = both(poisoned, head, targets)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
    close(got, both(hidden, head, targets), 0)


@pytest.mark.parametrize(("counts", "chunks"), [((0, 0), 0), ((5, 5), 1), ((9, 1), 1), ((9, 2), 2), ((20, 0), 2)])
def test_chunks_without_supervision_are_not_computed(counts, chunks, monkeypatch):
    hidden, head, targets = problem(share=1.0)
    keep = np.stack([np.random.default_rng(0).permutation(T) < count for count in counts])
    targets = targets._replace(weights=targets.weights * keep.astype(np.float32))
    visits = []

    def counted(*args):
        jax.debug.callback(lambda: visits.append(1))
        return token_nll(*args)

    monkeypatch.setattr(supervised, "token_nll", counted)
    got = jax.jit(lambda h: cross_entropy(h, head, targets))(hidden)
    jax.effects_barrier()
    assert len(visits) == chunks
    close(got, naive_loss(hidden, head, targets), 1e-5)


@pytest.mark.parametrize("width", [1, 4, 10, 16])
def test_the_scan_visits_every_counted_position_once_and_no_chunk_without_one(width):
    counted = np.random.default_rng(0).random((3, 10)) < np.array([[0.2], [0.7], [0.0]])
    row = np.arange(3)[:, None]

    def visit(carry, index, mask):
        visits, seen = carry
        chex.assert_shape([index, mask], (3, width))
        return visits + 1, seen.at[row, index].add(mask.astype(jnp.int32))

    start = jnp.zeros((), jnp.int32), jnp.zeros((3, 10), jnp.int32)
    visits, seen = fast_jit(lambda counted: scan_counted(visit, start, counted, width))(counted)
    np.testing.assert_array_equal(seen, counted)
    assert visits == -(-counted.sum(axis=1).max() // width)


def test_the_logits_of_all_positions_never_exist():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    targets = Targets(jax.ShapeDtypeStruct((B, 1000), jnp.int32), shape(B, 1000))
    lowered = lambda f: jax.jit(jax.grad(f, (0, 1))).lower(shape(B, 1000, D), shape(V, D), targets).as_text()
    assert f"2x1000x{V}" in lowered(naive_loss)  # the check finds them where they exist
    text = lowered(cross_entropy)
    assert f"10x{V}x" in text
    for whole in (f"2x1000x{V}", f"2000x{V}", f"1000x{V}"):
        assert whole not in text


def test_targets_stay_inside_their_example():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    weights = np.array([[0, 1, 0.5, 1, 2, 3]], np.float32)
    batch = make_batch(tokens, np.array([[1, 1, 1, 2, 2, 0]]), weights)
    targets = next_tokens(batch)
    chex.assert_shape(targets, (1, 6))
    # Neither the first token of the second example nor padding is predicted.
    np.testing.assert_array_equal(targets.weights, [[1, 0.5, 0, 2, 0, 0]])
    np.testing.assert_array_equal(targets.tokens[0, [0, 1, 3]], [6, 7, 9])
    assert total_weight(batch) == 3.5


def test_mismatched_arrays_raise():
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 4\)"):
        make_batch(np.zeros((1, 3), int), np.zeros((1, 4), int))
    with pytest.raises(ValueError, match="shape"):
        make_batch(np.zeros(3, int))
