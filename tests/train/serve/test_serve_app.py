"""The routes from the outside, with a tiny model behind them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient
from tiny_server import ASK, GREEDY, SETTINGS, error_of, eventually, idle, post

from jaxsteer import Model
from jaxsteer.batches import stack_rows
from jaxsteer.inference import score_tokens
from jaxsteer.io import load_steering
from train.serve.app import make_app
from train.serving.prompts import chat_prompt, plain_prompt


class Alone:
    """The steered model without any of the server: one text at a time, read anew for every token."""

    def __init__(self, served, file):
        self.served, self.loaded, self.file = served, served.roster.loaded, file
        self.model = Model(self.loaded.config, file.plan)

    def plain(self, text):
        return plain_prompt(self.loaded, text, "prompt")

    def chat(self, messages):
        return chat_prompt(self.loaded, self.served.roster.get("steered"), messages, "messages")

    def scores(self, prompt, strength=None):
        """Log-probabilities of the tokens [T], and the likeliest in their places [T]."""
        strength = {slot.name: np.float32((strength or {}).get(slot.name, 1)) for slot in self.file.plan}
        batch = stack_rows([[prompt.tokens]], 64)
        found = score_tokens(self.model, self.loaded.base, self.file.steering, batch, strength=strength, top=1)
        count = len(prompt.tokens.ids)
        return np.asarray(found.log_probability)[0, :count], np.asarray(found.top.tokens)[0, :count, 0]

    def answer(self, prompt, strength=None, count=6):
        """The greedy answer."""
        ids, stop = prompt.tokens.ids.tolist(), prompt.stop
        for _ in range(count):
            following = int(self.scores(plain_prompt(self.loaded, [*ids, 0], "prompt"), strength)[1][-1])
            if following in stop:
                break
            ids.append(following)
        return self.loaded.tokenizer.decode(ids[len(prompt.tokens.ids) :], skip_special_tokens=True)


@pytest.fixture(scope="session")
def alone(engine, served_folder):
    return Alone(engine, load_steering(served_folder / "steered.safetensors"))


def chunks(response):
    """The objects of a stream that has come to its end."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def close(one, other):
    """Whether two objects are equal but for rounding."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    return abs(one - other) < 1e-4 if isinstance(one, float) else one == other


# ---- answers


def test_answers_are_those_of_the_model_alone(client, alone):
    texts = ["ab", "x>", "hello w"]
    want = [alone.answer(alone.plain(text)) for text in texts]
    found = post(client, "completions", **GREEDY, prompt=texts, max_tokens=6)
    assert [choice["text"] for choice in found["choices"]] == want
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == 11
    ids = [alone.plain(text).tokens.ids.tolist() for text in texts]
    assert [
        choice["text"] for choice in post(client, "completions", **GREEDY, prompt=ids, max_tokens=6)["choices"]
    ] == want

    prompt = alone.chat(ASK)
    want = alone.answer(prompt)
    found = post(client, "chat/completions", **GREEDY, messages=ASK, max_tokens=6)
    assert found["choices"][0]["message"] == {"role": "assistant", "content": want, "refusal": None}
    assert found["usage"]["prompt_tokens"] == len(prompt.tokens.ids)


def test_strength(client, alone):
    ask = lambda **more: post(client, "completions", **(GREEDY | {"prompt": "ab", "max_tokens": 6} | more))["choices"][
        0
    ]
    base, steered = ask(model="tiny"), ask()
    assert ask(steering_strength=0)["text"] == base["text"] != steered["text"]
    assert ask(steering_strength=1) == ask(steering_strength={"lora": 1.0}) == steered
    strength = {"lora": 2.0, "post_block": -1.5}
    assert ask(steering_strength=strength)["text"] == alone.answer(alone.plain("ab"), strength)
    error = error_of(
        client.post("/v1/completions", json=GREEDY | {"prompt": "a", "steering_strength": {"lroa": 1}}), 400
    )
    assert error["param"] == "steering_strength"
    assert "did you mean lora?" in error["message"]


def test_strength_of_the_server(engine, client):
    halved = TestClient(make_app(engine, replace(SETTINGS, strength=0.0)))
    ask = lambda client, model, **more: post(client, "completions", **GREEDY | {"model": model}, prompt="ab", **more)
    text = lambda reply: reply["choices"][0]["text"]
    assert text(ask(halved, "steered")) == text(ask(client, "tiny")) == text(ask(halved, "tiny"))
    assert text(ask(halved, "steered", steering_strength=1)) == text(ask(client, "steered"))


def test_several_answers_have_the_seeds_after_the_first(client):
    ask = lambda seed, n: [
        choice["text"]
        for choice in post(client, "completions", model="steered", prompt=["ab", "cd"], seed=seed, n=n, max_tokens=8)[
            "choices"
        ]
    ]
    both, first, second = ask(5, 2), ask(5, 1), ask(6, 1)
    assert both == [first[0], second[0], first[1], second[1]]
    assert len(set(both)) > 1
    assert ask(-1, 1) == ask(-1, 1)
    assert len({tuple(ask(None, 1)) for _ in range(4)}) > 1  # drawn anew


def test_a_chunk_is_one_line_also_to_clients_that_know_more_ends_of_lines(client):
    text = "a\u2028b\x85c\u2029d\x0be\x1cf\r\n\ng"
    body = GREEDY | {"prompt": text, "echo": True, "max_tokens": 1, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == text


def test_streams_are_the_answer_in_pieces(client):
    body = GREEDY | {"messages": ASK, "max_tokens": 9, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = post(client, "chat/completions", **body)
    pieces = chunks(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in pieces}) == 1
    assert not any("usage" in piece for piece in pieces)
    for index, choice in enumerate(whole["choices"]):
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        tokens = [token for each in own if each["logprobs"] for token in each["logprobs"]["content"]]
        assert close(tokens, choice["logprobs"]["content"])
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        assert len(tokens) <= 9
        assert "".join(token["token"] for token in tokens) == choice["message"]["content"]

    body = GREEDY | {"prompt": "ab", "max_tokens": 9, "echo": True, "logprobs": 2}
    whole = post(client, "completions", **body)
    usage = {"include_usage": True}
    *pieces, last = chunks(client.post("/v1/completions", json=body | {"stream": True, "stream_options": usage}))
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {piece["usage"] for piece in pieces} == {None}
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
    for field, values in whole["choices"][0]["logprobs"].items():
        assert close([value for piece in pieces for value in piece["choices"][0]["logprobs"][field]], values)


def test_stop_strings_end_an_answer(client, engine):
    text = post(client, "completions", **GREEDY, prompt="ab", max_tokens=12)["choices"][0]["text"]
    stop = text[2:4]
    found = post(client, "completions", **GREEDY, prompt="ab", max_tokens=12, stop=[stop, "never this"])
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert found["usage"]["completion_tokens"] < 12
    eventually(lambda: idle(engine))


def test_echo_gives_the_probabilities_of_the_prompt(client, alone):
    """As lm-eval's local-completions asks for them: one token more than is read, whatever it is."""
    texts = ["ab$é", "hello", "x"]
    found = post(client, "completions", **GREEDY, prompt=texts, max_tokens=1, echo=True, logprobs=1)
    for text, choice in zip(texts, found["choices"], strict=True):
        prompt, logprobs = alone.plain(text), choice["logprobs"]
        scores, likeliest = alone.scores(prompt)
        count = len(prompt.tokens.ids)
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        np.testing.assert_allclose(logprobs["token_logprobs"][1:count], scores[1:], atol=1e-4)
        assert {len(values) for values in logprobs.values()} == {count + 1}
        assert "".join(logprobs["tokens"]) == choice["text"]
        greedy = [
            max(each.values()) == value
            for each, value in zip(logprobs["top_logprobs"][1:count], logprobs["token_logprobs"][1:count], strict=True)
        ]
        assert greedy == (likeliest[1:] == prompt.tokens.ids[1:]).tolist()
        assert choice["text"].startswith(text)
    nothing = post(client, "completions", **GREEDY, prompt=texts, max_tokens=0, echo=True)
    assert [choice["text"] for choice in nothing["choices"]] == texts
    assert nothing["usage"]["completion_tokens"] == 0


# ---- models, adapters, effects, figures


def test_models(client):
    base, steered = client.get("/v1/models").json()["data"][:2]
    assert (base["id"], base["parent"], base["steering"]) == ("tiny", None, None)
    assert (steered["id"], steered["parent"]) == ("steered", "tiny")
    assert steered["steering"] == {
        "slots": [
            {"name": "lora", "method": "lora(rank=2)", "sites": ["attn.q"], "layers": [0, 1, 2], "positions": "all"},
            {
                "name": "post_block",
                "method": "linear(rank=2)",
                "sites": ["block"],
                "layers": [0, 1, 2],
                "positions": "all",
            },
        ],
        "template": "{prompt}>",
        "chat": False,
        "strength": 1.0,
        "max_new_tokens": 6,
    }
    assert client.get("/v1/models/steered").json() == steered
    error_of(client.get("/v1/models/nothing"), 404)


def test_adapters_come_and_go(client, engine, served_folder, tmp_path):
    load = lambda name, path: client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
    unload = lambda name: client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    ask = lambda model: client.post("/v1/completions", json=GREEDY | {"model": model, "prompt": "ab", "max_tokens": 6})
    error_of(ask("more"), 404)
    assert load("more", served_folder / "other.safetensors").status_code == 200
    try:
        assert ask("more").json()["choices"][0]["text"] != ask("steered").json()["choices"][0]["text"]
        assert "taken" in error_of(load("more", served_folder / "other.safetensors"), 400)["message"]
    finally:
        assert unload("more").status_code == 200
    error_of(ask("more"), 404)
    error_of(unload("more"), 404)
    assert "base model" in error_of(unload("tiny"), 400)["message"]
    assert error_of(load("more", tmp_path), 400)["code"] == "adapter_refused"
    assert client.get("/v1/models").json()["data"][-1]["id"] == "steered"


def test_adapters_stay_unless_folders_are_allowed(engine):
    fixed = TestClient(make_app(engine, replace(SETTINGS, loading=False)))
    for path in ("load", "unload"):
        error = error_of(fixed.post(f"/v1/{path}_lora_adapter", json={"lora_name": "a", "lora_path": "b"}), 403)
        assert "--adapter-folders" in error["message"]


def test_effects(client, alone):
    body = {"model": "steered", "prompt": "ab", "answer": "cd", "top_tokens": 3}
    found = post(client, "effects", **body)
    assert [(token["text"], token["part"]) for token in found["tokens"]] == [
        ("a", "prompt"),
        ("b", "prompt"),
        ("c", "answer"),
        ("d", "answer"),
    ]
    assert found["layers"] == len(found["shift"]) == 3
    means = np.mean(found["shift"], axis=0)
    np.testing.assert_allclose([token["shift"] for token in found["tokens"]], means, rtol=1e-5)
    assert means.min() > 0
    first, *rest = found["tokens"]
    assert (first["log_probability"], first["top"]) == (None, [])
    scores, _ = alone.scores(alone.plain("abcd"))
    np.testing.assert_allclose([token["log_probability"] for token in rest], scores[1:], atol=1e-4)
    assert {len(token["top"]) for token in rest} == {len(token["top_base"]) for token in rest} == {3}
    none = post(client, "effects", **body, steering_strength=0)
    assert {token["shift"] for token in none["tokens"]} == {0.0}
    assert post(client, "effects", model="steered", messages=ASK)["tokens"][-1]["part"] == "prompt"
    error_of(client.post("/v1/effects", json={"model": "steered", "prompt": "a" * 60}), 400)


def test_figures(engine):
    own = TestClient(make_app(engine, SETTINGS))
    post(own, "completions", **GREEDY, prompt="abc", max_tokens=5)
    own.get("/v1/nothing")
    lines = dict(line.rsplit(" ", 1) for line in own.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines['jaxsteer_requests_total{model="steered",route="/v1/completions",status="200"}'] == "1.0"
    assert lines['jaxsteer_requests_total{model="",route="other",status="404"}'] == "1.0"
    assert lines['jaxsteer_prompt_tokens_total{model="steered"}'] == "3.0"
    assert 0 < float(lines['jaxsteer_answer_tokens_total{model="steered"}']) <= 5
    assert lines['jaxsteer_time_to_first_token_seconds_count{model="steered"}'] == "1.0"
    assert float(lines["jaxsteer_decoded_tokens_total"]) > 0
    assert {"jaxsteer_running", "jaxsteer_waiting", "jaxsteer_rows", "jaxsteer_prefix_hits_total"} <= set(lines)


def test_requests_are_logged_without_what_they_say(engine, caplog):
    body = GREEDY | {"prompt": "qqq", "max_tokens": 5}
    with caplog.at_level("INFO", "jaxsteer.serve"):
        answer = post(TestClient(make_app(engine, SETTINGS)), "completions", **body)["choices"][0]["text"]
        assert "POST /v1/completions steered: 200" in caplog.text
        assert "qqq" not in caplog.text
        post(TestClient(make_app(engine, replace(SETTINGS, log_requests=True))), "completions", **body)
        assert "prompt: 'qqq'" in caplog.text
        assert repr(answer) in caplog.text


def test_the_description_names_every_route(client):
    described = client.get("/openapi.json").json()
    assert described["openapi"] == "3.1.0"
    paths = {(method, path) for path, methods in described["paths"].items() for method in methods}
    assert {("post", "/v1/completions"), ("post", "/v1/effects"), ("get", "/v1/models/{model}")} <= paths
    schemas = described["components"]["schemas"]
    references = {text.partition('"')[0] for text in json.dumps(described).split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]
    assert schemas["ChatRequest"]["properties"]["temperature"]["description"] == "a number from 0 (greedy) to 2"
    assert "steered" in schemas["ChatRequest"]["properties"]["model"]["examples"]
    responses = described["paths"]["/v1/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
