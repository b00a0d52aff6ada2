"""The code that figures were measured with."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The clone, or the folder that jaxsteer is installed in."""


@cache
def code_digest() -> str:
    """A digest of the sources that figures depend on: of the library, the programs and the peers."""
    digest = hashlib.sha256()
    files = [*(ROOT / "jaxsteer").rglob("*.py"), *(ROOT / "train").rglob("*.py"), *ROOT.glob("tests/peers/*_peer.py")]
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def commit() -> str | None:
    """The commit of the clone that this runs in; None outside of one."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
