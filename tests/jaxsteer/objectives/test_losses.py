"""Each loss, its gradient and its facts against a transcription of its paper in fp64, and special cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import Text, alone, groups, in_rows, log_sigmoid
from jax.flatten_util import ravel_pytree
from tiny import close, fast_jit, random_steering, run, slot_of

from jaxsteer import Model
from jaxsteer.groups import Group, stack_groups
from jaxsteer.models.transformer import Network, logits_of, output_embedding
from jaxsteer.objectives import (
    Distillation,
    Grpo,
    Judged,
    Kto,
    Pairs,
    Preference,
    Rollouts,
    Taught,
    group_advantages,
    policy_log_probabilities,
)

BETA = 0.3
LOSSES = {
    "sigmoid": Preference(beta=BETA),
    "smoothed": Preference(beta=BETA, label_smoothing=0.2),
    "ipo": Preference("ipo", beta=BETA),
    "simpo": Preference("simpo", beta=2.0, margin=0.5),
}


@pytest.fixture(scope="module")
def steered(tiny_config):
    plan = (
        slot_of("linear", tiny_config, sites=("block",)),
        slot_of("lora", tiny_config, slot="l", sites=("mlp.down",)),
    )
    return Model(tiny_config, plan), random_steering(plan, tiny_config, seed=1)


@pytest.fixture(scope="module")
def made(tiny_config):
    return groups(tiny_config.vocab_size, count=5)


@pytest.fixture(scope="module")
def pairs(steered, tiny_base, made):
    """Pairs in three rows, and by (pair, member) the log-probabilities by policy and reference, fp64."""
    model, steering = steered
    other = jax.tree.map(lambda leaf: 0.5 * leaf, steering)
    return as_pairs(made, 2, 56, model, tiny_base, other), scores(made, model, tiny_base, steering, other)


def as_pairs(made, per_row, length, model, base, reference, *, trunks=True):
    grouped = in_rows(made, per_row, length, trunks=trunks)
    sign = np.where(grouped.member == 1, 1.0, -1.0) * (grouped.member > 0)
    known = logps(model, base, reference, grouped.batch)
    return Pairs(grouped.batch, jnp.asarray(grouped.group), jnp.float32(sign), known)


logps = fast_jit(policy_log_probabilities, static_argnums=0)


def scores(made, model, base, *trees):
    """[trees][pair][member]: the tokens' log-probabilities."""
    return [[[alone(model, base, tree, text) for text in group.examples] for group in made] for tree in trees]


def transcribed(name, policy, reference):
    """The published losses of one pair; policy and reference are [chosen, rejected] arrays of log-probabilities."""
    (won, lost), (ref_won, ref_lost) = ([a.sum() for a in side] for side in (policy, reference))
    margin = (won - ref_won) - (lost - ref_lost)
    if name == "sigmoid":
        return -log_sigmoid(BETA * margin)
    if name == "smoothed":
        return -0.8 * log_sigmoid(BETA * margin) - 0.2 * log_sigmoid(-BETA * margin)
    if name == "ipo":
        return (margin - 1 / (2 * BETA)) ** 2
    return -log_sigmoid(2.0 * (policy[0].mean() - policy[1].mean()) - 0.5)


def value(objective, model, base, steering, inputs, given=None):
    whole = jax.tree.map(lambda field: field[None], inputs)
    prepared = objective.prepare(model, base, steering, whole, given)
    micro = jax.tree.map(lambda field: field[0], prepared)
    summed = objective(model, base, steering, micro, given, jax.random.key(0), train=False)
    return summed.loss / objective.total(prepared), summed.facts


with_gradient = lambda objective: fast_jit(
    jax.value_and_grad(partial(value, objective), argnums=2, has_aux=True), static_argnums=0
)


@pytest.mark.parametrize("name", LOSSES)
def test_preferences(steered, tiny_base, pairs, name):
    (model, steering), (inputs, (policy, reference)) = steered, pairs
    (loss, facts), grads = with_gradient(LOSSES[name])(model, tiny_base, steering, inputs)
    want = [transcribed(name, *each) for each in zip(policy, reference, strict=True)]
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(
        facts["chosen_log_probability"].total / 5, np.mean([p[0].sum() for p in policy]), rtol=1e-5
    )
    directional(LOSSES[name], model, tiny_base, steering, inputs, grads)


def directional(objective, model, base, steering, inputs, grads, given=None):
    """The gradient along one direction is the difference of the loss."""
    flat, back = ravel_pytree(steering)
    towards = np.random.default_rng(5).standard_normal(flat.shape).astype(np.float32)
    towards /= np.linalg.norm(towards)
    at = fast_jit(lambda step: value(objective, model, base, back(flat + step * towards), inputs, given)[0])
    step = 2e-2
    difference = (float(at(step)) - float(at(-step))) / (2 * step)
    np.testing.assert_allclose(ravel_pytree(grads)[0] @ towards, difference, rtol=3e-2, atol=2e-4)


@pytest.mark.parametrize(("name", "want"), [("sigmoid", np.log(2)), ("ipo", 1 / (4 * BETA**2))])
def test_policy_equal_to_the_reference(steered, tiny_base, made, name, want):
    model, steering = steered
    inputs = as_pairs(made, 2, 56, model, tiny_base, steering)

    @fast_jit
    def same(steering):  # both in one program, so that no rounding of two tells them apart
        inside = inputs._replace(reference=policy_log_probabilities(model, tiny_base, steering, inputs.batch))
        return value(LOSSES[name], model, tiny_base, steering, inside)

    loss, facts = same(steering)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert float(facts["margin"].total) == pytest.approx(0, abs=1e-5)


def test_both_directions(steered, tiny_base, made):
    """BiPO: with d = −1 the shifts are the other way round, and so is the margin."""
    model, steering = Model(steered[0].config, steered[0].plan[:1]), {"s": steered[1]["s"]}
    inputs = as_pairs(made, 2, 56, model, tiny_base, jax.tree.map(jnp.zeros_like, steering))
    objective = Preference(beta=BETA, bidirectional=True)
    call = fast_jit(lambda key: objective(model, tiny_base, steering, inputs, None, key, train=True))
    found = {round(float(call(jax.random.key(k)).loss), 4) for k in range(8)}
    expected = set()
    for d in (1.0, -1.0):
        moved = policy_log_probabilities(model, tiny_base, steering, inputs.batch, strength={"s": d})
        delta = (np.asarray(moved, np.float64) - np.asarray(inputs.reference)) * np.asarray(inputs.sign)
        margins = [delta[r][inputs.pair[r] == p].sum() for r, p in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1))]
        expected.add(sum(-log_sigmoid(BETA * d * margin) for margin in margins))
    assert sorted(found) == pytest.approx(sorted(expected), rel=1e-4)


def test_kto(steered, tiny_base, made):
    model, steering = steered
    other = jax.tree.map(lambda leaf: 0.5 * leaf, steering)
    texts = [text for group in made for text in group.examples]
    mixed = [Text(a.prompt, b.answer) for a, b in zip(texts, texts[1:] + texts[:1], strict=True)]
    own, away = (in_rows([Group((text,)) for text in some], 4, 56, trunks=False).batch for some in (texts, mixed))
    signs = np.array([1, -1, 1, 1, -1, -1, 1, -1, 1, 1])
    sign = np.where(own.segments > 0, np.append(signs, 0)[np.arange(3)[:, None] * 4 + own.segments - 1], 0)
    reference = [logps(model, tiny_base, other, batch) for batch in (own, away)]
    inputs = Judged(own, jnp.float32(sign), reference[0], away, reference[1], jnp.zeros(own.tokens.shape))
    objective = Kto(beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    (loss, facts), grads = with_gradient(objective)(model, tiny_base, steering, inputs)

    ratio = lambda text: (alone(model, tiny_base, steering, text) - alone(model, tiny_base, other, text)).sum()
    z = max(0, np.mean([ratio(text) for text in mixed]))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    want = [
        1.5 * (1 - sigmoid(BETA * (ratio(t) - z))) if s > 0 else 0.5 * (1 - sigmoid(BETA * (z - ratio(t))))
        for t, s in zip(texts, signs, strict=True)
    ]
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(
        facts["reference_point"].total / facts["reference_point"].number, z, rtol=1e-4, atol=1e-6
    )
    fixed = inputs._replace(point=jnp.full(own.tokens.shape, z, jnp.float32))
    held = fast_jit(jax.grad(lambda tree: objective(model, tiny_base, tree, fixed, None, None, train=False).loss / 10))
    close(grads, held(steering), 1e-4)  # the reference point has no gradient


# ---- rewards


@pytest.fixture(scope="module")
def rollouts(steered, tiny_base, tiny_config):
    """Groups of three with rewards, old and reference log-probabilities from other steering."""
    model, steering = steered
    old, reference = (jax.tree.map(lambda leaf, f=f: f * leaf, steering) for f in (0.8, 0.4))
    made = groups(tiny_config.vocab_size, count=4, members=3, seed=3)
    advantages = group_advantages(np.random.default_rng(2).integers(0, 2, (4, 3)) + np.array([0, 0, 0.5]))
    grouped = in_rows(made, 2, 80)
    values = np.zeros(grouped.batch.tokens.shape, np.float32)
    for r in range(2):
        for g in (1, 2):
            for m in (1, 2, 3):
                values[r][(grouped.group[r] == g) & (grouped.member[r] == m)] = advantages[2 * r + g - 1, m - 1]
    known = [logps(model, tiny_base, tree, grouped.batch) for tree in (old, reference)]
    divisor = jnp.zeros(values.shape)
    inputs = Rollouts(grouped.batch, jnp.asarray(values), *known, divisor)
    return inputs, advantages, scores(made, model, tiny_base, steering, old, reference)


@pytest.mark.parametrize("average", ["tokens", "answers", "constant"])
def test_grpo(steered, tiny_base, rollouts, average):
    model, steering = steered
    inputs, advantages, (policy, old, reference) = rollouts
    lengths = np.array([len(answer) for group in policy for answer in group])
    objective = Grpo(0.05, 0.1, beta=0.2, average=average, max_tokens=6, on_policy=False)
    inputs = inputs._replace(divisor=inputs.divisor.at[0, 0].set(objective.divisor(lengths)))
    (loss, facts), grads = with_gradient(objective)(model, tiny_base, steering, inputs)
    terms, clipped, answers = [], 0, 0.0
    for g in range(4):
        for m in range(3):
            ratio = np.exp(policy[g][m] - old[g][m])
            limited, gain = np.clip(ratio, 0.95, 1.1), advantages[g, m]
            towards = reference[g][m] - policy[g][m]
            each = -np.minimum(ratio * gain, limited * gain) + 0.2 * (np.exp(towards) - towards - 1)
            clipped += np.count_nonzero(limited * gain < ratio * gain)
            terms += each.tolist()
            answers += each.mean()
    want = {"tokens": np.mean(terms), "answers": answers / 12, "constant": np.sum(terms) / (12 * 6)}[average]
    np.testing.assert_allclose(loss, want, rtol=2e-5, atol=1e-6)
    assert 0 < clipped == int(facts["clip_share"].total)
    directional(objective, model, tiny_base, steering, inputs, grads)


def test_grpo_at_the_sampling_policy_is_reinforce(steered, tiny_base, rollouts):
    """β = 0, ρ = 1, a constant normaliser: the gradient of −Σ A log π, whether π_old is given or is π itself."""
    (model, steering), (inputs, _, _) = steered, rollouts
    current = logps(model, tiny_base, steering, inputs.batch)
    inputs = inputs._replace(old=current, divisor=inputs.divisor.at[0, 0].set(12 * 6))

    def reinforce(steering):
        values = policy_log_probabilities(model, tiny_base, steering, inputs.batch)
        return -jnp.sum(inputs.advantages * values) / (12 * 6)

    want = fast_jit(jax.grad(reinforce))(steering)
    for on_policy in (True, False):
        objective = Grpo(average="constant", max_tokens=6, on_policy=on_policy)
        (_, facts), grads = with_gradient(objective)(model, tiny_base, steering, inputs)
        close(grads, want, 2e-5)
        assert facts["clip_share"].total == 0


def test_group_advantages():
    found = group_advantages(np.array([[1, 0, 0, 1], [0.3, 0.3, 0.3, 0.3]]))
    np.testing.assert_allclose(
        found[0], np.array([0.5, -0.5, -0.5, 0.5]) / (np.std([1, 0, 0, 1], ddof=1) + 1e-4), rtol=1e-6
    )
    assert not found[1].any()
    np.testing.assert_allclose(group_advantages(np.array([[3.0, 1.0]]), "none"), [[1, -1]])
    with pytest.raises(ValueError, match="at least 2 answers"):
        group_advantages(np.ones((3, 1)))
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(np.array([[1, np.nan]]))


# ---- distillation


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation(steered, tiny_base, tiny_config, temperature):
    """The teacher reads other prompts, in longer rows."""
    model, steering = steered
    teacher = Network(model, tiny_base, jax.tree.map(lambda leaf: -leaf, steering))
    texts = [text for group in groups(tiny_config.vocab_size, count=5) for text in group.examples]
    longer = [Text((7, 8, 9, *text.prompt), text.answer) for text in texts]
    student, known = (
        in_rows([Group((text,)) for text in some], 4, length, trunks=False).batch
        for some, length in ((texts, 56), (longer, 72))
    )
    objective, inputs = Distillation(temperature), Taught(student, known)
    (loss, facts), grads = with_gradient(objective)(model, tiny_base, steering, inputs, teacher)

    def distributions(tree, text):
        batch = stack_groups([[Group((text,))]], 24, trunks=False).batch
        hidden = run(model, tiny_base, tree, batch).hidden[0, len(text.prompt) - 1 : len(text.ids) - 1]
        return jax.nn.log_softmax(logits_of(hidden, output_embedding(tiny_base)) / temperature)

    kls = []
    for text, other in zip(texts, longer, strict=True):
        p, q = np.asarray(distributions(teacher.steering, other)), np.asarray(distributions(steering, text))
        kls += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
    np.testing.assert_allclose(loss, temperature**2 * np.mean(kls), rtol=1e-4)
    assert int(facts["teacher_kl"].number) == len(kls)
    directional(objective, model, tiny_base, steering, inputs, grads, teacher)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Preference("hinge"), "sigmoid, ipo, simpo"),
        (lambda: Preference(beta=0), "beta must be above 0"),
        (lambda: Preference(label_smoothing=0.5), "below 0.5"),
        (lambda: Kto(beta=-1), "beta must be above 0"),
        (lambda: Kto(desirable_weight=float("nan")), "desirable_weight must be at least 0"),
        (lambda: Grpo(clip_low=0), "clip_low"),
        (lambda: Grpo(average="rows"), "tokens, answers, constant"),
        (lambda: Distillation(0), "temperature must be above 0"),
    ],
)
def test_settings_that_no_loss_has(make, said):
    with pytest.raises(ValueError, match=said):
        make()
