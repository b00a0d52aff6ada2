"""How MkDocs makes the site: a hook for its tree of files, and an extension for the layout of docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("*.md", "LICENSE", "CITATION.cff", "constraints.txt", "configs/*.py", "tpu_scripts/topologies.txt")
"""What of the repository the site has besides the folder docs: pages, and files that pages link to."""

_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Example|Examples|Attributes|Note|Notes):$")
_FIELD = re.compile(r"^([\w][\w., \[\]-]{0,30}?)  +(\S.*)$")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Lay the site out as the repository, so that relative links are the same in both.

    Every file of docs/ gets its path from the root of the repository, and files from outside it are added.
    """
    docs = Path(config.docs_dir)
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(docs)]
    own = [path for path in docs.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    own += [path for pattern in SHOWN for path in ROOT.glob(pattern)]
    named = [
        File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for path in sorted(own)
    ]
    return Files([*theme, *named])


class Docstrings(griffe.Extension):
    """Docstrings are written to be read in the source; this makes Markdown of what is not yet."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Lay out the docstring of every class, function, module and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Aligned "name   what it is" lines become a list, and x[a][b] no link; sections (Args: ...) stay as they are."""
    lines, out = text.splitlines(), []
    listed = False
    for number, line in enumerate(lines):
        if _SECTION.match(line):
            return "\n".join([*out, *map(_no_links, lines[number:])])
        field = _FIELD.match(line)
        if field:
            if not listed and out and out[-1]:
                out.append("")
            out.append(f"- `{field[1]}`: {_no_links(field[2])}")
        elif listed and line.startswith("  ") and line.strip():
            out[-1] += " " + _no_links(line.strip())
        else:
            out.append(line if line.startswith("    ") else _no_links(line))
        listed = bool(field) or (listed and line.startswith("  "))
    return "\n".join(out)


def _no_links(line: str) -> str:
    """The line with brackets that follow brackets escaped, outside of `code`."""
    parts = line.split("`")
    return "`".join(part.replace("][", r"]\[") if i % 2 == 0 else part for i, part in enumerate(parts))
