"""The clients that docs/serving.md shows, against a server."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("curl ") and ADDRESS in line
]


@pytest.mark.xdist_group("serve_docs")  # a command may unload what the one before it has loaded
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(url, served_folder, command):
    names = {ADDRESS: url, '"mine"': '"steered"', "runs/late": str(served_folder / "other.safetensors")}
    for shown, here in names.items():
        command = command.replace(shown, here)
    done = subprocess.run([*shlex.split(command), "--silent", "--fail-with-body"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout


def test_the_openai_client(url):
    (code,), printed = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL), []
    names = {ADDRESS: url, '"mine"': '"steered"', "Why do the tides rise and fall?": "Why?"}
    for shown, here in names.items():
        assert shown in code
        code = code.replace(shown, here)
    exec(code, {"print": lambda *words: printed.append(words)})
    assert [strength for strength, _ in printed] == [0, 0.5, 1]
    assert printed[0][1] != printed[-1][1]
