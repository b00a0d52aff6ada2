"""No input ends in a traceback: each kind of error is a sentence with an exit status, and a bug says that it is one."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train.cli import load_config_file, run_main
from train.config import TrainConfig
from train.display import failures

ROOT = Path(__file__).parents[2]


def raising(error):
    def main():
        raise error

    return main


@pytest.fixture
def ended(capsys):
    """(exit status, what stands on standard error) of a command."""

    def call(main):
        with pytest.raises(SystemExit) as exit:
            run_main(main)
        return exit.value.code, " ".join(capsys.readouterr().err.split())

    return call


def nested():
    json.loads("[" * 100_000)


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (raising(ValueError("no such thing")), "error: no such thing"),
        (lambda: Path("/no/such/file").read_text(), "error: /no/such/file: No such file or directory"),
        (raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), "error: No space left on device"),
        (nested, "error: the input is nested too deeply to be read"),
        (lambda: "a\ud83d".encode(), r"not valid Unicode, at character 1: 'a\\\\ud83d'"),
        (lambda: b"a\xff".decode(), "error: the input is not UTF-8 text: byte 0xff at position 1"),
        (raising(MemoryError("Unable to allocate 3 TiB")), "out of memory: Unable to allocate 3 TiB. .*--batch-size"),
        (
            raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")),
            "out of memory on the device .*--sequence-length",
        ),
        (raising(ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")), "out of memory on the device"),
        (raising(RuntimeError("Unable to initialize backend 'tpu': no")), "JAX_PLATFORMS"),
        (raising(jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer")), "another process of this run"),
        (lambda: __import__("no_such_package"), "no_such_package is not installed; .* pip install no_such_package"),
        (
            raising(ModuleNotFoundError("No module named 'wandb'", name="wandb.sdk")),
            r'pip install "jaxsteer\[train,wandb\]"',
        ),
    ],
)
def test_an_error_that_a_user_can_cause_is_a_sentence(main, message, ended):
    status, text = ended(main)
    assert status == 1
    assert re.search(message, text), text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), KeyError("x"), ImportError("x", name="train.y")]
)
def test_a_bug_is_named_and_its_traceback_kept(error, ended, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, text = ended(raising(error))
    assert status == failures.BUG
    assert f"{type(error).__name__}: {error}. This is a bug in jaxsteer" in text
    (file,) = tmp_path.iterdir()
    assert file.name in text.replace(" ", "")
    assert "Traceback (most recent call last)" in file.read_text()
    assert "in main" in file.read_text()


def test_interruption_and_an_exit_of_its_own_keep_their_status(ended):
    assert ended(raising(KeyboardInterrupt())) == (130, "")
    assert ended(raising(SystemExit(75))) == (75, "")
    assert ended(raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == (141, "")


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_error():
    code = "from train.cli import run_main; run_main(lambda: print('line\\n' * 1_000_000))"
    command = f"'{sys.executable}' -c \"{code}\" | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line\n141\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("closing", "encoding"), [("<&-", ""), (">&-", ""), ("2>&-", ""), ("", "PYTHONIOENCODING=ascii")]
)
def test_streams_that_are_closed_or_narrow_are_no_error(closing, encoding):
    command = f"{encoding} '{sys.executable}' -m train plan listops_smollm2 --estimate --topology h100:1 {closing}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# ---- config files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.jsonl", '{"prompt": "a", "completion": "b"}\n', r"data.jsonl: not a config file; configs are Python"),
        ("run.bin", "\0\1", r"run.bin: not a config file"),
        ("broken.py", "def config(:\n", r"broken.py:1: invalid syntax"),
        ("imports.py", "x = 1\nimport no_such_package\n", r"imports.py:2: .*no_such_package is not installed"),
        ("raises.py", "def config():\n    return 1 / 0\n", r"raises.py:2: ZeroDivisionError: division by zero"),
        (
            "settings.py",
            "from train.config import TrainConfig\n\nconfig = lambda: TrainConfig(batch_size=0)\n",
            r"settings.py:3: --batch-size must be at least 1",
        ),
        (
            "option.py",
            "from train.config import TrainConfig\nconfig = lambda: TrainConfig(batch=0)\n",
            r"option.py:2: TypeError: .*batch",
        ),
    ],
)
def test_an_error_in_a_config_names_the_file_and_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config_file(tmp_path / name, TrainConfig)
