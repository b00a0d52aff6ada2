"""Requests as they are read, without a model: what is accepted, and what is said of the rest."""

import json

import pytest
from pydantic import ValidationError

from train.serve.errors import invalid
from train.serve.protocol import ChatRequest, CompletionRequest, EffectsRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def refusal(kind, body):
    text = body if isinstance(body, str) else json.dumps(body)
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(text)
    return invalid(kind, caught.value)


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"messages": None}, "messages", "'messages' must be a list of 1 to 4,096 messages"),
        ({"messages": []}, "messages", "'messages' must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "must be system (or developer), user"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a text, or a list of parts"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing required parameter: 'messages[0].content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "must be a text, or a list of parts",
        ),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "messages[0].nmae", "(did you mean name?)"),
        ({"temperature": "1"}, "temperature", "'temperature' must be a number from 0 (greedy) to 2"),
        ({"temperature": 2.5}, "temperature", "from 0 (greedy) to 2"),
        ({"temperature": True}, "temperature", "from 0 (greedy) to 2"),
        ({"max_tokens": 0}, "max_tokens", "a number of tokens from 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"n": 129}, "n", "from 1 to 128"),
        ({"seed": 1 << 63}, "seed", "a 64-bit integer"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop", "a text of at most"),
        ({"top_logprobs": 3}, "top_logprobs", "only with 'logprobs': true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with 'stream': true"),
        ({"steering_strength": "strong"}, "steering_strength", "a factor of the steering from -1000 to 1000"),
        ({"steering_strength": {"lora": "x"}}, "steering_strength", "for each slot by its name"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0 and nothing else, since the field is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "an empty object and nothing else"),
        ({"tools": [{}]}, "tools", "an empty list and nothing else"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", '"text" and nothing else'),
        ({"store": True}, "store", "false and nothing else"),
        ({"store": 0}, "store", "false and nothing else"),
        (
            {"max_token": 5},
            "max_token",
            "Unrecognized request argument supplied: 'max_token' (did you mean max_tokens?)",
        ),
        ({"model": None}, "model", "a name from GET /v1/models"),
    ],
)
def test_what_a_chat_refuses(more, param, message):
    error = refusal(ChatRequest, CHAT | more)
    assert (error.status, error.param) == (400, param)
    assert message in str(error)
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"prompt": ["a", 5]}, "prompt", "a text, a list of token ids, or a list of at most"),
        ({"prompt": []}, "prompt", "a list of token ids"),
        ({"prompt": [[]]}, "prompt", "a list of token ids"),
        ({"prompt": [-1]}, "prompt", "a list of token ids"),
        ({"max_tokens": 0}, "max_tokens", "0 is allowed only with 'echo': true"),
        ({"logprobs": True}, "logprobs", "a number from 0 to 20"),
        ({"best_of": 2}, "best_of", "must be equal to 'n' (1)"),
        ({"suffix": "x"}, "suffix", "an empty text and nothing else"),
        ({"echo": 1}, "echo", "whether the answer begins with the prompt"),
    ],
)
def test_what_a_completion_refuses(more, param, message):
    error = refusal(CompletionRequest, TEXT | more)
    assert (error.status, error.param) == (400, param)
    assert message in str(error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('"text"', "must be a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model": "m", "prompt": "\\ud800"}', "not valid JSON"),
        ('{"model": "m", "prompt": "x", "temperature": NaN}', "temperature"),
        ('{"prompt": "x"}', "Missing required parameter: 'model'"),
    ],
)
def test_what_is_no_request(body, message):
    assert message in str(refusal(CompletionRequest, body))


def test_effects_need_one_prompt():
    assert "either 'prompt' or 'messages'" in str(refusal(EffectsRequest, {"model": "m"}))
    assert "either 'prompt' or 'messages'" in str(refusal(EffectsRequest, {**CHAT, "prompt": "x"}))


def test_neutral_values_of_unsupported_fields_are_accepted():
    ChatRequest.model_validate_json(
        json.dumps(
            CHAT
            | {
                "frequency_penalty": 0.0,
                "presence_penalty": 0,
                "logit_bias": {},
                "tools": [],
                "tool_choice": "none",
                "response_format": {"type": "text"},
                "modalities": ["text"],
                "store": False,
                "user": "me",
                "metadata": {"a": "b"},
                "service_tier": "auto",
                "stop": None,
                "n": None,
            }
        )
    )
    CompletionRequest.model_validate_json(json.dumps(TEXT | {"best_of": 1, "suffix": "", "logit_bias": None}))


def test_an_answer_may_be_sent_back_as_it_came():
    """With the fields that the official client's message objects have."""
    answer = {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": None, "annotations": None}
    parts = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    body = ChatRequest.model_validate_json(json.dumps(CHAT | {"messages": [parts, answer, *CHAT["messages"]]}))
    assert [message.plain() for message in body.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_forms_of_prompts(prompt, prompts):
    assert CompletionRequest.model_validate_json(json.dumps(TEXT | {"prompt": prompt})).prompts == prompts
