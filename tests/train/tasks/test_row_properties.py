"""Any row, in any reader: examples, or a ValueError that names file and line; never another kind of error."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from task_rows import CHAT, INSTRUCTIONS, ROWS

from train.data.listops import ListOps, read_tsv
from train.tasks import HubTask, JsonlTask, TableTask

KEYS = [
    "prompt",
    "completion",
    "answer",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "text",
    "weight",
]

numbers = st.floats(width=32) | st.integers(-3, 10) | st.just(10**400)
strings = st.sampled_from(["", " ", "a", "7", "\0", "\ud83d", "nan", "user", "assistant", "gpt", "#### 5", "True"])
values = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "weight", "text", "label", "x"]), inner)
    ),
    max_leaves=6,
)
BYTES = [
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xed\xa0\xbd",
    b"\xef\xbb\xbf",
    b"a",
    b"7",
    b"\t",
    b",",
    b'"',
    b"{",
    b"}",
    b"[",
    b":",
    b"PAR1",
]
BYTES += [b'{"prompt": ', b'"p", ', b'"completion": ', b'"c"}', b"[MAX 1 2 ]", b"\\ud83d"]
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(task, path, row):
    """Load a file of one row, for training and for scoring."""
    path.write_text("\n" + json.dumps(row) + "\n")
    located = []
    for split in ("train", "test"):
        try:
            examples = task.load(split)
        except ValueError as error:
            located.append(f"{path.name}:2: " in str(error))
            continue
        for example in examples:
            assert math.isfinite(example.weight)
            for text in (*(turn.text for turn in example.turns), *example.choices, example.gold or ""):
                assert isinstance(text, str)
                assert "\0" not in text
                text.encode()
    assert all(located)


@given(row=st.dictionaries(st.sampled_from(KEYS), values, max_size=4), chat=st.booleans())
@few
def test_lines(tmp_path, row, chat):
    path = tmp_path / "d.jsonl"
    check(JsonlTask(str(path), test=str(path), chat=chat), path, row)


@given(row=st.fixed_dictionaries({"a": values, "b": values, "c": values}))
@few
def test_tables(tmp_path, row):
    path = tmp_path / "d.jsonl"
    task = TableTask(str(path), test=str(path), prompt="{a} {b}", completion="{b}", choices=("{c}",), weight="c")
    check(task, path, row)


@given(data=st.data(), name=st.sampled_from([*ROWS, "chat", *INSTRUCTIONS]))
@settings(few, max_examples=60)
def test_named_tasks(tmp_path, data, name):
    good = (
        CHAT if name == "chat" else data.draw(st.sampled_from([ROWS[name][0], INSTRUCTIONS.get(name, ROWS[name])[0]]))
    )
    column = data.draw(st.sampled_from([*good, "input", "weight"]))
    path = tmp_path / "d.jsonl"
    check(HubTask(name, train=str(path), test=str(path)), path, {**good, column: data.draw(values)})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
@given(content=st.lists(st.sampled_from(BYTES), max_size=9).map(b"".join))
@settings(few, max_examples=30)
def test_bytes(tmp_path, suffix, content):
    path = tmp_path / f"d{suffix}"
    refusals = []
    path.write_bytes(b"prompt,completion\n" * (suffix == ".csv") + content)
    tasks = [TableTask(str(path))] + [JsonlTask(str(path))] * (suffix == ".jsonl")
    for load in [lambda task=task: task.load("train") for task in tasks] + [
        lambda: read_tsv(path, ListOps(), "train") if suffix == ".tsv" else None
    ]:
        try:
            load()
        except ValueError as error:
            refusals.append(str(error))
    assert all(path.name in refusal for refusal in refusals)
