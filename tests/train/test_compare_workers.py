"""A comparison whose runs are made by several processes."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from train.compare import workers
from train.compare.__main__ import compare
from train.compare.config import Entry, Method
from train.compare.workers import cores_of_workers, working


@pytest.fixture
def config(tiny_comparison):
    entries = tuple(Entry(site, Method((f"fixed @ {site}",)), lr=1e-2) for site in ("block", "mlp", "attn"))
    return replace(tiny_comparison, entries=entries, scoring="predictions", timings=False)


def test_cores_are_dealt_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None, raising=False)
    assert cores_of_workers(2) == [{0, 2, 7}, {1, 5}]
    with pytest.raises(ValueError, match=r"--workers 6: more than the CPU cores .* \(5\)"):
        cores_of_workers(6)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="--workers 2: workers share the cores of a CPU, and this is a tpu"):
        cores_of_workers(2)


def test_one_worker_is_this_process(config):
    with working(config, lambda steps: None) as until_finished:
        until_finished(config.entries[0])


def test_the_end_of_a_worker_is_an_error():
    ours, theirs = multiprocessing.Pipe()
    worker = workers._Worker(SimpleNamespace(exitcode=-9, join=lambda: None), ours)
    theirs.send(3)
    theirs.send(workers._Failure("no such file", expected=True))
    theirs.send(workers._Failure("in a worker: KeyError", expected=False))
    theirs.close()
    assert worker.receive() == 3
    with pytest.raises(ValueError, match="no such file"):
        worker.receive()
    with pytest.raises(RuntimeError, match="KeyError"):
        worker.receive()
    with pytest.raises(ValueError, match="status -9, perhaps for want of memory; finished runs are kept"):
        worker.receive()


@pytest.mark.slow
def test_several_processes_make_the_runs(config, capfd):
    several = compare(replace(config, workers=2, together=2))
    folder = Path(config.out)
    assert len(list(folder.glob("runs/*/rate*_seed*.json"))) == 3 * (3 + 1)
    assert "tokens/s" not in (folder / "results.md").read_text()
    assert all(row["timing"] is None for row in several["methods"])
    printed = capfd.readouterr().out
    assert "block: validation accuracy by learning rate" in printed
    assert "Comparing  36/36" in printed
    alone = compare(replace(config, out=str(folder.parent / "alone")))
    for row, other in zip(several["methods"], alone["methods"], strict=True):
        assert row["final_loss"] == pytest.approx(other["final_loss"], rel=1e-4)
    # What a worker cannot do is said by the command; what had finished is kept.
    shutil.rmtree(folder / "runs" / "mlp")
    record = folder / "runs" / "attn" / "rate+0_seed1.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"entry": {}}))
    with pytest.raises(ValueError, match="made with other settings of 'attn'"):
        compare(replace(config, workers=2))
