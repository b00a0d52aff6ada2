"""The adapter in the lm-evaluation-harness, on a local task, against plain forward passes and plain decoding."""

# ruff: noqa: E402

import json

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed: pip install jaxsteer[lm-eval]")
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from jaxsteer import Model, generate, init_steering, make_batch, parse_plan
from jaxsteer.io import load_model, save_steering
from jaxsteer.lm_eval import JaxsteerLM
from jaxsteer.models.transformer import forward, logits_of, output_embedding

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


def test_rolling_likelihood(loaded, steered):
    """A text longer than the maximum length: read in windows, each token a target once."""
    model = JaxsteerLM.of(loaded, *steered, batch_size=2, max_length=9)
    text = "the quick brown fox"
    [got] = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    ids = model.tok_encode(text, add_special_tokens=False)
    want, first = 0.0, 0
    while first < len(ids):
        stop = min(first + 8, len(ids))
        context = [model.prefix_token_id] if not first else ids[stop - 9 : first]
        each, _ = log_probabilities(loaded, steered, [*context, *ids[first:stop]], len(context))
        want += each[len(context) - 1 :].sum()
        first = stop
    np.testing.assert_allclose(got, want, atol=1e-4)


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


def test_a_task_of_the_harness(loaded, steered, tiny_folder, tmp_path):
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps({"q": q, "c": c, "a": a}) + "\n" for q, c, a in QUESTIONS[:2]))
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\n'
        'doc_to_target: "{{a}}"\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )
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
