"""SLURM: the directives, and what the script does at the first start, a restart and the end."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = ["configs/x.py", "--plan", "nonlinear(rank=8) @ block"]


def start(stage, *words, **env):
    job = {"SLURM_SUBMIT_DIR": str(stage.folder), "SLURM_JOB_ID": "42", "HOSTNAME": "node-w-0", "WORKER": "0"}
    job["PYTHON"] = str(stage.folder / "worker_bin" / "python3")
    return stage.run("slurm.sh", "--out", "runs/a", *words, *TRAIN, **job | env)


def srun(stage):
    return [call[1:] for call in stage.calls() if call[0] == "srun"]


def test_directives(checkout):
    text = (checkout / "tpu_scripts" / "slurm.sh").read_text()
    head = text.partition("set -euo pipefail")[0]
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", head, re.MULTILINE))
    assert given["signal"] == "TERM@300"  # to the tasks, not to the script: no B:
    assert {"requeue", "nodes", "time", "output"} <= set(given)
    assert given["open-mode"] == "append"
    assert given["nodes"] == given["ntasks-per-node"] == "1"
    assert "gpus-per-task" not in given


def test_a_run_that_finishes(stage):
    assert "finished: runs/a" in start(stage, SLURM_CPUS_PER_TASK="4")
    (call,) = srun(stage)
    assert "--cpus-per-task=4" in call
    assert "--output=runs/a.logs/%j-%t.log" in call
    assert call[call.index("-m") :] == ["-m", "train.sft", *TRAIN, "--out", "runs/a"]
    assert not [call for call in stage.calls() if call[0] == "scontrol"]


def test_a_stopped_run_is_requeued_and_resumes(stage):
    (stage.folder / "stop").touch()  # as after SIGTERM
    assert "requeued" in start(stage)
    assert stage.calls()[-1] == ["scontrol", "requeue", "42"]
    (stage.folder / "stop").unlink()
    assert "finished" in start(stage, SLURM_RESTART_COUNT="1")
    assert [("--resume" in call) for call in srun(stage)] == [False, True]


def test_a_failed_run_is_not_requeued(stage):
    (stage.folder / "crash").touch()
    stage.run(
        *("slurm.sh", "--out", "runs/a", *TRAIN),
        ok=False,
        SLURM_SUBMIT_DIR=str(stage.folder),
        PYTHON=str(stage.folder / "worker_bin" / "python3"),
    )
    assert "srun exited with status 1" in stage.err
    assert stage.calls()[-1][0] == "srun"


def test_several_tasks_get_one_command(stage):
    start(stage, SLURM_NTASKS="16", SLURM_NTASKS_PER_NODE="8", SLURM_GPUS_ON_NODE="8")
    (call,) = srun(stage)
    assert call[call.index("-m") :] == ["-m", "train.sft", *TRAIN, "--out", "runs/a"]


def test_a_dry_run_prints_the_command(stage):
    start(stage, "--dry-run")
    words = shlex.split(stage.out)
    assert words[0] == "srun"
    assert words[words.index("-m") :] == ["-m", "train.sft", *TRAIN, "--out", "runs/a"]
    assert not stage.calls()


def test_config_and_options_are_read_before_a_task_starts(stage, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "${{@:3}}" >{tmp_path}/seen; echo "error: --optim.lrr" >&2; exit 1\n'
    )
    python.chmod(0o755)
    words = ["slurm.sh", "--out", "runs/a", "configs/x.py", "--optim.lrr", "1e-3"]
    said = stage.run(*words, ok=False, PYTHON=str(python))
    assert "train.sft does not accept: configs/x.py --optim.lrr 1e-3" in said
    assert "error: --optim.lrr" in said
    assert (tmp_path / "seen").read_text().splitlines() == words[3:]
    assert "no such program: nowhere/python" in stage.run(*words, ok=False, PYTHON="nowhere/python")
    assert not stage.calls()
    assert not (stage.folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["listops_smollm2", "--optim.lr", "1e-3"], None),
        (["listops_smollm2", "--optim.lrr", "1e-3"], "--optim.lrr"),
        (["configs/absent.py"], "configs/absent.py: no such config file"),
    ],
)
def test_the_options_are_those_of_the_training(words, complaint):
    """With this repository's own programs."""
    done = subprocess.run(
        ["bash", "tpu_scripts/slurm.sh", "--dry-run", "--out", "runs/a", *words],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (complaint is None), done.stderr
    assert (complaint or "") in done.stderr


def test_jax_finds_the_tasks(monkeypatch):
    """JAX reads the variables that srun sets: task 13 of 16 takes the GPU with its local index."""
    from jax._src.clusters import ClusterEnv

    task = {"SLURM_JOB_ID": "42", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NTASKS": "16"}
    for name, value in (task | {"SLURM_PROCID": "13", "SLURM_LOCALID": "5"}).items():
        monkeypatch.setenv(name, value)
    address, count, process, gpus = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, "slurm", 10)
    assert address.startswith("gpu03:")
    assert (count, process, gpus) == (16, 13, [5])
