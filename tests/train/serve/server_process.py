"""`jaxsteer serve` in a process of its own, seen from the outside: its address, its figures and its memory."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import httpx2

ROOT = Path(__file__).resolve().parents[3]
METRIC = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")


@dataclass
class ServerProcess:
    """A server that runs.

    process  of the server
    url      of its root
    printed  lines that it has written to stderr
    """

    process: subprocess.Popen
    url: str
    printed: list[str] = field(default_factory=list)

    def metrics(self):
        """Figures by name, those with labels summed up."""
        found = {}
        for name, _, value in self._lines():
            found[name] = found.get(name, 0) + value
        return found

    def statuses(self):
        """Numbers of requests by the status of the response."""
        found = {}
        for name, labels, value in self._lines():
            if name == "jaxsteer_requests_total":
                status = int(re.search(r'status="(\d+)"', labels)[1])
                found[status] = found.get(status, 0) + value
        return found

    def memory(self):
        """Resident memory that is the process's own, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1000

    def idle(self):
        """Whether no request is being answered."""
        figures = self.metrics()
        return figures["jaxsteer_running"] + figures["jaxsteer_waiting"] == 0

    def _lines(self):
        for line in httpx2.get(f"{self.url}/metrics").text.splitlines():
            if found := METRIC.match(line):
                yield found[1], found[2] or "", float(found[3])


@contextmanager
def server_process(*arguments, port=0, **environment):
    """A server started with these arguments, which is ready; killed at the end of the block if it still runs."""
    command = [sys.executable, "-m", "train", "serve", *map(str, arguments), "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, **pipes)
    printed = []
    reader = Thread(target=lambda: printed.extend(process.stderr), daemon=True)
    reader.start()
    try:
        ready = next((line for line in process.stdout if line.startswith("Ready: ")), None)
        if ready is None:
            reader.join()
            raise AssertionError("".join(printed))
        yield ServerProcess(process, ready.split()[1], printed)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
