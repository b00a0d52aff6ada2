"""The likeliest tokens at each step and position, against the sorted log-softmax of a forward pass."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import NEW, prompts
from tiny import close, fast_jit, identical, layouts, random_steering, rows, run

from jaxsteer import LoRA, Model, NonlinearSteering, Positions, Sampling, Slot, stack_adapters
from jaxsteer.inference import (
    Decoder,
    Limits,
    Request,
    generate_all,
    per_token_shift,
    score_continuations,
    score_tokens,
)
from jaxsteer.inference.draws import Drawing
from jaxsteer.inference.rows import Sizes, advance, empty_rows
from jaxsteer.models.transformer import Network, logits_of, output_embedding

LIMITS = Limits(max_prompt=24, max_new_tokens=NEW, rows=4, chunk=3)
NAMES = ("lora", "steer", None)

scores_of = fast_jit(score_tokens, static_argnames=("model", "top"))
shift_of = fast_jit(per_token_shift, static_argnames=("model", "top"))


@pytest.fixture(scope="module")
def adapters(tiny_config):
    """LoRA everywhere, and steering that depends on where the prompt ends."""
    plans = {
        "lora": (Slot("lora", LoRA(rank=2, alpha=4.0), ("attn.q", "mlp.down")),),
        "steer": (Slot("steer", NonlinearSteering(rank=3), ("block",), (1, 3), Positions("completion")),),
    }
    trees = {
        name: (plan, random_steering(plan, tiny_config, i, scale=0.5)) for i, (name, plan) in enumerate(plans.items())
    }
    return stack_adapters(trees, tiny_config, places=3)


@pytest.fixture(scope="module")
def model(adapters):
    return Model(adapters.config, adapters.plan)


def log_softmax(model, base, steering, batch, **given):
    """log p of every token after each position, [B, T, V]."""
    hidden = run(model, base, steering, batch, **given).hidden
    return np.asarray(jax.nn.log_softmax(logits_of(hidden, output_embedding(base))))


def assert_top(top, logp):
    """The likeliest of log p [n, V] come first, in order; equal ones may change places."""
    count = top.tokens.shape[-1]
    np.testing.assert_allclose(top.log_probabilities, -np.sort(-logp, axis=-1)[:, :count], atol=2e-4)
    np.testing.assert_allclose(np.take_along_axis(logp, top.tokens, axis=-1), top.log_probabilities, atol=2e-4)
    assert all(len(set(row)) == count for row in top.tokens.tolist())


# ---- decoding


@pytest.fixture(scope="module")
def asked(tiny_config):
    """Requests that differ in everything, of which some want no likeliest tokens; in the first three all is plain."""
    asked = []
    for i, prompt in enumerate(prompts(tiny_config.vocab_size, 14)):
        strength = {} if i < 3 or i % 3 else {"lora": 0.5, "steer": -1.0}
        sampling = Sampling(2.0, 0, 0.9) if i >= 3 and i % 2 else Sampling()
        top = (20, 0, 3, 1)[i % 4]
        asked.append(Request(prompt, 1 + i % NEW, (5,), sampling, i, strength=strength, adapter=NAMES[i % 3], top=top))
    return asked


@pytest.fixture(scope="module")
def answers(asked, model, adapters, tiny_base):
    return dict(generate_all(Decoder(model, tiny_base, adapters, LIMITS), asked))


def test_tops_are_the_sorted_log_softmax(answers, asked, model, adapters, tiny_base):
    texts = [np.concatenate([request.prompt.ids, answers[i].tokens]) for i, request in enumerate(asked)]
    weights = [
        np.concatenate([request.prompt.weights, np.ones(len(answers[i].tokens))]) for i, request in enumerate(asked)
    ]
    batch, _ = rows([(0, [(0, pair)]) for pair in zip(texts, weights, strict=True)], 24 + NEW)
    index = np.array([adapters.index(request.adapter) for request in asked])
    strength = {name: np.float32([request.strength.get(name, 1.0) for request in asked]) for name in ("lora", "steer")}
    logp = log_softmax(model, tiny_base, adapters.steering, batch, adapters=index, strength=strength)
    for i, request in enumerate(asked):
        answer, start = answers[i], len(request.prompt.ids) - 1
        if not request.top:
            assert answer.top is None
            continue
        assert answer.top.tokens.shape == answer.top.log_probabilities.shape == (len(answer.tokens), request.top)
        assert (answer.top.tokens.dtype, answer.top.log_probabilities.dtype) == (np.int32, np.float32)
        assert_top(answer.top, logp[i, start : start + len(answer.tokens)])
        if request.sampling.temperature == 0:
            np.testing.assert_array_equal(answer.top.tokens[:, 0], answer.tokens)
            np.testing.assert_array_equal(answer.top.log_probabilities[:, 0], answer.log_probabilities)
    assert sum(len(answer.tokens) for answer in answers.values() if answer.top) > 3 * NEW


def test_answers_do_not_depend_on_who_asks(answers, asked, model, adapters, tiny_base):
    """Without any tops, and one request at a time in the order of its events."""
    plain = dict(generate_all(Decoder(model, tiny_base, adapters, LIMITS), [replace(r, top=0) for r in asked]))
    assert [plain[i].tokens.tolist() for i in plain] == [answers[i].tokens.tolist() for i in plain]
    assert not any(answer.top for answer in plain.values())
    decoder = Decoder(model, tiny_base, adapters, replace(LIMITS, chunk=1))
    for i in (4, 6):
        decoder.submit(asked[i])
        events = []
        while decoder.pending:
            events += decoder.step()
        assert all(event.top.tokens.shape == (len(event.tokens), asked[i].top) for event in events)
        for field in ("tokens", "log_probabilities"):
            got = np.concatenate([getattr(event.top, field) for event in events])
            np.testing.assert_allclose(got, getattr(answers[i].top, field), atol=2e-4)
        assert len(events) > 1


def test_a_cancelled_request_keeps_what_it_was_told(asked, model, adapters, tiny_base):
    decoder = Decoder(model, tiny_base, adapters, LIMITS)
    ended = lambda index, tokens: len(tokens) >= 1
    (_, answer), *_ = generate_all(decoder, [replace(asked[0], max_new_tokens=NEW, stop_tokens=())], ended)
    assert answer.finished == "cancelled"
    assert answer.top.tokens.shape == (len(answer.tokens), 20)


def test_programs_without_tops_do_not_look_for_them(model, adapters, tiny_base):
    def text(top):
        network = Network(model, tiny_base, adapters.steering)
        state = empty_rows(model, Sizes(4, 16, 8, 2), "float32", adapters=True)
        reported = np.zeros(4, np.int32)
        return advance.lower(network, state, reported, np.int32(4), chunk=3, drawing=Drawing(False, top)).as_text()

    assert "chlo.top_k" in text(True)
    assert "chlo.top_k" not in text(False)


def test_more_tops_than_tokens_are_all_of_them(tiny_config, tiny_base):
    few = {
        **tiny_base,
        "embed": {"embedding": tiny_base["embed"]["embedding"][:9]},
        "head": {"embedding": tiny_base["head"]["embedding"][:9]},
    }
    model = Model(replace(tiny_config, vocab_size=9))
    request = Request(prompts(9, 1)[0], 2, top=20)
    ((_, answer),) = generate_all(Decoder(model, few, {}, LIMITS), [request])
    assert sorted(answer.top.tokens[0].tolist()) == list(range(9))
    np.testing.assert_allclose(np.exp(answer.top.log_probabilities).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.cpu
def test_no_program_sorts_the_vocabulary(model, adapters, tiny_base, packed):
    """XLA searches for the k largest much faster than it sorts, if nothing else is asked of the order."""
    batch, _, index = packed
    network = Network(model, tiny_base, adapters.steering)
    state = empty_rows(model, Sizes(4, 16, 8, 2), "float32", adapters=True)
    some = np.zeros(4, np.int32), np.int32(4)
    programs = [
        advance.lower(network, state, *some, chunk=3, drawing=Drawing(False, True)),
        score_tokens.lower(model, tiny_base, adapters.steering, batch, adapters=index, top=5),
    ]
    for program in programs:
        text = program.compile({"xla_backend_optimization_level": 0}).as_text()
        assert 'custom_call_target="TopK"' in text
        assert not re.search(r",61\][^=]* sort\(", text)


@pytest.mark.parametrize("top", [-1, 21])
def test_impossible_numbers_of_tops_raise(top, tiny_config):
    with pytest.raises(ValueError, match=f"here: top must be from 0 to 20 likeliest tokens, got {top}"):
        Request(prompts(tiny_config.vocab_size, 1)[0], 1, top=top)


# ---- given texts


@pytest.fixture(scope="module")
def packed(tiny_config):
    """Rows of which one holds two examples, and the index of an adapter for each token."""
    batch, where = layouts(tiny_config.vocab_size)["packed"]
    index = np.full(batch.tokens.shape, -1, np.int32)
    for example, adapter in {3: 0, 2: 1, 0: 1, 4: 0}.items():
        index[where[example]] = adapter
    return batch, where, index


@pytest.mark.parametrize("chunk", [3, 128])
def test_scores_are_the_log_softmax_of_whole_texts(chunk, packed, model, adapters, tiny_base, monkeypatch):
    """Several chunks of positions, the last one not full; all at once."""
    for name in ("CPU_CHUNK_TOKENS", "CHUNK_TOKENS"):
        monkeypatch.setattr(f"jaxsteer.objectives.tokens.{name}", chunk * 5)
    batch, where, index = packed
    strength = {"lora": np.linspace(0, 1, index.size, dtype=np.float32).reshape(index.shape)}
    given = {"strength": strength, "adapters": index}
    logp = log_softmax(model, tiny_base, adapters.steering, batch, **given)
    score = fast_jit(score_tokens, static_argnames=("model", "top"))  # compiled anew: the chunk is no argument
    got = score(model, tiny_base, adapters.steering, batch, top=4, **given)
    assert got.top.tokens.shape == (*index.shape, 4)
    real = np.zeros(index.shape, bool)
    for row, columns in where.values():
        places = np.arange(columns.start + 1, columns.stop)
        real[row, places] = True
        want = logp[row, places - 1, np.asarray(batch.tokens)[row, places]]
        np.testing.assert_allclose(got.log_probability[row, places], want, atol=2e-4)
        assert_top(jax.tree.map(lambda field, at=(row, places): np.asarray(field[at]), got.top), logp[row, places - 1])
    assert not any(np.any(np.asarray(field)[~real]) for field in jax.tree.leaves(got))


def test_scores_of_rows_with_an_adapter_each(packed, model, adapters, tiny_base):
    batch, _, index = packed
    by_row = np.array([0, 1, -1, 0, 0])
    got = scores_of(model, tiny_base, adapters.steering, batch, adapters=by_row)
    assert got.top is None
    spread = np.broadcast_to(by_row[:, None], index.shape)
    same = scores_of(model, tiny_base, adapters.steering, batch, adapters=spread)
    identical(got, same)
    other = scores_of(model, tiny_base, adapters.steering, batch, adapters=np.full_like(by_row, -1))
    np.testing.assert_array_equal(got.log_probability[2], other.log_probability[2])
    assert np.abs(got.log_probability - other.log_probability).max() > 1e-2


def test_scores_add_up_to_likelihoods(model, adapters, tiny_base):
    """And a continuation is greedy where each of its tokens is the likeliest."""
    asked = prompts(61, 6)
    draw = np.random.default_rng(1)
    texts = [[draw.integers(3, 61, 1 + i).astype(np.int32)] for i in range(6)]
    index = [0, 1, -1, 0, 1, -1]
    scored = dict(score_continuations(model, tiny_base, adapters.steering, asked, texts, adapters=index))
    whole = [
        (np.concatenate([p.ids, text]), np.concatenate([p.weights, np.ones(len(text))]))
        for p, (text,) in zip(asked, texts, strict=True)
    ]
    batch, _ = rows([(0, [(0, pair)]) for pair in whole], 32)
    got = scores_of(model, tiny_base, adapters.steering, batch, adapters=np.array(index), top=1)
    for i, prompt in enumerate(asked):
        part = slice(len(prompt.ids), len(prompt.ids) + 1 + i)
        (want,) = scored[i]
        np.testing.assert_allclose(got.log_probability[i, part].sum(), want.log_probability, atol=1e-4)
        assert np.array_equal(got.top.tokens[i, part, 0], batch.tokens[i, part]) == want.greedy


def test_the_logits_of_a_text_are_never_all_in_memory(model, adapters, tiny_config, tiny_base):
    """No array of a program holds a vocabulary for each of its positions."""
    length, tokens = 512, np.ones((1, 512), np.int32)
    batch, _ = rows([(0, [(0, (tokens[0], np.zeros(length)))])], length)
    for program in (score_tokens, per_token_shift):
        text = program.lower(model, tiny_base, adapters.steering, batch, adapters=np.array([0]), top=2).as_text()
        assert f"x{tiny_config.vocab_size}xf32" in text
        assert not any(f"tensor<{shape}x{tiny_config.vocab_size}xf32>" in text for shape in ("512", "1x512", "511"))


def test_the_shift_of_stacked_adapters_is_that_of_each_alone(packed, model, adapters, tiny_base):
    batch, where, index = packed
    strength = {"lora": np.float32([1, 0.5, -1, 1, 1])}
    together = shift_of(model, tiny_base, adapters.steering, batch, adapters=index, strength=strength, top=3)
    alone = [shift_of(model, tiny_base, adapters.alone(i), batch, strength=strength, top=3) for i in range(2)]
    plain = shift_of(Model(adapters.config), tiny_base, {}, batch, top=3)
    for at in where.values():
        place = int(index[at][0])
        want = plain if place < 0 else alone[place]
        part = lambda found, at=at: (
            found.shift[:, at[0], at[1]],
            *(field[at] for field in jax.tree.leaves((found.steered, found.base))),
        )
        close(part(together), part(want), 1e-5)
        if place < 0:
            assert not part(together)[0].any()
    identical(together.base, plain.base)
    changed = np.asarray(together.change)
    np.testing.assert_array_equal(
        changed, jnp.asarray(together.steered.log_probability) - jnp.asarray(together.base.log_probability)
    )
    assert np.abs(changed).max() > 1e-2
    assert np.any(together.steered.top.tokens != together.base.top.tokens)
