"""Stand-ins for gcloud, kubectl, srun, scontrol and a worker's Python.

They reject what the real programs do not accept, log every call, and fail when a test asks them to. A worker is a
folder that serves as its home: what is sent over ssh runs there, so quoting and worker.sh are really tested.

Run as a program under the name of the one it replaces; $STAND_IN is the folder of the play, and faults.json in it lists
the faults to inject.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# From the Google Cloud SDK 528, `gcloud COMMAND --help`, and `gcloud help` for the flags of all commands.
EVERYWHERE = {"project", "quiet", "format", "verbosity", "account", "configuration"}
SSH = {"zone", "worker", "command", "output-directory", "internal-ip", "ssh-flag", "ssh-key-file", "plain", "dry-run"}
GCLOUD = {
    "compute tpus queued-resources create": {
        *("zone", "accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "spot", "reserved"),
        *("valid-until-duration", "valid-until-time", "network", "subnetwork", "service-account", "scopes", "async"),
        *("internal-ips", "labels", "metadata", "tags", "data-disk", "description", "type", "topology", "guaranteed"),
    },
    "compute tpus queued-resources describe": {"zone"},
    "compute tpus queued-resources delete": {"zone", "force", "async"},
    "compute tpus tpu-vm ssh": SSH,
    "compute tpus tpu-vm scp": (SSH - {"command", "output-directory", "ssh-flag"})
    | {"recurse", "compress", "scp-flag"},
    "compute tpus tpu-vm describe": {"zone"},
    "storage rsync": {"recursive", "exclude", "continue-on-error", "checksums-only", "no-clobber", "dry-run"},
    "storage ls": {"recursive", "long", "json"},
    "storage cat": {"range"},
    "storage cp": {"recursive", "no-clobber", "continue-on-error"},
}
# https://cloud.google.com/tpu/docs/v5e, v6e, v5p, v4 and runtimes
TYPES = {
    *(f"{kind}-{n}" for kind in ("v5litepod", "v6e") for n in (1, 4, 8, 16, 32, 64, 128, 256)),
    *(f"{kind}-{2**n}" for kind in ("v5p", "v4") for n in range(3, 12)),
}
RUNTIMES = {"v2-alpha-tpuv5-lite", "v2-alpha-tpuv5", "v2-alpha-tpuv6e", "tpu-ubuntu2204-base"}

# `kubectl COMMAND --help` and `kubectl options`
KUBECTL = {
    "apply": {"filename", "namespace", "dry-run"},
    "get": {"namespace", "output", "selector", "ignore-not-found"},
    "logs": {"namespace", "selector", "container", "prefix", "tail", "follow", "max-log-requests"},
    "delete": {"namespace", "ignore-not-found", "wait", "timeout"},
}
SWITCHES = {"quiet", "spot", "force", "async", "recursive", "continue-on-error", "prefix", "follow", "ignore-not-found"}


class Rejected(Exception):
    """A call that the real program would not accept."""


def parse(program, argv):
    """(command, positional words, flags) of a call; raises Rejected if the command or a flag does not exist."""
    table = GCLOUD if program == "gcloud" else KUBECTL
    known = EVERYWHERE if program == "gcloud" else set()
    command = next((name for name in table if argv[: name.count(" ") + 1] == name.split()), None)
    if command is None:
        raise Rejected(f"Invalid choice: {' '.join(argv[:4])}")
    words, flags = [], {}
    for word in argv[command.count(" ") + 1 :]:
        if not word.startswith("--"):
            words.append(word)
            continue
        name, given, value = word[2:].partition("=")
        if name not in table[command] | known:
            raise Rejected(f"unrecognized arguments: {word}")
        if bool(given) == (name in SWITCHES):
            raise Rejected(f"argument --{name}: {'takes no' if given else 'expected one'} value")
        flags[name] = value
    if "zone" in table[command] and not flags.get("zone"):
        raise Rejected("The required property [zone] is not set")
    if command.endswith("create"):
        if flags.get("accelerator-type") not in TYPES or flags.get("runtime-version") not in RUNTIMES:
            raise Rejected(f"INVALID_ARGUMENT: {flags.get('accelerator-type')}, {flags.get('runtime-version')}")
        if ("node-id" in flags) == ("node-count" in flags) or int(flags.get("node-count", 2)) < 2:
            raise Rejected("Exactly one of --node-id and --node-count (above 1) must be specified")
    if command.endswith("tpu-vm ssh") and "command" not in flags:
        raise Rejected("this would open a shell")
    return command, words, flags


class Play:
    """The state in $STAND_IN: workers, buckets, the calls so far, and faults to inject."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def read(self, name, default):
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else default

    def write(self, name, value):
        (self.folder / f"{name}.json").write_text(json.dumps(value))

    def calls(self):
        """Every call so far: the program's name and its words, in order."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def home(self, node, worker):
        return self.folder / "nodes" / node / str(worker)

    def bucket(self, url):
        return self.folder / "buckets" / url.removeprefix("gs://")

    def end_workers(self, under="nodes"):
        """Kill what still runs on the workers, as a power cut would."""
        mark = f"HOME={self.folder / under}/".encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                    os.kill(int(entry.parent.name), 9)
            except OSError:
                continue

    # ---- gcloud

    def fault(self, name):
        """Take a fault, so that it happens only once; None if there is none."""
        faults = self.read("faults", {})
        fault = faults.pop(name, None)
        if fault is not None:
            self.write("faults", faults)
        return fault

    def gcloud(self, argv):
        command, words, flags = parse("gcloud", argv)
        verb = command.split()[-1]
        if command.startswith("storage"):
            return self.storage(verb, words, flags)
        if "queued-resources" in command:
            return self.queue(verb, words[0], flags)
        return self.node(verb, words, flags)

    def queue(self, verb, name, flags):
        queue = self.read("queue", {})
        if verb == "create":
            if error := self.fault("create"):
                return error, 1
            if name in queue:
                return f"ERROR: ALREADY_EXISTS: {name} already exists", 1
            count = int(flags.get("node-count", 1))
            nodes = [flags["node-id"]] if count == 1 else [f"{flags['node-prefix']}-{n}" for n in range(count)]
            states = self.fault("states") or ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
            queue[name] = {"states": states, "nodes": nodes}
            for node in nodes:
                for worker in range(2):
                    self.home(node, worker).mkdir(parents=True)
        elif name not in queue:
            return f"ERROR: NOT_FOUND: Resource 'queuedResources/{name}' was not found", 1
        elif verb == "delete":
            self.end_workers()
            for node in queue.pop(name)["nodes"]:
                shutil.rmtree(self.folder / "nodes" / node)
        elif flags["format"] == "value(state.failedData.error.message)":
            print(self.read("faults", {}).get("reason", ""))
        else:
            assert flags["format"] == "value(state.state)"
            states = queue[name]["states"]
            print(states.pop(0) if len(states) > 1 else states[0])
        self.write("queue", queue)
        return None, 0

    def take_away(self):
        """A preemption: the machines are off, and the next query of the request says so."""
        self.end_workers()
        (self.folder / "hold").unlink(missing_ok=True)
        queue = self.read("queue", {})
        for each in queue.values():
            each["states"] = ["SUSPENDED"]
        self.write("queue", queue)

    def node(self, verb, words, flags):
        node = words[-1].partition(":")[0] if verb == "scp" else words[0]
        here = next((each for each in self.read("queue", {}).values() if node in each["nodes"]), None)
        if here is None:
            return f"ERROR: NOT_FOUND: {node}", 1
        if verb == "describe":
            print("READY" if here["states"][-1] == "ACTIVE" else "PREEMPTED")
            return None, 0
        if here["states"][-1] != "ACTIVE":
            return f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) TPU {node} is in state PREEMPTED", 1
        workers = range(2) if flags.get("worker") == "all" else [int(flags.get("worker", 0))]
        if verb == "scp":
            for worker in workers:
                shutil.copy(words[0], self.home(node, worker) / words[1].partition(":")[2])
            return None, 0
        return self.ssh(node, workers, flags)

    def ssh(self, node, workers, flags):
        faults = self.read("faults", {})
        when = faults.get("preempt")
        if when and when["at"] in flags["command"] and (self.folder / when.get("once", "")).exists():
            self.fault("preempt")
            self.take_away()
            return "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].", 255
        status = 0
        for worker in workers:
            code = self.on_worker(node, worker, flags, faults.get("worker", {}))
            if code and len(workers) > 1:
                print(f"##### Command execution on worker {worker} failed with exit status {code}. Continuing.")
            status = status or code
        return None, status

    def on_worker(self, node, worker, flags, bad):
        if bad.get("at", "\n") in flags["command"] and (node, worker) == (bad["node"], bad["worker"]):
            print("error: No space left on device", file=sys.stderr)
            return bad["status"]
        home = self.home(node, worker)
        path = f"{self.folder / 'worker_bin'}:{os.environ['PATH']}"
        machine = {"HOME": str(home), "HOSTNAME": f"{node}-w-{worker}", "PATH": path, "WORKER": str(worker)}
        out = None
        if "output-directory" in flags:
            out = (Path(flags["output-directory"]) / f"{worker}.log").open("w")
        return subprocess.run(
            ["bash", "-c", flags["command"]], cwd=home, env=os.environ | machine, stdout=out
        ).returncode

    # ---- gcloud storage

    def storage(self, verb, words, flags):
        if error := self.read("faults", {}).get("storage"):
            return error, 1
        here = [self.bucket(word) if word.startswith("gs://") else Path(word) for word in words]
        if not here[0].exists():
            return f"ERROR: (gcloud.storage.{verb}) One or more URLs matched no objects.", 1
        if verb == "cat":
            print(here[0].read_text(), end="")
        elif verb == "cp":
            here[1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(*here)
        elif verb == "rsync":
            for path in here[0].rglob("*"):
                name = path.relative_to(here[0])
                if path.is_file() and not re.match(flags.get("exclude", r"\n"), str(name)):
                    (here[1] / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, here[1] / name)
        return None, 0

    # ---- kubectl

    def kubectl(self, argv):
        command, words, flags = parse("kubectl", argv)
        faults = self.read("faults", {})
        if command == "apply":
            (self.folder / "applied.yaml").write_text(sys.stdin.read())
        elif command == "get" and words[0] == "pods":
            print("\n".join(f"{name} {phase}" for name, phase in faults.get("pods", {}).items()))
        elif command == "get" and "conditions" in flags["output"]:
            conditions = faults["conditions"]
            print(conditions.pop(0) if len(conditions) > 1 else conditions[0])
            self.write("faults", faults)
        elif command == "get":
            print(faults.get("restarts", 0))
        elif command == "logs":
            print("error: the loss is nan")
        return None, 0

    # ---- SLURM: one task; the rest of a job is not simulated

    def srun(self, argv):
        known = r"--(kill-on-bad-exit|gpu-bind|open-mode|output|cpus-per-task)="
        words = [word for word in argv if not re.match(known, word)]
        log = Path(next(word for word in argv if word.startswith("--output=")).partition("=")[2])
        if words[0].startswith("-") or not log.parent.is_dir():
            raise Rejected(f"srun: {words[0]}, {log}")
        return None, subprocess.run(words).returncode

    def scontrol(self, argv):
        if argv[0] != "requeue":
            raise Rejected(f"scontrol: {argv}")
        return None, 0


# A worker's Python. It creates environments with copies of itself, installs nothing, and trains one step at a time:
# process 0 writes checkpoints, and continues as long as there is a file `hold`.
PYTHON = r"""#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit ;;
  "-m pip") echo "$*" >>"$HOME/pip"; exit ;;
  "-c "*) exit ;;
esac
shift 3
printf '%s\n' "$(printf '%q ' "$@")" >>"$STAND_IN/trained"  # in one piece: all workers write there
out= resume= stopped=
while (($#)); do
  case $1 in --out) out=$2 ;; --resume) resume=1 ;; esac
  shift
done
env | grep '^HF_TOKEN=' >"$HOME/saw"
trap 'stopped=1' TERM
if [[ ${WORKER:-0} == 0 && ${HOSTNAME%-w-0} != *-1 ]]; then
  [[ -z $resume || -e $out/config.json ]] || { echo "error: no run to resume" >&2; exit 1; }
  [[ $resume || ! -e $out/config.json ]] || { echo "error: holds this run already" >&2; exit 1; }
  mkdir -p "$out/checkpoints"
  last=$(cd "$out/checkpoints"; printf '%s\n' 0 [0-9]* | grep -v '[^0-9]' | sort -n | tail -n 1)
  echo '{"seed": 0}' >"$out/config.json"
  save() { mkdir -p "$out/checkpoints/$1"; echo "weights $1" >"$out/checkpoints/$1/data"; }
  save $((last + 1))
  mkdir -p "$out/checkpoints/$((last + 2)).orbax-checkpoint-tmp-1"
  echo half >"$out/checkpoints/$((last + 2)).orbax-checkpoint-tmp-1/data"
  echo "{\"step\": $((last + 1))}" >>"$out/metrics.jsonl"
fi
echo "trained"
while [[ -e $STAND_IN/hold && ! $stopped ]]; do sleep 0.05; done
[[ ! -e $STAND_IN/crash ]] || { echo "error: the loss is nan" >&2; exit 1; }
if [[ $stopped || -e $STAND_IN/stop ]]; then
  [[ ! $last ]] || save $((last + 2))
  exit 75
fi
[[ ! $last ]] || echo '{}' >"$out/summary.json"
"""


def main():
    program = Path(sys.argv[0]).name
    play = Play(os.environ["STAND_IN"])
    with (play.folder / "calls.jsonl").open("a") as log:
        log.write(json.dumps([program, *sys.argv[1:]]) + "\n")
    try:
        error, status = getattr(play, program)(sys.argv[1:])
    except Rejected as rejected:
        error, status = f"ERROR: ({program}) REJECTED {rejected}", 2
    if error:
        print(error, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
