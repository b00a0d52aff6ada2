"""MkDocs hook: the site has the tree of the repository, so that relative links are the same in both."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("*.md", "LICENSE", "CITATION.cff", "constraints.txt", "configs/*.py", "tpu_scripts/topologies.txt")
"""What of the repository the site has besides the folder docs: pages, and files that pages link to."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give every file of docs/ its path from the root of the repository, and add the files from outside it."""
    docs = Path(config.docs_dir)
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(docs)]
    own = [path for path in docs.rglob("*") if path.is_file() and path.suffix != ".py"]
    own += [path for pattern in SHOWN for path in ROOT.glob(pattern)]
    named = [
        File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for path in sorted(own)
        if "__pycache__" not in path.parts
    ]
    return Files([*theme, *named])
