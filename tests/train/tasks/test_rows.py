"""Rows from files and from the hub, tables with columns of their own, and invalid input."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from task_rows import ROWS

from train.tasks import HubTask, TableTask, on_file, task_from_json, task_to_json
from train.tasks.listops import ListOpsTask
from train.tasks.rows import read_file

RECORDS = [{"q": "Größer: 2 or 3?", "a": "3"}, {"q": 'He said "no",\nor yes?', "a": "no"}]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", RECORDS)
    rows = read_file(path).all()
    assert [row for _, row in rows] == RECORDS
    assert rows[0][0].startswith(f"{path}:")
    task = TableTask(train=str(path), prompt="Q: {q}\n", completion="{a}.", answer="{a}", rule="exact")
    [first, _] = task.load("train")
    assert [turn.text for turn in first.turns] == ["Q: Größer: 2 or 3?\n", "3."]
    assert first.gold == "3"
    assert task.load("validation") == []
    assert on_file(task, str(path)).load("test") == task.load("train")
    assert task_from_json(json.loads(json.dumps(task_to_json(task)))) == task
    assert task.template == "Q: {prompt}\n"


def test_a_table_with_choices(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"x": "a{b}", "right": "up", "all": ["up", "down"], "n": 3}])
    task = TableTask(train=str(path), prompt="{x}{{}} {n} ", completion="{right}", choices=("{all}",))
    [example] = task.load("train")
    assert example.turns[0].text == "a{b}{} 3 "
    assert example.choices == ("up", "down")
    fixed = TableTask(train=str(path), prompt="{x}", completion="{right}", choices=("up", "left"))
    assert fixed.load("train")[0].choices == ("up", "left")
    wrong = TableTask(train=str(path), prompt="{x}", completion="{right}", choices=("left", "down"))
    with pytest.raises(
        ValueError, match=r"t\.jsonl:1: 0 of the choices are the answer 'up', need one; they are 'left', 'down'"
    ):
        wrong.load("train")


def test_a_table_of_conversations(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    path = write(tmp_path / "t.parquet", [{"talk": talk}])
    task = TableTask(train=str(path), messages="talk")
    assert task.chat
    assert task.load("train")[0].gold == "Yes"


def test_a_task_from_files(tmp_path):
    row = ROWS["gsm8k"][0]
    for split, count in (("train", 3), ("test", 10)):
        write(tmp_path / f"g_{split}.jsonl", [{**row, "question": f"{split} {i}?"} for i in range(count)])
        write(tmp_path / f"{split}.csv", [{**row, "question": f"{split} {i}?"} for i in range(count)])
    task = HubTask("gsm8k", data=str(tmp_path / "g_{split}.jsonl"))
    texts = {split: [e.turns[0].text for e in task.load(split)] for split in ("train", "validation", "test")}
    assert {split: len(each) for split, each in texts.items()} == {"train": 3, "validation": 2, "test": 8}
    assert not set(texts["validation"]) & set(texts["test"])
    folder = HubTask("gsm8k", data=str(tmp_path))
    assert [e.turns for e in folder.load("test")] == [e.turns for e in task.load("test")]
    whole = HubTask("gsm8k", train=str(tmp_path / "train.csv"), test=str(tmp_path / "g_test.jsonl"))
    assert [len(whole.load(split)) for split in ("train", "validation", "test")] == [3, 0, 10]
    assert len(on_file(task, str(tmp_path / "g_test.jsonl")).load("test")) == 10
    with pytest.raises(ValueError, match=r"has no file of the split 'validation', e\.g\. validation\.jsonl"):
        HubTask("boolq", data=str(tmp_path)).load("test")


def test_one_file_does_not_stand_for_several_splits(tmp_path):
    path = write(tmp_path / "all.jsonl", [{**ROWS["gsm8k"][0], "question": f"{i}?"} for i in range(10)])
    for split in ("train", "test"):
        with pytest.raises(
            ValueError, match=r"all\.jsonl is one file, but gsm8k has the splits test, train; write \{split\}"
        ):
            HubTask("gsm8k", data=str(path)).load(split)
    # A task of one split is.
    path = write(tmp_path / "one.jsonl", [{**ROWS["asdiv"][0], "question": f"{i}?"} for i in range(10)])
    splits = [HubTask("asdiv", data=str(path)).load(split) for split in ("train", "validation", "test")]
    assert [len(each) for each in splits] == [8, 1, 1]
    assert len({e.source for each in splits for e in each}) == 10


def test_listops_from_a_file(tmp_path):
    path = tmp_path / "l.tsv"
    path.write_text("".join(f"{max(i, j)}\t( ( [MAX {i} ) {j} ) ]\n" for i in range(10) for j in range(10)))
    task = ListOpsTask(data=str(path))
    counts = [len(task.load(split)) for split in ("train", "validation", "test")]
    assert sum(counts) == 100
    assert min(counts) > 0
    assert "data" not in task_to_json(ListOpsTask())
    assert task_from_json(task_to_json(task)) == task


# ---- the hub


def test_an_unreachable_hub_names_the_alternatives(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"openai/gsm8k: .*'train' cannot be read from the .*hub.*--task\.data 'folder/\{split\}\.jsonl'",
    ):
        HubTask("gsm8k").load("train")
    with pytest.raises(ValueError, match=r"me/mine: the split 'train\[:90%\]' cannot be read"):
        TableTask(data="me/mine", train="train[:90%]").load("train")


def test_the_hub_is_asked_for_what_the_record_says(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list([{**ROWS["piqa"][0], "goal": f"Goal {i}"} for i in range(10)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(HubTask("piqa").load("validation")) == 5
    HubTask("piqa", data="me/copy").load("train")
    assert asked == [
        ("ybisk/piqa", None, "validation", "refs/convert/parquet"),
        ("me/copy", None, "train", None),
    ]


# ---- invalid input


def changed(name, **values):
    return {**ROWS[name][0], **values}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q", "reply": "a"}, r":1: no column 'answer'; there are 'question', 'reply'"),
        ("boolq", changed("boolq", answer="maybe"), r":1: the label is 'maybe', allowed are True, False"),
        ("arc_easy", changed("arc_easy", answerKey="E"), r":1: the label is 'E', allowed are '1', '2'"),
        ("aqua", changed("aqua", correct="F"), r":1: the label is 'F', allowed are 'A', .*'E'"),
        ("mnli", changed("mnli", label=-1), r":1: the label is -1, allowed are 0, 1, 2"),
        ("hellaswag", changed("hellaswag", label=""), r":1: the label is '', allowed are 0, 1, 2, 3"),
        ("siqa", changed("siqa", answerB=""), r":1: the choices must be texts that are not empty"),
        ("arc_easy", changed("arc_easy", choices=["a"]), r":1: not a row of allenai/ai2_arc \(TypeError"),
        ("gsm8k", changed("gsm8k", answer="#### "), r":1: 'answer' has no number after ####"),
        ("gsm8k", changed("gsm8k", question=7), r":1: 'question' must be a text, got 7"),
        ("alpaca", changed("alpaca", output=" "), r":1: the completion is empty"),
        ("boolq", changed("boolq", passage="  "), r":1: 'passage' is empty"),
        ("listops", changed("listops", Target=9), r":1: the answer given is 9, but .* is 3"),
        (
            "arc_easy",
            {"instruction": "Please: x?\n\nAnswer format: a/b", "output": "c", "answer": "c"},
            r"label is 'c', .*'a', 'b'",
        ),
        (
            "arc_easy",
            {"instruction": "x", "text": "y"},
            r":1: no column 'output', 'answer'; there are 'instruction', 'text'",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": "x"}]},
            r":1: 'messages' ends with role 'user'",
        ),
    ],
)
def test_invalid_rows_are_refused(tmp_path, name, row, message):
    path = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        HubTask(name, test=str(path)).load("test")


def test_empty_texts_can_be_dropped_and_are_counted(tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl", [changed("alpaca", output=""), ROWS["alpaca"][0], changed("alpaca", instruction="")]
    )
    [example] = HubTask("alpaca", test=str(path), on_empty="drop").load("test")
    assert example.source == f"{path}:2"
    assert "dropped 2 of 3 rows" in capsys.readouterr().err
    with pytest.raises(ValueError, match="every row has an empty or missing text"):
        HubTask("alpaca", test=str(write(path, [changed("alpaca", output="")])), on_empty="drop").load("test")
    with pytest.raises(ValueError, match="on_empty: got 'skip'"):
        HubTask("alpaca", test=str(path), on_empty="skip")


def test_a_table_refuses(tmp_path):
    path = str(write(tmp_path / "t.csv", [{"a": "x", "b": ""}]))
    with pytest.raises(ValueError, match=r"t\.csv:2: no column 'prompt'; there are 'a', 'b'"):
        TableTask(train=path, completion="{a}").load("train")
    with pytest.raises(ValueError, match=r"t\.csv:2: 'b' is empty; --task\.on-empty drop"):
        TableTask(train=path, prompt="{a}", completion="{b}").load("train")
    with pytest.raises(ValueError, match=r"task\.prompt: got 'Hello', need a text with a \{column\}"):
        TableTask(train=path, prompt="Hello")
    with pytest.raises(ValueError, match=r"task\.prompt: '\{a' ?.*write \{\{ for a brace"):
        TableTask(train=path, prompt="{a")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": "b"}\n{"a": "\xfc"}\n', r"x\.jsonl:2: not UTF-8 text"),
        ("x.csv", b"a,b\n1,2\n3,\xfc\n", r"x\.csv:3: not UTF-8 text .*save the file as UTF-8"),
        ("x.csv", b"a,b\n1,2,3\n", r"x\.csv:2: has more or fewer fields than the 2 columns"),
        ("x.csv", b"a,b\n1\n", r"x\.csv:2: has more or fewer fields"),
        ("x.csv", b'a,b\n1,"2\n', r"x\.csv:2: unexpected end of data"),
        ("x.csv", b"a,b\n", r"x\.csv: no rows"),
        ("x.parquet", b"PAR1 no", r"x\.parquet: not a Parquet file"),
        ("x.txt", b"a", r"x\.txt: unknown file type; known suffixes are \.jsonl"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TableTask(train=str(path), prompt="{a}", completion="{a}").load("train")


def test_deep_nesting_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: nested too deeply"):
        read_file(path).all()


def test_no_such_file():
    with pytest.raises(ValueError, match=r"gsm8k_train\.jsonl: no such file"):
        HubTask("gsm8k", data="nowhere/gsm8k_{split}.jsonl").load("train")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_of_10_megabytes(tmp_path, suffix):
    path = write(tmp_path / f"long{suffix}", [{"prompt": "word " * 2_000_000, "completion": "yes"}])
    [example] = TableTask(train=str(path)).load("train")
    assert len(example.turns[0].text) == 10_000_000
