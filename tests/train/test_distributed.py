"""Several processes are one run: two of them on this machine, each with four CPU devices."""

import json
import os
import pickle
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsteer.io import load_steering
from train.config import TrainConfig
from train.data import DataSource, TokenizedExample
from train.devices import processes as distributed
from train.devices import rendezvous
from train.devices.placement import MeshConfig
from train.devices.processes import DistributedConfig
from train.run.loop import train
from train.run.metrics import read_metrics
from train.run.training import step_batch
from train.tasks import JsonlTask

ROOT = Path(__file__).parents[2]
DEAD_AFTER = 20


@pytest.fixture(scope="module")
def config(tiny_folder, tiny_data, tmp_path_factory):
    return TrainConfig(
        task=JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=2),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block", "lora(rank=2) @ projections"),
        steps=8,
        batch_size=8,
        sequence_length=32,
        grad_accumulation=2,
        test_examples=0,
        validation_examples=8,
        evaluate_every=8,
        eval_batch_size=8,
        checkpoint_every=2,
        out=str(tmp_path_factory.mktemp("runs") / "single"),
        mesh=MeshConfig(1, 1, 1),
    )


@pytest.fixture(scope="module")
def alone(config):
    """The same run in this process, on one device."""
    return train(config)


def begin(config, out, *, resume=False):
    """The two processes of a run."""
    pickled = pickle.dumps(replace(config, out=str(out), mesh=MeshConfig(2, 2, 2)))
    file = Path(f"{out}.py")
    file.write_text(f"import pickle\nconfig = lambda: pickle.loads({pickled!r})\n")
    return start("train.sft", str(file), *(["--resume"] if resume else []))


def start(program, *arguments):
    """A program as two processes that are to find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    fast = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    environment = os.environ | {"XLA_FLAGS": fast, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    settings = {"coordinator": f"localhost:{port}", "processes": 2, "timeout": DEAD_AFTER}
    command = [sys.executable, "-m", program, *arguments]
    for name, value in settings.items():
        command += [f"--distributed.{name}", str(value)]
    return [
        subprocess.Popen(
            [*command, "--distributed.process", str(number)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]


def finish(processes):
    """What each has printed, after both have ended well."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n----\n".join(outputs)
    return outputs


def wait_for(found, processes, seconds=200):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.05)


def saved(out):
    return {int(path.name) for path in Path(out, "checkpoints").glob("[0-9]*") if path.name.isdecimal()}


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_resumes(config, alone, tmp_path):
    out = tmp_path / "run"
    first, second = begin(config, out)
    wait_for(lambda: saved(out), [first, second])
    second.kill()
    second.wait()
    killed = time.monotonic()
    text, _ = first.communicate(timeout=DEAD_AFTER + 60)
    assert first.returncode, text
    assert time.monotonic() - killed < DEAD_AFTER + 30
    assert not (out / "summary.json").exists()

    spoke, silent = finish(begin(config, out, resume=True))
    assert "mesh" in spoke
    assert "data 2 x fsdp 2 x tensor 2" in spoke
    assert "Restored step" in spoke
    assert "Training" in spoke
    assert "Training" not in silent
    assert "Restored" not in silent

    want, got = ([r for r in read_metrics(Path(of) / "metrics.jsonl") if "loss" in r] for of in (config.out, out))
    assert [row["step"] for row in got] == list(range(1, 9))
    for name in ("loss", "grad_norm"):
        values = [np.array([row[name] for row in rows]) for rows in (want, got)]
        np.testing.assert_allclose(values[1], values[0], 1e-5, 1e-5, err_msg=name)
    one, other = (load_steering(Path(of) / "steering.safetensors").steering for of in (config.out, out))
    for slot, sites in one.items():
        for site, params in sites.items():
            for name, leaf in params.items():
                np.testing.assert_allclose(other[slot][site][name], leaf, 1e-3, 1e-4, err_msg=f"{slot}/{site}/{name}")
    assert json.loads((out / "summary.json").read_text())["trainable_parameters"] == alone.trainable


@pytest.fixture(scope="module")
def choosing(tiny_folder, tiny_data, tmp_path_factory):
    """A config file whose task lists choices."""
    path = tmp_path_factory.mktemp("choosing") / "config.py"
    path.write_text(
        "from train.config import TrainConfig\nfrom train.tasks import TableTask\n"
        f"task = TableTask({str(tiny_data)!r}, {str(tiny_data)!r}, choices=('{{completion}}', ' several', 'Z'))\n"
        f"config = lambda: TrainConfig(task=task, model={str(tiny_folder)!r})\n"
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["generation", "likelihood"])
def test_two_processes_answer_as_one_does(by, config, alone, choosing, tmp_path):
    single, pair = tmp_path / "single", tmp_path / "pair"
    steering = str(Path(config.out) / "steering.safetensors")
    arguments = (
        "--split",
        "validation",
        "--examples",
        "20",
        "--batch-size",
        "16",
        "--no-base",
        "--by",
        by,
    )  # 16 are halved
    if by == "likelihood":
        arguments += ("--config", choosing)
    done = subprocess.run(
        [sys.executable, "-m", "train.evaluate", steering, *arguments, "--out", str(single)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert done.returncode == 0
    finish(start("train.evaluate", steering, *arguments, "--out", str(pair), "--mesh.tensor", "2"))
    lines = [(folder / "steered.jsonl").read_text().splitlines() for folder in (single, pair)]
    one, other = ([json.loads(line) for line in each] for each in lines)
    field = "margin" if by == "generation" else "scores"
    sizes = [[answer.pop(field) for answer in answers] for answers in (one, other)]
    assert one == other
    assert len(one) == 20
    np.testing.assert_allclose(*sizes, 1e-4, 1e-6)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_all_at_one_step(config, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    long = replace(config, steps=60, checkpoint_every=50, evaluate_every=0)
    finish(begin(long, whole))
    processes = begin(long, out)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out / "metrics.jsonl")) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=120)
    (step,) = saved(out)
    assert 2 < step < 60
    shutil.copytree(out, tmp_path / "one", ignore=shutil.ignore_patterns(".lock*"))
    finish(begin(long, out, resume=True))
    one = train(replace(long, out=str(tmp_path / "one"), resume=True))  # on one process, one device
    paths = (one.run.steering, whole / "steering.safetensors")
    alike = [load_steering(path).steering["nonlinear"]["block"] for path in paths]
    for name, leaf in alike[0].items():
        np.testing.assert_allclose(alike[1][name], leaf, 1e-3, 1e-4)
    assert (out / "steering.safetensors").read_bytes() == (whole / "steering.safetensors").read_bytes()


def test_an_error_of_one_is_an_error_of_all(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").write_text("not a run")
    processes = begin(config, tmp_path / "run")
    for process in processes:
        text, _ = process.communicate(timeout=200)
        assert process.returncode == 1, text
    assert "neither empty nor a run" in " ".join(text.split())


def test_rows_of_a_part_are_those_of_the_whole():
    draw = np.random.default_rng(0)
    examples = [TokenizedExample(np.arange(n), np.ones(n, bool), 1, "") for n in draw.integers(2, 8, 50)]
    data, config = (
        DataSource(examples, 12, 16, seed=3),
        TrainConfig(batch_size=12, sequence_length=16, grad_accumulation=3),
    )
    for step in range(4):
        whole, part = step_batch(config, data, step), step_batch(config, data, step, range(1, 3))
        for one, other in zip(*map(jax.tree.leaves, (whole, part)), strict=True):
            assert one.shape == (3, 4, 16)
            np.testing.assert_array_equal(one[:, 1:3], other)


# ---- how processes find each other

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # inside an allocation, not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_what_an_environment_says(environment, several):
    assert distributed.several(environment) == several


def test_settings_go_before_the_environment():
    found = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    explicit = lambda environment=found, **settings: distributed.explicit(DistributedConfig(**settings), environment)
    assert explicit() == {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}
    assert explicit(coordinator="b:2", process=0) == {"coordinator_address": "b:2", "num_processes": 4, "process_id": 0}
    assert explicit({}) == {}
    assert explicit({"JAX_COORDINATOR_ADDRESS": "a:1", **SLURM}) == {"coordinator_address": "a:1"}
    with pytest.raises(ValueError, match="processes, process missing"):
        explicit({"JAX_COORDINATOR_ADDRESS": "a:1"})
    with pytest.raises(ValueError, match="the coordinator is '', need host:port"):
        explicit(coordinator="")
    with pytest.raises(ValueError, match=r"JAX_PROCESS_ID: must be a number .* got 'x'"):
        explicit(found | {"JAX_PROCESS_ID": "x"})


@pytest.mark.parametrize(
    ("gpus", "tasks", "local", "own"),
    [("8", "1", "0", list(range(8))), ("8", "8", "3", [3]), ("8", "2", "1", [4, 5, 6, 7]), ("", "1", "0", None)],
)
def test_a_slurm_task_takes_its_share_of_the_gpus(gpus, tasks, local, own):
    found = {"SLURM_GPUS_ON_NODE": gpus, "SLURM_NTASKS_PER_NODE": tasks, "SLURM_LOCALID": local}
    assert distributed.own_gpus(found) == own


def test_a_coordinator_that_does_not_answer(monkeypatch):
    def refuse(**settings):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr("jax.distributed.initialize", refuse)
    monkeypatch.setattr(distributed, "meet", lambda party, patience: None)
    with pytest.raises(ValueError, match=r"could not join the others at nowhere:1 \(DEADLINE_EXCEEDED\)"):
        distributed.join(DistributedConfig(coordinator="nowhere:1", processes=2, process=0), {})
    distributed.join(DistributedConfig(join="no", coordinator="nowhere:1", processes=2, process=0), {})
    distributed.join(DistributedConfig(), {})


# ---- processes that never come


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def gathering(port, processes, number, seconds=20.0):
    """A process that goes to the meeting in a thread; gives what it says, and how it ends."""
    said, ended = [], []

    def go():
        party = rendezvous.party_of(f"localhost:{port}", processes[number], number)
        try:
            rendezvous.meet(party, rendezvous.Patience(seconds, said.append))
            ended.append("met")
        except ValueError as error:
            ended.append(str(error))

    thread = threading.Thread(target=go)
    thread.start()
    return thread, said, ended


def gathered(*processes):
    for thread, _, _ in processes:
        thread.join(30)
    return [ended[0] for _, _, ended in processes]


def test_processes_meet_whichever_comes_first(monkeypatch):
    for order in ((0, 1, 2), (2, 1, 0)):
        port = free_port()
        assert gathered(*(gathering(port, [3] * 3, number) for number in order)) == ["met"] * 3


def test_a_process_that_never_comes_is_named_by_all(monkeypatch):
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.1)
    port = free_port()
    there = [gathering(port, [3] * 3, number, seconds) for number, seconds in ((0, 0.8), (1, 5.0))]
    first, other = gathered(*there)
    node = platform.node()
    assert f"waits for 1 of 3 processes: 2; there are 1 on {node}. Given up after 1 s" in first
    assert "process 0 has given up" in other
    assert "waits for 1 of 3 processes: 2;" in there[0][1][-1]
    (alone,) = gathered(gathering(free_port(), [3] * 3, 2, 0.3))
    assert "process 2 waits for process 0 at localhost:" in alone
    assert "Connection refused. Given up" in alone


def test_processes_that_disagree_are_told(monkeypatch):
    port = free_port()
    first, other = gathered(gathering(port, [2, 3, 3], 0), gathering(port, [2, 3, 3], 2))
    assert "process 2 on" in first
    assert "--distributed.processes 3, process 0 with 2" in first
    assert "--distributed.processes 2" in other
    port = free_port()
    twins = [gathering(port, [3] * 3, 1) for _ in range(2)]
    outcomes = gathered(gathering(port, [3] * 3, 0), *twins)
    assert "two processes say --distributed.process 1" in outcomes[0]
    assert "met" not in outcomes


def test_a_stranger_at_the_door_changes_nothing():
    port = free_port()
    first = gathering(port, [2] * 2, 0)
    time.sleep(0.2)
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert gathered(first, gathering(port, [2] * 2, 1)) == ["met"] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "localhost"}, "'localhost', need host:port"),
        ({"coordinator": "localhost:http"}, "need host:port"),
        ({"coordinator": "a:70000"}, "need host:port"),
        ({"processes": 0}, "--distributed.processes 0: need at least 1"),
        ({"process": 2}, "--distributed.process 2: need 0 to 1"),
        ({"process": -1}, "--distributed.process -1: need 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    given = {"coordinator": "localhost:1234", "processes": 2, "process": 0} | settings
    with pytest.raises(ValueError, match=message):
        distributed.join(DistributedConfig(**given), {})
