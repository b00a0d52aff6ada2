"""Print the installed versions of all packages that jaxsteer[train] needs at run time: `make constraints`."""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEADER = """\
# The versions that this release was tested and measured with, see docs/performance.md. Use them with
#   pip install -c constraints.txt "jaxsteer[train]"
# Written by `make constraints`."""


def pins() -> dict[str, str]:
    """The version of each package that the library and the extra `train` require, directly or not."""
    found: dict[str, str] = {}
    waiting = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        extras = ("", *sorted(requirement.extras))
        key = (canonicalize_name(requirement.name), extras)
        if key in seen or (requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras)):
            continue
        seen.add(key)
        package = distribution(requirement.name)
        found[canonicalize_name(package.metadata["Name"])] = package.version
        for text in package.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                waiting.append(needed)
    return found


if __name__ == "__main__":
    print(HEADER)
    print("\n".join(f"{name}=={version}" for name, version in sorted(pins().items())))
