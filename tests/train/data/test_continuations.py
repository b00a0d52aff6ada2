"""Pieces of a text have the tokens of the whole text: with tokenizers that mark where a text begins, and others."""

from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, LLAMA2, MARKS, ZEPHYR, sentencepiece_tokenizer, tiny_tokenizer

from train.data import Encoding, Example, Turn, depends_on_date, digest_of, encode, encode_prompts, stop_tokens
from train.evaluation.answers import make_prompts
from train.tasks import JsonlTask

FEW = settings(derandomize=True, max_examples=40, deadline=None, database=None)
CHAT = Encoding(chat=True)
TOKENIZERS = {
    **{
        f"{mark} {name}": sentencepiece_tokenizer(mark, t)
        for mark in MARKS
        for name, t in (("z", ZEPHYR), ("l", LLAMA2))
    },
    "bytes": tiny_tokenizer(bos=True, merges=[("a", "b"), ("Ċ", "a"), ("Ġ", "y")]),
}
YES = Example.of("no?", "yes", "f:1")


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def whole(tokenizer, example):
    """The ids that transformers gives for a conversation."""
    messages = [{"role": turn.role, "content": turn.text} for turn in example.turns]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


texts = st.text(st.sampled_from("yesno ?\nü"), min_size=1, max_size=8)


@st.composite
def conversations(draw):
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(texts)), Turn("assistant", draw(texts))]
    return Example(tuple(turns), "f:1")


@FEW
@given(conversations(), st.sampled_from(sorted(TOKENIZERS)))
def test_a_conversation_has_the_tokens_of_the_whole(example, name):
    tokenizer = TOKENIZERS[name]
    [row], report = encode([example], tokenizer, CHAT)
    [prompt], _ = encode_prompts([example], tokenizer, CHAT)
    assert row.ids[: len(prompt)].tolist() == prompt.ids.tolist()
    ids = whole(tokenizer, example)
    if not report.straddled:
        assert row.ids.tolist() == ids[: len(row)]
        assert not tokenizer.decode(ids[len(row) :]).strip()


@FEW
@given(texts, texts, st.sampled_from(sorted(TOKENIZERS)))
def test_a_completion_has_the_tokens_of_the_whole(prompt, completion, name):
    tokenizer, example = TOKENIZERS[name], Example.of(prompt, completion, "f:1")
    [row], report = encode([example], tokenizer)
    [start], _ = encode_prompts([example], tokenizer)
    assert start.ids.tolist() == tokenizer(prompt)["input_ids"] == row.ids[: len(start)].tolist()
    if not report.straddled:
        assert row.ids[:-1].tolist() == tokenizer(prompt + completion)["input_ids"]


@pytest.mark.parametrize("mark", MARKS)
def test_an_answer_does_not_begin_with_the_mark_of_a_text(mark):
    tokenizer = sentencepiece_tokenizer(mark)
    [row], report = encode([YES], tokenizer, CHAT)
    assert tokens(tokenizer, row.ids[row.completion]) == ["yes", "</s>"]
    assert report.straddled == 0
    [plain], _ = encode([YES], tokenizer)
    assert tokens(tokenizer, plain.ids) == ["<s>", "▁no", "?", "yes", "</s>"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_token_across_the_boundary_is_split_and_counted(mark):
    tokenizer = sentencepiece_tokenizer(mark)
    rows, report = encode([Example.of("no ", "yes", "f:1"), Example.of("no", " yes", "f:2")], tokenizer)
    assert [tokens(tokenizer, row.ids) for row in rows] == [
        ["<s>", "▁no", "▁", "yes", "</s>"],
        ["<s>", "▁no", "▁yes", "</s>"],
    ]
    assert report.straddled == 1
    assert "in 1 a token would have spanned prompt and completion" in str(report)


@pytest.mark.parametrize("chat", [False, True])
def test_choices_are_completions(chat):
    tokenizer, how = sentencepiece_tokenizer(), Encoding(chat=chat)
    example = Example.of("no?", "yes", "f:1", choices=("yes", "no", " yes"))
    prompts = make_prompts([example], tokenizer, how, (), JsonlTask("none", chat=chat), choices=True)
    rows, _ = encode([Example.of("no?", choice, "f:1") for choice in example.choices], tokenizer, how)
    for row, ids in zip(rows, prompts.choice_ids[0], strict=True):
        assert [*prompts.tokens[0].ids, *ids] == row.ids.tolist()


def test_beginning_and_end_are_not_doubled():
    tokenizer = sentencepiece_tokenizer()
    typed = [
        Example.of("<s>no", "yes", "f:1"),
        Example.of("no", "yes</s>", "f:2"),
        Example.of("no", "yes</s>\n", "f:3"),
    ]
    rows, report = encode([*typed, Example.of("no", "yes</s>no", "f:4")], tokenizer)
    assert [tokens(tokenizer, row.ids) for row in rows] == [
        ["<s>", "no", "yes", "</s>"],
        *[["<s>", "▁no", "yes", "</s>"]] * 2,
        [
            "<s>",
            "▁no",
            "yes",
            "</s>",
            *tokens(tokenizer, tokenizer("yes</s>no", add_special_tokens=False)["input_ids"])[2:],
            "</s>",
        ],
    ]
    assert (report.begun, report.ended) == (1, 2)
    assert "1 began with the beginning-of-sequence token" in str(report)
    assert "2 had a completion that ended with the end token" in str(report)
    [row], report = encode([Example.of("no", "yes</s>", "f:1")], tokenizer, CHAT)
    assert tokens(tokenizer, row.ids[row.completion]) == ["yes", "</s>"]
    assert report.ended == 1
    [prompt], _ = encode_prompts(typed[:1], tokenizer)
    assert prompt.ids.tolist() == rows[0].ids[: len(prompt)].tolist()


IGNORES = CHATML.split("{% if add_generation_prompt")[0]


def test_the_header_of_a_template_without_generation_prompts_is_found():
    ours, theirs = tiny_tokenizer(template=IGNORES), tiny_tokenizer()
    talk = Example((Turn("user", "a"), Turn("assistant", "one"), Turn("user", "b"), Turn("assistant", "t")), "f:1")
    for encoder in (encode, encode_prompts):
        [found], [known] = encoder([talk], ours, CHAT)[0], encoder([talk], theirs, CHAT)[0]
        assert found.ids.tolist() == known.ids.tolist()
        assert found.completion.tolist() == known.completion.tolist()
    assert stop_tokens(ours, CHAT) == stop_tokens(theirs, CHAT)


def test_a_header_that_cannot_be_found_is_refused():
    shouts = IGNORES.replace("message['content']", "message['content'] | upper")
    with pytest.raises(ValueError, match=r"f:1: the chat template ignores add_generation_prompt.*--task\.no-chat"):
        encode([YES], tiny_tokenizer(template=shouts), CHAT)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example((Turn("assistant", "a"),), "f:1"), "f:1: the conversation begins with the assistant"),
        (Example((Turn("text", "a"), Turn("user", "a")), "f:1"), "f:1: a 'text' cannot be part of a conversation"),
        (Example.of("a\ud83d", "b", "f:1"), "f:1: the prompt is no Unicode text: character 1"),
        (Example.of("a", "b", "f:1", weight=float("nan")), "f:1: the weight is nan, need a finite number"),
    ],
)
def test_refuses(example, message):
    with pytest.raises(ValueError, match=message):
        encode([example], tiny_tokenizer(), CHAT)


def test_a_template_that_fails_in_python_is_refused():
    with pytest.raises(ValueError, match="f:1: the chat template refused messages 0 to 0"):
        encode([YES], tiny_tokenizer(template="{{ messages[0]['content'] + 1 }}"), CHAT)


DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %-d.%-m.') }}{% endif %}" + CHATML


def test_the_date_of_a_template_is_a_setting():
    tokenizer = tiny_tokenizer(template=DATED)
    [row], _ = encode([YES], tokenizer, Encoding(chat=True, date="2024-07-04"))
    assert tokenizer.decode(row.ids).startswith("04 Jul 2024, 4.7.<|im_start|>user\n")
    [prompt], _ = encode_prompts([YES], tokenizer, Encoding(chat=True, date="2024-07-04"))
    assert row.ids[: len(prompt)].tolist() == prompt.ids.tolist()
    [row], _ = encode([YES], tokenizer, CHAT)
    assert tokenizer.decode(row.ids).startswith(date.today().strftime("%d %b %Y"))
    assert depends_on_date(tokenizer)
    assert not depends_on_date(tiny_tokenizer())
    assert CHAT.dated(tokenizer).date == date.today().isoformat()
    assert Encoding(chat=True, date="2024-07-04").dated(tiny_tokenizer()) == CHAT
    with pytest.raises(ValueError, match=r"--date: got '4\.7\.', need a date such as"):
        Encoding(date="4.7.")


def test_weights_multiply_the_loss_and_nothing_else():
    tokenizer = tiny_tokenizer()
    [one], [half], [none] = (encode([Example.of("ab", "c", "f:1", weight=w)], tokenizer)[0] for w in (1.0, -0.5, 0.0))
    assert half.weights.tolist() == [0, 0, -0.5, -0.5]
    assert none.weights.tolist() == [0, 0, 0, 0]
    for other in (half, none):
        assert other.completion.tolist() == one.completion.tolist() == [False, False, True, True]
        assert other.prompt_length == one.prompt_length
    assert encode_prompts([Example.of("ab", "c", "f:1", weight=2.0)], tokenizer)[0][0].answer == "c"


def test_the_loss_may_be_on_everything():
    example = Example.of("ab", "c", "f:1")
    for chat in (False, True):
        [row], report = encode([example], tiny_tokenizer(), Encoding(chat=chat, loss_on="all"))
        [usual], _ = encode([example], tiny_tokenizer(), Encoding(chat=chat))
        assert row.weights.tolist() == [0] + [1] * (len(row) - 1)
        assert report.supervised == len(row) - 1
        assert row.ids.tolist() == usual.ids.tolist()
        assert row.completion.tolist() == usual.completion.tolist()
        assert row.prompt_length == usual.prompt_length
    with pytest.raises(ValueError, match="--loss-on: got 'prompt', allowed are completion, all"):
        Encoding(loss_on="prompt")


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_is_learned_as_a_whole_and_steered_like_a_prompt(chat):
    tokenizer = sentencepiece_tokenizer()
    text = Example((Turn("text", "no yes"),), "f:1")
    (row, talk), _ = encode([text, YES], tokenizer, Encoding(chat=chat))
    assert tokens(tokenizer, row.ids) == ["<s>", "▁no", "▁yes", "</s>"]
    assert row.weights.tolist() == [0, 1, 1, 1]
    assert (row.completion.any(), row.prompt_length, row.answer) == (False, 4, None)
    assert talk.completion.any()
    [start], _ = encode_prompts([text], tokenizer, Encoding(chat=chat))
    assert tokens(tokenizer, start.ids) == ["<s>", "▁no", "▁yes"]


def test_a_digest_tells_tokenised_data_apart():
    base = [Example.of("ab", "c", "f:1"), Example.of("d", "e", "f:2")]
    others = [
        base[:1],
        base[::-1],
        [base[0], Example.of("d", "e", "f:2", weight=2.0)],
        [base[0], Example.of("de", "e", "f")],
    ]
    digest = lambda examples, **how: digest_of(encode(examples, tiny_tokenizer(), Encoding(**how))[0])
    assert digest(base) == digest([base[0], Example.of("d", "e", "elsewhere:1", "gold")])
    assert len({digest(base), digest(base, loss_on="all"), *map(digest, others)}) == 6
    assert len(digest(base)) == 64
    assert np.array_equal(encode(base, tiny_tokenizer())[0][0].weights, [0, 0, 1, 1])
