"""Which weights a model has: one model in four forms is one model, the same model after a short training is another."""

import itertools
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsteer import Model, make_batch, mean_loss
from jaxsteer.io import WeightSample, compare_samples, load_model, sample_weights, save_hf
from jaxsteer.io.rounding import is_known, may_be_one
from jaxsteer.io.sample import sample_from_json
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import init_base

# Blocks of 32 need widths that 32 divides.
CONFIG = ModelConfig(96, 64, 3, 4, 2, 16, 96, tied_head=True, max_length=64)
FORMS = ("F32", "BF16", "Q8_0", "Q4_1")


def base_of(seed):
    """Random weights of the usual size; norms near 1."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_base(CONFIG, key), jax.random.key(0))
    scale = lambda path: 1.0 if path[-1].key == "scale" else 0.0
    return jax.tree.map_with_path(lambda path, leaf: np.float32(scale(path) + draw.normal(0, 0.05, leaf.shape)), shapes)


def moved(base, size, seed=0):
    """What the first steps of Adam do: every weight moves by about the sum of the learning rates."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(leaf + size * draw.uniform(-1, 1, leaf.shape)), base)


_gradient = jax.jit(jax.grad(mean_loss, argnums=1), static_argnums=0)


def trained(config, base, lr, seed=0):
    """Yield the base after 1, 2, ... steps of Adam on random text."""
    optimizer = optax.adam(lr)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(base)
    for step in itertools.count():
        tokens = jax.random.randint(jax.random.key(1000 * seed + step), (4, 32), 0, config.vocab_size)
        batch = make_batch(tokens, weights=jnp.ones(tokens.shape))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(_gradient(Model(config), base, {}, batch), state)
            base = optax.apply_updates(base, updates)
        yield jax.tree.map(np.asarray, base)


def fine_tuned(base, steps, lr, seed=0):
    """The base after a few of these steps."""
    return next(itertools.islice(trained(CONFIG, base, lr, seed), steps - 1, None))


@pytest.fixture
def in_forms(tmp_path, write_gguf):
    """(base) -> the model's sample in each of FORMS, through files as people publish them."""

    def write(base, name="model"):
        folders = {"F32": tmp_path / f"{name}-F32", "BF16": tmp_path / f"{name}-BF16"}
        save_hf(folders["F32"], CONFIG, base, "llama")
        save_hf(folders["BF16"], CONFIG, jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), base), "llama")
        files = {
            kind: write_gguf(folders["F32"], CONFIG, kind, name=f"{name}-{kind}.gguf") for kind in ("Q8_0", "Q4_1")
        }
        return {form: sample_weights(path) for form, path in (folders | files).items()}

    return write


def test_one_model_in_four_forms_and_the_same_after_a_short_training(in_forms):
    base = base_of(0)
    samples, others = in_forms(base), in_forms(moved(base, 5e-4), "tuned")
    for form in FORMS:
        assert samples[form].forms.keys() == {form, "F32"} - ({"F32"} if form == "BF16" else set())
    for here, there in itertools.product(FORMS, FORMS):
        one = compare_samples(samples[here], samples[there])
        assert one.verdict == ("same" if here == there else "consistent"), (here, there, one.reason)
        other = compare_samples(others[here], samples[there])
        assert other.verdict == "another", (here, there, other.reason)
        assert "sampled parts of the weights differ by more than rounding" in other.reason


@pytest.mark.slow
@pytest.mark.parametrize("master", ["bfloat16", "float32"])
def test_the_rate_of_detection(in_forms, capsys, master):
    """Prints docs/compatibility.md's table: short trainings that are noticed, for each pair of forms.

    `master`: in which the base was made; what is published in bfloat16 loses nothing there.
    """
    counts = {}
    settings = [(steps, lr) for lr in (1e-6, 1e-5, 1e-4) for steps in (1, 5)]
    for seed in range(8):
        base = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(master)).astype(np.float32), base_of(seed))
        samples = in_forms(base, f"{seed}")
        for here, there in itertools.product(FORMS, FORMS):
            assert compare_samples(samples[here], samples[there]).verdict in ("same", "consistent")
        for steps, lr in settings:
            others = in_forms(fine_tuned(base, steps, lr, seed), f"{seed}-{steps}-{lr}")
            for here, there in itertools.product(FORMS, FORMS):
                kind = "same form" if here == there else " and ".join(sorted((here, there)))
                found = compare_samples(others[here], samples[there]).verdict == "another"
                counts.setdefault((steps, lr), {}).setdefault(kind, []).append(found)
    assert all(sum(cells["same form"]) == len(cells["same form"]) for cells in counts.values())
    assert all(sum(cell) == len(cell) for cell in counts[5, 1e-4].values())
    with capsys.disabled():
        print(f"\n| master in {master} | " + " | ".join(counts[settings[0]]) + " |")
        for (steps, lr), cells in counts.items():
            print(f"| {steps} steps at {lr:g} | " + " | ".join(f"{sum(c)}/{len(c)}" for c in cells.values()) + " |")


@pytest.mark.slow
def test_the_rate_of_detection_in_a_real_model(smollm2, smollm2_path, tmp_path, capsys):
    """Prints docs/compatibility.md's figures: Q4_1 against exports in two forms of what 1, 3 and 5 steps made of it."""
    stored, found = sample_weights(smollm2_path), {}

    def compared(base, form):
        folder = tmp_path / form
        dtype = jnp.dtype({"F32": "float32", "BF16": "bfloat16"}[form])
        save_hf(folder, smollm2.config, jax.tree.map(lambda leaf: np.asarray(leaf, dtype), base), "llama")
        return compare_samples(sample_weights(folder), stored)

    for form in ("F32", "BF16"):
        assert compared(smollm2.base, form).verdict == "consistent"
    for lr in (1e-6, 5e-6, 1e-5):
        for steps, base in zip(range(1, 6), trained(smollm2.config, smollm2.base, lr), strict=False):
            for form in ("F32", "BF16") if steps % 2 else ():
                found[lr, steps, form] = compared(base, form)
    with capsys.disabled():
        for (lr, steps, form), comparison in found.items():
            print(f"\n{steps} steps at {lr:g}, {form}: {comparison.verdict}; {comparison.reason}", end="")
    assert all(comparison.verdict == "another" for (_, _, form), comparison in found.items() if form == "F32")


def blocks_of_all_sizes(count):
    """Blocks [count, 32]: ordinary, tiny, huge, of one sign, with an outlier, constant, zero."""
    draw = np.random.default_rng(0)
    blocks = draw.normal(0, 1, (count, 32)) * 10.0 ** draw.uniform(-6, 3, (count, 1))
    blocks[0::7] = np.abs(blocks[0::7])
    blocks[1::7, 5] *= 40
    blocks[2::7] = blocks[2::7, :1]
    blocks[3] = 0
    return blocks.astype(np.float32)


def through(form, values):
    """The values as they come back from a file in this form."""
    kind = gguf.GGMLQuantizationType[form]
    return values if form == "F32" else gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).astype("f4")


KNOWN = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")


@pytest.mark.parametrize("master", ["F32", "F16", "BF16"])
def test_no_form_is_taken_for_another_model(master):
    """Whatever the weights were made in, and whatever fp16 file a converter went through."""
    blocks = through(master, blocks_of_all_sizes(14))
    stored = {(form, way): through(form, through(way, blocks)) for form in KNOWN for way in ("F32", "F16")}
    for (form, _), (other, _) in itertools.combinations(stored, 2):
        if form != other:
            for one, two in zip(stored[form, "F32"], stored[other, "F16"], strict=True):
                assert may_be_one(one, form, two, other), (form, other, one, two)


def test_half_a_step_is_the_limit():
    """A value a little beyond what rounding explains is noticed, in each of the forms."""
    block = np.random.default_rng(1).normal(0, 0.05, (1, 32)).astype(np.float32)
    for form in KNOWN[1:]:
        (stored,) = through(form, block)
        at = int(np.argsort(np.abs(block[0]))[16])
        step = {"F16": 2.0**-10, "BF16": 2.0**-7}.get(form, 0) * abs(stored[at])
        step = step or float(np.ptp(stored)) / {"Q8_0": 100, "Q5_0": 31, "Q5_1": 31}.get(form, 15)
        assert may_be_one(block[0], "F32", stored, form)
        for size, alike in ((0.0, True), (1.2 * step, False)):
            changed = stored.copy()
            changed[at] = stored[at] + size
            assert may_be_one(changed, "F32", stored, form) == alike, form
    assert not is_known("Q4_K")
    assert not is_known("Q4_1 (imatrix)")


def test_what_cannot_be_compared_is_said(in_forms):
    """K-quants, whose rounding is not a step: undecided where all norms agree, another model where one does not."""
    base = base_of(0)
    samples = in_forms(base)
    blocks = tuple(
        b._replace(form="Q4_K", values=b.values * 1.01) if len(b.at) == 2 else b for b in samples["F32"].blocks
    )
    other = WeightSample("x", {"Q4_K": 20, "F32": 7}, blocks)
    found = compare_samples(other, samples["BF16"])
    assert found.verdict == "undecided"
    assert "stored as Q4_K and F32 here, as BF16 there, which cannot be compared" in found.reason
    norms = tuple(b._replace(values=b.values * 1.02) if len(b.at) == 1 else b for b in blocks)
    assert compare_samples(WeightSample("x", other.forms, norms), samples["BF16"]).verdict == "another"


def test_a_sample_is_the_same_after_json_and_in_every_family(family_files):
    for family in ("llama", "gpt2", "phi3", "gemma3"):
        folder, file = family_files(family)
        one, other = sample_weights(folder), sample_weights(file)
        assert {block.place: block.values.tolist() for block in one.blocks}.keys() == {b.place for b in other.blocks}
        assert compare_samples(one, other).verdict == "same", family
        back = sample_from_json(json.loads(json.dumps(one.to_json())))
        assert back.to_json() == one.to_json()
        assert load_model(folder).sample.digest == one.digest
    for damage in ({"values": "AAAA"}, {"places": 3}, {"digest": None, "forms": []}, {"values": "ä"}):
        with pytest.raises(ValueError, match="weight sample: "):
            sample_from_json(one.to_json() | damage)
