"""Continuous batching against one prompt at a time, all at once and as requests come and go."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from tiny import random_steering, rows, run, slot_of

from jaxsteer import Model, Positions, Sampling, generate
from jaxsteer.inference import Decoder, Limits, Request, decoder, generate_all, nonfinite_logits, score_continuations
from jaxsteer.inference.scheduling import next_prefill
from jaxsteer.models.by_layer import put_in_layer
from jaxsteer.models.transformer import logits_of, output_embedding

NEW = 7
TIE = 1e-4
LIMITS = Limits(max_prompt=24, max_new_tokens=NEW, rows=4)
PROGRAMS = (
    "clear_rows",
    "empty_rows",
    "prefill",
    "insert",
    "advance",
    "free_rows",
    "keep_rows",
    "add_rows",
    "resize_slots",
)


@dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    completion: np.ndarray
    weights: np.ndarray
    prompt_length: int
    source: str = "here"


def prompts(vocab, count=23, longest=24):
    """Lengths over several buckets; every fourth is a second turn, with a completion before it."""
    draw = np.random.default_rng(0)
    made = []
    for i in range(count):
        ids = draw.integers(3, vocab, draw.integers(1, longest)).astype(np.int32)
        weights = np.zeros(len(ids), np.float32)
        if i % 4 == 0 and len(ids) > 6:
            weights[3:5] = 1
        made.append(Prompt(ids, weights > 0, weights, 3 if weights.any() else len(ids)))
    return made


@pytest.fixture(scope="module")
def steered(tiny_config):
    """Kinds of positions that count from the prompt's start, from its end, and in the answer."""
    kinds = ("first:2+last:2", "last", "completion")
    plan = tuple(slot_of("linear", tiny_config, slot=k, positions=Positions.parse(k), sites=("block",)) for k in kinds)
    return Model(tiny_config, plan), random_steering(plan, tiny_config)


@pytest.fixture(scope="module")
def alone(steered, tiny_base):
    """Each prompt by itself, and stop tokens that end some answers: at once, in between, never."""
    model, steering = steered

    def ask(prompt):
        batch, _ = rows([(0, [(0, (prompt.ids, prompt.weights))])], 24)
        return generate(model, tiny_base, steering, batch, max_new_tokens=NEW, stop_tokens=())

    asked = prompts(model.config.vocab_size)
    answers = [np.asarray(ask(prompt).tokens[0]) for prompt in asked]
    return asked, (int(answers[1][0]), int(answers[2][3])), answers


def until(answer, stops, limit=NEW):
    """The answer before its first stop token or up to its limit, and whether it stopped."""
    ends = [i for i, token in enumerate(answer[:limit]) if token in stops]
    return (answer[: ends[0]], True) if ends else (answer[:limit], False)


def requests(asked, stops=(), **settings):
    return [Request(prompt, NEW, stops, **settings) for prompt in asked]


def mixed(asked, stops):
    """Requests that differ in all settings."""
    kinds = (Sampling(), Sampling(5.0), Sampling(3.0, 20), Sampling(5.0, 0, 0.9), Sampling(4.0, 30, 0.95))
    return [
        Request(prompt, 1 + i % NEW, stops if i % 2 else (), kinds[i % 5], seed=(i << 40) + i)
        for i, prompt in enumerate(asked)
    ]


class Reader:
    """Collects what a decoder reports, by request."""

    def __init__(self, decoder):
        self.decoder, self.parts, self.finished = decoder, {}, {}

    def step(self):
        for event in self.decoder.step():
            assert event.id not in self.finished, "an event after the end"
            assert len(event.tokens) == len(event.log_probabilities)
            assert len(event.tokens) <= self.decoder.limits.chunk + 1
            assert len(event.tokens) or event.finished
            self.parts.setdefault(event.id, []).append(event)
            if event.finished:
                self.finished[event.id] = event.finished

    def drain(self):
        while self.decoder.pending:
            self.step()
        return [self.tokens(id) for id in sorted(self.finished)]

    def tokens(self, id):
        return np.concatenate([event.tokens for event in self.parts[id]]).tolist()


def answers_of(decoder, asked):
    reader = Reader(decoder)
    for request in asked:
        decoder.submit(request)
    return reader.drain()


@pytest.fixture(scope="module")
def make(steered, tiny_base):
    """Decoders of the steered model; those with the same limits share their programs."""
    model, steering = steered
    return lambda limits=LIMITS: Decoder(model, tiny_base, steering, limits)


@pytest.mark.parametrize("at_a_time", [LIMITS.rows, 40])
def test_answers_are_those_of_one_at_a_time(at_a_time, make, alone, monkeypatch):
    kept, keep_rows = [], decoder.keep_rows
    counted = lambda state, rows: kept.append(len(rows)) or keep_rows(state, rows)
    monkeypatch.setattr(decoder, "keep_rows", counted)
    monkeypatch.setattr(decoder, "HALVING_STEPS", 1)
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
    assert kept == ([11] if at_a_time == 40 else [])  # half of the 23 rows, once the others are done
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


def test_requests_may_come_while_others_are_decoded(make, alone):
    asked, stops, _ = alone
    asked = mixed(asked, stops)
    reader = Reader(make(replace(LIMITS, chunk=1)))
    for i, request in enumerate(asked):
        assert reader.decoder.submit(request) == i
        reader.step()
    assert reader.drain() == answers_of(make(), asked)
    assert reader.decoder.step() == []
    for i, request in enumerate(asked):
        short = len(reader.tokens(i)) < request.max_new_tokens
        assert reader.finished[i] == ("stop" if short else "length")
    assert any(len(parts) > 3 for parts in reader.parts.values())  # streamed


def test_a_drained_decoder_grows_again(make, alone):
    """Few rows with few slots for prompts remain; more and longer requests get the full size back."""
    asked, _, _ = alone
    asked = sorted(requests(asked), key=len)
    short, rest = asked[:9], asked[9:]
    growing = make(replace(LIMITS, rows=20, chunk=1))
    for request in short:
        growing.submit(request)
    parts = {}
    for step in range(60):
        if step == 2:
            assert (len(growing._tickets), growing._rows.prompt_slots) == (9, 16)
            for request in rest:
                growing.submit(request)
        for event in growing.step(draining=True):
            parts.setdefault(event.id, []).extend(event.tokens.tolist())
        if step == 2:
            assert (len(growing._tickets), growing._rows.prompt_slots) == (20, 24)
    assert growing.pending == 0
    assert [parts[i] for i in range(len(asked))] == answers_of(make(), asked)


def test_the_ring_grows_with_the_answers(make, alone, monkeypatch):
    """Rows that started at different times, in a ring that is as short as the next step allows."""
    monkeypatch.setattr(decoder, "FIRST_RING", 2)
    asked, stops, _ = alone
    reader = Reader(make(replace(LIMITS, chunk=1)))
    for request in requests(asked, stops):
        reader.decoder.submit(request)
    rings = []
    while reader.decoder.pending:
        reader.step()
        rings.append(reader.decoder._rows.ring)
    assert sorted(set(rings)) == [2, 4, NEW - 1]
    assert rings == sorted(rings)
    assert [reader.tokens(id) for id in sorted(reader.finished)] == answers_of(make(), requests(asked, stops))


def test_a_prefill_doubles_its_rows_while_prompts_fill_them():
    def shape(count, **more):
        layout = next_prefill([range(60)] * count, 16, count, **more)
        return layout.size, len(layout.rows), layout.width

    assert [shape(count) for count in (1, 9)] == [(1, 1, 64), (1, 1, 64)]
    assert [shape(count, many=True) for count in (1, 2, 5, 40)] == [(1, 1, 64), (2, 1, 128), (5, 2, 256), (16, 4, 256)]


def test_cancelling_frees_a_row_at_once(make, alone):
    asked, _, want = alone
    reader = Reader(make(replace(LIMITS, chunk=1)))
    for request in requests(asked[:6]):
        reader.decoder.submit(request)
    reader.step()
    assert reader.decoder.pending == 6
    assert sorted(reader.parts) == [0, 1, 2, 3]  # the other two wait
    assert reader.decoder.cancel(1)  # running
    assert reader.decoder.cancel(5)  # waiting
    assert reader.decoder.pending == 4
    reader.step()
    assert {id: reader.finished[id] for id in (1, 5)} == {1: "cancelled", 5: "cancelled"}
    assert 4 in reader.parts  # took over the row of 1
    answers = dict(zip((0, 1, 2, 3, 4, 5), reader.drain(), strict=True))
    for id in (0, 2, 3, 4):
        assert answers[id] == want[id].tolist()
    assert answers[1] == want[1][:2].tolist()
    assert answers[5] == []
    assert not reader.decoder.cancel(0)
    assert not reader.decoder.cancel(99)


def test_answers_may_be_ended_early_or_left_unread(make, alone):
    asked, _, want = alone
    shared = make(replace(LIMITS, chunk=1))
    found = dict(generate_all(shared, requests(asked), lambda index, tokens: len(tokens) >= 3 and index % 2 == 0))
    for index, answer in found.items():
        assert answer.stopped == (index % 2 == 0)
        assert answer.tokens.tolist() == want[index][: 3 if index % 2 == 0 else NEW].tolist()
    answers = generate_all(shared, requests(asked))
    next(answers)
    with pytest.raises(ValueError, match=r"a decoder to itself, but this one has [0-9]+ requests pending"):
        next(generate_all(shared, requests(asked)))
    answers.close()
    assert shared.pending == 0
    again = dict(generate_all(shared, requests(asked[:3])))
    assert [again[i].tokens.tolist() for i in range(3)] == [answer.tolist() for answer in want[:3]]


def compiled():
    return [program._cache_size() for program in (*(getattr(decoder, name) for name in PROGRAMS), put_in_layer)]


def test_200_mixed_requests_compile_nothing(make, alone):
    """Once the shapes are known: greedy or sampling, and how many prompts are admitted at once."""
    asked, _, _ = alone
    draw = np.random.default_rng(0)
    serving = make(replace(LIMITS, chunk=1))

    def serve(count):
        for i in range(count):
            prompt = asked[draw.integers(len(asked))]
            sampling = Sampling(draw.choice([0.0, 1.0, 3.0]), int(draw.integers(40)), draw.uniform(0.5, 1))
            some = tuple(int(token) for token in draw.integers(0, 61, draw.integers(17)))
            serving.submit(Request(prompt, int(draw.integers(1, NEW + 1)), some, sampling, int(draw.integers(1 << 62))))
            if draw.random() < 0.3:
                serving.cancel(i)
            while draw.random() < 0.6 or serving.pending > 9:
                serving.step()
        answers_of(serving, [])

    for sampling in (Sampling(), Sampling(2.0)):
        answers_of(serving, requests(asked[:1], sampling=sampling))
        answers_of(serving, requests(asked[:9], sampling=sampling))
    serving.cancel(serving.submit(requests(asked)[0]))
    before = compiled()
    serve(200)
    assert compiled() == before


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
    for size in ("max_prompt", "max_new_tokens", "rows", "chunk", "max_stop_tokens"):
        with pytest.raises(ValueError, match=f"{size} must be at least 1"):
            replace(LIMITS, **{size: 0})
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


def test_answers_longer_than_the_context_are_refused(steered, tiny_base):
    model, steering = steered
    with pytest.raises(ValueError, match="max_new_tokens=100,000,000: this model's context has 64 tokens"):
        Decoder(model, tiny_base, steering, replace(LIMITS, max_new_tokens=100_000_000))
    batch, _ = rows([(0, [(0, (np.int32([3]), np.zeros(1, np.float32)))])], 4)
    with pytest.raises(ValueError, match="context has 64 tokens"):
        generate(model, tiny_base, steering, batch, max_new_tokens=65, stop_tokens=())
