"""Tokenised data on disk: found by its content, complete or absent, and made by whoever comes first."""

import errno
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))
from tiny_tokenizer import CHATML, tiny_tokenizer

from train.data import DataSource, Encoding, Example, digest_of, encode, shards
from train.data.records import Listed, Part, Recipe, sampled
from train.data.shard_file import read
from train.data.tokenised import tokenised
from train.run.training import tokenising

EXAMPLES = [
    Example.of("Was? ", "ja", "f:1", "yes"),
    Example.of("p" * 30, "c", "f:2"),
    Example.of("x", "no", "g:2", weight=-0.5),
    Example.of("x<|im_end|>", "so", "g:3"),
    Example.of("y", "no", "g:4"),
]

PLAIN = Encoding()


def recipe(examples=EXAMPLES, *more, choose=None):
    return Recipe(tuple(Part(Listed(some)) for some in (examples, *more)), choose)


def encode_first(example, cache):
    """Another first example."""
    return tokenised(recipe([example, *EXAMPLES[1:]]), tiny_tokenizer(), PLAIN, cache)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder; shards of two rows."""
    monkeypatch.setattr(shards, "SHARD", 2)
    monkeypatch.setattr(shards, "CHUNK", 1)
    monkeypatch.setattr(shards, "_POLL_SECONDS", 0.01)
    return tmp_path / "tokens"


@pytest.fixture
def calls(monkeypatch):
    """The number of examples of each call of `encode_rows`."""
    counted = []
    original = shards.encode_rows
    monkeypatch.setattr(shards, "encode_rows", lambda some, *rest: counted.append(len(some)) or original(some, *rest))
    return counted


def files(cache):
    return sorted(path for path in cache.glob("*/*") if path.is_file())


def same(a, b):
    assert a[1] == b[1]
    for one, other in zip(a[0], b[0], strict=True):
        for name in ("ids", "completion", "weights"):
            x, y = getattr(one, name), getattr(other, name)
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        assert (one.prompt_length, one.source, one.answer) == (other.prompt_length, other.source, other.answer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 20, "on_long": "drop"},
        {"max_length": 20, "on_long": "cut"},
        {"max_length": 20, "on_long": "cut", "loss_on": "all"},
        {"chat": True},
    ],
)
def test_the_second_time_is_read(cache, calls, options):
    first = tokenised(recipe(), tiny_tokenizer(), Encoding(**options), cache)
    made = len(calls)
    second = tokenised(recipe(), tiny_tokenizer(), Encoding(**options), cache)
    assert len(calls) == made == 5
    same(first, second)
    same(first, encode(EXAMPLES, tiny_tokenizer(), Encoding(**options)))
    assert first[0].digest() == digest_of(encode(EXAMPLES, tiny_tokenizer(), Encoding(**options))[0])
    assert [path.suffix for path in files(cache)] == [".arrow"] * 3
    assert second[0].files == ["f", "g"]


def test_the_arrays_are_views_of_the_files(cache):
    store, _ = tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    for columns in store.columns:
        for array in (columns.ids, columns.starts, columns.runs, columns.prompt_lengths, columns.digests):
            assert not array.flags.owndata
            assert not array.flags.writeable
    assert store.columns[0].ids.dtype == np.uint16


def test_another_length_or_another_choice_finds_the_same_files(cache, calls):
    tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    shorter, report = tokenised(recipe(), tiny_tokenizer(), Encoding(max_length=20, on_long="drop"), cache)
    assert (len(shorter), len(report.too_long)) == (4, 1)
    backwards = lambda counts: np.arange(sum(counts))[::-1]
    store, _ = tokenised(recipe(EXAMPLES, EXAMPLES[:1], choose=backwards), tiny_tokenizer(), PLAIN, cache)
    assert [each.source for each in store] == ["f:1", *(each.source for each in EXAMPLES[::-1])]
    assert sum(calls) == 6


def test_a_sample_contains_the_smaller_ones(cache):
    whole, _ = tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)

    def names(count):
        return [each.source for each in tokenised(sampled(recipe(), count), tiny_tokenizer(), PLAIN, cache)[0]]

    few, more, everything = names(2), names(len(whole) - 1), [each.source for each in whole]
    assert (len(few), len(more)) == (2, len(whole) - 1)
    assert set(few) < set(more) < set(everything)
    assert few == [name for name in everything if name in few]  # in the data's order
    assert names(0) == names(len(whole) + 1) == everything


def test_batches_do_not_depend_on_where_the_examples_are(cache):
    how = Encoding(max_length=20, on_long="cut")
    stored, _ = tokenised(recipe(), tiny_tokenizer(), how, cache)
    listed, _ = encode(EXAMPLES, tiny_tokenizer(), how)
    for step in range(4):
        batches = (DataSource(some, 2, 32, seed=3).batch(step) for some in (stored, listed))
        for one, other in zip(*map(jax.tree.leaves, batches), strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: tokenised(recipe(EXAMPLES[:3]), tiny_tokenizer(), PLAIN, cache),
        lambda cache: encode_first(Example.of("Was? ", "ja", "f:1", "no"), cache),
        lambda cache: encode_first(Example.of("Was?", " ja", "f:1", "yes"), cache),
        lambda cache: encode_first(replace(EXAMPLES[0], weight=0.5), cache),
        lambda cache: tokenised(recipe(), tiny_tokenizer(), Encoding(loss_on="all"), cache),
        lambda cache: tokenised(recipe(), tiny_tokenizer(), Encoding(chat=True), cache),
        lambda cache: tokenised(recipe(), tiny_tokenizer(bos=True), PLAIN, cache),
        lambda cache: tokenised(recipe(), tiny_tokenizer(merges=[("p", "p")]), PLAIN, cache),
        lambda cache: tokenised(recipe(), tiny_tokenizer(eos="<|im_end|>"), PLAIN, cache),
        lambda cache: tokenised(recipe(), tiny_tokenizer(template=CHATML + " "), PLAIN, cache),
    ],
)
def test_a_change_of_any_input_tokenises_again(cache, calls, change):
    tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    before = len(calls)
    change(cache)
    assert len(calls) > before


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"x" + raw[1:]])
def test_only_a_damaged_file_is_made_again(cache, calls, damage):
    first = tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    kept = [(each.ids.copy(), each.source) for each in first[0]]
    path = files(cache)[1]
    raw = path.read_bytes()
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(damage(raw))
    calls.clear()
    again, _ = tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    assert len(calls) == 2
    for each, (ids, source) in zip(again, kept, strict=True):
        np.testing.assert_array_equal(each.ids, ids)
        assert each.source == source


def test_a_killed_process_leaves_what_it_finished(cache, calls, monkeypatch):
    class Killed(BaseException):
        pass

    records = Listed(EXAMPLES)
    whole = records.read
    stop = lambda start, end: whole(start, end) if start < 3 else (_ for _ in ()).throw(Killed)
    with monkeypatch.context() as patch:
        patch.setattr(Listed, "read", lambda self, start, end: stop(start, end))
        with pytest.raises(Killed):
            tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    assert len(files(cache)) == 1
    calls.clear()
    tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    assert sum(calls) == 3


def test_processes_divide_the_work(cache, calls):
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: tokenised(recipe(), tiny_tokenizer(), PLAIN, cache), range(3)))
    assert sum(calls) == 5
    for each in made:
        same(each, made[0])


def claim(cache, owner, age=0.0):
    """Someone else's claim of the first shard."""
    [path] = {path.parent for path in files(cache)}
    path = path / "00000.claim"
    path.write_text(owner)
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(("owner", "age"), [(f"{os.uname().nodename} 999999999", 0), ("another 1", 1000)])
def test_a_dead_process_blocks_nobody(cache, calls, owner, age):
    tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    claim(cache, owner, age)
    files(cache)[0].unlink()
    tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    assert len(calls) == 7
    assert not list(cache.glob("*/*.claim"))


def test_a_living_process_is_waited_for(cache, calls):
    first = tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    path = files(cache)[0]
    raw = path.read_bytes()
    path.unlink()
    claim(cache, "another 1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tokenised, recipe(), tiny_tokenizer(), PLAIN, cache)
        time.sleep(0.05)
        assert not waiting.done()
        path.write_bytes(raw)
        same(waiting.result(), first)
    assert len(calls) == 5


def test_the_date_that_a_template_prints_belongs_to_the_key(cache, calls):
    dated = tiny_tokenizer(template="{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    chat, today = Encoding(chat=True), date.today().isoformat()
    for how in (chat, Encoding(chat=True, date=today), Encoding(chat=True, date="2024-07-04")):
        rows, _ = tokenised(recipe(), dated, how, cache)
        assert dated.decode(rows[0].ids).startswith(how.date or today)
    assert sum(calls) == 10
    tokenised(recipe(), tiny_tokenizer(), chat, cache)
    tokenised(recipe(), tiny_tokenizer(), Encoding(chat=True, date="2024-07-04"), cache)
    assert sum(calls) == 15


def test_what_took_no_time_is_not_written(cache):
    tokenised(recipe(EXAMPLES[:2]), tiny_tokenizer(), PLAIN, cache)
    assert files(cache) == []


def test_a_cache_that_cannot_be_written_is_no_error(cache):
    cache.write_text("a file where the folder should be")
    rows, _ = tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    assert len(rows) == 5


def test_a_full_disk_is_no_error_and_leaves_no_file(cache, monkeypatch):
    def fsync(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    rows, _ = tokenised(recipe(), tiny_tokenizer(), PLAIN, cache)
    assert len(rows) == 5
    assert files(cache) == []


def test_an_error_is_not_written(cache):
    bad = [*EXAMPLES[:3], Example.of("x", "", "f:9", weight=float("nan"))]
    with pytest.raises(ValueError, match="f:9: the weight is nan"):
        tokenised(recipe(bad), tiny_tokenizer(), PLAIN, cache)
    assert [path.suffix for path in files(cache)] == [".arrow"]
    with pytest.raises(ValueError, match="longer than 5"):
        tokenised(recipe(), tiny_tokenizer(), Encoding(max_length=5), cache)


def test_progress_of_many(cache, capsys):
    tokenised(recipe(), tiny_tokenizer(), PLAIN, cache, tokenising)
    assert "Tokenising" in capsys.readouterr().out


def test_a_file_that_is_none_is_refused(tmp_path):
    assert read(tmp_path / "00000-of-00001-0.arrow") is None
