"""Batches of pairs and of judged answers: what is in each row, where the reference's table is read, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from train.data import Encoding, Example, TokenStore, encode
from train.data.judged import JudgedSource, mismatched
from train.data.pairs import Layout, PairSource, fitting_pairs


def store(texts, name="f"):
    """The examples (prompt, answer) as tokens, one a byte."""
    examples = [Example.of(prompt, answer, f"{name}:{i}") for i, (prompt, answer) in enumerate(texts, start=1)]
    return TokenStore.of(encode(examples, tiny_tokenizer(), Encoding())[0])


def texts(count, seed, prompts=0):
    """Prompts and answers of random lengths; `prompts` is the seed of the prompts."""
    lengths, asked = np.random.default_rng(seed), np.random.default_rng(prompts)
    letters = lambda of, most: "".join(of.choice([*"abcdef"], int(of.integers(2, most))))
    return [(letters(asked, 12), letters(lengths, 9)) for _ in range(count)]


def pairs(**settings):
    return PairSource(store(texts(17, 1)), store(texts(17, 2)), Layout(2, 64, 3), **settings)


def answers(batch, table):
    """(tokens that count, their values in the table) of each segment that has any, in each row."""
    found = []
    for r, row in enumerate(batch.segments):
        for segment in np.unique(row[row > 0]):
            here = (row == segment) & (batch.weights[r] != 0)
            if here.any():
                found.append((r, batch.tokens[r, here].tolist(), table[r, here].tolist()))
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_pairs_are_whole_and_in_one_row(shared):
    source = pairs(shared=shared)
    seen = []
    for step in range(source.steps(1.0)):
        inputs, members = source.batch(step), source.order.members(step)
        assert not inputs.sign[inputs.pair == 0].any()
        assert (np.abs(inputs.sign[inputs.batch.weights != 0]) == 1).all()
        assert not inputs.reference.any()
        for r, row in enumerate(members):
            for number, i in enumerate(row.tolist(), start=1):
                for sign, side in ((1, source.chosen), (-1, source.rejected)):
                    here = (inputs.pair[r] == number) & (inputs.sign[r] == sign) & (inputs.batch.weights[r] != 0)
                    assert inputs.batch.tokens[r, here].tolist() == side[i].ids[side[i].weights != 0].tolist()
                seen.append(i)
    assert set(seen) == set(range(17))
    prompt = sum(int(trunk) for trunk in source._trunks)
    assert (prompt > 0) == shared


def test_shared_prompts_take_less_room():
    shared, whole = pairs(shared=True), pairs(shared=False)
    saved = sum(example.prompt_length - 1 for example in shared.chosen)
    assert int(whole.order.lengths.sum()) - int(shared.order.lengths.sum()) == saved
    assert whole.batch(0).batch.trunks is None
    assert shared.batch(0).batch.trunks.any()


def test_prompts_whose_tokens_differ_are_not_shared():
    chosen, rejected = store([("xy", "b")]), store([("xy", "c")])
    other = replace(rejected[0], ids=np.concatenate([[chosen[0].ids[0] + 1], rejected[0].ids[1:]]).astype(np.int32))
    assert PairSource(chosen, rejected, Layout(1, 32))._trunks.tolist() == [1]
    assert PairSource(chosen, TokenStore.of([other]), Layout(1, 32))._trunks.tolist() == [0]


@pytest.mark.parametrize("shared", [True, False])
def test_the_table_of_the_reference(shared):
    source = pairs(shared=shared)
    table = np.arange(1, source.counted + 1, dtype=np.float32)
    filled = np.zeros_like(table)
    for step in range(source.steps(1.0)):
        for located in source.located(step):
            filled[located.places[located.places >= 0]] += 1
    assert (filled > 0).all()
    starts = np.cumsum(
        [0, *(np.count_nonzero(s[i].weights) for i in range(17) for s in (source.chosen, source.rejected))]
    )
    referred = source.referenced(table)
    for step in (0, 1, 7):
        inputs = referred.batch(step)
        found = answers(inputs.batch, inputs.reference)
        expected = [
            (r, side[i].ids[side[i].weights != 0].tolist(), table[starts[2 * i + k] : starts[2 * i + k + 1]].tolist())
            for r, row in enumerate(source.order.members(step))
            for i in row.tolist()
            for k, side in enumerate((source.chosen, source.rejected))
        ]
        assert found == expected
        assert not inputs.reference[inputs.batch.weights == 0].any()
    wanted, unwanted = source.sums(table)
    assert wanted[3] == table[starts[6] : starts[7]].sum()
    assert unwanted[3] == table[starts[7] : starts[8]].sum()


@pytest.mark.parametrize("make", [pairs, lambda: judged()])
def test_rows_of_a_step_and_the_order(make):
    source, again = make(), make()
    for step in (5, 0):
        whole, one = source.batch(step), again.batch(step, [1])
        leaves = zip(_leaves(whole), _leaves(one), strict=True)
        assert all(np.array_equal(a[1:2], b) for a, b in leaves)
    assert source.digest() == again.digest()
    assert [len(row) for row in source.named(0)] == [len(row) for row in source.order.members(0)]
    assert source.files in (["f"], ["w", "u"])


def _leaves(inputs):
    for field in inputs:
        if isinstance(field, tuple):
            yield from _leaves(field)
        elif field is not None:
            yield field


def test_pairs_that_do_not_fit():
    chosen, rejected = store([("aaaa", "b"), ("aaaaaaaaaa", "b")]), store([("aaaa", "c"), ("aaaaaaaaaa", "c")])
    length = len(chosen[1]) + len(rejected[1])
    kept = fitting_pairs(chosen, rejected, length - 1, "drop", shared=False)
    assert [kept.chosen.source(0), kept.report.too_long] == ["f:1", (("f:2", length),)]
    assert kept.report.tokens == len(chosen[0]) + len(rejected[0])
    shared = fitting_pairs(chosen, rejected, length - 1, "error", shared=True)  # with the prompt once, both fit
    assert len(shared.chosen) == 2
    assert shared.report.too_long == ()
    with pytest.raises(ValueError, match=r"1 of 2 examples longer than .*f:2"):
        fitting_pairs(chosen, rejected, length - 1, "error", shared=False)
    with pytest.raises(ValueError, match="no example is left"):
        fitting_pairs(chosen, rejected, 3, "drop", shared=False)
    with pytest.raises(ValueError, match="pairs cannot be cut"):
        fitting_pairs(chosen, rejected, length, "cut", shared=False)


def test_answers_that_are_no_pairs():
    some = store([("a", "b"), ("c", "d")])
    with pytest.raises(ValueError, match=r"2 wanted and 1 unwanted answers, which are no pairs.*kto"):
        fitting_pairs(some, store([("a", "x")]), 64, "error", shared=True)
    with pytest.raises(ValueError, match="which are no pairs"):
        fitting_pairs(some, store([("a", "x"), ("c", "y")], "g"), 64, "error", shared=True)
    with pytest.raises(ValueError, match="f:2: the chosen and the rejected answer have the same tokens"):
        fitting_pairs(some, store([("a", "x"), ("c", "d")]), 64, "error", shared=True)


def judged():
    return JudgedSource(store(texts(12, 1, 5), "w"), store(texts(9, 2, 6), "u"), Layout(2, 40, 3))


def test_mismatched_answers():
    first, second = store([("ab", "xyz"), ("cdefg", "u")])
    made = mismatched(first, second)
    assert made.ids.tolist() == [*first.ids[:2], *second.ids[5:]]
    assert made.weights.tolist() == [0, 0, 1, 1]
    assert made.prompt_length == 2
    source = judged()
    sides = [*source.desirable, *source.undesirable]
    inputs = source.batch(0)
    for r, row in enumerate(source.order.members(0)):
        expected = [sides[(i + 1) % 21] for i in row.tolist()]
        counted = [token for each in expected for token in each.ids[each.weights != 0].tolist()]
        assert inputs.mismatched.tokens[r, inputs.mismatched.weights[r] != 0].tolist() == counted
        own = inputs.desirable[r, inputs.batch.weights[r] != 0]
        assert own.tolist() == [
            1 if i < 12 else -1 for i in row.tolist() for _ in range(np.count_nonzero(sides[i].weights))
        ]
    assert not inputs.desirable[inputs.batch.segments == 0].any()


def test_every_epoch_has_the_same_mismatched_answers():
    source = judged()
    epoch = source.order.rows_per_epoch
    places = []
    for first in range(3):
        rows = [divmod(row, 2) for row in range(first * epoch, (first + 1) * epoch)]
        found = [source.located(step, [row])[k].places for step, row in rows for k in (0, 1)]
        places.append(np.sort(np.concatenate([each[each >= 0] for each in found])))
    assert all(np.array_equal(places[0], each) for each in places)
    assert np.array_equal(places[0], np.arange(source.counted))  # every place of the table, once
    assert 0 < source.fill < 1


def test_mismatched_answers_longer_than_a_row_are_left_out():
    desirable = store([("a" * 14, "b"), ("c", "d" * 14)], "w")
    source = JudgedSource(desirable, store([("e", "f")], "u"), Layout(1, 20))
    assert source._fits.tolist() == [False, True, True]
    counted = sum(np.count_nonzero(source.batch(step).mismatched.weights) for step in range(source.steps(1.0)))
    assert counted == 2 + 2  # after "c" that of "e", after "e" that of the first: one letter and the end


def test_judged_answers_of_one_kind():
    some = store([("a", "b"), ("c", "d")])
    none = TokenStore(some.columns, some.prefixes, some.chosen[:0])
    for sides, kind in (((some, none), "desirable"), ((none, some), "undesirable")):
        with pytest.raises(ValueError, match=f"f: all answers are {kind}"):
            JudgedSource(*sides, Layout(1, 32))
