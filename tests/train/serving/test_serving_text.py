"""Text as its tokens come: whatever the division into events, nothing of a stop string, and each token's own text."""

from functools import partial

import numpy as np
import pytest
from tiny_tokenizer import sentencepiece_tokenizer, tiny_tokenizer
from tokenizers import decoders

from jaxsteer.inference.draws import Top
from jaxsteer.inference.events import Event
from train.serving.text import TextOfAnswer, pieces

TEXTS = ("héllo wörld 日本 🙂", " a  b\n", "\n🙂\n\n🙂", "", "no yes yes" * 30, "日本語" * 40)


def stripping_tokenizer():
    """Drops the space before the first word, as published SentencePiece tokenizers do."""
    tokenizer = sentencepiece_tokenizer()
    spaces = decoders.Replace("▁", " ")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "merges": tiny_tokenizer(merges=[("a", "b"), ("l", "l")]),
    "sentencepiece": stripping_tokenizer(),
    "spaced": sentencepiece_tokenizer("prepend"),
}


def decoder_of(tokenizer):
    return partial(tokenizer.decode, skip_special_tokens=True)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def events_of(ids, sizes, finished="stop", *, empty_end=False):
    """The ids as events of these many tokens, in turn; log-probabilities are minus the token's number."""
    start, made, number = 0, [], 0
    while start < len(ids) or not made:
        part = np.array(ids[start : start + sizes[number % len(sizes)]], np.int32)
        values = -np.arange(start, start + len(part), dtype=np.float32)
        start, number = start + len(part), number + 1
        made.append(Event(7, part, values, None, 1.0))
    if empty_end:
        return [*made, Event(7, np.zeros(0, np.int32), np.zeros(0, np.float32), finished, 1.0)]
    return [*made[:-1], made[-1]._replace(finished=finished)]


def read(tokenizer, ids, sizes, stop=(), *, tokens=True, **end):
    """All deltas of an answer, and its reader."""
    reader = TextOfAnswer(decoder_of(tokenizer), stop, tokens=tokens)
    deltas = [reader.push(event) for event in events_of(ids, sizes, **end)]
    assert "".join(delta.text for delta in deltas) == reader.text
    return deltas, reader


@pytest.mark.parametrize("sizes", [(1,), (3, 1, 2), (1000,)], ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:6])
def test_all_text_comes_out_once(text, name, sizes):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text)
    expected = decoder_of(tokenizer)(ids)
    for tokens in (False, True):
        deltas, reader = read(tokenizer, ids, sizes, tokens=tokens, empty_end=True)
        assert reader.text == expected
        assert (reader.generated, reader.finished) == (len(ids), "stop")
        assert all("\ufffd" not in delta.text for delta in deltas)
        assert [delta.finished for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    found = [token for delta in deltas for token in delta.tokens]
    assert [token.id for token in found] == ids
    assert "".join(token.text for token in found) == expected
    np.testing.assert_array_equal([token.log_probability for token in found], -np.arange(len(ids)))
    assert "".join(pieces(ids, decoder_of(tokenizer))) == expected


def test_text_is_given_out_as_soon_as_it_is_settled():
    tokenizer = TOKENIZERS["bytes"]
    deltas, _ = read(tokenizer, ids_of(tokenizer, "aé🙂b"), (1,))
    assert [delta.text for delta in deltas] == ["a", "", "é", "", "", "", "🙂", "b"]


def test_a_token_belongs_to_the_delta_with_its_text():
    tokenizer = TOKENIZERS["bytes"]
    deltas, _ = read(tokenizer, ids_of(tokenizer, "aéb"), (1,))
    assert ["".join(token.text for token in delta.tokens) for delta in deltas] == ["a", "", "é", "b"]
    assert [len(delta.tokens) for delta in deltas] == [1, 0, 2, 1]


@pytest.mark.parametrize("text", ["abc🙂", "\n🙂"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_that_ends_inside_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text)[:-1]
    deltas, reader = read(tokenizer, ids, (2,), finished="length")
    assert reader.text.strip("\ufffd ") == text[:-1]
    assert deltas[-1].finished == "length"
    assert "".join(token.text for delta in deltas for token in delta.tokens) == reader.text
    assert sum(len(delta.tokens) for delta in deltas) == len(ids)


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    tokenizer = TOKENIZERS["sentencepiece"]
    broken = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xF0>"])
    _, reader = read(tokenizer, [*broken, *ids_of(tokenizer, "yes no yes")], (1,))
    assert reader.text.startswith("\n")
    assert reader.text.endswith("yes no yes")


# ---- stop strings


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (1000,)], ids=str)
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("one\n", ["\n\n"], "one\n"),  # held back until the end
        ("a日本b", ["日本"], "a"),
        ("aab", ["ab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("abcd", ["abcd", "c"], "ab"),  # the one that is complete first
        ("xabcd", ["bc", "abc"], "x"),
        ("STOP here", ["STOP"], ""),
        ("until the END", ["END"], "until the "),
        ("plain", [], "plain"),
    ],
)
def test_nothing_of_a_stop_string_comes_out(text, stop, expected, sizes):
    tokenizer = TOKENIZERS["merges"]
    ids = ids_of(tokenizer, text)
    generated = set()
    for tokens in (False, True):
        deltas, reader = read(tokenizer, ids, sizes, stop, tokens=tokens, finished="length", empty_end=True)
        assert reader.text == expected
        assert reader.finished == ("stop" if expected != text else "length")
        generated.add(reader.generated)
    assert "".join(token.text for delta in deltas for token in delta.tokens) == expected
    assert len(generated) == 1
    found = [token for delta in deltas for token in delta.tokens]
    assert [token.id for token in found] == ids[: len(found)]
    assert [-token.log_probability for token in found] == list(range(len(found)))


def test_the_token_in_which_a_stop_string_begins_is_cut():
    tokenizer = TOKENIZERS["merges"]  # "ab" is one token
    deltas, _ = read(tokenizer, ids_of(tokenizer, "xabc"), (1,), ["bc"])
    assert [token.text for delta in deltas for token in delta.tokens] == ["x", "a"]


def test_tokens_after_a_stop_string_do_not_count():
    tokenizer = TOKENIZERS["bytes"]
    for sizes in ((1,), (100,)):
        _, reader = read(tokenizer, ids_of(tokenizer, "ab.cdef"), sizes, ["."])
        assert (reader.text, reader.generated) == ("ab", 3)


def test_an_answer_that_has_ended_says_no_more():
    tokenizer = TOKENIZERS["bytes"]
    reader = TextOfAnswer(decoder_of(tokenizer), ["b"])
    first, second = events_of(ids_of(tokenizer, "abcd"), (2,))
    assert reader.push(first) == ("a", (), "stop")
    assert reader.push(second) == ("", (), None)


@pytest.mark.parametrize("finished", ["cancelled", "nonfinite"])
def test_answers_without_an_end_have_no_text(finished):
    event = Event(0, np.zeros(0, np.int32), np.zeros(0, np.float32), finished, 1.0)
    with pytest.raises(ValueError, match=finished):
        TextOfAnswer(str).push(event)


# ---- the likeliest tokens


def test_the_likeliest_tokens_have_the_text_they_would_add():
    tokenizer = TOKENIZERS["sentencepiece"]
    yes, no = tokenizer.convert_tokens_to_ids(["▁yes", "▁no"])
    (half,) = tokenizer.convert_tokens_to_ids(["<0xF0>"])
    top = Top(np.array([[yes, no], [no, half]], np.int32), np.array([[-0.5, -1], [-0.25, -2]], np.float32))
    reader = TextOfAnswer(decoder_of(tokenizer), tokens=True)
    event = Event(0, np.array([yes, no], np.int32), np.array([-0.5, -0.25], np.float32), "stop", 1.0, top)
    first, second = reader.push(event).tokens
    assert first.top == ((yes, "yes", -0.5), (no, "no", -1.0))  # no space before the first word
    assert second.top == ((no, " no", -0.25), (half, "\ufffd", -2.0))
    assert (first.text, second.text) == ("yes", " no")


def test_a_token_among_the_likeliest_has_its_own_text():
    tokenizer = TOKENIZERS["bytes"]
    ids = ids_of(tokenizer, "é")
    top = Top(np.array([[each] for each in ids], np.int32), np.zeros((2, 1), np.float32))
    reader = TextOfAnswer(decoder_of(tokenizer), tokens=True)
    event = Event(0, np.array(ids, np.int32), np.zeros(2, np.float32), "stop", 1.0, top)
    assert [(token.text, token.top[0].text) for token in reader.push(event).tokens] == [("", ""), ("é", "é")]
