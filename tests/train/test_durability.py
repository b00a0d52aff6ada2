"""Whatever ends a run, it goes on from its last checkpoint to the same end; two runs never share a folder."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.io import load_steering
from train import sft
from train.cli import run_main
from train.config import TrainConfig
from train.run import loop
from train.run.checkpoints import open_checkpoints
from train.run.folder import locked
from train.run.loop import train
from train.run.metrics import read_metrics
from train.tasks import JsonlTask

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tiny_folder, tiny_data):
    return TrainConfig(
        task=JsonlTask(str(tiny_data)),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block",),
        steps=4,
        batch_size=4,
        sequence_length=32,
        test_examples=0,
        checkpoint_every=2,
    )


@pytest.fixture
def config(settings, tmp_path):
    return replace(settings, out=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nothing interrupts."""
    return train(replace(settings, out=str(tmp_path_factory.mktemp("whole") / "run")))


# ---- one run a folder


def test_a_folder_is_locked_while_its_run_lasts(config):
    with locked(config.out):
        owner = rf"process {os.getpid()} on .*, since 20\d\d-"
        with pytest.raises(ValueError, match=rf"a run is writing here .*{owner}.* another --out"):
            train(config)
        assert set(os.listdir(config.out)) == {".lock", ".lock.json"}
    train(config)
    with pytest.raises(ValueError, match="holds this run already"):
        train(config)


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = f"import time\nfrom train.run.folder import locked\nwith locked({str(tmp_path)!r}): time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        while not (tmp_path / ".lock.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(ValueError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["process"] == os.getpid()


# ---- starting again


def test_one_command_begins_and_resumes(config, capsys):
    again = replace(config, auto_resume=True)
    first = train(again)
    assert "Restored" not in capsys.readouterr().out
    second = train(again)
    assert "Restored step 4" in capsys.readouterr().out
    assert first.run.steering.read_bytes() == second.run.steering.read_bytes()


def test_a_stopped_run_says_so_in_its_exit_status(config, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda config, **rest: None)
    monkeypatch.setattr(sys, "argv", ["train.sft"])
    with pytest.raises(SystemExit) as ended:
        run_main(sft.main)
    assert ended.value.code == 75


# ---- a disk that does not take it


@pytest.mark.xdist_group("durability")  # they share a whole run
@pytest.mark.parametrize("words", ["No space left on device", "Read-only file system"])
def test_a_save_that_fails_keeps_the_last_good_step(config, whole, monkeypatch, words):
    import orbax.checkpoint as ocp

    original = ocp.CheckpointManager.save

    def fail(self, step, *args, **settings):
        if step == 4:
            raise ValueError(f"RESOURCE_EXHAUSTED: Error writing a/b/c: Failed to write 9 bytes: {words} [code='28']")
        return original(self, step, *args, **settings)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(ValueError, match=rf"could not be written \({words}\)\. .* step 2; .*--resume"):
        train(config)
    monkeypatch.undo()
    resumed = train(replace(config, resume=True))
    assert resumed.run.steering.read_bytes() == whole.run.steering.read_bytes()


def test_checkpoints_may_lie_elsewhere(config, tmp_path):
    away = replace(config, checkpoints=f"file://{tmp_path / 'bucket' / 'run'}")
    first = train(away)
    assert not first.run.checkpoints.exists()
    assert (tmp_path / "bucket" / "run" / "4").exists()
    train(replace(away, resume=True, out=config.out))
    with pytest.raises(ValueError, match=r"checkpoints hdfs://a/b: cannot be reached \(supported are gs://"):
        open_checkpoints("hdfs://a/b")
    with pytest.raises(ValueError, match=r"out must be a local or mounted folder.*--checkpoints"):
        replace(config, out="gs://bucket/run")


def test_checkpoints_outlive_their_run(config, tmp_path, capsys):
    """A machine that is gone took the run's folder with it; the checkpoints were kept elsewhere, here in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as memory:
        away = replace(config, checkpoints=f"file://{memory}", auto_resume=True)
        first = train(replace(away, auto_resume=False))
        with pytest.raises(
            ValueError, match=r"holds checkpoints already, the last of step 4, .*--auto-resume continues"
        ):
            train(replace(away, out=config.out + "-2", auto_resume=False))
        with pytest.raises(ValueError, match=r"was saved with other settings: config\.seed is 0 there, 1 here"):
            train(replace(away, out=config.out + "-3", seed=1))
        shutil.rmtree(Path(memory) / "4")
        again = train(replace(away, out=config.out + "-4"))
        assert "Restored step 2" in capsys.readouterr().out
        assert first.run.steering.read_bytes() == again.run.steering.read_bytes()
        assert [row["step"] for row in read_metrics(again.run.metrics)] == [3, 4]
        with locked(memory), pytest.raises(ValueError, match="a run is writing here right now"):
            train(replace(away, out=config.out + "-5"))


# ---- the matrix

CONFIG = """
from train.config import TrainConfig
from train.tasks import JsonlTask
from jaxsteer.optim import OptimConfig

def config():
    return TrainConfig(task=JsonlTask({data!r}), model={model!r}, steps=120, batch_size=4, sequence_length=32,
                       test_examples=0, plan=("nonlinear(rank=4) @ block",), checkpoint_every=3,
                       optim=OptimConfig(lr=3e-3))
"""


@pytest.mark.slow
def test_the_kill_matrix(tiny_folder, tiny_data, tmp_path):
    """20 SIGKILLs and 5 SIGTERMs at random moments; every fifth resumes on a mesh.

    Every fourth kill comes while Python starts and the model is loaded, the others between or within steps and saves.
    """
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(data=str(tiny_data), model=str(tiny_folder)))

    def begin(out, devices=1):
        command = [sys.executable, "-m", "train.sft", str(file), "--out", str(out), "--auto-resume"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(out, devices=1):
        process = begin(out, devices)
        text, _ = process.communicate()
        assert process.returncode == 0, text
        return text

    def count(out):
        metrics = out / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait(process, out, steps):
        """Wait until this many steps are done; gives the seconds that it took."""
        began = time.monotonic()
        while process.poll() is None and count(out) < steps:
            time.sleep(0.001)
        return time.monotonic() - began

    finish(tmp_path / "whole")  # compiles
    process = begin(tmp_path / "timed")
    loading = wait(process, tmp_path / "timed", 1)
    process.communicate()
    whole = load_steering(tmp_path / "whole" / "steering.safetensors").steering["nonlinear"]["block"]
    losses = [row["loss"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")]

    moments, found = random.Random(time.time_ns()), []
    for number, kind in enumerate([signal.SIGKILL] * 20 + [signal.SIGTERM] * 5):
        out, devices = tmp_path / str(number), 4 if number % 5 == 4 else 1
        process = begin(out)
        if kind == signal.SIGKILL and number % 4 == 0:
            time.sleep(loading * moments.uniform(0, 1))
        else:
            wait(process, out, moments.randrange(1, 110))
            time.sleep(moments.uniform(0, 0.05))
        process.send_signal(kind)
        process.communicate()
        ended = process.returncode
        assert ended == (-9 if kind == signal.SIGKILL else 75), ended
        steps = [int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdecimal()]
        unfinished = len(list((out / "checkpoints").glob("*tmp*")))
        text = finish(out, devices)
        got = load_steering(out / "steering.safetensors").steering["nonlinear"]["block"]
        for name, leaf in whole.items():
            if devices == 1:
                np.testing.assert_array_equal(got[name], leaf)
            else:
                np.testing.assert_allclose(got[name], leaf, 1e-6, 1e-6)
        if devices == 1:
            assert [row["loss"] for row in read_metrics(out / "metrics.jsonl")] == losses
        restored = text.partition("Restored step ")[2].partition(".")[0] or "none"
        assert restored == "none" or int(restored) >= max(steps, default=0)
        found.append((kind.name, ended, max(steps, default=0), unfinished, restored, devices))
    for row in found:
        print("{}: exit {}, last step {}, saves under way {}, restored {}, devices {}".format(*row))
    assert len({last for _, _, last, *_ in found}) > 10  # the moments differ


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
def test_a_full_disk(config, tmp_path):
    """3 MB, most of them taken."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (disk / "taken").write_bytes(bytes(2_500_000))
        small = replace(config, out=str(disk / "run"), steps=40, checkpoint_every=5)
        with pytest.raises(ValueError, match=r"could not be written \(No space left on device\)"):
            train(small)
        (disk / "taken").unlink()
        with open_checkpoints(disk / "run" / "checkpoints") as there:
            assert there.steps()
        resumed, whole = train(replace(small, resume=True)), train(replace(small, out=config.out))
        assert resumed.run.steering.read_bytes() == whole.run.steering.read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)
