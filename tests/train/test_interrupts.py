"""Ctrl-C is noticed at once, obeyed at the next safe point or at once, and never ends in a traceback."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PLATFORMS": "cpu",
}

LOOP = """
import time
from train.devices import interrupts
interrupts.GRACE_SECONDS = 0.2
with interrupts.handling():
    try:
        {block}
            print("ready", flush=True)
            for _ in range(500):
                time.sleep(0.02)
                {check}
    except interrupts.Interrupted as stop:
        print(stop, "left")
        interrupts.leave(interrupts.STOPPED)
print("done")
"""
SAFE, UNSAFE = "interrupts.safe_point('kept')", "pass"


def begin(*command):
    """A process in which Ctrl-C is not ignored, as it is in the jobs of a shell script."""
    return subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, *command],
        cwd=ROOT,
        env=os.environ | QUICK,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def press(process, times):
    for number in range(times):
        time.sleep(0.1 * bool(number))
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err.split("\n")


@pytest.mark.parametrize(
    ("block", "check", "times", "output", "said"),
    [
        ("if True:", SAFE, 1, "", ["Interrupted."]),
        ("with interrupts.block('soon'):", SAFE, 1, "kept left\n", ["Stopping"]),
        ("with interrupts.block('soon'):", UNSAFE, 1, "", ["Stopping"]),  # after the time of grace
        ("with interrupts.block('wait'):", SAFE, 1, "kept left\n", ["Stopping"]),
        ("with interrupts.block('wait'):", UNSAFE, 2, "", ["Stopping", "Interrupted."]),
        ("with interrupts.block('wait'), interrupts.deferred():", SAFE, 2, "", ["Stopping", "Interrupted."]),
    ],
)
def test_what_ctrl_c_does(block, check, times, output, said):
    process = begin("-c", LOOP.format(block=block, check=check))
    assert process.stdout.readline() == "ready\n"
    status, out, err = press(process, times)
    assert (status, out) == (130, output)
    assert [line.split()[0] for line in err if line] == said


def test_a_job_in_the_background_goes_on():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + LOOP.format(block="if True:", check=UNSAFE)
    process = begin("-c", code.replace("range(500)", "range(10)"))
    assert process.stdout.readline() == "ready\n"
    assert press(process, 1) == (0, "done\n", [""])


CONFIG = """
from train.config import TrainConfig
from train.tasks import JsonlTask

def config():
    task = JsonlTask({data!r}, validation={data!r}, max_new_tokens=20)
    return TrainConfig(task=task, model={model!r}, plan=("nonlinear(rank=4) @ block",), steps=2000, batch_size=4,
                       sequence_length=32, test_examples=64, evaluate_every=50, eval_batch_size=8, checkpoint_every=50)
"""


def wait_for_steps(process, metrics):
    """Wait until a training writes its first lines."""
    began = time.time()
    while not (metrics.exists() and metrics.stat().st_mtime > began) and process.poll() is None:
        time.sleep(0.05)


def test_pressed_while_a_command_imports():
    """It ends at once: an exception there would be a traceback, or be swallowed by the import."""
    for name in ("evaluate", "generate"):
        process = begin("-X", "importtime", "-m", f"train.{name}", "none")
        for line in process.stderr:  # the package itself is imported, and much is to come
            if line.endswith("| train\n"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT
        assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("command", ["sft", "evaluate", "generate"])
def test_pressed_at_any_moment(command, presses, tiny_folder, tiny_data, tmp_path):
    """Ten times each: the status says how it ended, no traceback is printed, and a training can go on."""
    (tmp_path / "config.py").write_text(CONFIG.format(data=str(tiny_data), model=str(tiny_folder)))
    arguments = {
        "sft": [str(tmp_path / "config.py"), "--auto-resume", "--out", str(tmp_path / "run")],
        "evaluate": ["none", "--model", str(tiny_folder), "--data", str(tiny_data), "--batch-size", "2",
                     "--out", str(tmp_path / "evaluation")],
        "generate": ["none", "--model", str(tiny_folder), *["abc"] * 40, "--max-new-tokens", "58"],
    }[command]  # fmt: skip
    moments, statuses, waits = random.Random(time.time_ns()), [], []
    for number in range(10):
        process = begin("-m", "train", command, *arguments)
        if command == "sft" and number % 2:
            wait_for_steps(process, tmp_path / "run" / "metrics.jsonl")
        time.sleep(moments.uniform(0.3, 4.0))
        pressed = time.monotonic()
        status, _, err = press(process, presses)
        waits.append(time.monotonic() - pressed)
        statuses.append(status)
        assert status in ({75, 130} if command == "sft" else {130, 0, -signal.SIGINT}), err
        strange = ("Traceback", "Exception", "Error", "error", "Fatal", "Segmentation")
        assert not [line for line in err if any(word in line for word in strange)], err
    print(f"\n{command}, Ctrl-C {presses} x: statuses {sorted(statuses)}, longest wait {max(waits):.1f} s")
    assert max(waits) < 30
    if command == "sft":
        done = subprocess.run(
            [sys.executable, "-m", "train", "sft", *arguments], cwd=ROOT, env=os.environ | QUICK, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy_after"]
