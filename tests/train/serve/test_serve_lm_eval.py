"""The lm-evaluation-harness asks a server, and finds what it finds with the model in its own process."""

import json

import lm_eval
import numpy as np
import pytest
from lm_eval.tasks import TaskManager

import jaxsteer.lm_eval  # noqa: F401 (registers its model)

QUESTIONS = [("ab", ["cd", "xyz", "q"], 0), ("m", ["no", "n", "nop"], 1), ("hello w", ["orld", "indow"], 1)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks: `letters` chooses an answer, `spoken` generates one, `read` has the likelihood of whole texts."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "task.jsonl"
    data.write_text("".join(json.dumps({"q": q, "c": c, "a": a}) + "\n" for q, c, a in QUESTIONS))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    source += 'doc_to_text: "{{q}}"\ntarget_delimiter: ""\n'
    (folder / "letters.yaml").write_text(
        f'task: letters\n{source}output_type: multiple_choice\ndoc_to_choice: "{{{{c}}}}"\ndoc_to_target: "{{{{a}}}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "spoken.yaml").write_text(
        f'task: spoken\n{source}output_type: generate_until\ndoc_to_target: "{{{{c[a]}}}}"\n'
        'generation_kwargs: {until: ["z", "\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n'
    )
    (folder / "read.yaml").write_text(
        f"task: read\n{source}output_type: loglikelihood_rolling\n"
        'doc_to_target: "{{q}} {{c[0]}}"\nmetric_list: [{metric: word_perplexity}]\n'
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(tasks, kind, **arguments):
    found = lm_eval.simple_evaluate(
        kind,
        model_args=arguments,
        tasks=["letters", "spoken", "read"],
        task_manager=tasks,
        bootstrap_iters=0,
        log_samples=True,
    )
    answers = {task: [each["resps"] for each in samples] for task, samples in found["samples"].items()}
    return found["results"], answers


@pytest.mark.slow
@pytest.mark.parametrize("concurrent", [1, 4])
def test_the_harness_finds_the_same_numbers(tasks, url, served_folder, concurrent):
    file, model = served_folder / "steered.safetensors", str(served_folder / "tiny")
    want, alone = evaluated(tasks, "jaxsteer", steering=str(file), batch_size=2)
    got, served = evaluated(
        tasks,
        "local-completions",
        model="steered",
        base_url=f"{url}/v1/completions",
        tokenizer=model,
        tokenizer_backend="huggingface",
        num_concurrent=concurrent,
        batch_size=2,
        max_length=48,
    )
    for metric in ("acc,none", "acc_norm,none"):
        assert got["letters"][metric] == want["letters"][metric]
    assert served["spoken"] == alone["spoken"]
    for mine, theirs in zip(served["letters"], alone["letters"], strict=True):
        likelihoods = [[float(choice[0][0]) for choice in each] for each in (mine, theirs)]
        np.testing.assert_allclose(*likelihoods, atol=1e-4)
        assert [choice[0][1] for choice in mine] == [choice[0][1] for choice in theirs]
    rolling = lambda answers: [float(each[0][0]) for each in answers["read"]]
    np.testing.assert_allclose(rolling(served), rolling(alone), atol=1e-4)
