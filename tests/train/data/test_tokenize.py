import numpy as np
import pytest
from tiny_tokenizer import CHATML, END_OF_TEXT, IM_END, IM_START, tiny_tokenizer

from train.data import Encoding, Example, Turn, encode, encode_prompts, stop_tokens

TALK = Example(
    (
        Turn("system", "Be kind."),
        Turn("user", "Hi"),
        Turn("assistant", " Hello\n"),
        Turn("user", "Bye"),
        Turn("assistant", "Ciao"),
    ),
    "talk.jsonl:1",
)


CHAT = Encoding(chat=True)


def one(example, tokenizer, **options):
    return encode([example], tokenizer, Encoding(**options))[0][0]


def spans(tokenizer, row):
    """Texts of the runs of completion tokens, each of weight 1."""
    assert np.array_equal(row.weights, row.completion)
    edges = np.flatnonzero(np.diff(np.r_[0, row.completion, 0]))
    return [tokenizer.decode(row.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def test_plain_golden():
    row = one(Example.of("ab\n", "7", "f:1", "seven"), tiny_tokenizer())
    ids = tiny_tokenizer()("ab\n7")["input_ids"]
    assert row.ids.tolist() == [*ids, END_OF_TEXT]
    assert row.completion.tolist() == [False, False, False, True, True]
    assert row.weights.tolist() == [0, 0, 0, 1, 1]
    assert (row.prompt_length, len(row), row.source, row.answer) == (3, 5, "f:1", "seven")
    assert (row.ids.dtype, row.completion.dtype, row.weights.dtype) == (np.int32, bool, np.float32)


def test_beginning_of_sequence_where_the_tokenizer_adds_it():
    row = one(Example.of("a", "b", "f:1"), tiny_tokenizer(bos=True))
    assert row.ids[0] == IM_START
    assert (row.ids == IM_START).sum() == 1
    assert row.prompt_length == 2
    # A template writes its own.
    chat = one(Example.of("a", "b", "f:1"), tiny_tokenizer(bos=True), chat=True)
    assert (chat.ids == IM_START).sum() == 2


def test_no_merge_across_the_boundary():
    tokenizer = tiny_tokenizer(merges=[("a", "b")])
    assert len(tokenizer("ab")["input_ids"]) == 1
    example = Example.of("xa", "by", "f:1")
    row, prompt = one(example, tokenizer), encode_prompts([example], tokenizer)[0][0]
    assert tokenizer.convert_ids_to_tokens(row.ids.tolist()) == ["x", "a", "b", "y", "<|endoftext|>"]
    assert prompt.ids.tolist() == row.ids[:2].tolist()


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_begin_the_training_ids(chat):
    tokenizer = tiny_tokenizer(bos=True)
    example = Example.of("What? ", " that.", "f:1")
    row, prompt = one(example, tokenizer, chat=chat), encode_prompts([example], tokenizer, Encoding(chat=chat))[0][0]
    assert prompt.ids.tolist() == row.ids[: row.prompt_length].tolist()
    assert prompt.prompt_length == row.prompt_length == len(prompt)
    assert not prompt.completion.any()
    assert not prompt.weights.any()
    assert prompt.answer == row.answer == "that."


def test_chat_golden():
    tokenizer = tiny_tokenizer()
    row = one(Example.of("2+2?", "4", "f:1"), tokenizer, chat=True)
    text = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    assert tokenizer.decode(row.ids) == text
    assert row.ids.tolist() == tokenizer(text)["input_ids"]
    assert spans(tokenizer, row) == ["4<|im_end|>"]


def test_every_assistant_turn_is_supervised():
    tokenizer = tiny_tokenizer()
    row = one(TALK, tokenizer, chat=True)
    assert spans(tokenizer, row) == [" Hello\n<|im_end|>", "Ciao<|im_end|>"]
    before = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.ids[: row.prompt_length]) == before
    assert row.ids[-1] == IM_END  # the template's newline after it is left out
    middle = " Hello\n<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>"
    assert tokenizer.decode(row.ids) == before + middle


def test_multi_turn_prompt_keeps_what_was_supervised():
    tokenizer = tiny_tokenizer()
    row, prompt = one(TALK, tokenizer, chat=True), encode_prompts([TALK], tokenizer, CHAT)[0][0]
    n = len(prompt)
    assert row.ids[:n].tolist() == prompt.ids.tolist()
    assert row.completion[:n].tolist() == prompt.completion.tolist()
    assert row.weights[:n].tolist() == prompt.weights.tolist()
    assert row.prompt_length == prompt.prompt_length
    assert row.completion[n:].all()
    assert row.weights[n:].all()
    assert prompt.answer == "Ciao"


def test_special_text_inside_an_answer_does_not_end_it():
    tokenizer = tiny_tokenizer()
    row = one(Example.of("u", "a<|im_end|>b", "f:1"), tokenizer, chat=True)
    assert spans(tokenizer, row) == ["a<|im_end|>b<|im_end|>"]


def test_template_that_trims():
    tokenizer = tiny_tokenizer(template=CHATML.replace("message['content']", "message['content'].strip()"))
    assert spans(tokenizer, one(TALK, tokenizer, chat=True)) == ["Hello<|im_end|>", "Ciao<|im_end|>"]


def test_template_that_rewrites_earlier_turns():
    # As reasoning models do: only the last answer keeps its thoughts.
    body = "message['content'] if loop.last or message['role'] != 'assistant' else '...'"
    tokenizer = tiny_tokenizer(template=CHATML.replace("message['content']", f"({body})"))
    with pytest.raises(ValueError, match=r"talk\.jsonl:1: the chat template is not prefix-stable: with message 3"):
        encode([TALK], tokenizer, CHAT)
    single = Example(TALK.turns[:3], "talk.jsonl:2")
    assert spans(tokenizer, one(single, tokenizer, chat=True)) == [" Hello\n<|im_end|>"]


def test_template_without_an_end_of_turn():
    tokenizer = tiny_tokenizer(template=CHATML.replace("<|im_end|>", ""))
    with pytest.raises(ValueError, match=r"talk\.jsonl:1: .* no special token"):
        encode([TALK], tokenizer, CHAT)


def test_template_that_refuses():
    tokenizer = tiny_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"talk\.jsonl:1: the chat template refused .*roles must alternate"):
        encode([TALK], tokenizer, CHAT)


def test_stop_tokens():
    assert stop_tokens(tiny_tokenizer()) == (END_OF_TEXT,)
    assert stop_tokens(tiny_tokenizer(), CHAT) == (END_OF_TEXT, IM_END)
    assert stop_tokens(tiny_tokenizer(eos="<|im_end|>"), CHAT) == (IM_END,)
    assert stop_tokens(tiny_tokenizer(eos=None), CHAT) == (IM_END,)
    with pytest.raises(ValueError, match="no end-of-sequence"):
        stop_tokens(tiny_tokenizer(eos=None))


def test_long_prompts_lose_their_beginning_if_asked_and_are_counted():
    tokenizer = tiny_tokenizer(bos=True)
    examples = [Example.of("0123456789", "abc", "f:1"), Example.of("xy", "abc", "f:2")]
    (long, short), report = encode(examples, tokenizer, Encoding(max_length=9, on_long="cut"))
    assert tokenizer.decode(long.ids) == "<|im_start|>6789abc<|endoftext|>"
    assert (long.prompt_length, len(long), long.answer) == (5, 9, "abc")
    assert spans(tokenizer, long) == ["abc<|endoftext|>"]
    assert tokenizer.decode(short.ids) == "<|im_start|>xyabc<|endoftext|>"
    assert (report.cut, report.too_long, report.kept) == ((("f:1", 15),), (), 2)
    assert "cut the prompts of 1 of 2 examples longer than 9 tokens (longest 15): f:1 (15)" in str(report)
    # One token of the prompt stays; a completion is never cut.
    assert encode(examples, tokenizer, Encoding(max_length=6, on_long="cut"))[0][0].prompt_length == 2
    with pytest.raises(ValueError, match=r"2 of 2 examples longer than 5 .*cutting the prompt is not enough"):
        encode(examples, tokenizer, Encoding(max_length=5, on_long="cut"))
    with pytest.raises(ValueError, match="--on-long cut is for plain prompts"):
        encode(examples, tokenizer, Encoding(chat=True, max_length=9, on_long="cut"))


def test_many_examples_are_tokenised_in_chunks(monkeypatch):
    monkeypatch.setattr("train.data.tokenize.CHUNK", 3)
    examples = [Example.of("p" * (n + 1), f"c{n}", f"f:{n}") for n in range(8)]
    seen = []
    rows, _ = encode(examples, tiny_tokenizer(), advance=seen.append)
    assert seen == [3, 6, 8]
    assert [(r.source, r.answer, r.prompt_length) for r in rows] == [(f"f:{n}", f"c{n}", n + 1) for n in range(8)]


def test_long_examples_are_reported_and_not_cut_unasked():
    examples = [Example.of("p" * n, "c", f"f:{n}") for n in (1, 8, 2, 9)]
    rows, report = encode(examples, tiny_tokenizer(), Encoding(max_length=9, on_long="drop"))
    assert [r.source for r in rows] == ["f:1", "f:2"]
    assert report.too_long == (("f:8", 10), ("f:9", 11))
    assert (report.examples, report.kept, report.tokens, report.supervised, report.longest) == (
        4,
        2,
        7,
        4,
        11,
    )
    assert "2 of 4 examples longer than 9 tokens (longest 11): f:8 (10), f:9 (11)" in str(report)
    with pytest.raises(ValueError, match=r"2 of 4 examples longer than 9 .* f:8 \(10\).*--on-long drop"):
        encode(examples, tiny_tokenizer(), Encoding(max_length=9))
    assert encode(examples, tiny_tokenizer(), Encoding(max_length=11))[1].kept == 4
    with pytest.raises(ValueError, match="no example is left"):
        encode(examples, tiny_tokenizer(), Encoding(max_length=2, on_long="drop"))


@pytest.mark.parametrize(
    ("example", "options", "tokenizer", "message"),
    [
        (TALK, {}, {}, r"talk\.jsonl:1: has a 'system' message.*--task.chat"),
        (TALK, {"chat": True}, {"template": None}, r"talk\.jsonl:1: .* no chat template"),
        (Example.of("p", None, "f:7"), {}, {}, "f:7: nothing to train on"),
        (Example.of("", "c", "f:7"), {}, {}, "f:7: the prompt is empty"),
        (Example.of("p", "c", "f:7"), {}, {"eos": None}, "no end-of-sequence token"),
        (Example.of("p", "c", "f:7"), {"on_long": "trim"}, {}, "--on-long: got 'trim'"),
    ],
)
def test_refuses(example, options, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        encode([example], tiny_tokenizer(**tokenizer), Encoding(**options))


def test_refuses_nothing():
    with pytest.raises(ValueError, match="no examples"):
        encode([], tiny_tokenizer())


def test_an_empty_prompt_is_fine_after_a_beginning_of_sequence():
    assert one(Example.of("", "c", "f:1"), tiny_tokenizer(bos=True)).prompt_length == 1
