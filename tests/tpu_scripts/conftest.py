"""A stage for the scripts: stand-ins first on PATH, a small checkout, none of this machine's own settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "tpu_scripts"

sys.path.insert(0, str(HERE))
import stand_in  # noqa: E402


class Stage(stand_in.Play):
    """The play, and a checkout whose scripts run."""

    def __init__(self, folder, checkout):
        super().__init__(folder / "play")
        self.checkout = checkout
        self.folder.mkdir()
        bin_, worker_bin = self.folder / "bin", self.folder / "worker_bin"
        bin_.mkdir()
        worker_bin.mkdir()
        program = (
            f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(HERE)!r})\nimport stand_in\nstand_in.main()\n"
        )
        for path, text in [
            *((bin_ / name, program) for name in ("gcloud", "kubectl", "srun", "scontrol")),
            *((worker_bin / name, stand_in.PYTHON) for name in ("python3.13", "python3")),
        ]:
            path.write_text(text)
            path.chmod(0o755)
        (self.folder / "home" / "me").mkdir(parents=True)
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("POD_", "SLURM_", "CLOUDSDK_", "KUBE", "GIT_"))
        }
        self.env = inherited | {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home" / "me"),
            "STAND_IN": str(self.folder),
            "POD_POLL": "0.05",
            "POD_NAME": "pod",
            "POD_ZONE": "us-west4-a",
            "TMPDIR": str(folder),
        }

    def run(self, script, *words, ok=True, **env):
        """Run a script, check that it succeeds (or fails, with ok=False), and return its stdout and stderr."""
        done = subprocess.run(
            ["bash", self.checkout / "tpu_scripts" / script, *words],
            env=self.env | env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert "REJECTED" not in done.stdout + done.stderr, done.stderr
        assert (done.returncode == 0) == ok, (done.returncode, done.stdout, done.stderr)
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        return done.stdout + done.stderr

    def ready(self):
        """As after create.sh and setup.sh."""
        self.write("queue", {"pod": {"states": ["ACTIVE"], "nodes": ["pod"]}})
        for worker in range(2):
            there = self.home("pod", worker) / "jaxsteer"
            shutil.copytree(self.checkout / "tpu_scripts", there / "tpu_scripts")
            (there / ".venv" / "bin").mkdir(parents=True)
            shutil.copy(self.folder / "worker_bin" / "python3", there / ".venv" / "bin" / "python")

    def verbs(self):
        """Abbreviated calls: create, scp, ssh install and so on, without repetitions."""
        short = []
        for program, *words in self.calls():
            if program == "gcloud" and words[2:3] == ["queued-resources"]:
                short.append(words[3])
            elif words[2:4] == ["tpu-vm", "ssh"]:
                command = next(word for word in words if word.startswith("--command="))
                short.append(f"ssh {command.partition('worker.sh ')[2].split()[0]}")
            elif words[2:4] == ["tpu-vm", "scp"]:
                short.append("scp")
        return [verb for n, verb in enumerate(short) if verb not in ("describe", short[n - 1] if n else "")]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A git checkout with the scripts and little else."""
    root = tmp_path_factory.mktemp("checkout") / "jaxsteer"
    shutil.copytree(SCRIPTS, root / "tpu_scripts")
    (root / "configs").mkdir()
    (root / "configs" / "x.py").write_text("")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], cwd=root, check=True)
    return root


@pytest.fixture
def stage(tmp_path, checkout):
    stage = Stage(tmp_path, checkout)
    yield stage
    stage.end_workers()
    stage.end_workers("home")
