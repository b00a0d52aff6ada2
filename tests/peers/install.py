"""Make the environments of the programs that exports are verified with: `make peers`, or `install.py [NAME ...]`.

Each file requirements/NAME.txt, whose first line says what it takes, becomes the environment .peers/NAME. Environments
that are there already, with these versions, are left as they are. What pip says goes to .peers/NAME.log.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = {path.stem: path for path in sorted((HERE / "requirements").glob("*.txt"))}
INSTALLED = "installed.txt"
"""Name of the file in a complete environment: a copy of the requirements that it was made from."""


def is_complete(folder: Path, requirements: Path) -> bool:
    """Whether an environment was made to its end, from these requirements."""
    made = folder / INSTALLED
    return made.is_file() and made.read_text() == requirements.read_text()


def install(folder: Path, requirements: Path) -> None:
    """Make an environment, instead of an unfinished or older one that may be there.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    venv.create(folder, clear=True, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    with open(folder.with_suffix(".log"), "wb") as log:
        command = [*pip, "install", "--progress-bar", "off", "--requirement", str(requirements)]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    (folder / INSTALLED).write_text(requirements.read_text())


def make(name: str, root: Path) -> bool:
    """Make one environment if it is not there, and say so. Returns whether it is there now."""
    requirements, folder = REQUIREMENTS[name], root / name
    if is_complete(folder, requirements):
        print(f"{name}: {folder} is complete")
        return True
    print(f"{name}: installing into {folder} ({describe(requirements)}) ...", flush=True)
    start = time.monotonic()
    try:
        install(folder, requirements)
    except subprocess.CalledProcessError:
        log = folder.with_suffix(".log")
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        print(f"{name}: pip failed: {''.join(last)} (all it said: {log})", file=sys.stderr)
        return False
    print(f"{name}: done in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return True


def describe(requirements: Path) -> str:
    """What a requirements file says of itself."""
    return requirements.read_text().partition("\n")[0].removeprefix("# ")


def main() -> None:
    """Make the environments that are named; by default all, one after the other."""
    takes = "".join(f"\n  {name:<10}{describe(path)}" for name, path in REQUIREMENTS.items())
    parser = argparse.ArgumentParser(
        description=f"{(__doc__ or '').strip()}\n{takes}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join(REQUIREMENTS)}")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / ".peers", help="default: %(default)s")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in REQUIREMENTS]:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(REQUIREMENTS)}")
    done = [make(name, options.folder) for name in options.names or REQUIREMENTS]
    raise SystemExit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
