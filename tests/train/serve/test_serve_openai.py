"""OpenAI's own client, and clients that leave, against a server at a port."""

import http.client
import json
from dataclasses import replace
from urllib.parse import urlsplit

import openai
import pytest
from tiny_server import ASK, SETTINGS, eventually, held, idle, serving

from train.serve.app import make_app


@pytest.fixture(scope="module")
def ask(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chats(ask):
    whole = ask.chat.completions.create(
        model="steered", messages=ASK, temperature=0, max_completion_tokens=8, logprobs=True, top_logprobs=2
    )
    choice = whole.choices[0]
    assert choice.finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {2}
    assert all(token.logprob <= token.top_logprobs[0].logprob + 1e-6 for token in choice.logprobs.content)
    assert bytes(byte for token in choice.logprobs.content for byte in token.bytes).decode() == choice.message.content

    settings = {"temperature": 0, "max_completion_tokens": 8, "stream": True}
    stream = ask.chat.completions.create(
        model="steered", messages=ASK, **settings, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
    assert (last.choices, last.usage) == ([], whole.usage)

    half = ask.chat.completions.create(
        model="steered", messages=ASK, temperature=0, max_tokens=8, extra_body={"steering_strength": {"post_block": 0}}
    )
    assert half.choices[0].message.content != choice.message.content
    more = [*ASK, choice.message, {"role": "user", "content": "c"}]
    with pytest.raises(openai.BadRequestError, match="--max-prompt"):  # the message is read, and too long with the rest
        ask.chat.completions.create(model="steered", messages=more)


def test_completions(ask):
    settings = {"model": "steered", "prompt": ["ab", "cd"], "temperature": 0, "max_tokens": 6}
    whole = ask.completions.create(**settings, logprobs=1)
    assert [len(choice.logprobs.tokens) for choice in whole.choices] == [
        len(choice.logprobs.text_offset) for choice in whole.choices
    ]
    texts = ["", ""]
    for piece in ask.completions.create(**settings, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_models(ask):
    assert [model.id for model in ask.models.list()][:2] == ["tiny", "steered"]
    assert ask.models.retrieve("steered").owned_by == "jaxsteer"


def test_errors(ask, app, engine):
    create = ask.completions.create
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="nothing", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="steered", prompt="a", temperature=3)
    assert caught.value.param == "temperature"
    with held(engine):
        waiting = create(model="steered", prompt=["a"] * 12, stream=True)  # accepted: the response has begun
        with pytest.raises(openai.RateLimitError) as caught:
            create(model="steered", prompt="a")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        waiting.close()
    eventually(lambda: idle(engine))


def test_the_key(engine):
    with (
        serving(make_app(engine, replace(SETTINGS, api_key="secret"))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert client.with_options(api_key="secret").models.list().data[0].id == "tiny"


def requested(url, **more):
    """A connection over which a request was sent."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    body = {"model": "steered", "messages": ASK, "temperature": 0} | more
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(url, app, engine, stream):
    metrics = app.state.service.metrics.registry
    labels = {"route": "/v1/chat/completions", "model": "steered", "status": "499"}
    left = lambda: metrics.get_sample_value("jaxsteer_requests_total", labels) or 0
    before, stats = left(), engine.stats()
    with held(engine):
        connection = requested(url, stream=stream, n=3)
        if stream:
            response = connection.getresponse()
            assert b"assistant" in response.readline()
            response.close()
        eventually(lambda: engine.stats().submitted == stats.submitted + 3)
        connection.close()
        eventually(lambda: left() == before + 1)
    eventually(lambda: idle(engine))
    assert engine.stats().cancelled == stats.cancelled + 3
    assert engine.stats().new_tokens == stats.new_tokens
