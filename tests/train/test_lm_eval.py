"""The adapter in the lm-evaluation-harness, on a local task, against plain forward passes and plain decoding."""

# ruff: noqa: E402

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed: pip install jaxsteer[lm-eval]")
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from jaxsteer import Model, generate, init_steering, make_batch, parse_plan
from jaxsteer.inference.draws import GREEDY, Sampling
from jaxsteer.io import load_model, save_steering
from jaxsteer.lm_eval import JaxsteerLM
from jaxsteer.lm_eval.__main__ import with_default_model
from jaxsteer.lm_eval.settings import read_settings
from jaxsteer.models.transformer import forward, logits_of, output_embedding

ROOT = Path(__file__).parents[2]
QUESTIONS = [("ab", ["cd", "xyz", "q"], 0), ("m", ["no", "n", "nop"], 1), ("ab", ["ab", "abab"], 1)]


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def steered(loaded):
    plan = parse_plan(("nonlinear(rank=4) @ block positions=completion",), loaded.config)
    draw = np.random.default_rng(0)
    start = init_steering(plan, loaded.config, jax.random.key(0))
    return plan, jax.tree.map(lambda x: x + draw.normal(0, 0.3, x.shape).astype(np.float32), start)


@pytest.fixture(scope="module")
def model(loaded, steered):
    return JaxsteerLM.of(loaded, *steered, batch_size=4)


LENGTH = 16  # of a row that holds any text here
jitted_forward = jax.jit(forward, static_argnums=0)


def log_probabilities(loaded, steered, ids, prompt):
    """Log p of every token but the first, where the tokens after the prompt are completion."""
    row = np.arange(LENGTH)
    tokens, segments = np.zeros((1, LENGTH), int), (row < len(ids))[None].astype(np.int32)
    tokens[0, : len(ids)] = ids
    weights = ((row >= prompt) & (row < len(ids)))[None].astype(np.float32)
    hidden = jitted_forward(
        Model(loaded.config, steered[0]), loaded.base, steered[1], make_batch(tokens, segments, weights)
    ).hidden[0, : len(ids)]
    logp = np.asarray(jax.nn.log_softmax(logits_of(hidden, output_embedding(loaded.base))))
    return logp[np.arange(len(ids) - 1), ids[1:]], logp[:-1].argmax(-1) == ids[1:]


def ask(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_likelihoods_are_those_of_whole_texts(loaded, steered, model):
    pairs = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices] + [("", "abc")]
    got = model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (logp, greedy) in zip(pairs, got, strict=True):
        before = model.tok_encode(context) if context else [model.prefix_token_id]
        ids = [*before, *model.tok_encode(continuation, add_special_tokens=False)]
        each, best = log_probabilities(loaded, steered, ids, len(before))
        np.testing.assert_allclose(logp, each[len(before) - 1 :].sum(), atol=1e-4)
        assert greedy == bool(best[len(before) - 1 :].all())


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def golden(request):
    """A model, the requests, and what the harness's own Hugging Face model answers to them."""
    known = json.loads((GOLDEN / "lm_eval.json").read_text())
    return JaxsteerLM(str(GOLDEN / "lm_eval" / request.param), batch_size=4), known["requests"], known[request.param]


def test_likelihoods_are_the_harness_s_own(golden):
    """Also those of texts longer than the model reads, cut or in windows: to the last token, with learned positions."""
    model, requests, expected = golden
    got = model.loglikelihood(ask("loglikelihood", *map(tuple, requests["loglikelihood"])), disable_tqdm=True)
    want = expected["loglikelihood"]
    np.testing.assert_allclose([logp for logp, _ in got], [logp for logp, _ in want], rtol=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    rolling = model.loglikelihood_rolling(
        ask("loglikelihood_rolling", *map(tuple, requests["loglikelihood_rolling"])), disable_tqdm=True
    )
    np.testing.assert_allclose(rolling, expected["loglikelihood_rolling"], rtol=1e-5)


@pytest.mark.slow
def test_answers_are_the_harness_s_own(golden):
    """Cut at texts that are special tokens, as long as any of the names for the maximum length says."""
    model, requests, expected = golden
    asked = ask("generate_until", *map(tuple, requests["generate_until"]))
    assert model.generate_until(asked) == expected["generate_until"]


def test_generation_stops_at_a_text(loaded, steered, model):
    batch = make_batch(np.array([model.tok_encode("ab")]))
    generated = generate(
        Model(loaded.config, steered[0]),
        loaded.base,
        steered[1],
        batch,
        max_new_tokens=40,
        stop_tokens=tuple(sorted({*loaded.stop_tokens, model.eot_token_id})),
    )
    whole = loaded.tokenizer.decode(np.asarray(generated.tokens[0, : generated.lengths[0]]), skip_special_tokens=True)
    middle = whole[len(whole) // 2 :][:2]
    requests = ask(
        "generate_until", ("ab", {"until": [], "max_gen_toks": 40}), ("ab", {"until": [middle], "max_gen_toks": 40})
    )
    assert model.generate_until(requests) == [whole, whole[: whole.find(middle)]]


def test_generation_with_mixed_settings(model):
    """Sampled and greedy answers of several lengths at once are those of each request alone, by seed and number."""
    sampled = {"until": [], "do_sample": True, "temperature": 3.0}
    requests = ask(
        "generate_until",
        ("ab", {"until": [], "max_gen_toks": 8}),
        ("ab", sampled | {"max_gen_toks": 8}),
        ("ab", sampled | {"max_gen_toks": 8}),
        ("ab", sampled | {"max_gen_toks": 5}),
    )
    answers = model.generate_until(requests)
    assert model.generate_until(requests) == answers
    assert answers[0] == model.generate_until(requests[:1])[0]
    assert len({*answers}) == 4


def write_task(folder):
    """A multiple-choice task `letters` with its data, as the harness reads them from a folder."""
    data = folder / "task.jsonl"
    data.write_text("".join(json.dumps({"q": q, "c": c, "a": a}) + "\n" for q, c, a in QUESTIONS[:2]))
    (folder / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\n'
        'doc_to_target: "{{a}}"\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )


def test_a_task_of_the_harness(loaded, steered, tiny_folder, tmp_path):
    write_task(tmp_path)
    file = tmp_path / "steering.safetensors"
    save_steering(file, steered[1], steered[0], model_name=str(tiny_folder), config=loaded.config)
    results = lm_eval.simple_evaluate(
        "jaxsteer",
        model_args=f"steering={file},batch_size=2",
        tasks=["letters"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    for question, choices, answer in QUESTIONS[:2]:
        ids = loaded.tokenizer(question, add_special_tokens=False)["input_ids"]
        scores = [
            log_probabilities(
                loaded, steered, [*ids, *loaded.tokenizer(choice, add_special_tokens=False)["input_ids"]], len(ids)
            )[0][len(ids) - 1 :].sum()
            for choice in choices
        ]
        right += int(np.argmax(scores)) == answer
    assert results["results"]["letters"]["acc,none"] == right / 2


def test_which_model(tmp_path):
    with pytest.raises(ValueError, match="which model"):
        JaxsteerLM()


def test_special_tokens_end_an_answer_and_are_left_out(model):
    """The text that ends it may be a special token, contain one, or come after one."""
    tokens = model.tok_encode("x <|im_end|> y\n<|im_start|>z", add_special_tokens=False)
    answer = lambda *until: model._answer(np.array(tokens), until)
    assert answer("<|im_end|>") == "x "
    assert answer("\n<|im_start|>") == "x  y"
    assert answer("z", "y") == "x  "
    assert answer("absent") == answer() == "x  y\nz"


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({}, 256),
        ({"max_new_tokens": 3}, 3),
        ({"max_tokens": 4}, 4),
        ({"max_completion_tokens": 5}, 5),
        ({"max_gen_toks": 2, "max_new_tokens": 3}, 2),
    ],
)
def test_every_name_of_the_maximum_length(asked, tokens):
    assert read_settings(asked, "</s>", "request 0").max_new_tokens == tokens


def test_settings():
    read = lambda **asked: read_settings(asked, "</s>", "request 7")
    assert read(until=None).until == read(until="").until == ("</s>",)
    assert read(until="\n").until == ("\n", "</s>")
    assert read(do_sample=False, temperature=2.0).sampling == GREEDY
    assert read(do_sample=True).sampling == Sampling(1.0)
    assert read(temperature=0.5, top_k=3).sampling == Sampling(0.5, 3)
    with pytest.raises(ValueError, match="request 7: the maximum number of new tokens must be at least 1, got 0"):
        read(max_gen_toks=0)
    with pytest.raises(ValueError, match=r"request 7: .*top_p"):
        read(temperature=0.5, top_p=0)


def test_a_system_message_that_the_template_refuses_is_left_out(tiny_folder):
    model = JaxsteerLM(str(tiny_folder))
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert model.apply_chat_template(messages) == "U"


def test_sizes_that_are_not_possible(tiny_folder):
    for wrong in ({"batch_size": "many"}, {"batch_size": 0}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            JaxsteerLM(str(tiny_folder), **wrong)


def test_the_default_model():
    assert with_default_model(["--tasks", "a"]) == ["run", "--model", "jaxsteer", "--tasks", "a"]
    assert with_default_model(["run", "-t", "a"]) == ["run", "--model", "jaxsteer", "-t", "a"]
    for words in ([], ["ls", "tasks"], ["--help"], ["run", "--model=hf"], ["-M", "hf", "-t", "a"]):
        assert with_default_model(words) == words


def test_the_command_registers_the_model_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
    monkeypatch.delitem(sys.modules, "jaxsteer.lm_eval.__main__")
    with pytest.raises(SystemExit) as done:
        runpy.run_module("jaxsteer.lm_eval", run_name="__main__")
    assert done.value.code == 0
    assert "--model_args" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command(tiny_folder, tmp_path):
    """The documented command, on a task of its own, in a process of its own."""
    write_task(tmp_path)
    command = [sys.executable, "-m", "jaxsteer.lm_eval", "--tasks", "letters", "--include_path", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HOME": str(tmp_path / "hf")}
    run = lambda model: subprocess.run(
        [*command, "--model_args", f"pretrained={model}", "--output_path", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=environment,
    )
    done = run(tiny_folder)
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["letters"]["acc,none"] in (0, 0.5, 1)
