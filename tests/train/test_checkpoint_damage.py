"""Damaged checkpoints are found and the one before is used; a kill costs one save at most."""

import asyncio
import json
import signal
import sys
from types import SimpleNamespace

import pytest
from saved_trees import abstract, assert_same, run, save_three, small

from train.run.checkpoints import open_checkpoints
from train.run.orbax_log import drop_reported_errors


def payload(folder, step):
    """The files of a step that hold the arrays."""
    files = list((folder / str(step) / "t").rglob("d/*"))
    assert files
    return files


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_byte_is_found_and_the_checkpoint_before_it_is_used(tmp_path):
    save_three(tmp_path)
    for file in payload(tmp_path, 3):
        flip(file, file.stat().st_size // 2)
    with open_checkpoints(tmp_path, keep_latest=3) as checkpoints:
        with pytest.raises(ValueError, match="step 3 cannot be read"):
            checkpoints.restore(3, abstract(small(0)))
        found = checkpoints.restore_latest(abstract(small(0)))
        assert (found.step, found.meta, len(found.skipped)) == (2, {"at": 2}, 1)
        assert found.skipped[0].startswith("step 3 cannot be read (")
        assert_same(found.trees, small(2))
        # The run goes on and saves that step anew.
        checkpoints.save(3, small(30), {"at": 3})
    with open_checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore_latest(abstract(small(0)))
        assert (found.step, found.skipped) == (3, [])
        assert_same(found.trees, small(30))


def test_a_flipped_byte_anywhere_is_found_or_harmless(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {"at": 1}, {"loss": 1.0})
    found_out = 0
    for file in (path for path in (tmp_path / "1").rglob("*") if path.is_file() and path.stat().st_size):
        whole = file.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            flip(file, position)
            with open_checkpoints(tmp_path) as checkpoints:
                try:
                    found = checkpoints.restore_latest(abstract(small(0)))
                except ValueError:
                    found_out += 1
                else:
                    assert found is not None, file
                    assert_same(found.trees, small(1))
                    assert found.meta == {"at": 1}
            file.write_bytes(whole)
    assert found_out >= 5


def test_lost_and_cut_files_are_skipped_and_all_damaged_is_an_error(tmp_path):
    save_three(tmp_path)
    for file in payload(tmp_path, 3):
        file.unlink()
    for file in payload(tmp_path, 2):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with open_checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore_latest(abstract(small(0)))
        assert found.step == 1
        assert [text.split(" cannot")[0] for text in found.skipped] == ["step 3", "step 2"]
    for file in (tmp_path / "1" / "record").rglob("*"):
        file.write_text("{}")
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="no checkpoint is intact: step 3"),
    ):
        checkpoints.restore_latest(abstract(small(0)))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3"}


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from train.run.checkpoints import open_checkpoints
checkpoints = open_checkpoints(sys.argv[1])
checkpoints.save(1, {"t": {"x": jnp.full(64, 1.0)}}, {})
checkpoints.wait()
checkpoints.save(2, {"t": {"x": jnp.full(20_000_000, 2.0)}}, {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_mid_save_costs_that_save_only(tmp_path):
    assert run(KILLED, tmp_path).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} - {"1"}  # it was killed in the middle
    with open_checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore_latest(abstract(small(0)))
        assert (found.step, found.skipped, checkpoints.steps()) == (1, [], [1])
        checkpoints.save(2, small(2), {})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_write_that_comes_after_a_failed_save_prints_no_traceback(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.exc_value))
    drop_reported_errors()
    loop = asyncio.new_event_loop()
    loop.close()
    for act, expected in (
        (lambda: loop.call_soon_threadsafe(print), RuntimeError),
        (lambda: json.loads("{"), ValueError),
    ):
        with pytest.raises(expected) as caught:
            act()
        trace = caught.value.__traceback__.tb_next.tb_next  # TensorStore calls from C++: no frame of its own
        sys.unraisablehook(SimpleNamespace(exc_value=caught.value, exc_traceback=trace))
    assert [type(error) for error in shown] == [json.JSONDecodeError]
