"""Weights to steering and back: planted trees are found again, later blocks make up for earlier ones."""

import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_oracle import fine_tuned
from tiny import fast_jit, layouts, random_steering, run

from jaxsteer import LinearSteering, Model, NonlinearSteering, Slot, make_batch
from jaxsteer.io import load_model
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import Network
from jaxsteer.theory.compare import compare_networks, means, measure, totals
from jaxsteer.theory.conversion import FitSettings, plan_of, to_lora, to_steering
from jaxsteer.theory.distillation import distill

pytestmark = pytest.mark.xdist_group("conversion")  # the tests share compiled programs


@pytest.fixture(scope="module")
def base(tiny_config, tiny_base):
    return Network(Model(tiny_config), tiny_base, {})


packed_batch = fast_jit(make_batch)


def token_batches(vocab, count, seed=0):
    """Packed rows, two examples each, the last tokens of the second supervised; one row of padding at its end."""
    draw = np.random.default_rng(seed)
    segments = np.repeat([[1, 2]], 16, axis=1).reshape(1, 32).repeat(8, axis=0)
    segments[-1, 24:] = 0
    weights = np.zeros((8, 32), np.float32)
    weights[:, 12:16] = weights[:, 20:24] = 1
    return [packed_batch(draw.integers(3, vocab, (8, 32)), segments, weights) for _ in range(count)]


@pytest.fixture(scope="module")
def batches(tiny_config):
    return token_batches(tiny_config.vocab_size, 4)


@pytest.fixture(scope="module")
def held_out(tiny_config):
    return token_batches(tiny_config.vocab_size, 1, seed=9)


def planted(base, method, scale):
    """The base steered by a known tree: D reads the stream at about unit size, U writes a tenth of it."""
    plan = (Slot("planted", method, ("block",)),)
    params = random_steering(plan, base.model.config, seed=3, scale=scale)
    return Network(replace(base.model, plan=plan), base.base, params)


def kl(tuned, network, batches):
    return means(measure(tuned, network, batches, "all")).kl


PLANTED = (
    pytest.param(LinearSteering(rank=4), id="linear"),
    pytest.param(NonlinearSteering(rank=4), id="nonlinear", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("method", PLANTED)
def test_a_planted_tree_is_found(method, base, batches, held_out):
    tuned = planted(base, method, 0.12)
    form = "linear" if isinstance(method, LinearSteering) else "nonlinear"
    found = to_steering(tuned, base, batches, FitSettings(form, rank=4, ridge=1e-9))
    assert kl(tuned, base, held_out) > 0.05
    assert kl(tuned, found.network, held_out) < 1e-3
    assert np.max(found.unexplained) < 1e-2
    assert found.network.model.plan == plan_of(form, 4)
    run(found.network.model, base.base, found.network.steering, held_out[0])  # an ordinary tree
    # Too few directions leave what they cannot reach; the mean shift leaves most.
    less = to_steering(tuned, base, batches, FitSettings(form, rank=1, ridge=1e-9))
    fixed = to_steering(tuned, base, batches, FitSettings("fixed"))
    assert kl(tuned, fixed.network, held_out) > kl(tuned, less.network, held_out) > 1e-3


@pytest.fixture(scope="module")
def tuned(tiny_config, tiny_base):
    return fine_tuned(tiny_config, tiny_base)


@pytest.mark.slow
def test_later_blocks_make_up_for_earlier_ones(tuned, base, batches):
    """Fitted to the increments of the fine-tuned stream instead, errors pile up."""
    settings = FitSettings("affine", rank=4)
    streamed = to_steering(tuned, base, batches, settings)
    alone = [to_steering(tuned, base, batches, replace(settings, layers=(layer,))) for layer in range(4)]
    # Each fitted as if it were the only one: the shift of the layers before it is counted again and again.
    piled = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(each.network.steering for each in alone))
    plain = Network(streamed.network.model, base.base, piled)
    ours, theirs, before = (kl(tuned, n, batches) for n in (streamed.network, plain, base))
    assert ours < 0.7 * before
    assert ours < theirs


@pytest.mark.slow
def test_steering_at_one_layer_only(tuned, base, batches):
    found = to_steering(tuned, base, batches, FitSettings("affine", rank=4, layers=(3,)))
    (steer, _) = found.network.model.plan
    assert steer.layers == (3,)
    assert found.network.steering["steer"]["block"]["D"].shape == (1, 4, 32)
    assert kl(tuned, found.network, batches) < kl(tuned, base, batches)


class Stream:
    """Batches that exist while they are looked at, and the most bytes that any of them found in memory."""

    def __init__(self, vocab, count):
        self.vocab, self.count, self.most = vocab, count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError(i)
        self.most = max(self.most, sum(array.nbytes for array in jax.live_arrays()))
        return jax.tree.map(lambda leaf: jnp.asarray(np.tile(leaf, (4, 1))), token_batches(self.vocab, 1, seed=i)[0])


@pytest.mark.slow
def test_flat_conversions_are_the_same(tuned, base, batches):
    settings = FitSettings("affine", rank=4)
    one, other = (to_steering(tuned, base, batches, settings, flat=flat).network.steering for flat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), one, other)


def test_flat_conversions_do_not_grow_with_the_tokens(tuned, base):
    """5 thousand tokens and 50 thousand: 5 and 50 batches of 32 rows of 32."""
    settings = FitSettings("fixed", layers=(0,))

    def most(count, flat):
        gc.collect()
        before = sum(array.nbytes for array in jax.live_arrays())
        stream = Stream(base.model.config.vocab_size, count)
        to_steering(tuned, base, stream, settings, flat=flat)
        return stream.most - before

    few, many = most(5, True), most(50, True)
    assert many <= 1.01 * few
    assert most(5, False) > few + 3.5 * 2 * 32 * 32 * 32 * 4  # two streams of each token


@pytest.mark.slow
def test_distillation_lowers_the_divergence_further(tuned, base, batches):
    start = to_steering(tuned, base, batches, FitSettings("linear", rank=2)).network
    done = distill(tuned, start, batches, steps=60, lr=0.1)
    assert done.kl.shape == (60,)
    assert kl(tuned, done.network, batches) < 0.8 * kl(tuned, start, batches)
    assert kl(tuned, done.network, batches) == pytest.approx(float(np.mean(done.kl[-4:])), rel=0.1)
    assert (done.before, done.after) == pytest.approx([kl(tuned, each, batches) for each in (start, done.network)])
    # Steps that are too large leave it as it was.
    failed = distill(tuned, start, batches, steps=3, lr=30.0)
    assert failed.after > failed.before
    assert failed.network is start


def test_a_lora_is_found_for_steering(base, batches):
    """Steering that a weight update can follow, since it reads what the MLP writes, and the update that did it."""
    steered = planted(base, NonlinearSteering(rank=2), 0.1)
    found = to_lora(steered, base, batches, rank=16)
    assert kl(steered, found.network, batches) < 0.5 * kl(steered, base, batches)
    assert np.all(found.unexplained < 1)
    (slot,) = found.network.model.plan
    assert slot.sites == ("mlp.down",)
    # A model that differs by such an update itself is met exactly.
    again = to_lora(found.network, base, batches, rank=16, ridge=1e-9)
    assert kl(found.network, again.network, batches) < 1e-3


compare = fast_jit(compare_networks, static_argnames="where")


def test_comparisons_count_what_is_asked(base, tuned, batches):
    batch = batches[0]
    found = compare(tuned, base, batch)
    out = [np.asarray(run(n.model, n.base, {}, batch).hidden @ n.base["head"]["embedding"].T) for n in (tuned, base)]
    p, q = (scipy.special.log_softmax(x, axis=-1) for x in out)
    by_hand = np.sum(np.exp(p) * (p - q), -1)
    counted = np.asarray(found.counted) > 0
    np.testing.assert_allclose(np.asarray(found.kl)[counted], by_hand[counted], rtol=1e-3, atol=1e-5)
    assert counted[:, 11:15].all()
    assert counted.sum() == 8 * 8
    assert not np.any(np.asarray(found.kl)[~counted])
    everything = compare(tuned, base, batch, "all")
    assert np.sum(everything.counted) == 8 * 32 - 8  # no padding
    assert not np.any(np.asarray(everything.right)[:, 15])  # after an example's end
    same = means(totals(compare(tuned, tuned, batch, "all"), batch))
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.agreement == 1
    # A model asked for what it says itself is always right.
    tokens, weights = np.array(batch.tokens), np.zeros((8, 32), np.float32)
    tokens[:, 15], weights[:, 15] = np.argmax(out[0], -1)[:, 14], 1
    one = packed_batch(tokens, batch.segments, weights)
    sums = totals(compare(tuned, tuned, one), one)
    assert (sums.solved, sums.examples) == (8, 8)
    with pytest.raises(ValueError, match="answers or all, got 'some'"):
        compare_networks(tuned, base, batch, "some")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, golden):
    """Packed rows of any family: a planted tree is found, a LoRA for it helps."""
    loaded = load_model(golden / ("tiny_llama" if name == "llama" else f"families/{name}"))
    base = Network(Model(loaded.config), loaded.base, {})
    tuned = planted(base, LinearSteering(rank=4), 0.12)
    batches = token_batches(loaded.config.vocab_size, 6)
    found = to_steering(tuned, base, batches, FitSettings("linear", rank=4, ridge=1e-9))
    assert kl(tuned, found.network, batches) < 1e-3 < kl(tuned, base, batches)
    lora = to_lora(tuned, base, batches, rank=8)
    if loaded.config.pre_norm:  # where every branch is normalised before it is added, nearer streams need not mean this
        assert kl(tuned, lora.network, batches) < kl(tuned, base, batches)
    packed = layouts(loaded.config.vocab_size)["packed"][0]
    assert means(measure(tuned, found.network, [packed], "all")).agreement > 0.9


def test_what_cannot_be_converted_is_refused(base, tuned, batches, tiny_config):
    with pytest.raises(ValueError, match=r"'steer' at 'block': rank 33 .* between 1 and 32"):
        to_steering(tuned, base, batches, FitSettings("linear", rank=33))
    with pytest.raises(ValueError, match=r"rank 40 .* from 48 to 32"):
        to_lora(tuned, base, batches, rank=40)
    with pytest.raises(ValueError, match="unknown form 'cubic' of steering: fixed, linear"):
        to_steering(tuned, base, batches, FitSettings("cubic"))
    with pytest.raises(ValueError, match="at least one batch"):
        to_steering(tuned, base, [], FitSettings())
    deeper = Network(Model(replace(tiny_config, layers=6)), base.base, {})
    with pytest.raises(ValueError, match="layers is 4 in one and 6 in the other"):
        to_steering(deeper, base, batches)
    with pytest.raises(ValueError, match="needs batches, a network with steering"):
        distill(tuned, base, batches, steps=3)
