"""Prompts of requests: the tokens of training, and what is wrong with those that cannot be answered."""

from dataclasses import replace

import pytest
from tiny_tokenizer import CHATML, END_OF_TEXT, IM_END, IM_START, tiny_tokenizer

from train.data import Encoding, Example, Turn, encode_prompts
from train.serving.lineup import Served
from train.serving.prompts import chat_prompt, plain_prompt

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def served(**notes):
    return Served("tiny", None, (), {}, notes, None, 0)


def talking(tiny_loaded, template=CHATML, **options):
    return replace(tiny_loaded, tokenizer=tiny_tokenizer(template=template, **options))


def test_a_text_after_the_beginning_of_a_text(tiny_loaded):
    for bos in (False, True):
        loaded = talking(tiny_loaded, bos=bos)
        prompt = plain_prompt(loaded, "ab", "here")
        assert (
            prompt.tokens.ids.tolist() == [IM_START] * bos + loaded.tokenizer("ab", add_special_tokens=False).input_ids
        )
        assert prompt.tokens.prompt_length == len(prompt.tokens.ids)
        assert prompt.stop == (END_OF_TEXT,)


def test_token_ids_are_taken_as_they_are(tiny_loaded):
    prompt = plain_prompt(tiny_loaded, [5, 6, IM_END], "here")
    assert prompt.tokens.ids.tolist() == [5, 6, IM_END]
    assert prompt.text.endswith("<|im_end|>")


@pytest.mark.parametrize(
    ("given", "said"), [([], "empty"), ([3, 259], "259"), ([-1], "-1"), ("", "empty"), ("a\ud800", "Unicode")]
)
def test_prompts_that_nothing_can_continue(given, said, tiny_loaded):
    with pytest.raises(ValueError, match=f"(?s)^choices.*{said}"):
        plain_prompt(tiny_loaded, given, "choices")


def test_a_conversation_has_the_tokens_of_training(tiny_loaded):
    prompt = chat_prompt(tiny_loaded, served(), TALK, "messages")
    turns = tuple(Turn(message["role"], message["content"]) for message in TALK)
    (trained,), _ = encode_prompts([Example(turns, "here")], tiny_loaded.tokenizer, Encoding(chat=True))
    assert prompt.tokens.ids.tolist() == trained.ids.tolist()
    assert prompt.tokens.completion.tolist() == trained.completion.tolist()
    assert prompt.text.endswith("<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
    assert set(prompt.stop) == {END_OF_TEXT, IM_END}


def test_the_date_is_that_of_the_training(tiny_loaded):
    loaded = talking(tiny_loaded, "{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    assert chat_prompt(loaded, served(date="2025-03-04"), TALK, "m").text.startswith("2025-03-04<|im_start|>")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "there are none"),
        (TALK[:3], "the last one is the assistant's"),
        ([{"role": "tool", "content": "x"}], "message 0: the role is 'tool'"),
        ([TALK[1], {"role": "user", "content": ["x"]}], "message 1: the content must be a text"),
        ([{"role": "user", "content": "\udc00"}], "message 0: not valid Unicode"),
        ([TALK[2], TALK[1]], "begins with the assistant"),
    ],
)
def test_messages_that_cannot_be_answered(messages, said, tiny_loaded):
    with pytest.raises(ValueError, match=said):
        chat_prompt(tiny_loaded, served(), messages, "messages")


def test_a_model_without_a_template(tiny_loaded):
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompt(talking(tiny_loaded, None), served(), TALK, "messages")


def test_a_template_that_rewrites_earlier_messages(tiny_loaded):
    rewriting = "{{ messages | length }}" + CHATML
    with pytest.raises(ValueError, match="not prefix-stable"):
        chat_prompt(talking(tiny_loaded, rewriting), served(), TALK, "messages")
