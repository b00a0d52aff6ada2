"""TPU VMs: create, set up, launch, resume, delete, against a gcloud that rejects what the real one does not accept."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in

BUCKET = "gs://mine/run1"
CREATE = ["--topology", "v5e:4x4"]
RUN = ["--bucket", BUCKET, "--upload-every", "0.1"]
TRAIN = ["configs/x.py", "--optim.lr", "3e-3", "--plan", "nonlinear(rank=8) @ block"]
TABLE = [
    line.split()
    for line in (Path(__file__).parents[2] / "tpu_scripts" / "topologies.txt").read_text().splitlines()
    if not line.startswith("#")
]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def settle(stage, name=".jaxsteer/exit", workers=2):
    """Wait until a file exists on `workers` workers; by default the one with the training's exit status."""
    for _ in range(1000):
        if len(list((stage.folder / "nodes").glob(f"*/*/{name}"))) == workers:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {name}")


# ---- the table


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_topologies_are_sold_under_documented_names(row):
    topology, sold, runtime, chips, hosts, accelerator, machine = row
    kind, _, shape = topology.partition(":")
    count = 1
    for side in shape.split("x"):
        count *= int(side)
    assert int(chips) == count
    assert int(sold.split("-")[-1]) == count * (2 if kind in ("v5p", "v4") else 1)
    assert int(machine.removesuffix("t").split("-")[-1]) * int(hosts) == count
    assert sold in stand_in.TYPES
    assert runtime in stand_in.RUNTIMES
    assert (
        accelerator
        == {
            "v5e": "tpu-v5-lite-podslice",
            "v5p": "tpu-v5p-slice",
            "v6e": "tpu-v6e-slice",
            "v4": "tpu-v4-podslice",
        }[kind]
    )


@pytest.mark.parametrize(
    ("topology", "sold", "chips"),
    [("v5e:4x4", "v5litepod-16", 16), ("v5p:4x4x4", "v5p-128", 64), ("v6e:4x4", "v6e-16", 16), ("v4:2x2x1", "v4-8", 4)],
)
def test_both_names_are_printed(stage, topology, sold, chips):
    said = stage.run("create.sh", "--topology", topology, "--dry-run")
    assert f"{topology} is sold as {sold}: {chips} chips" in said
    assert f"--accelerator-type={sold} " in stage.out


@pytest.mark.parametrize("name", ["v5litepod-16", "v5e-16", "V5E:4x4", "v5lite-16"])
def test_every_name_of_a_topology_is_known(stage, name):
    assert "v5e:4x4 is sold as v5litepod-16" in stage.run("create.sh", "--topology", name, "--dry-run")


def test_a_config_of_another_repository_is_not_looked_for(stage):
    stage.run("launch.sh", "--dry-run", *RUN, "configs/theirs.py", POD_REPO="https://host/theirs.git")


def test_options_are_read_before_anything_is_called(stage, tmp_path):
    """By this machine's python, from the root of the checkout; a shipped config may go by its name."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\npwd >{tmp_path}/seen; printf "%s\\n" "${{@:3}}" >>{tmp_path}/seen\n'
        'echo "error: --optim.lrr" >&2; exit 1\n'
    )
    python.chmod(0o755)
    said = stage.run("launch.sh", "x", "--optim.lrr", "1e-3", ok=False, PYTHON=str(python))
    assert "train.sft does not accept: x --optim.lrr 1e-3" in said
    assert "error: --optim.lrr" in said
    assert (tmp_path / "seen").read_text().splitlines() == [str(stage.checkout), "x", "--optim.lrr", "1e-3"]
    assert not stage.calls()


@pytest.mark.slow
@pytest.mark.parametrize(("option", "accepted"), [("--optim.lr", True), ("--optim.lrr", False)])
def test_the_options_are_those_of_the_training(option, accepted):
    """With this repository's own programs."""
    script = ["bash", "tpu_scripts/launch.sh", "--dry-run", "--name", "pod", "--zone", "z", "listops_smollm2"]
    done = subprocess.run(
        [*script, option, "1e-3"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == accepted, done.stderr
    assert accepted or "--optim.lrr" in done.stderr


def test_an_unknown_topology_lists_the_known(stage):
    said = stage.run("create.sh", "--topology", "v5e:3x3", ok=False)
    assert "unknown topology 'v5e:3x3'" in said
    assert all(row[0] in said for row in TABLE)
    assert not stage.calls()


# ---- dry runs

DRY_RUNS = {
    "create": ["create.sh", *CREATE, "--spot", "--slices=2", "--", "--network=n 1"],
    "setup": ["setup.sh"],
    "setup-repo": ["setup.sh", "--repo", "https://host/a b.git", "--mount", "gs://mine"],
    "launch": ["launch.sh", *RUN, *TRAIN],
    "status": ["status.sh"],
    "logs": ["logs.sh", "--worker", "3", "--follow"],
    "logs-save": ["logs.sh", "--save", "a folder"],
    "stop": ["stop.sh"],
    "sync-up": ["sync.sh", "--bucket", BUCKET, "up"],
    "sync-down": ["sync.sh", "--bucket", BUCKET, "down"],
    "sync-fetch": ["sync.sh", "--bucket", BUCKET, "fetch", "runs/a b"],
    "delete": ["delete.sh", "--bucket", BUCKET],
    "resume": ["resume.sh", *CREATE, *RUN, "--slices", "2", "--then-delete", *TRAIN],
}


@pytest.mark.parametrize("words", DRY_RUNS.values(), ids=DRY_RUNS)
def test_a_dry_run_prints_commands_that_gcloud_has_and_calls_nothing(stage, words):
    script, *flags = words
    stage.run(script, "--dry-run", *flags)
    commands = [shlex.split(line) for line in stage.out.splitlines()]
    assert commands
    assert {command[0] for command in commands} <= {"gcloud", "git", "rm", "mkdir"}
    for command in commands:
        if command[0] == "gcloud":
            stand_in.parse("gcloud", command[1:])
    assert not stage.calls()


def test_a_dry_run_is_quoted_exactly(stage):
    """The printed commands are exactly the commands that run."""
    launch = ["launch.sh", *RUN, *TRAIN, "--seed", "it's 'odd' $HOME `x` \\ *"]
    stage.ready()
    before = len(stage.calls())
    stage.run(launch[0], "--dry-run", *launch[1:])
    printed = [shlex.split(line) for line in stage.out.splitlines()]
    stage.run(*launch)
    done = [call for call in stage.calls()[before:] if call[1] == "compute"]
    assert printed == done
    settle(stage)
    assert "it\\'s\\ \\'odd\\'\\ \\$HOME\\ \\`x\\`\\ \\\\\\ \\*" in (stage.folder / "trained").read_text()


# ---- end to end


def test_create_setup_launch_delete(stage):
    said = stage.run("create.sh", *CREATE, "--spot")
    assert "WAITING_FOR_RESOURCES" in said
    assert "pod is ready" in said
    assert stage.calls()[0][4:] == [
        *("create", "pod", "--zone=us-west4-a", "--accelerator-type=v5litepod-16"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--node-id=pod", "--spot"),
    ]
    stage.run("setup.sh")
    for worker in range(2):
        assert "--editable .[train,tpu]" in (stage.home("pod", worker) / "pip").read_text()
    stage.run("launch.sh", *RUN, *TRAIN)
    settle(stage)
    assert "pod-w-0 finished" in stage.run("status.sh")
    trained = (stage.folder / "trained").read_text().splitlines()
    assert len(trained) == 2
    assert all(line.startswith(shlex.join(TRAIN[:3])) and "--resume" not in line for line in trained)
    assert all("--distributed.join yes" in line for line in trained)  # the workers form one run
    assert "trained" in stage.run("logs.sh")
    assert stage.run("logs.sh", "--worker", "all").count("trained") == 2
    stage.run("logs.sh", "--save", "logs")
    assert "trained" in (stage.folder / "logs" / "pod" / "1.log").read_text()

    stage.run("delete.sh", "--bucket", BUCKET)
    assert stage.verbs() == [
        *("create", "scp", "ssh install", "ssh restore", "ssh begun", "ssh start", "ssh upload"),
        *("ssh status", "ssh log", "ssh stop", "ssh upload", "delete"),
    ]
    bucket = stage.bucket(BUCKET)
    assert checkpoints(bucket) == ["1"]  # nothing half written
    assert (bucket / "summary.json").exists()
    assert "trained" in (bucket / "logs" / "pod-w-0.log").read_text()
    assert not stage.read("queue", {})

    stage.run("sync.sh", "--bucket", BUCKET, "fetch", "here")
    assert (stage.folder / "here" / "checkpoints" / "1" / "data").read_text() == "weights 1\n"


def test_several_slices(stage):
    stage.run("create.sh", *CREATE, "--slices", "2")
    assert {"--node-count=2", "--node-prefix=pod"} <= set(stage.calls()[0])
    stage.run("setup.sh", "--slices", "2")
    stage.run("launch.sh", "--slices", "2", *TRAIN)
    settle(stage, workers=4)
    assert len((stage.folder / "trained").read_text().splitlines()) == 4
    assert (stage.home("pod-1", 1) / "pip").exists()


def test_several_hosts_are_advised_to_share_a_folder(stage):
    assert "note: runs/sft is on each worker's own disk" in stage.run("launch.sh", "--dry-run", *CREATE, *TRAIN)
    assert "note" not in stage.run("launch.sh", "--dry-run", *CREATE, "--out", "~/bucket/a", *TRAIN)


# ---- errors


def test_a_quota_error_is_explained(stage):
    limit = "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a."
    stage.write(
        "faults", {"create": f"ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: {limit}"}
    )
    said = stage.run("create.sh", *CREATE, ok=False)
    assert stage.status == 1
    assert limit in said
    assert "quota is too small" in said
    assert "console.cloud.google.com/iam-admin/quotas" in said
    assert "nothing is billed" in said


def test_a_late_quota_error_ends_resume_too(stage):
    stage.write("faults", {"states": ["FAILED"], "reason": "Quota limit 'X' has been exceeded."})
    said = stage.run("resume.sh", *CREATE, *RUN, *TRAIN, ok=False)
    assert "quota is too small" in said
    assert stage.verbs() == ["create"]


def test_no_capacity_suggests_trying_again(stage):
    stage.write("faults", {"states": ["FAILED"], "reason": 'There is no more capacity in the zone "us-west4-a"'})
    assert "no free capacity" in stage.run("create.sh", *CREATE, ok=False)
    assert stage.status == 3


def test_a_failing_worker_is_named(stage):
    stage.run("create.sh", *CREATE, "--slices", "2")
    stage.write("faults", {"worker": {"at": "install", "node": "pod-1", "worker": 1, "status": 7}})
    said = stage.run("setup.sh", "--slices", "2", ok=False)
    assert "setting up failed: pod-1 worker 1, exit status 7" in said
    assert "No space left on device" in said
    assert "pod-0 worker" not in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["launch.sh", *RUN], "no CONFIG given"),
        (["launch.sh", *RUN, "configs/y.py"], "no such config: configs/y.py"),
        (["resume.sh", *CREATE, *RUN, "configs/y.py"], "no such config: configs/y.py"),
        (["resume.sh", "--topology", "v5e:4x5", *RUN, *TRAIN], "unknown topology 'v5e:4x5'"),
        (["launch.sh", *TRAIN, "--resume"], "an existing run is resumed"),
        (["launch.sh", "--bucket", "mine", *TRAIN], "gs://BUCKET/FOLDER"),
        (["create.sh", "--name", "My_Pod", *CREATE], "lowercase letters"),
        (["create.sh", "--topologie", "v5e:4x4"], "unknown flag --topologie"),
        (["create.sh", "--slices", "0", *CREATE], "whole number"),
        (["resume.sh", *CREATE, *TRAIN], "a preempted TPU would take runs/sft with it"),
        (["launch.sh", *RUN, "--out", "~/bucket/run1", *TRAIN], "already in a bucket"),
        (["sync.sh", "--bucket", BUCKET, "sideways"], "give up, down"),
    ],
)
def test_mistakes_are_caught_before_anything_is_called(stage, words, complaint):
    assert complaint in stage.run(*words, ok=False)
    assert not stage.calls()


# ---- nothing is lost


def test_delete_requires_the_run_to_be_saved_first(stage):
    stage.ready()
    assert "--discard if it may be lost" in stage.run("delete.sh", ok=False)
    stage.write("faults", {"worker": {"at": "upload", "node": "pod", "worker": 0, "status": 1}})
    assert "was not copied" in stage.run("delete.sh", "--bucket", BUCKET, ok=False)
    assert "delete" not in stage.verbs()
    stage.run("delete.sh", "--discard")
    assert stage.verbs()[-1] == "delete"


def test_delete_stops_the_training_so_that_it_saves(stage):
    (stage.folder / "hold").touch()
    stage.ready()
    stage.run("launch.sh", *TRAIN)  # without a bucket
    settle(stage, "jaxsteer/runs/sft/metrics.jsonl", workers=1)
    assert "pod-w-0 running step 1" in stage.run("status.sh")
    stage.run("delete.sh", "--bucket", BUCKET)
    assert checkpoints(stage.bucket(BUCKET)) == ["1", "2"]


def test_another_run_in_the_bucket_is_left_alone(stage):
    stage.ready()
    stage.run("launch.sh", *TRAIN)
    settle(stage)
    other = stage.bucket(BUCKET)
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"seed": 1}\n')
    assert "holds a run with other settings" in stage.run("sync.sh", "--bucket", BUCKET, "up", ok=False)
    assert [path.name for path in other.iterdir()] == ["config.json"]


def test_a_bucket_that_cannot_be_read_is_not_an_empty_one(stage):
    """Otherwise a new run would start beside its own checkpoints."""
    stage.ready()
    stage.write("faults", {"storage": "ERROR: (gcloud.storage.ls) HTTPError 403: no storage.objects.list access"})
    said = stage.run("launch.sh", *RUN, *TRAIN, ok=False)
    assert "nothing was started" in said
    assert "HTTPError 403" in said
    assert "ssh start" not in stage.verbs()


def test_settings_for_the_training_are_never_shown(stage):
    (stage.folder / "secrets").write_text("HF_TOKEN=hf_very_secret\n")
    stage.run("create.sh", *CREATE)
    said = stage.run("setup.sh", "--env-file", "secrets") + stage.run("launch.sh", *TRAIN)
    settle(stage)
    said += stage.run("logs.sh")
    assert "hf_very_secret" not in said + str(stage.calls())
    assert (stage.home("pod", 1) / "saw").read_text() == "HF_TOKEN=hf_very_secret\n"
    assert (stage.home("pod", 1) / ".jaxsteer").stat().st_mode & 0o077 == 0


# ---- preemptions


def test_preempted_while_launching(stage):
    stage.write("faults", {"preempt": {"at": "worker.sh start"}})
    said = stage.run("resume.sh", *CREATE, "--spot", *RUN, "--then-delete", *TRAIN, POD_POLL="0.05")
    assert "pod was preempted (preemption 1)" in said
    assert "The training has finished" in said
    once = ["create", "scp", "ssh install", "ssh restore", "ssh begun", "ssh start"]
    assert [verb for verb in stage.verbs() if verb not in ("ssh status", "ssh upload", "ssh stop")] == [
        *(*once, "delete"),
        *(*once, "delete"),
    ]
    assert (stage.bucket(BUCKET) / "summary.json").exists()


def test_preempted_while_training_resumes_from_the_checkpoint(stage):
    """The machines and their disks are gone; the second pass restores the first one's checkpoint and gets --resume."""
    (stage.folder / "hold").touch()  # until the preemption
    stage.write("faults", {"preempt": {"at": "worker.sh status", "once": "buckets/mine/run1/checkpoints/1/data"}})
    said = stage.run("resume.sh", *CREATE, *RUN, *TRAIN, POD_POLL="0.05")
    assert "preemption 1" in said
    assert "Resuming the run" in said
    trained = (stage.folder / "trained").read_text().splitlines()
    assert ["--resume" in line for line in trained] == [False, False, True, True]
    assert checkpoints(stage.bucket(BUCKET)) == ["1", "2"]
    assert (stage.bucket(BUCKET) / "checkpoints" / "1" / "data").read_text() == "weights 1\n"


def test_a_training_that_fails_is_not_retried_forever(stage):
    (stage.folder / "crash").touch()
    said = stage.run("resume.sh", *CREATE, *RUN, "--retries", "1", *TRAIN, ok=False, POD_POLL="0.05")
    assert "giving up: the training failed on pod-w-0 pod-w-1" in said
    assert "error: the loss is nan" in said
    assert stage.verbs().count("ssh start") == 2
    assert "delete" not in stage.verbs()  # left to be inspected
