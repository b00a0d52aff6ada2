"""What every objective must satisfy: all methods learn by it, batches in parts, and what must not reach a loss."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from answers import Text, groups, in_rows
from tiny import all_methods, close, fast_jit, layouts, random_steering, slot_of

from jaxsteer import METHODS, Model, Params, init_state, param_labels, partition, train_step
from jaxsteer.groups import Group
from jaxsteer.models.transformer import Network
from jaxsteer.objectives import (
    Distillation,
    Grpo,
    Judged,
    Keeping,
    Kept,
    Kto,
    Pairs,
    Preference,
    Rollouts,
    Taught,
    counted_kl,
    mean_loss,
)
from jaxsteer.objectives.distillation import Predictions, kl_at, predictions
from jaxsteer.objectives.tokens import token_log_probabilities
from jaxsteer.theory.compare import compare_networks, counted_predictions
from jaxsteer.types import Batch

OBJECTIVES = {
    "sigmoid": Preference(beta=0.3, label_smoothing=0.1),
    "bidirectional": Preference(beta=0.3, bidirectional=True),
    "ipo": Preference("ipo", beta=0.3),
    "simpo": Preference("simpo", beta=2.0, margin=0.5),
    "kto": Kto(beta=0.3, undesirable_weight=1.5),
    "tokens": Grpo(0.01, 0.02, beta=0.2, on_policy=False, temperature=0.8),
    "answers": Grpo(beta=0.2, average="answers"),
    "constant": Grpo(average="constant", max_tokens=4),
    "distillation": Distillation(2.0),
    "keeping": Keeping(weight=0.7),
}
ROWS, LENGTH = 4, 64


@pytest.fixture(scope="module")
def inputs(tiny_config):
    """Inputs by class of objective: rows of two groups of two answers with a shared prompt, the last row of one."""
    made = groups(tiny_config.vocab_size, count=2 * ROWS - 1)
    firsts = [group.examples[0] for group in made]
    mixed = [Group((Text(a.prompt, b.answer),)) for a, b in zip(firsts, firsts[1:] + firsts[:1], strict=True)]
    own, away = in_rows(made, 2, LENGTH), in_rows(mixed, 2, LENGTH, trunks=False).batch
    sign = np.array([0, 1, -1], np.float32)[own.member]
    draw = np.random.default_rng(4)
    scores = lambda batch: np.where(batch.weights != 0, draw.normal(-4, 0.5, sign.shape), 0).astype(np.float32)
    divisor = np.zeros_like(sign)
    divisor[:, 0] = 7
    found = {
        Preference: Pairs(own.batch, own.group, sign, scores(own.batch)),
        Kto: Judged(own.batch, sign, scores(own.batch), away, scores(away), np.zeros_like(sign)),
        Grpo: Rollouts(own.batch, 0.7 * sign, scores(own.batch), scores(own.batch), divisor),
        Distillation: Taught(own.batch, own.batch),
        Keeping: Kept(own.batch, away),
    }
    return {kind: jax.tree.map(jnp.asarray, each) for kind, each in found.items()}


def given_to(objective, model, base):
    """The model without its plan, for distillation and for keeping what it was."""
    return Network(Model(model.config), base, {}) if isinstance(objective, Distillation | Keeping) else None


def step(objective, model, base, steering, inputs):
    """A step of plain gradient descent with inputs [B, T] or [M, B, T]: the steering after it, and the metrics."""
    params, tx = Params(base, steering), optax.sgd(0.1)
    trained, frozen = partition(params, param_labels(params, model.plan, train_base=False))
    state = init_state(trained, tx, jax.random.key(1))
    one = fast_jit(partial(train_step, model=model, tx=tx, objective=objective))
    state, metrics = one(state, inputs, frozen, given_to(objective, model, base))
    return state.params.steering, metrics


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method_learns(name, inputs, tiny_config, tiny_base):
    """A plan with a slot of each method: loss and gradients are finite, and each of them moves."""
    objective, plan = OBJECTIVES[name], all_methods(tiny_config, few=True)
    model, steering = Model(tiny_config, plan), random_steering(plan, tiny_config)
    after, metrics = step(objective, model, tiny_base, steering, inputs[type(objective)])
    assert np.isfinite(metrics.loss)
    assert metrics.loss != 0
    assert all(np.isfinite(fact) for fact in metrics.facts.values())
    for method in METHODS:
        far = lambda a, b: 0.0 if a is None else float(np.abs(a - b).max())  # None does not train
        moved = jax.tree.leaves(jax.tree.map(far, after[method], steering[method], is_leaf=lambda leaf: leaf is None))
        assert np.isfinite(moved).all(), method
        assert max(moved) > 0, method


@pytest.fixture(scope="module")
def joint(tiny_config):
    plan = (
        slot_of("linear", tiny_config, sites=("block",)),
        slot_of("lora", tiny_config, slot="l", sites=("mlp.down",)),
    )
    return Model(tiny_config, plan), random_steering(plan, tiny_config)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "bidirectional"])
def test_accumulation_is_one_large_batch(name, inputs, joint, tiny_base):
    """Two microbatches with different numbers of answers; the facts too are means over the whole."""
    objective, whole = OBJECTIVES[name], inputs[type(OBJECTIVES[name])]
    parts = jax.tree.map(lambda field: field.reshape(2, -1, *field.shape[1:]), whole)
    steered = lambda inputs: step(objective, joint[0], tiny_base, joint[1], inputs)
    close(steered(parts), steered(whole), 2e-5)


def summed(objective, model, base, steering, inputs):
    """The summed loss of rows, its gradient, and the divisor."""
    whole = jax.tree.map(lambda field: field[None], inputs)
    ready = objective.prepare(model, base, steering, whole, None)
    micro = jax.tree.map(lambda field: field[0], ready)
    given = given_to(objective, model, base)
    loss = lambda tree: objective(model, base, tree, micro, given, jax.random.key(0), train=True).loss
    return *jax.value_and_grad(loss)(steering), objective.total(ready)


evaluate = fast_jit(summed, static_argnums=(0, 1))


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "kto", "tokens", "answers", "distillation"])
def test_what_no_answer_holds_never_reaches_the_loss(name, inputs, joint, tiny_base):
    """NaN where no token counts, in every float of the inputs but the weights."""
    objective, clean = OBJECTIVES[name], inputs[type(OBJECTIVES[name])]

    def poison(field):
        if isinstance(field, Batch):
            return field
        batch = clean.mismatched if field is getattr(clean, "mismatched_reference", None) else clean.batch
        return jnp.where(batch.weights == 0, jnp.nan, field) if field.dtype == jnp.float32 else field

    keep = ("sign", "divisor", "point")
    dirty = clean._replace(**{n: poison(v) for n, v in clean._asdict().items() if n not in keep})
    got, want = (evaluate(objective, joint[0], tiny_base, joint[1], each) for each in (dirty, clean))
    close(got, want, 0)
    assert want[0] != 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_learn_from(name, inputs, joint, tiny_base):
    """Rows of padding: the loss is 0 and has no gradient, and a step changes nothing."""
    objective = OBJECTIVES[name]
    empty = jax.tree.map(jnp.zeros_like, inputs[type(objective)])
    after, metrics = step(objective, joint[0], tiny_base, joint[1], empty)
    assert metrics.loss == 0
    close(after, joint[1], 0)
    assert not any(metrics.facts.values())


def without(batch, mask):
    return batch._replace(weights=jnp.where(mask, 0, batch.weights))


def test_a_pair_with_an_empty_answer_is_no_pair(inputs, joint, tiny_base):
    """Its tokens count in neither sum nor divisor: as if the whole pair were away."""
    pairs = inputs[Preference]
    first = (pairs.pair == 1) & (jnp.arange(ROWS) == 0)[:, None]
    for name in ("sigmoid", "ipo", "simpo"):
        half, none = (pairs._replace(batch=without(pairs.batch, mask)) for mask in (first & (pairs.sign < 0), first))
        got, want = (evaluate(OBJECTIVES[name], joint[0], tiny_base, joint[1], each) for each in (half, none))
        close(got, want, 1e-6)
        assert got[2] == 2 * ROWS - 2


def test_an_undecided_answer_is_left_out(inputs, joint, tiny_base):
    judged = inputs[Kto]
    first = (judged.batch.segments == 2) & (jnp.arange(ROWS) == 0)[:, None]
    undecided = judged._replace(desirable=jnp.where(first, 0, judged.desirable))
    away = judged._replace(batch=without(judged.batch, first))
    got, want = (evaluate(OBJECTIVES["kto"], joint[0], tiny_base, joint[1], each) for each in (undecided, away))
    close(got, want, 1e-6)
    assert got[2] == 4 * ROWS - 3


@pytest.mark.parametrize("name", ["simpo", "kto", "tokens", "answers"])
def test_a_first_token_never_counts(name, inputs, joint, tiny_base):
    """Nothing predicts it: a weight there changes nothing."""
    objective, clean = OBJECTIVES[name], inputs[type(OBJECTIVES[name])]
    segments = clean.batch.segments
    first = (segments > 0) & (segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0))))
    marked = clean._replace(batch=clean.batch._replace(weights=jnp.where(first, 1.0, clean.batch.weights)))
    got, want = (evaluate(objective, joint[0], tiny_base, joint[1], each) for each in (marked, clean))
    close(got, want, 0)


def test_the_direction_is_drawn_with_the_key_and_leaves_evaluation_alone(inputs, joint, tiny_base):
    both, plain = OBJECTIVES["bidirectional"], Preference(beta=0.3)
    call = lambda objective, key, train: (
        objective(joint[0], tiny_base, joint[1], inputs[Preference], None, jax.random.key(key), train=train).loss
    )
    run = fast_jit(call, static_argnums=(0, 2))
    assert len({float(run(both, key, True)) for key in range(8)}) == 2
    assert run(both, 3, True) == run(both, 3, True)
    assert run(both, 3, False) == run(plain, 3, False)


def test_sums_of_a_bf16_model_are_fp32(inputs, joint, tiny_base):
    narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    for objective in (OBJECTIVES[name] for name in ("sigmoid", "kto", "tokens", "distillation")):
        own = inputs[type(objective)]
        out = jax.eval_shape(partial(summed, objective, joint[0]), narrow(tiny_base), joint[1], own)
        assert out[0].dtype == jnp.float32, objective


def test_a_teacher_with_other_tokens_is_nan(inputs, joint, tiny_base):
    """Silence would teach from the wrong positions: a row whose numbers of tokens differ has no loss."""
    taught = inputs[Distillation]
    last = jnp.argmax(jnp.where(taught.teacher.weights[0] != 0, jnp.arange(LENGTH), -1))
    short = taught._replace(teacher=taught.teacher._replace(weights=taught.teacher.weights.at[0, last].set(0)))
    assert np.isnan(evaluate(OBJECTIVES["distillation"], joint[0], tiny_base, joint[1], short)[0])


def test_keeping_adds_the_mean_divergence_on_neutral_text(inputs, joint, tiny_base):
    (model, steering), kept = joint, inputs[Keeping]
    loss, slope, total = evaluate(OBJECTIVES["keeping"], model, tiny_base, steering, kept)

    def expected(steering):
        networks = Network(model, tiny_base, steering), Network(Model(model.config), tiny_base, {})
        after, before = (predictions(network, kept.neutral) for network in networks)
        kl = counted_kl(after, Taught(kept.neutral, kept.neutral), before)
        return (
            mean_loss(model, tiny_base, steering, kept.batch)
            + 0.7 * kl.sum() / (kept.neutral.weights != 0).astype(jnp.float32).sum()
        )

    close(
        (loss / total, jax.tree.map(lambda g: g / total, slope)), fast_jit(jax.value_and_grad(expected))(steering), 1e-5
    )


@pytest.mark.parametrize("where", ["answers", "all"])
def test_the_divergence_is_that_of_comparisons(where, joint, tiny_base, tiny_config):
    """Values, and gradients in the student, at the positions themselves."""
    (model, steering), batch = joint, layouts(tiny_config.vocab_size)["packed"][0]
    plain, counts = Network(Model(model.config), tiny_base, {}), counted_predictions(batch, where)
    places = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    student = lambda tree: Network(model, tiny_base, tree)
    compared = lambda tree: compare_networks(plain, student(tree), batch, where).kl
    ours = lambda tree: kl_at(predictions(student(tree), batch), predictions(plain, batch), counts, places)
    both = lambda f: fast_jit(lambda tree: (f(tree), jax.grad(lambda tree: jnp.sum(f(tree)))(tree)))(steering)
    close(both(ours), both(compared), 1e-5)


def test_the_logits_of_all_positions_never_exist():
    B, T, D, V = 2, 1000, 6, 37
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    ints = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = Batch(ints, ints, ints, ints, jax.ShapeDtypeStruct((B, T), jnp.bool_), shape(B, T))

    def kl(hidden, head, batch):
        student, teacher = Predictions(hidden, head, None), Predictions(2 * hidden, head, None)
        return jnp.sum(counted_kl(student, Taught(batch, batch), teacher, 2.0))

    log_probabilities = lambda *args: jnp.sum(token_log_probabilities(*args, None, 2.0))
    for loss in (kl, log_probabilities):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(shape(B, T, D), shape(V, D), batch).as_text()
        assert re.search(rf"tensor<\d+x{V}xf32>", text)  # the check finds those of a chunk
        for whole in (f"{B}x{T}x{V}", f"{B * T}x{V}", f"{T}x{V}"):
            assert whole not in text


@pytest.mark.parametrize(
    "settings", [{"loss": "ipo", "label_smoothing": 0.1}, {"loss": "simpo", "bidirectional": True}, {"margin": 0.5}]
)
def test_settings_of_another_loss(settings):
    with pytest.raises(ValueError, match=r"is a setting of the (sigmoid|simpo) loss, not of"):
        Preference(**settings)
