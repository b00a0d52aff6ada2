import time
from collections import Counter

import jax
import numpy as np
import pytest

from jaxsteer.batches import bucket_length, make_batch
from train.data import DataSource, TokenizedExample, pack, stack_rows


def made(lengths, seed=0):
    """Examples of these lengths whose first id is their index; the last third is supervised."""
    rng = np.random.default_rng(seed)
    examples = []
    for i, n in enumerate(lengths):
        ids = rng.integers(1, 1000, n).astype(np.int32)
        ids[0] = 10_000 + i
        prompt = max(1, n - n // 3)
        examples.append(TokenizedExample(ids, np.arange(n) >= prompt, prompt, f"f:{i}", str(i)))
    return examples


LENGTHS = np.random.default_rng(1).integers(2, 33, 101).tolist()


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def seen(source, rows):
    """How often each example occurs in this many rows from the start."""
    steps = -(-rows // source.batch_size)
    members = [row for step in range(steps) for row in source.row_members(step)][:rows]
    return Counter(i for row in members for i in row)


def test_pack_is_a_partition_and_best_fit():
    rows = pack(LENGTHS, 64)
    assert sorted(i for row in rows for i in row) == list(range(101))
    assert all(sum(LENGTHS[i] for i in row) <= 64 for row in rows)
    # 7 goes to the row with 8 left rather than the one with 9, then 9 fills the other.
    assert pack([55, 56, 7, 9, 64, 1], 64) == [[0, 3], [1, 2, 5], [4]]
    assert pack([], 8) == []


def test_pack_is_fast_and_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.1, 0.4, 7500), 40, 1024).astype(int).tolist()  # like GSM8K's
    start = time.perf_counter()
    rows = pack(lengths, 1024)
    assert time.perf_counter() - start < 1
    assert sum(lengths) / (1024 * len(rows)) > 0.95


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_epoch_has_every_example_once(packed, batch_size):
    source = DataSource(made(LENGTHS), batch_size, 64, seed=5, pack=packed)
    per_epoch = source.rows_per_epoch
    for epochs in (1, 2, 3):
        assert seen(source, epochs * per_epoch) == dict.fromkeys(range(101), epochs)
    if not packed:
        assert per_epoch == 101


def test_order_is_a_function_of_seed_and_step():
    examples = made(LENGTHS)
    first, second = (DataSource(examples, 3, 64, seed=5) for _ in range(2))
    steps = 5 * first.steps(1)
    inorder = [first.batch(k) for k in range(steps)]
    for k in np.random.default_rng(0).permutation(steps).tolist():
        assert same(second.batch(k), inorder[k])
    assert same(DataSource(examples, 3, 64, seed=5).batch(1000), first.batch(1000))
    other = DataSource(examples, 3, 64, seed=6)
    assert not same(other.batch(0), inorder[0])


def test_batch_size_does_not_change_the_order_of_rows():
    examples = made(LENGTHS)
    single, triple = (DataSource(examples, n, 64) for n in (1, 3))
    rows = [single.batch(k).tokens[0] for k in range(60)]
    assert np.array_equal(np.stack(rows), np.concatenate([triple.batch(k).tokens for k in range(20)]))


def test_golden_order():
    # A resumed run must see what it would have seen: this order may change only on purpose.
    source = DataSource(made([5, 3, 4, 5, 2, 3, 4, 5]), 2, 10, seed=1)
    assert [source.row_members(k) for k in range(4)] == GOLDEN


GOLDEN = [[[0], [6, 7]], [[1, 2], [3, 5, 4]], [[5, 6], [2, 0]], [[7, 1, 4], [3]]]


def test_epochs_differ():
    source = DataSource(made(LENGTHS), 1, 64)
    n = source.rows_per_epoch
    first, second = ([source.row_members(e * n + k)[0] for k in range(n)] for e in (0, 1))
    assert first != second
    assert {tuple(sorted(r)) for r in first} != {tuple(sorted(r)) for r in second}  # other neighbours too


def test_rows_hold_their_examples_exactly():
    examples = made(LENGTHS)
    source = DataSource(examples, 4, 64, seed=2)
    for step in range(source.steps(1)):
        batch, members = source.batch(step), source.row_members(step)
        assert [f.dtype for f in jax.tree.leaves(batch)] == [np.int32] * 4 + [np.bool_, np.float32]
        assert all(f.shape == (4, 64) for f in jax.tree.leaves(batch))
        for r, row in enumerate(members):
            at = 0
            for segment, i in enumerate(row, 1):
                e, span = examples[i], slice(at, at + len(examples[i]))
                assert np.array_equal(batch.tokens[r, span], e.ids)
                assert (batch.segments[r, span] == segment).all()
                assert np.array_equal(batch.positions[r, span], np.arange(len(e)))
                assert (batch.prompt_lengths[r, span] == e.prompt_length).all()
                assert np.array_equal(batch.completion[r, span], e.completion)
                assert np.array_equal(batch.weights[r, span], e.weights)
                at += len(e)
            assert not any(f[r, at:].any() for f in jax.tree.leaves(batch))  # padding is zeros


def test_counts():
    source = DataSource(made([8] * 10), 4, 16)
    assert (source.rows_per_epoch, source.steps(1), source.steps(2), source.steps(0.4)) == (5, 2, 3, 1)
    assert source.fill == 1.0
    assert DataSource(made([8] * 10), 4, 16, pack=False).fill == 0.5
    assert DataSource(made([8] * 30), 1, 8).steps(0.1) == 3


def test_first_token_is_never_a_target():
    e = TokenizedExample(np.array([7, 8], np.int32), np.ones(2, bool), 0, "f:1")
    assert stack_rows([[e, e]], 5).weights.tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "got batch_size 0 and sequence_length 64, both must be at least 1"),
        ({"sequence_length": 0}, "got batch_size 2 and sequence_length 0, both must be at least 1"),
        ({"sequence_length": 31}, r"f:\d+: 32 tokens do not fit a row of 31; raise --sequence-length"),
        ({"seed": -1}, "seed: got -1"),
        ({"examples": []}, "no examples"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSource(**{"examples": made(LENGTHS), "batch_size": 2, "sequence_length": 64, **settings})


def test_refuses_negative_steps_and_full_rows():
    with pytest.raises(ValueError, match="step -1"):
        DataSource(made([4]), 1, 8).batch(-1)
    with pytest.raises(ValueError, match="8 tokens do not fit a row of 7"):
        stack_rows([made([4, 4])], 7)


def test_bucket_lengths_are_few():
    assert [bucket_length(n) for n in (1, 16, 17, 24, 25, 33, 49, 100, 1000)] == [
        16,
        16,
        24,
        24,
        32,
        48,
        64,
        128,
        1024,
    ]
    assert len({bucket_length(n) for n in range(1, 2049)}) == 15


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_what_the_library_would_make_of_them(left):
    examples = made(LENGTHS)
    rows = [[examples[i] for i in row] for row in pack(LENGTHS, 64)]
    batch = stack_rows(rows, 64, left=left)
    assert same(batch, jax.jit(make_batch)(batch.tokens, batch.segments, batch.weights))
