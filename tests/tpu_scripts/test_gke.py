"""GKE: the rendered JobSet, the calls of kubectl, and how pods agree on resuming."""

import shlex
import subprocess

import pytest
import yaml

RENDER = ["--topology", "v5e:4x4", "--image", "host/jaxsteer:1", "--bucket", "gs://mine/a/run1"]
TRAIN = ["configs/x.py", "--plan", 'lora(rank=4) @ attn.q "quoted" $(HOME) back\\slash', "--optim.lr", "3e-3"]


def manifest(stage, *words):
    stage.run("gke.sh", "render", *RENDER, *words)
    return yaml.safe_load(stage.out)


def pod_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_config_is_looked_for_and_the_topology_goes_by_any_name(stage):
    assert "no such config: configs/y.py" in stage.run("gke.sh", "render", *RENDER, "configs/y.py", ok=False)
    jobset = manifest(stage, "--topology", "v5litepod-16", *TRAIN)
    assert pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"


def test_the_manifest_has_what_gke_needs(stage):
    jobset = manifest(stage, "--max-restarts", "5", *TRAIN)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "pod"
    exclusive = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"

    slices = jobset["spec"]["replicatedJobs"][0]
    job, pod = slices["template"]["spec"], pod_of(jobset)
    assert slices["replicas"] == 1
    assert job["parallelism"] == job["completions"] == 4
    assert job["backoffLimit"] == 0
    assert {rule["action"] for rule in job["podFailurePolicy"]["rules"]} == {"FailJob"}
    assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    container = pod["containers"][0]
    assert container["image"] == "host/jaxsteer:1"
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    volume = pod["volumes"][0]["csi"]
    assert volume["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["volumeAttributes"]["bucketName"] == "mine"
    assert " " not in volume["volumeAttributes"]["mountOptions"]


def test_the_command_is_passed_on_exactly(stage):
    container = pod_of(manifest(stage, *TRAIN))["containers"][0]
    as_started = [word.replace("$$(", "$(") for word in container["command"]]  # as Kubernetes expands it
    assert as_started == ["bash", "tpu_scripts/worker.sh", "pod", "--out", "/bucket/a/run1", "--", *TRAIN]
    assert "$$(HOME)" in container["command"][8]


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
        ("v6e:8x8", "tpu-v6e-slice", 16, 4),
        ("v6e:2x4", "tpu-v6e-slice", 1, 8),
    ],
)
def test_other_topologies(stage, topology, accelerator, hosts, chips):
    jobset = manifest(stage, "--topology", topology, *TRAIN)
    assert jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == hosts
    assert pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    assert pod_of(jobset)["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_several_slices_on_spot_nodes(stage):
    jobset = manifest(stage, "--slices", "3", "--spot", *TRAIN)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    said = stage.run("gke.sh", "render", *RENDER, "--slices", "2", "--topology", "v6e:2x4", *TRAIN, ok=False)
    assert "joins only slices of several hosts" in said


def test_apply_watch_logs_delete(stage):
    said = stage.run("gke.sh", "apply", *RENDER, *TRAIN)
    assert "1 node pool(s) of 4 node(s), machine type ct5lp-hightpu-4t, topology 4x4" in said
    assert yaml.safe_load((stage.folder / "applied.yaml").read_text())["kind"] == "JobSet"
    stage.write("faults", {"conditions": ["", "StartupPolicyCompleted", "Completed"], "pods": {"pod-0": "Running"}})
    said = stage.run("gke.sh", "watch")
    assert "1 Running" in said
    assert "has finished" in said
    assert "the loss is nan" in stage.run("gke.sh", "logs", "--follow")
    stage.run("gke.sh", "delete")
    assert stage.calls()[-1] == ["kubectl", "delete", "jobset", "pod", "--namespace=default", "--ignore-not-found"]


def test_a_failed_pod_is_named(stage):
    stage.write("faults", {"conditions": ["Failed"], "pods": {"pod-slice-0-0": "Running", "pod-slice-0-1": "Failed"}})
    said = stage.run("gke.sh", "watch", ok=False)
    assert "pod-slice-0-1 failed" in said
    assert "pod-slice-0-0 failed" not in said
    assert "the loss is nan" in said


@pytest.mark.parametrize(
    "words", [["apply", *RENDER, *TRAIN], ["watch"], ["logs"], ["delete"]], ids=lambda words: words[0]
)
def test_a_dry_run_calls_nothing(stage, words):
    stage.run("gke.sh", words[0], "--dry-run", *words[1:])
    assert stage.out.startswith("kubectl ")
    assert not stage.calls()
    if words[0] == "apply":  # the printed command can be pasted
        subprocess.run(["bash", "-c", stage.out], env=stage.env, check=True)
        assert yaml.safe_load((stage.folder / "applied.yaml").read_text())["kind"] == "JobSet"
    else:
        subprocess.run([*shlex.split(stage.out)[:1], "--help"], env=stage.env, check=False)


def test_pods_agree_on_resuming_and_ask_to_be_restarted(stage):
    """Pod 0 decides and the others wait for it; a stopped run exits with 75, a finished one with 0."""
    out = stage.folder / "bucket" / "run"
    python = str(stage.folder / "worker_bin" / "python3")
    both = {"PYTHON": python, "RUN_TOKEN": "7", "JOB_INDEX": "0"}

    def pod(index, attempt, ok=True):
        name = {"HOSTNAME": f"pod-w-{index}", "WORKER": str(index)}
        return stage.run(
            *("worker.sh", "pod", "--out", str(out), "--", "configs/x.py"),
            ok=ok,
            **both | name | {"RESTART_ATTEMPT": str(attempt), "JOB_COMPLETION_INDEX": str(index)},
        )

    (stage.folder / "stop").touch()  # as after SIGTERM
    for number in range(2):
        pod(number, 0, ok=False)
        assert stage.status == 75
    (stage.folder / "stop").unlink()
    pod(0, 1)
    pod(1, 1)
    trained = (stage.folder / "trained").read_text().splitlines()
    assert ["--resume" in line for line in trained] == [False, False, True, True]
