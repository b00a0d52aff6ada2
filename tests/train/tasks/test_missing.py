"""Missing values are missing in every reader: refused with file and line, or dropped and counted."""

import json
import math
import sys

import pytest
from task_rows import ROWS

from train import sft
from train.cli import run_main
from train.tasks import HubTask, JsonlTask, TableTask

MISSING = [None, math.nan, math.inf, -math.inf, "", " \n"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- JSON Lines

PLAIN = {"prompt": "p", "completion": "so 7", "answer": 7}


@pytest.mark.parametrize("value", MISSING)
def test_answers_of_lines(tmp_path, value, capsys):
    path = write(tmp_path / "d.jsonl", [PLAIN, {**PLAIN, "answer": value}])
    task = JsonlTask(path, path)
    with pytest.raises(ValueError, match=r"d\.jsonl:2: 'answer' is missing \(.*; --task\.on-empty drop leaves such"):
        task.load("validation")
    [example] = JsonlTask(path, path, on_empty="drop").load("test")
    assert example.gold == "7"
    # Training needs no answers; that some are missing is said.
    assert [example.answer for example in task.load("train")] == ["7", None]
    said = capsys.readouterr().err
    assert "d.jsonl: dropped 1 of 2 rows with an empty or missing text" in said
    assert "1 of 2 lines have an 'answer'" in said


def test_lines_without_the_answers_of_others(tmp_path):
    path = write(tmp_path / "d.jsonl", [PLAIN, {"prompt": "p", "completion": "c"}])
    with pytest.raises(ValueError, match=r"d\.jsonl:2: 'answer' is missing \(no such key\)"):
        JsonlTask(path, path).load("validation")
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "c"}])
    assert JsonlTask(path, path).load("validation")[0].gold == "c"


def test_completions_that_are_the_answer_but_blank(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "\n"}])
    assert len(JsonlTask(path, path).load("train")) == 1
    with pytest.raises(ValueError, match=r"d\.jsonl:1: the gold answer is empty"):
        JsonlTask(path, path).load("validation")


@pytest.mark.parametrize(
    ("gold", "rule"),
    [
        ("nan", "number"),
        ("3/0", "number"),
        ("17", "digit"),
        ("the first", "label"),
        ("Option", "last_label"),
        ("yes", "truth"),
        ("entails", "relation"),
    ],
)
def test_golds_that_no_output_can_match(tmp_path, gold, rule):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "c", "answer": gold}])
    with pytest.raises(ValueError, match=rf"d\.jsonl:1: the gold answer is '{gold}', which no output can .* '{rule}'"):
        JsonlTask(path, path, rule=rule).load("validation")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: the gold answer"):
        TableTask(path, path, answer="{answer}", rule=rule).load("test")


def test_a_conversation_without_a_chat_template_names_the_option(tmp_path):
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "d.jsonl", [{"messages": talk}])
    with pytest.raises(ValueError, match=r"d\.jsonl:1: .*give --task\.chat"):
        JsonlTask(path).load("train")
    assert JsonlTask(path, chat=True).load("train")[0].gold == "a"


# ---- tables


@pytest.mark.parametrize("value", MISSING)
@pytest.mark.parametrize(
    "templates",
    [
        {"completion": "{q} is {a}"},
        {"completion": "{q}", "answer": "#### {a}"},
        {"completion": "{q}", "choices": ("{q}", "{a}")},
        {"completion": "{q}", "choices": ("{all}",)},
        {"prompt": "Q: {a}{a}\n", "completion": "{q}"},
    ],
)
def test_cells(tmp_path, value, templates):
    path = write(
        tmp_path / "t.jsonl", [{"q": "x", "a": 1, "all": ["x", 2]}, {"q": "y", "a": value, "all": ["y", value]}]
    )
    settings = {"prompt": "{q}", **templates}
    with pytest.raises(ValueError, match=r"t\.jsonl:2: .*(missing|empty)"):
        TableTask(path, **settings).load("train")
    assert len(TableTask(path, on_empty="drop", **settings).load("train")) == 1


@pytest.mark.parametrize("value", MISSING)
def test_a_part_of_a_prompt_may_be_missing(tmp_path, value):
    path = write(tmp_path / "t.jsonl", [{"q": "x", "given": value, "a": 2.0}])
    [example] = TableTask(path, prompt="{q}/{given}/", completion="{a}").load("train")
    assert [turn.text for turn in example.turns] == ["x//", "2"]


@pytest.mark.parametrize("cell", ["", "NaN", "nan", " "])
def test_cells_of_csv_files(tmp_path, cell):
    path = tmp_path / "t.csv"
    path.write_text(f"prompt,completion\np,1\nq,{cell}\n")
    with pytest.raises(ValueError, match=r"t\.csv:3: 'completion' is"):
        TableTask(str(path)).load("train")


def test_weights_and_lists_in_cells(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,completion,w\np,1,0.25\nq,2,\n")
    assert [example.weight for example in TableTask(str(path), weight="w").load("train")] == [0.25, 1]
    path.write_text("prompt,completion,w\np,1,much\n")
    with pytest.raises(ValueError, match=r"t\.csv:2: 'w' must be a finite number"):
        TableTask(str(path), weight="w").load("train")
    rows = write(tmp_path / "t.jsonl", [{"prompt": "p", "completion": ["a"]}])
    with pytest.raises(ValueError, match=r"t\.jsonl:1: 'completion' must be a text or a number, got \['a'\]"):
        TableTask(rows).load("train")


def test_columns_that_nothing_reads_are_named_once(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", [{"prompt": "p", "completion": "c", "weight": 2}])
    task = TableTask(path)
    assert task.load("train") == task.load("train")
    assert capsys.readouterr().err.count("columns that are not used: 'weight'") == 1


# ---- named tasks

GOLD = {
    "boolq": "answer",
    "winogrande": "answer",
    "mnli": "label",
    "arc_easy": "answerKey",
    "openbookqa": "answerKey",
    "aqua": "correct",
    "gsm8k": "answer",
    "svamp": "Answer",
    "mawps": "answer",
    "asdiv": "result_float",
    "listops": "Target",
    "hellaswag": "label",
    "piqa": "label",
    "siqa": "label",
    "alpaca": "output",
}


@pytest.mark.parametrize("value", [None, math.nan, math.inf, ""])
@pytest.mark.parametrize("name", GOLD)
def test_answers_of_named_tasks(tmp_path, name, value):
    good = ROWS[name][0]
    path = write(tmp_path / "d.jsonl", [good, {**good, GOLD[name]: value}])
    with pytest.raises(ValueError, match=r"d\.jsonl:2: .*; --task\.on-empty drop"):
        HubTask(name, test=path).load("test")
    assert len(HubTask(name, test=path, on_empty="drop").load("test")) == 1


@pytest.mark.parametrize("column", ["instruction", "output", "answer"])
def test_answers_of_instructions(tmp_path, column):
    good = {"instruction": "Add 1 and 2.", "output": "It is 3.", "answer": 3.0}
    path = write(tmp_path / "d.jsonl", [good, {**good, column: math.nan}])
    with pytest.raises(ValueError, match=rf"d\.jsonl:2: '{column}' is missing \(nan\)"):
        HubTask("svamp", test=path).load("test")
    [example] = HubTask("svamp", test=path, on_empty="drop").load("test")
    assert example.gold == "3"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("arc_easy", {"choices": {"text": ["a", 5], "label": ["1", "2"]}}, r"the choices must be 2 texts"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["1", "2"]}}, r"the choices must be 2 texts"),
        ("hellaswag", {"endings": ["x"] * 9}, r"has 9 choices; at most 8"),
        ("svamp", {"Answer": "many"}, r"'Answer' must be a number, got 'many'"),
        ("gsm8k", {"answer": "so #### none"}, r"'answer' has no number after ####"),
        ("gsm8k", {"weight": "x"}, r"'weight' must be a finite number"),
    ],
)
def test_other_values_of_named_tasks(tmp_path, name, values, message):
    path = write(tmp_path / "d.jsonl", [{**ROWS[name][0], **values}])
    with pytest.raises(ValueError, match=rf"d\.jsonl:1: {message}"):
        HubTask(name, test=path).load("test")


def test_numbers_of_labels_and_weights(tmp_path):
    path = write(tmp_path / "d.jsonl", [{**ROWS["mnli"][0], "label": 0.0, "weight": 2}])
    [example] = HubTask("mnli", test=path).load("test")
    assert (example.gold, example.weight) == ("ENTAILMENT", 2)
    choices = {"text": ["sun", "ice"], "label": [1, 2]}
    path = write(tmp_path / "d.jsonl", [{**ROWS["arc_easy"][0], "choices": choices, "answerKey": 2.0}])
    assert HubTask("arc_easy", test=path).load("test")[0].gold == "2"


def test_settings_that_allow_no_answer():
    for make in (lambda: JsonlTask("a", max_new_tokens=0), lambda: TableTask("a", max_new_tokens=-1)):
        with pytest.raises(ValueError, match=r"task\.max_new_tokens must be at least 1"):
            make()
    with pytest.raises(ValueError, match=r"task\.max_new_tokens must be at least 1, or 0"):
        HubTask("gsm8k", max_new_tokens=-1)


def test_an_empty_name_is_not_no_file(tmp_path):
    path = write(tmp_path / "d.jsonl", [PLAIN])
    for task in (JsonlTask(path, path, ""), TableTask(path, path, ""), HubTask("gsm8k", path, path, test="")):
        with pytest.raises(ValueError, match=r"\.: "):
            task.load("test")


def test_weights_that_leave_nothing_to_train_on(tmp_path):
    path = write(tmp_path / "d.jsonl", [{**PLAIN, "weight": 0}, {**PLAIN, "weight": 0.0}])
    for task in (JsonlTask(path), TableTask(path, weight="weight"), HubTask("gsm8k", train=path)):
        if isinstance(task, HubTask):
            write(tmp_path / "d.jsonl", [{**ROWS["gsm8k"][0], "weight": 0}])
        with pytest.raises(ValueError, match=r"d\.jsonl:1: this example has weight 0 in the loss, and so have all of"):
            task.load("train")


def test_a_command_names_file_and_line(tiny_folder, tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "d.jsonl", tmp_path / "out"
    options = ["--model", str(tiny_folder), "--task.train", str(path), "--out", str(out)]
    good = '{"prompt": "a", "completion": "b"}\n'
    for bad, message in (('{"prompt": "a\\ud83d", "completion": "b"}', "ud83d is half"), ("[" * 100_000, "nested too")):
        path.write_text(good + bad)
        monkeypatch.setattr(sys, "argv", ["sft", "jsonl", *options])
        with pytest.raises(SystemExit) as ended:
            run_main(sft.main)
        said = " ".join(capsys.readouterr().err.replace("\n", "").split())
        assert ended.value.code == 1
        assert "d.jsonl:2:" in said.replace(" ", "")
        assert message.replace(" ", "") in said.replace(" ", "")
