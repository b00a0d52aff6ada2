"""Continuous batching as requests come and go: sizes, admission, cancelling, and what is compiled."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from decoding import LIMITS, NEW, Reader, answers_of, compiled, mixed, requests

from jaxsteer import Sampling
from jaxsteer.inference import Limits, Request, generate_all, sizes
from jaxsteer.inference.layouts import next_prefill, open_prefill, widths_of
from jaxsteer.inference.rows import Sizes
from jaxsteer.inference.sizes import Ladder


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
            assert growing._table.sizes[:2] == (9, 16)
            for request in rest:
                growing.submit(request)
        for event in growing.step(draining=True):
            parts.setdefault(event.id, []).extend(event.tokens.tolist())
        if step == 2:
            assert growing._table.sizes[:2] == (20, 24)
    assert growing.pending == 0
    assert [parts[i] for i in range(len(asked))] == answers_of(make(), asked)


# ---- sizes


@pytest.fixture
def many_sizes(monkeypatch):
    """A ladder of several sizes within the limits of tiny decoders, which are given up soon."""
    monkeypatch.setattr(sizes, "SMALLEST_PROMPT", 16)
    monkeypatch.setattr(sizes, "SMALLEST_RING", 2)
    monkeypatch.setattr(sizes, "SHRINK_STEPS", 2)


def test_the_ladder():
    """Few sizes, of which the largest are the limits."""
    ladder = Ladder.of(Limits(1000, 512, rows=32, chunk=4))
    assert ladder.rows == (1, 4, 16, 32)
    assert ladder.slots == ((64, 128), (256, 255), (1024, 511))
    assert Ladder.of(Limits(30, 7, rows=1)).rows == (1,)
    assert Ladder.of(Limits(30, 7, rows=1)).slots == ((32, 6),)
    assert Ladder.of(Limits(30, 7, rows=64), shards=8).rows == (8, 32, 64)
    need = lambda rows, prompt, ring: ladder.fitting(Sizes(rows, prompt, ring, 16))[:3]
    assert need(1, 5, 4) == (1, 64, 128)
    assert need(2, 5, 129) == (4, 256, 255)
    assert need(17, 257, 4) == (32, 1024, 511)


def test_changes_of_size_are_those_of_the_tour():
    """Each changes rows or slots by one rung, whatever the sizes before and after."""
    ladder = Ladder.of(Limits(1000, 512, rows=64, chunk=4))
    tour = list(ladder.tour())
    steps = [*pairwise(tour)]
    assert len(set(steps)) == len(steps) == 2 * (3 * 3 + 4 * 2)
    assert set(tour) == {Sizes(rows, *slots, 16) for rows in ladder.rows for slots in ladder.slots}
    assert tour[0] == tour[-1] == ladder.smallest
    for old, new in product(set(tour), repeat=2):
        path = [old, *ladder.path(old, new)]
        assert path[-1] == new
        assert set(pairwise(path)) <= set(steps)
    drained = Sizes(9, 48, 128, 16)  # not on the ladder
    for new in set(tour):
        assert ladder.path(drained, new)[-1] == new


def test_sizes_follow_the_load(make, alone, many_sizes):
    """One request has one row; others grow it at once, in mid-stream, and it shrinks when they have long ended."""
    asked, _, want = alone
    lengths = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
    first, more = lengths[0], lengths[-3:]
    reader = Reader(make(replace(LIMITS, chunk=1)))
    decoder = reader.decoder
    found, seen = {}, []
    found[decoder.submit(Request(asked[first], NEW))] = want[first]
    for step in range(20):
        if step == 2:
            found |= {decoder.submit(Request(asked[i], 2)): want[i][:2] for i in more}
        reader.step()
        seen.append((decoder.rows, *decoder._table.sizes[1:3]))
    assert seen[:3] == [(1, 16, 2), (1, 16, 3), (4, 24, 6)]
    assert seen[5] == (1, 24, 6)  # the answer has grown out of the smallest ring
    assert reader.finished == dict.fromkeys(found, "length")
    assert {id: reader.tokens(id) for id in found} == {id: answer.tolist() for id, answer in found.items()}
    again = decoder.submit(Request(asked[first], NEW))
    while again not in reader.finished:
        reader.step()
        seen.append((decoder.rows, *decoder._table.sizes[1:3]))
    assert (1, 16, 2) in seen[20:]
    assert reader.tokens(again) == want[first].tolist()


def test_answers_do_not_depend_on_sizes(make, alone, many_sizes):
    """Requests of all lengths that come at random: rows and slots change all the time."""
    asked, stops, _ = alone
    draw = np.random.default_rng(3)
    asked = [request for request in mixed(asked, stops) for _ in range(2)]
    reader, seen = Reader(make(replace(LIMITS, chunk=1))), set()
    for request in asked:
        reader.decoder.submit(request)
        for _ in range(draw.choice([0, 1, 25], p=[0.6, 0.2, 0.2])):
            before = reader.decoder.active
            reader.step()
            seen.add((reader.decoder._table.sizes[:3], before > 0))
    answers = reader.drain()
    assert answers[::2] == answers[1::2] == answers_of(make(), asked[::2])
    assert {rows for (rows, _, _), busy in seen if busy} == {1, 4}
    assert {prompt for (_, prompt, _), busy in seen if busy} == {16, 24}
    assert reader.decoder.active == reader.decoder.waiting == 0


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


def test_once_warm_200_mixed_requests_compile_nothing(make, alone, many_sizes):
    """Sizes of its own, so that no other test has compiled them."""
    asked, _, _ = alone
    draw = np.random.default_rng(0)
    limits = replace(LIMITS, rows=5, chunk=1, max_stop_tokens=17, prefill_chunk=10, prefix_tokens=500, general=True)
    serving = make(limits)
    cold, told = compiled(), []
    serving.warm(lambda done, total: told.append((done, total)))
    warm = compiled()
    assert all(warm[name] > cold[name] for name in ("prefill", "read_part", "first_tokens", "insert", "advance"))
    assert told == [(done, 7) for done in range(8)]
    assert serving.pending == serving.active == 0
    seen = set()
    for i in range(200):
        prompt = asked[draw.integers(len(asked))]
        sampling = Sampling(draw.choice([0.0, 1.0, 3.0]), int(draw.integers(40)), draw.uniform(0.5, 1))
        some = tuple(int(token) for token in draw.integers(0, 61, draw.integers(17)))
        strength = {"last": draw.choice([0.0, 0.5, 1.0])} if draw.random() < 0.5 else {}
        seed, top = int(draw.integers(1 << 62)), int(draw.integers(3))
        request = Request(prompt, int(draw.integers(1, NEW + 1)), some, sampling, seed, strength=strength, top=top)
        assert serving.submit(request) == i
        if draw.random() < 0.3:
            serving.cancel(i)
        while draw.random() < 0.6 or serving.pending > 9:
            serving.step()
            seen.add(serving._table.sizes)
    answers_of(serving, [])
    assert compiled() == warm
    assert len(seen) > 3
    serving.submit(requests(asked)[0])
    with pytest.raises(ValueError, match="warm: 1 requests are pending"):
        serving.warm()


def test_general_programs_answer_the_same(make, alone):
    asked, stops, _ = alone
    asked = mixed(asked, stops)
    assert answers_of(make(replace(LIMITS, general=True)), asked) == answers_of(make(), asked)


def test_prefills_of_an_open_queue_have_few_shapes():
    widths = widths_of(Limits(1000, 7))
    assert widths == (64, 128, 256)
    assert widths_of(Limits(100, 7)) == (64, 128)
    assert widths_of(Limits(1000, 7, prefill_chunk=10)) == (10,)

    def shape(*lengths, limit=32):
        layout = open_prefill([range(length) for length in lengths], widths, limit)
        return layout.size, layout.width

    assert shape(10) == (1, 64)
    assert shape(65) == (1, 128)
    assert shape(60, 60) == (2, 128)
    assert shape(50, 50, 50) == (2, 128)  # and then the third alone: 256 columns would be filled by half
    assert shape(*[30] * 20) == (8, 256)
    assert shape(*[20] * 20) == (6, 128)
    assert shape(*[20] * 20, limit=3) == (3, 64)
    assert shape(200, 100) == (1, 256)
