"""Every named task: golden prompts, gold answers that score, the same tokens in training and evaluation."""

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from task_rows import CHAT, INSTRUCTIONS, ROWS

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny_tokenizer import END_OF_TEXT, IM_END, tiny_tokenizer

from train.data import Encoding, Turn, encode, encode_prompts
from train.tasks import TASKS, HubTask, task_from_json, task_to_json
from train.tasks.__main__ import documentation, main
from train.tasks.instructions import as_instructions
from train.tasks.record import Part, placeholders
from train.tasks.records import _divided
from train.tasks.scoring import score

NAMES = list(ROWS)


def made(name):
    record = TASKS[name]
    return record.example(record.ask(ROWS[name][0], "hub:1"), "hub:1")


def test_every_task_has_a_golden_row():
    assert set(TASKS) == {*ROWS, "chat"}


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    _, prompt, completion, gold, choices = ROWS[name]
    example = made(name)
    assert example.turns == (Turn("prompt", prompt), Turn("completion", completion))
    assert example.gold == gold
    assert example.choices == choices
    assert example.context.choices == choices
    assert set(TASKS[name].columns) <= set(ROWS[name][0])


@pytest.mark.parametrize("name", NAMES)
def test_gold_completions_and_one_choice_score(name):
    example, rule = made(name), TASKS[name].rule
    assert score(example.turns[-1].text, example.gold, rule)
    assert [score(choice, example.gold, rule) for choice in example.choices].count(True) == bool(example.choices)
    # The rule reads the answer, not just any text.
    assert not score("I do not know.", example.gold, rule)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_share_the_boundary_and_the_end_is_supervised(name, chat):
    # Merges over every boundary that a prompt's end and a completion's start could make.
    tokenizer = tiny_tokenizer(merges=[("Ċ", "A"), ("Ċ", "7"), ("Ċ", "(")])
    example = made(name)
    how = Encoding(chat=chat)
    [row], [prompt] = encode([example], tokenizer, how)[0], encode_prompts([example], tokenizer, how)[0]
    assert row.ids[: row.prompt_length].tolist() == prompt.ids.tolist()
    assert row.ids[-1] == (IM_END if chat else END_OF_TEXT)
    assert row.weights[row.prompt_length :].all()
    assert not row.weights[: row.prompt_length].any()
    assert tokenizer.decode(row.ids[row.prompt_length : -1]) == example.turns[-1].text


def test_a_conversation_is_supervised_at_every_assistant_turn():
    record, tokenizer = TASKS["chat"], tiny_tokenizer()
    example = record.example(record.ask(CHAT, "hub:1"), "hub:1")
    assert [turn.role for turn in example.turns] == ["user", "assistant", "user", "assistant"]
    assert example.gold == "See you."
    [row] = encode([example], tokenizer, Encoding(chat=HubTask("chat").chat))[0]
    assert tokenizer.decode(row.ids[row.weights > 0]) == "Hello!<|im_end|>See you.<|im_end|>"


def test_alpaca_without_an_input():
    record = TASKS["alpaca"]
    for row in ({"instruction": "Sing.", "input": "", "output": "la"}, {"instruction": "Sing.", "output": "la"}):
        example = record.example(record.ask(row, "f:1"), "f:1")
        assert example.turns[0].text == "### Instruction:\nSing.\n\n### Response:\n"


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_rows_of_instructions(name):
    row, choices = INSTRUCTIONS[name]
    record = as_instructions(TASKS[name])
    example = record.example(record.ask(row, "f:1"), "f:1")
    assert example.turns == (Turn("prompt", row["instruction"] + "\n"), Turn("completion", row["output"]))
    assert example.choices == choices
    assert score(row["output"], example.gold, record.rule)
    assert [score(choice, example.gold, record.rule) for choice in choices].count(True) == bool(choices)


def test_templates_name_what_the_reader_gives():
    for name in NAMES:
        record, question = TASKS[name], TASKS[name].ask(ROWS[name][0], "f:1")
        assert len(record.paraphrases) >= 2
        for other in record.paraphrases:
            assert set(placeholders(other)) == set(placeholders(record.prompt))
            assert other != record.prompt
            assert other not in ("", record.example(question, "f:1").turns[0].text)


@pytest.mark.parametrize("rows", [7, 150, 1319])
def test_cuts_are_those_of_the_datasets_library(rows):
    data = datasets.Dataset.from_dict({"n": list(range(rows))})
    cut = lambda data, share: data.shuffle(seed=42).train_test_split(share, seed=42)
    fifth = cut(data, 0.2)
    assert Part("test", (("hold", 0.2),)).indices(rows) == fifth["test"]["n"]
    assert Part("test", (("keep", 0.2),)).indices(rows) == fifth["train"]["n"]
    if rows > 7:
        assert Part("test", (("hold", 0.2), ("keep", 0.5))).indices(rows) == cut(fifth["test"], 0.5)["train"]["n"]


def test_cuts_partition_the_rows():
    parts = [part.indices(101) for part in _divided("train").values()]
    assert sorted(itertools.chain(*parts)) == list(range(101))
    assert str(Part("test", (("hold", 0.2), ("keep", 0.5)))) == "test (10 %)"


def test_settings_survive_json():
    task = HubTask("gsm8k", data="d/{split}.csv", chat=True)
    assert task.max_new_tokens == 100
    assert task_from_json(task_to_json(task)) == task
    assert replace(task, max_new_tokens=7).max_new_tokens == 7
    assert HubTask("gsm8k").template == "{prompt}\n"
    with pytest.raises(ValueError, match=r"no 'gsm' \(did you mean gsm8k\?\); known are boolq, .*gsm8k"):
        HubTask("gsm")
    with pytest.raises(ValueError, match=r"'HubTsk' \(did you mean HubTask\?\)"):
        task_from_json({"type": "HubTsk"})


def test_the_documentation_is_that_of_the_records():
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text("utf-8")
    _, found, _ = page.split("<!-- generated -->")
    assert found.strip() == documentation().strip(), "run `python -m train.tasks`"


def test_the_command_writes_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "tasks.md"
    page.write_text("before <!-- generated --> old <!-- generated --> after")
    main()
    assert page.read_text("utf-8").split("<!-- generated -->")[1].strip() == documentation().strip()
    assert page.read_text("utf-8").startswith("before <!--")
    assert page.read_text("utf-8").endswith("--> after")


# ---- real files, if there are any

_FILES = {"gsm8k": "gsm8k", "boolq": "boolq_questions", "arc_challenge": "arc_challenge"}


def real_files():
    folder = Path(os.environ.get("JAXSTEER_DATA", "/nowhere"))
    return [(name, path) for name, stem in _FILES.items() for path in sorted(folder.glob(f"{stem}_*.jsonl"))]


SAMPLES = Path(__file__).parent / "samples"
ALWAYS = [(name, SAMPLES / f"{stem}.jsonl") for name, stem in _FILES.items()]


@pytest.mark.parametrize(("name", "path"), [*ALWAYS, *real_files()], ids=lambda value: getattr(value, "stem", value))
def test_golds_of_whole_files_score(name, path):
    task = HubTask(name, test=str(path))
    examples = task.load("test")
    assert len(examples) == len(path.read_text("utf-8").splitlines())
    wrong = [e.source for e in examples if not score(e.turns[-1].text, e.gold, task.rule)]
    assert not wrong
    unclear = [e.source for e in examples if e.choices and sum(score(c, e.gold, task.rule) for c in e.choices) != 1]
    assert not unclear
    # Another row's completion scores where the answers happen to agree, and only there.
    shifted = itertools.pairwise(examples)
    agree = [
        (score(b.turns[-1].text, a.gold, task.rule), a.gold.replace(",", "") == b.gold.replace(",", ""))
        for a, b in shifted
    ]
    assert all(scored == same for scored, same in agree)
