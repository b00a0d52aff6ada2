"""Properties of packing and encoding that hold for any examples."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import END_OF_TEXT, IM_END, tiny_tokenizer

from train.data import DataSource, Encoding, Example, TokenizedExample, Turn, encode, encode_prompts

FEW = settings(derandomize=True, max_examples=30, deadline=None, database=None)
SEQUENCE_LENGTH = 16
TOKENIZERS = [tiny_tokenizer(), tiny_tokenizer(bos=True), tiny_tokenizer(merges=[("a", "b"), ("b", "a"), ("Ċ", "a")])]


@st.composite
def tokenized(draw):
    """Examples of 1 to SEQUENCE_LENGTH tokens whose ids are distinct across examples, with any real weights."""
    examples = []
    for length in draw(st.lists(st.integers(1, SEQUENCE_LENGTH), min_size=1, max_size=20)):
        index = len(examples)
        prompt_length = draw(st.integers(0, length))
        weights = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=length, max_size=length))
        examples.append(
            TokenizedExample(
                ids=np.arange(length, dtype=np.int32) + 100 * (index + 1),
                completion=np.arange(length) >= prompt_length,
                prompt_length=prompt_length,
                source=f"f:{index}",
                weights=np.array(weights, np.float32),
            )
        )
    return examples


sources = st.builds(
    DataSource,
    tokenized(),
    batch_size=st.integers(1, 5),
    sequence_length=st.just(SEQUENCE_LENGTH),
    seed=st.integers(0, 2**64 - 1),
    pack=st.booleans(),
)


@FEW
@given(sources, st.integers(0, 3))
def test_an_epoch_has_every_example_exactly_once(source, epoch):
    first = epoch * source.rows_per_epoch
    indices = []
    for row in range(first, first + source.rows_per_epoch):
        step, within = divmod(row, source.batch_size)
        [members] = source.row_members(step, [within])
        indices += members
    assert sorted(indices) == list(range(len(source.examples)))


@FEW
@given(sources, st.integers(0, 50))
def test_a_row_is_its_examples_one_after_another(source, step):
    batch = source.batch(step)
    assert batch.tokens.shape == (source.batch_size, SEQUENCE_LENGTH)
    for r, members in enumerate(source.row_members(step)):
        examples = [source.examples[i] for i in members]
        lengths = [len(example) for example in examples]
        total = sum(lengths)
        assert np.array_equal(batch.tokens[r, :total], np.concatenate([example.ids for example in examples]))
        assert np.array_equal(batch.segments[r, :total], np.repeat(np.arange(len(lengths)) + 1, lengths))
        assert np.array_equal(batch.positions[r, :total], np.concatenate([np.arange(n) for n in lengths]))
        prompt_lengths = [example.prompt_length for example in examples]
        assert np.array_equal(batch.prompt_lengths[r, :total], np.repeat(prompt_lengths, lengths))
        # Nothing predicts the first token of an example.
        later = batch.positions[r, :total] > 0
        completion = np.concatenate([example.completion for example in examples])
        weights = np.concatenate([example.weights for example in examples])
        assert np.array_equal(batch.completion[r, :total], completion & later)
        assert np.array_equal(batch.weights[r, :total], np.where(later, weights, 0))
        assert not any(field[r, total:].any() for field in jax.tree.leaves(batch))


@FEW
@given(sources, st.integers(0, 50), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_batch_does_not_depend_on_its_division_among_processes(source, step, processes, random):
    whole = source.batch(step)
    rows = list(range(source.batch_size))
    random.shuffle(rows)
    for process in range(processes):
        held = rows[process::processes]
        fresh = DataSource(source.examples, source.batch_size, SEQUENCE_LENGTH, source.seed, source.pack)
        part = fresh.batch(step, held)
        assert all(
            np.array_equal(mine, field[held]) for mine, field in zip(*map(jax.tree.leaves, (part, whole)), strict=True)
        )


texts = st.text(st.sampled_from("ab \nü="), max_size=12)
filled = st.text(st.sampled_from("ab \nü="), min_size=1, max_size=12)


@st.composite
def plain(draw):
    return Example.of(draw(filled), draw(filled), "f:1")


@st.composite
def conversations(draw):
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(filled)), Turn("assistant", draw(filled))]
    return Example(tuple(turns), "f:1")


@FEW
@given(st.lists(plain(), min_size=1, max_size=4), st.sampled_from(TOKENIZERS))
def test_plain_examples(examples, tokenizer):
    encoded, report = encode(examples, tokenizer)
    prompts, _ = encode_prompts(examples, tokenizer)
    for example, row, prompt in zip(examples, encoded, prompts, strict=True):
        assert row.ids[: row.prompt_length].tolist() == prompt.ids.tolist()
        assert not prompt.completion.any()
        # The completion is exactly what follows the prompt: its text and the end of the sequence.
        assert np.array_equal(row.completion, np.arange(len(row)) >= row.prompt_length)
        assert np.array_equal(row.weights, row.completion)
        assert tokenizer.decode(row.ids[row.completion][:-1]) == example.turns[1].text
        assert row.ids[-1] == END_OF_TEXT
    assert report.tokens == sum(map(len, encoded))
    assert report.supervised == sum(int(row.completion.sum()) for row in encoded)


@FEW
@given(st.lists(conversations(), min_size=1, max_size=4), st.sampled_from(TOKENIZERS))
def test_conversations(examples, tokenizer):
    encoded, _ = encode(examples, tokenizer, Encoding(chat=True))
    prompts, _ = encode_prompts(examples, tokenizer, Encoding(chat=True))
    for example, row, prompt in zip(examples, encoded, prompts, strict=True):
        n = len(prompt)
        assert row.ids[:n].tolist() == prompt.ids.tolist()
        assert np.array_equal(row.completion[:n], prompt.completion)
        assert row.completion[n:].all()
        assert np.array_equal(row.weights, row.completion)
        assert row.prompt_length == int(row.completion.argmax())
        # Each run of completion tokens is one assistant message and the token that ends it.
        edges = np.flatnonzero(np.diff(np.r_[0, row.completion, 0])).reshape(-1, 2)
        said = [tokenizer.decode(row.ids[start : end - 1]) for start, end in edges]
        assert said == [turn.text for turn in example.turns if turn.role == "assistant"]
        assert {int(row.ids[end - 1]) for _, end in edges} == {IM_END}
