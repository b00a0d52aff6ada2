"""What the report on a run says: what was trained, what came of it, its settings and its answers."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
from parsed_page import page_of
from run_folders import CONFIG, START, answers, make_run, metrics, write_lines

from jaxsteer.io.files import write_json
from jaxsteer.steering import count_parameters
from train.cli import load_config_file
from train.config import TrainConfig
from train.report.record import read_record
from train.report.replies import reply_table
from train.report.settings import as_yaml


def test_a_report_says_what_was_trained_and_what_came_of_it(finished):
    page = page_of(finished)
    assert page.texts(of="problem") == []
    assert "80.0 % (70.0 to 90.0)" in page.text
    assert "30.0 % (20.0 to 40.0)" in page.text
    assert "5 % of the model's 1,000" in page.text
    assert "validation loss 3.0000 0.0500" in page.text
    # D and U [4, 32] in 3 layers; A [2, 48] and B [32, 2] in 2 layers.
    assert "post nonlinear(rank=4, alpha=1.0, activation='silu', init_scale=0.001) block 0-2 all 768" in page.text
    assert f"total {768 + 2 * 2 * (48 + 32)}" in page.text.replace(",", "")
    assert "100 examples, 5,000 tokens, 1,000 of them with a loss from letters.jsonl" in page.text
    assert "2026-01-31 10:00 UTC" in page.text
    assert "from start to end 5 min" in page.text
    assert "processor A processor, 2 cores, 8.0 GB" in page.text
    steps = page.texts("li")
    assert any(step.startswith("runs/earlier (steering for m, SHA-256 cdcd") for step in steps)
    assert any(step.startswith("training: model some/model") for step in steps)
    assert "jaxsteer sft jsonl --task.train 'my letters.jsonl'" in page.texts("pre")
    assert f"jaxsteer generate {finished.folder} '10>' --compare" in page.texts("pre")


def test_counts_agree_with_the_tree(finished):
    record = read_record(finished.folder, "x")
    assert count_parameters(record.steering.steering) == 768 + 320
    assert asdict(record.summary)["trainable"] == 1632


@pytest.mark.parametrize(
    "plan", [("lora(rank=2) @ attn.q", "dora(rank=2) @ attn.o"), ("jola @ attn.heads", "fixed @ mlp"), ()]
)
def test_any_plan(tmp_path, plan):
    config = replace(CONFIG, plan=plan, train_base=not plan)
    run = make_run(tmp_path / "run", config) if plan else make_run(tmp_path / "run")
    if not plan:
        write_json(run.config, config.to_json())
        run.steering.unlink()
    page = page_of(run)
    assert page.texts(of="problem") == []
    assert ("all weights" in page.text) == (not plan)
    used = page.texts("pre")
    assert (f"jaxsteer generate none 'YOUR QUESTION' --model {run.folder / 'model'}" in used) == (not plan)


def test_settings_that_are_not_defaults_come_first(finished):
    page = page_of(finished)
    changed = page.texts("tr", of="changed")
    assert "optim.lr 0.01 default" not in page.text
    assert "optim.lr 0.01 0.0009" in changed
    assert not [row for row in changed if row.startswith("seed")]
    assert "seed 0" in page.texts("tr")


def test_the_settings_make_the_same_run_again(finished, tmp_path):
    (tmp_path / "run.yaml").write_text(as_yaml(json.loads(finished.config.read_text())))
    assert load_config_file(tmp_path / "run.yaml", TrainConfig) == CONFIG


def test_answers_are_counted_and_each_kind_is_shown(finished):
    page = page_of(finished, examples=5)
    labels = page.texts("label")
    assert labels == [
        "all",
        "became right: 6 (2 shown)",
        "became wrong: 1",
        "stayed right: 2 (1 shown)",
        "stayed wrong: 1",
    ]
    assert "5 of 10 test questions. The difference in accuracy is +50.0 points (95 %:" in page.text
    assert Counter(values.get("class") for tag, values in page.elements if tag == "tr")["gained"] == 2
    assert "step 0 ✗ a" in page.text
    assert "step 20 to 40 ✓ b" in page.text


def test_the_number_of_answers_is_limited():
    before, after = answers(["right"] * 30, False), answers(["right"] * 30, True)
    assert len(reply_table(before, after, 7).rows) == 7
    assert reply_table(before, after, 0).rows == []
    assert reply_table([], [], 7) is None
    with pytest.raises(ValueError, match="must answer the same examples"):
        reply_table(before, after[1:], 7)


def test_free_text_has_losses_and_no_marks(run):
    for path in (run.answers_before, run.answers_after):
        path.unlink()
    summary = json.loads(run.summary.read_text()) | {"accuracy_before": None, "accuracy_after": None}
    write_json(run.summary, summary | {"test": {"before": {"loss": 2.0}, "after": {"loss": 1.0}}})
    page = page_of(run)
    assert page.texts(of="problem") == []
    assert "test loss 2.0000 1.0000" in page.text
    assert "test loss 1 from 2 before" in page.text


def test_evaluations_made_later_are_shown(run):
    (run.folder / "evaluation").mkdir()
    found = {"accuracy": 0.75, "interval": [0.6, 0.9], "truncated": 0, "low_margin": 0}
    write_json(
        run.folder / "evaluation" / "summary.json",
        {"split": "test", "perturbed": None, "examples": 20, "strength": {"post": 0.5}, "lora_only": found},
    )
    assert "lora_only, 20 test examples, strength {'post': 0.5} (95 %) 75.0 % (60.0 to 90.0)" in page_of(run).text


def test_what_happened_on_the_way(run):
    rows = metrics()
    rows[5] |= {"examples": [["letters.jsonl:3"]], "skipped": 1, "loss": "NaN"}
    write_lines(run.metrics, rows)
    write_lines(run.starts, [START | {"steps": 60}, START | {"done": 20, "steps": 60}])
    write_lines(run.history, [{"time": "2026-01-31T11:00:00+00:00", "steps": 20, "changed": {"optim.lr": [0.1, 0.2]}}])
    summary = json.loads(run.summary.read_text())
    write_json(run.summary, summary | {"step": 20})
    assert page_of(run).texts(of="note") == [
        "It was resumed once, from step 20.",
        "Changed on purpose after 20 steps (2026-01-31 11:00 UTC): optim.lr from 0.1 to 0.2.",
        "Loss or gradient was not finite at step 5: the updates were skipped.",
        "It stopped early, after 40 of 60 steps, because it did not improve any more.",
        "The state of step 20 was kept, the best by validation.",
    ]
