"""Continuous batching against one prompt at a time."""

import gc
import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest
from decoding import LIMITS, NEW, TIE, Prompt, Reader, answers_of, mixed, prompts, requests, until
from tiny import rows, run

from jaxsteer import Model, Sampling, generate
from jaxsteer.inference import Decoder, Limits, Request, draining, generate_all, nonfinite_logits, score_continuations
from jaxsteer.inference.table import Table
from jaxsteer.models.transformer import logits_of, output_embedding


@pytest.mark.parametrize("at_a_time", [LIMITS.rows, 40])
def test_answers_are_those_of_one_at_a_time(at_a_time, make, alone, monkeypatch):
    counts, resize = [], Table.resize
    counted = lambda table, sizes: resize(table, sizes) or counts.append(len(table.tickets))
    monkeypatch.setattr(Table, "resize", counted)
    monkeypatch.setattr(draining, "HALVING_STEPS", 1)
    asked, stops, want = alone
    found = dict(generate_all(make(replace(LIMITS, rows=at_a_time)), requests(asked, stops)))
    assert sorted(found) == list(range(len(asked)))
    lengths = set()
    for index, answer in enumerate(want):
        tokens, stopped = until(answer, stops)
        if found[index].margin > TIE:
            np.testing.assert_array_equal(found[index].tokens, tokens, str(index))
            assert found[index].stopped == stopped
        lengths.add(len(found[index].tokens))
    assert sum(found[index].margin <= TIE for index in found) <= 1
    assert sorted(set(counts)) == ([11, 23] if at_a_time == 40 else [4])  # half, once the others are done
    assert {0, NEW} < lengths  # rows end at different times


def test_requests_with_mixed_settings_answer_as_if_alone(make, alone):
    """Whatever the order, the chunk and the neighbours: greedy ones as `generate`, sampled ones by their seed."""
    asked, stops, want = alone
    asked = mixed(asked, stops)
    together = answers_of(make(), asked)
    assert answers_of(make(), asked[::-1])[::-1] == together
    assert answers_of(make(replace(LIMITS, chunk=1)), asked) == together
    assert [answer for i in range(0, len(asked), 6) for answer in answers_of(make(), [asked[i]])] == together[::6]
    for request, answer, greedy in zip(asked, together, want, strict=True):
        if request.sampling.temperature == 0:
            assert answer == until(greedy, request.stop_tokens, request.max_new_tokens)[0].tolist()
    other = answers_of(make(), [replace(request, seed=request.seed + 1) for request in asked])
    changed = [a != b for a, b in zip(together, other, strict=True)]
    assert not any(changed[::5])
    assert sum(changed) > len(asked) // 3
    assert len({token for answer in together for token in answer}) > 2 * NEW


def test_draws_of_a_row_are_those_of_its_settings(make, alone):
    """Top-k 1 is greedy whatever the temperature; a tiny top-p too."""
    asked, stops, _ = alone
    greedy = answers_of(make(), requests(asked, stops))
    for sampling in (Sampling(9.0, 1), Sampling(9.0, 0, 1e-6)):
        assert answers_of(make(), requests(asked, stops, sampling=sampling)) == greedy


def test_log_probabilities_are_those_of_a_forward_pass(make, steered, tiny_base, alone):
    model, steering = steered
    asked, stops, _ = alone
    reader = Reader(make())
    for request in mixed(asked, stops):
        reader.decoder.submit(request)
    layout = []
    for request, answer in zip(mixed(asked, stops), reader.drain(), strict=True):
        ids, weights = (
            np.concatenate(pair)
            for pair in ((request.prompt.ids, answer), (request.prompt.weights, np.ones(len(answer))))
        )
        layout.append((0, [(0, (ids.astype(int), weights))]))
    hidden = run(model, tiny_base, steering, rows(layout, 24 + NEW)[0]).hidden
    logp = np.asarray(jax.nn.log_softmax(logits_of(hidden, output_embedding(tiny_base))))
    for i, prompt in enumerate(asked):
        got = np.concatenate([event.log_probabilities for event in reader.parts[i]])
        start = len(prompt.ids) - 1
        want = logp[i, np.arange(start, start + len(got)), reader.tokens(i)]
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_the_margin_is_how_far_the_first_is_ahead(tiny_config, tiny_base):
    """Two equal vectors in the output embedding are two tokens that always tie."""
    asked, model = prompts(tiny_config.vocab_size, 3), Model(tiny_config)
    ask = lambda base: dict(
        generate_all(Decoder(model, base, {}, Limits(24, 1, 2)), [Request(prompt, 1, (-1,)) for prompt in asked])
    )
    plain = ask(tiny_base)
    token = int(plain[0].tokens[0])
    assert plain[0].margin > TIE
    head = tiny_base["head"]["embedding"]
    twin = (token + 1) % tiny_config.vocab_size
    tied = ask(tiny_base | {"head": {"embedding": head.at[twin].set(head[token])}})
    assert tied[0].margin == 0.0


def test_impossible_requests_raise(make):
    prompt = Prompt(np.arange(5, dtype=np.int32), np.zeros(5, bool), np.zeros(5, np.float32), 5)
    nothing = Prompt(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32), 0)
    assert list(generate_all(make(), [])) == []
    least = dict.fromkeys(("max_prompt", "max_new_tokens", "rows", "chunk", "max_stop_tokens"), 1)
    for size, smallest in {**least, "prefill_chunk": 2, "prefix_tokens": 0}.items():
        with pytest.raises(ValueError, match=f"{size} must be at least {smallest}"):
            replace(LIMITS, **{size: smallest - 1})
    with pytest.raises(ValueError, match="here: max_new_tokens must be at least 1"):
        Request(prompt, 0)
    with pytest.raises(ValueError, match="here: an empty prompt"):
        Request(nothing, 1)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="here: the seed"):
            Request(prompt, 1, seed=seed)
    small = make(Limits(4, 3, max_stop_tokens=2))
    for request, message in (
        (Request(prompt, 1), "here: 5 tokens in the prompt, but this decoder takes up to 4"),
        (Request(replace(prompt, ids=prompt.ids[:4]), 4), "here: 4 new tokens, .* up to 3"),
        (Request(replace(prompt, ids=prompt.ids[:4]), 3, (7, 8, 9, 7)), "here: 3 stop tokens, .* a larger max_stop_"),
    ):
        with pytest.raises(ValueError, match=message):
            small.submit(request)
    assert small.pending == 0


def test_learned_positions_end(tiny_config):
    """Rotary positions go on, learned ones do not."""
    model = Model(replace(tiny_config, learned_positions=True, max_length=20))
    asked = [Prompt(np.arange(3, 17, dtype=np.int32), np.zeros(14, bool), np.zeros(14, np.float32), 14, "mine:3")]
    answers = generate_all(Decoder(model, {}, {}, LIMITS), requests(asked))
    with pytest.raises(ValueError, match=r"mine:3: takes up to 21 tokens, but .* learned positions for 20 only"):
        next(answers)
    with pytest.raises(ValueError, match="mine:3: takes up to 21 tokens"):
        next(score_continuations(model, {}, {}, asked, [[np.arange(8, dtype=np.int32)]]))  # the last is only a target


# ---- strength, and logits that are not finite


def test_each_request_has_its_own_strength(steered, tiny_base, alone):
    """Prompts that share a prefill, and rows that decode together; those without a strength answer as always."""
    model, steering = steered
    asked, _, whole = alone
    factors = [{}, dict.fromkeys(steering, 0.0), dict.fromkeys(steering, -20.0)]
    chosen = asked[:6]
    strengths = [factors[i % 3] for i in range(6)]
    decode = Decoder(model, tiny_base, steering, LIMITS)
    found = dict(generate_all(decode, [Request(p, NEW, strength=s) for p, s in zip(chosen, strengths, strict=True)]))
    for i in (0, 3):
        np.testing.assert_array_equal(found[i].tokens, whole[i])
    plain = Decoder(replace(model, plan=()), tiny_base, {}, LIMITS)
    for i, answer in generate_all(plain, requests([chosen[1], chosen[4]])):
        np.testing.assert_array_equal(found[3 * i + 1].tokens, answer.tokens)
    batch, _ = rows([(0, [(0, (p.ids, p.weights))]) for p in chosen], 24)
    column = np.float32([s.get("last", 1.0) for s in strengths])
    by_row = generate(
        model, tiny_base, steering, batch, max_new_tokens=NEW, stop_tokens=(), strength=dict.fromkeys(steering, column)
    )
    for i in range(6):
        np.testing.assert_array_equal(by_row.tokens[i], found[i].tokens)
    with pytest.raises(ValueError, match="no slot"):
        decode.submit(Request(chosen[0], NEW, strength={"lora": 0.5}))


def test_a_row_whose_logits_are_not_finite_ends_there(steered, tiny_base, alone):
    """The next prompt in its row is answered as if nothing had been."""
    model, steering = steered
    asked, _, whole = alone
    outside = Prompt(np.int32([3, 4, 1000]), np.zeros(3, bool), np.zeros(3, np.float32), 3)
    decode = Decoder(model, tiny_base, steering, replace(LIMITS, rows=1))
    for prompt, want in ((asked[1], whole[1]), (outside, None), (asked[2], whole[2])):
        ((_, answer),) = generate_all(decode, requests([prompt]))
        assert answer.finished == ("nonfinite" if want is None else "length")
        assert answer.stopped is False
        np.testing.assert_array_equal(answer.tokens, [] if want is None else want)
    with pytest.raises(FloatingPointError, match=r"here: .*token ids 3, 4, 1000.*\[1000\] are outside the model's 61"):
        raise nonfinite_logits(outside, model.config.vocab_size)
    batch, _ = rows([(0, [(0, (p.ids, p.weights))]) for p in (asked[1], outside)], 24)
    out = generate(model, tiny_base, steering, batch, max_new_tokens=NEW, stop_tokens=(0,))
    np.testing.assert_array_equal(out.finite, [True, False])
    np.testing.assert_array_equal(out.lengths, [NEW, 0])
    np.testing.assert_array_equal(out.stopped, [False, False])
    with pytest.raises(FloatingPointError, match="here: the model gave non-finite logits"):
        list(score_continuations(model, tiny_base, steering, [outside], [[np.int32([4]), np.int32([5])]]))


@pytest.mark.parametrize("draining", [False, True])
def test_a_prompt_that_is_not_finite_spares_those_read_with_it(draining, make, alone):
    asked, _, whole = alone
    outside = Prompt(np.int32([3, 4, 1000]), np.zeros(3, bool), np.zeros(3, np.float32), 3)
    decode = make(replace(LIMITS, rows=8))
    for request in requests([asked[1], outside, asked[2], asked[3]]):
        decode.submit(request)
    events = []
    while decode.pending:
        events += decode.step(draining=draining)
    assert {event.id: event.finished for event in events if event.finished} == dict(
        enumerate(["length", "nonfinite", "length", "length"])
    )
    for id, want in ((0, whole[1]), (2, whole[2]), (3, whole[3])):
        np.testing.assert_array_equal(np.concatenate([event.tokens for event in events if event.id == id]), want)


def test_nothing_of_a_request_is_kept(make, alone):
    asked, stops, _ = alone
    decode = make(replace(LIMITS, prefill_chunk=10))
    left = []
    for request in mixed(asked, stops):
        left.append(weakref.ref(request))
        decode.submit(request)
    del request
    while decode.pending:
        decode.step()
    gc.collect()
    assert [each for each in left if each() is not None] == []


def test_answers_longer_than_the_context_are_refused(steered, tiny_base):
    model, steering = steered
    with pytest.raises(ValueError, match="max_new_tokens=100,000,000: this model's context has 64 tokens"):
        Decoder(model, tiny_base, steering, replace(LIMITS, max_new_tokens=100_000_000))
    batch, _ = rows([(0, [(0, (np.int32([3]), np.zeros(1, np.float32)))])], 4)
    with pytest.raises(ValueError, match="context has 64 tokens"):
        generate(model, tiny_base, steering, batch, max_new_tokens=65, stop_tokens=())
