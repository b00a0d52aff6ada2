"""What a run notes at its starts."""

from pathlib import Path

import pytest

import train
from train.run.folder import RunFolder
from train.run.starts import command, read_starts

PACKAGE = Path(train.__file__).parent


@pytest.mark.parametrize(("program", "name"), [("sft.py", "sft"), ("compare/__main__.py", "compare")])
def test_the_command_of_a_start(monkeypatch, program, name):
    monkeypatch.setattr("sys.argv", [str(PACKAGE / program), "jsonl", "--steps", "3"])
    assert command() == ["jaxsteer", name, "jsonl", "--steps", "3"]


def test_another_program_is_no_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest"])
    assert command() is None


def test_starts_that_cannot_be_read_are_named(tmp_path):
    run = RunFolder(tmp_path)
    assert read_starts(run) == []
    run.starts.write_text('{"done": 0}\n{"do')
    assert read_starts(run) == [{"done": 0}]
    run.starts.write_text('{"done": 0}\n{"do\n')
    with pytest.raises(ValueError, match=r"starts\.jsonl:2"):
        read_starts(run)
