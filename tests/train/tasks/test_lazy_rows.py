"""Data in several files, read row by row: the same examples as from one list, and keys that know every change."""

import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from task_rows import ROWS

from train.data import loading
from train.data.records import Tally
from train.tasks import HeldOutTask, HubTask, JsonlTask, MixtureTask, TableTask, held_out
from train.tasks.record import Part
from train.tasks.row_sources import HubRows, JsonlRows, ParquetRows, PickedRows

RECORDS = [{"prompt": f"question {i}?", "completion": f"{i}."} for i in range(23)]


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of three JSON Lines shards."""
    for number, (first, last) in enumerate([(0, 10), (10, 11), (11, 23)]):
        write_jsonl(tmp_path / "shards" / f"part-{number}.jsonl", RECORDS[first:last])
    return tmp_path / "shards"


@pytest.fixture
def parquet(tmp_path):
    """A folder of two Parquet files, of several row groups each."""
    for number, rows in enumerate([RECORDS[:15], RECORDS[15:]]):
        path = tmp_path / "tables" / f"train-0000{number}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    return tmp_path / "tables"


def asked(examples):
    return [example.turns[0].text for example in examples]


ALL = [row["prompt"] for row in RECORDS]


def test_a_folder_or_a_pattern_stands_for_its_files(folder, parquet):
    for train in (str(folder), f"{folder}/*.jsonl"):
        assert asked(JsonlTask(train).load("train")) == ALL
        assert asked(TableTask(train=train).load("train")) == ALL
    assert JsonlTask(str(folder)).load("train")[11].source == f"{folder}/part-2.jsonl:1"
    for train in (str(parquet), f"{parquet}/train-*.parquet"):
        assert asked(TableTask(train=train).load("train")) == ALL
    with pytest.raises(ValueError, match=r"nothing\*\.jsonl: no files"):
        JsonlTask(f"{folder}/nothing*.jsonl").load("train")


def test_the_shards_of_a_split_are_found_by_its_name(tmp_path):
    rows = [{**ROWS["gsm8k"][0], "question": f"{i}?"} for i in range(6)]
    for number in range(3):
        write_jsonl(tmp_path / "data" / f"train-{number}-of-3.jsonl", rows[2 * number : 2 * number + 2])
    assert len(HubTask("gsm8k", data=str(tmp_path / "data")).load("train")) == 6


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_rows_are_read_in_any_order(tmp_path, folder, parquet, kind):
    if kind == "jsonl":
        path = tmp_path / "gaps.jsonl"
        path.write_text("\ufeff" + "".join(f"{json.dumps(row)}\n \u00a0 \n\n" for row in RECORDS))
        rows = JsonlRows(path)
    elif kind == "parquet":
        path = next(iter(sorted(parquet.iterdir())))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=4)
        rows = ParquetRows(path)
    else:
        rows = HubRows(datasets.Dataset.from_list(RECORDS), "me/mine train")
    assert len(rows) == len(RECORDS)
    assert rows.first()[1] == RECORDS[0]
    everything = rows.all()
    assert [row for _, row in everything] == RECORDS
    order = np.random.default_rng(0).permutation(len(RECORDS)).tolist()
    for numbers in (order, range(3, 9), range(0), [5, 5]):
        assert rows.take(numbers) == [everything[number] for number in numbers]
    line = 3 * 22 + 1 if kind == "jsonl" else 23
    assert everything[-1][0].endswith(f":{line}")
    part = Part("train", (("hold", 0.3),))
    assert PickedRows(rows, part).all() == [everything[i] for i in part.indices(len(RECORDS))]


def key(task, split="train"):
    [part] = task.recipe(split).parts
    return part.records.key


def test_the_key_knows_content_and_settings(folder):
    task = JsonlTask(str(folder))
    before = key(task)
    assert key(JsonlTask(str(folder))) == before
    for other in (JsonlTask(str(folder), template="Q: {prompt}"), JsonlTask(str(folder), on_empty="drop")):
        assert key(other) != before
    path = folder / "part-1.jsonl"
    old = path.stat()
    path.write_text(path.read_text().replace("question 10", "question 99"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # neither size nor time tell
    assert key(task) != before


@pytest.mark.parametrize("name", ROWS)
def test_the_key_is_the_same_in_another_process(tmp_path, name):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[name][0]])
    for task in (HubTask(name, train=str(path)), JsonlTask(str(path)), TableTask(train=str(path))):
        [part] = task.recipe("train").parts
        assert " at 0x" not in part.records.settings  # the address of an object


def test_held_out_and_mixed_examples_are_chosen_by_number(folder, parquet):
    lines, table = JsonlTask(str(folder)), TableTask(train=str(parquet))
    held = HeldOutTask(lines, 0.2)
    train, validation = held.load("train"), held.load("validation")
    assert sorted(asked(train) + asked(validation)) == sorted(ALL)
    assert len(validation) == 5
    mixture = MixtureTask((lines, table), weights=(3, 1))
    examples = mixture.load("train")
    assert len(examples) == 46
    recipe = HeldOutTask(mixture, 0.2).recipe("train")
    assert [part.prefix for part in recipe.parts] == ["shards: ", "tables: "]
    [mine] = [part.records.read(2, 3).examples for part in recipe.parts[:1]]
    assert asked(mine) == ["question 2?"]


def test_what_asks_the_same_is_found_without_reading_again(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "WORTH_SECONDS", 0.0)
    rows = [{"prompt": "", "completion": "x"}, *RECORDS[:3], {"prompt": "question 1?", "completion": "again"}]
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    task = HeldOutTask(JsonlTask(str(path), on_empty="drop"), 0.6)
    monkeypatch.setattr(loading, "_known", {})
    held, rest = task.load("validation"), task.load("train")
    assert not set(asked(held)) & set(asked(rest))
    assert len(held) + len(rest) == 4
    monkeypatch.setattr(loading, "_known", {})
    held_out._held.cache_clear()
    monkeypatch.setattr(loading, "_asks", None)
    assert task.load("validation") == held
    [path] = (tmp_path / "cache" / "scans").iterdir()
    path.write_bytes(path.read_bytes()[:-99])
    monkeypatch.undo()
    assert task.load("validation") == held


def test_counts_of_parts_add_up(folder):
    [part] = JsonlTask(str(folder)).recipe("train").parts
    halves = part.records.read(0, 9).tally + part.records.read(9, 23).tally
    assert halves.to_json() == part.records.read(0, 23).tally.to_json()
    assert Tally.of(json.loads(json.dumps(halves.to_json()))).to_json() == halves.to_json()
