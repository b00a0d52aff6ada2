"""The cache of encoded data: keyed by content, and each file complete or absent."""

import errno
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))
from tiny_tokenizer import CHATML, tiny_tokenizer

from train.data import Encoding, Example, encode
from train.data import cache as encoded
from train.data.cache import encode_cached
from train.run.training import tokenising

EXAMPLES = [Example.of("Was? ", "ja", "f:1", "yes"), Example.of("p" * 30, "c", "f:2"), Example.of("x", "no", "f:2")]

PLAIN = Encoding()


def encode_first(example, cache):
    """Another first example."""
    return encode_cached([example, *EXAMPLES[1:]], tiny_tokenizer(), PLAIN, cache)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder; everything is worth caching."""
    monkeypatch.setattr(encoded, "WORTH_SECONDS", 0.0)
    return tmp_path / "tokens"


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of `encode`."""
    counted = []
    monkeypatch.setattr(encoded, "encode", lambda *args, **named: counted.append(1) or encode(*args, **named))
    return counted


def same(a, b):
    assert a[1] == b[1]
    for one, other in zip(a[0], b[0], strict=True):
        for name in ("ids", "completion", "weights"):
            x, y = getattr(one, name), getattr(other, name)
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        assert (one.prompt_length, one.source, one.answer) == (other.prompt_length, other.source, other.answer)


@pytest.mark.parametrize("options", [{}, {"max_length": 20, "on_long": "drop"}, {"max_length": 20, "on_long": "cut"}])
def test_the_second_time_is_read(cache, calls, options):
    first = encode_cached(EXAMPLES, tiny_tokenizer(), Encoding(**options), cache)
    second = encode_cached(EXAMPLES, tiny_tokenizer(), Encoding(**options), cache)
    assert len(calls) == 1
    same(first, second)
    same(first, encode(EXAMPLES, tiny_tokenizer(), Encoding(**options)))
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: encode_cached(EXAMPLES[:2], tiny_tokenizer(), PLAIN, cache),
        lambda cache: encode_first(Example.of("Was? ", "ja", "f:1", "no"), cache),
        lambda cache: encode_first(Example.of("Was?", " ja", "f:1", "yes"), cache),
        lambda cache: encode_first(replace(EXAMPLES[0], weight=0.5), cache),
        lambda cache: encode_cached(EXAMPLES, tiny_tokenizer(), Encoding(loss_on="all"), cache),
        lambda cache: encode_cached(EXAMPLES, tiny_tokenizer(), Encoding(chat=True), cache),
        lambda cache: encode_cached(EXAMPLES, tiny_tokenizer(), Encoding(max_length=99), cache),
        lambda cache: encode_cached(EXAMPLES, tiny_tokenizer(bos=True), PLAIN, cache),
        lambda cache: encode_cached(EXAMPLES, tiny_tokenizer(merges=[("p", "p")]), PLAIN, cache),
        lambda cache: encode_cached(EXAMPLES, tiny_tokenizer(eos="<|im_end|>"), PLAIN, cache),
        lambda cache: encode_cached(EXAMPLES, tiny_tokenizer(template=CHATML + " "), PLAIN, cache),
    ],
)
def test_a_change_of_any_input_encodes_again(cache, calls, change):
    encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache)
    change(cache)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"x" * len(raw)])
def test_a_damaged_file_is_replaced(cache, calls, damage):
    first = encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache)
    [path] = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    same(first, encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache))
    assert len(calls) == 2
    encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache)
    assert len(calls) == 2


def test_the_date_that_a_template_prints_belongs_to_the_key(cache, calls):
    dated = tiny_tokenizer(template="{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    chat, today = Encoding(chat=True), date.today().isoformat()
    for how in (chat, Encoding(chat=True, date=today), Encoding(chat=True, date="2024-07-04")):
        rows, _ = encode_cached(EXAMPLES, dated, how, cache)
        assert dated.decode(rows[0].ids).startswith(how.date or today)
    assert len(calls) == 2
    encode_cached(EXAMPLES, tiny_tokenizer(), chat, cache)
    encode_cached(EXAMPLES, tiny_tokenizer(), Encoding(chat=True, date="2024-07-04"), cache)
    assert len(calls) == 3


def test_what_took_no_time_is_not_cached(cache, monkeypatch):
    monkeypatch.setattr(encoded, "WORTH_SECONDS", 60.0)
    encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(cache):
    cache.write_text("a file where the folder should be")
    rows, _ = encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache)
    assert len(rows) == 3


def test_a_full_disk_is_no_error_and_leaves_no_file(cache, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    rows, _ = encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache)
    assert len(rows) == 3
    assert list(cache.iterdir()) == []


def test_an_error_is_not_cached(cache):
    with pytest.raises(ValueError, match="longer than 5"):
        encode_cached(EXAMPLES, tiny_tokenizer(), Encoding(max_length=5), cache)
    assert not cache.exists()


def test_progress_of_many(cache, monkeypatch, capsys):
    monkeypatch.setattr(encoded, "CHUNK", 2)
    encode_cached(EXAMPLES, tiny_tokenizer(), PLAIN, cache, watch=tokenising)
    assert "Tokenising" in capsys.readouterr().out
