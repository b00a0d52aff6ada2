"""Answers kept on disk as they are given, so that an evaluation that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.types import PyTree
from train.devices.processes import is_first, on_first
from train.evaluation import Decoded, Prompts, answer_from_json


class Unfinished:
    """An append-only file beside the answers: a header that says which evaluation it is, then an answer a line.

    A context manager. Process 0 alone writes; all know what is done.

    Args:
        path: of the finished answers; the file is `path` with ".unfinished" behind it.
        identity: what makes the evaluation what it is, JSON values.

    Raises:
        ValueError: the file is another evaluation's.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path.with_name(path.name + ".unfinished")
        self._identity = dict(identity)
        held = on_first(self._read)
        self.done = {int(index): answer_from_json(answer) for index, answer in held}
        self._file = None
        if is_first():
            self._file = self.path.open("a", encoding="utf-8")
            if not self.path.stat().st_size:
                self._write({"evaluation": self._identity})

    def add(self, index: int, answer: Decoded) -> None:
        """Keep an answer; on disk at once."""
        if self._file is not None:
            self._write({"index": index, **asdict(answer)})

    def remove(self) -> None:
        """Forget the file: the answers are kept elsewhere."""
        self.__exit__()
        if is_first():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Unfinished:
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self) -> list[list[Any]]:
        """(number, answer) of each line; a last line that was only half written is cut off."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
        if not rows:
            return []
        before = rows[0].get("evaluation", {})
        if before != self._identity:
            keys = sorted({*before, *self._identity})
            differing = ", ".join(key for key in keys if before.get(key) != self._identity.get(key))
            raise ValueError(
                f"{self.path}: an evaluation with another {differing} was not finished there; go on with that one, "
                "delete the file to begin anew, or choose another --out"
            )
        return [[row.pop("index"), row] for row in rows[1:]]


def hash_tree(tree: PyTree) -> str:
    """sha256 over the paths and bytes of a tree's leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def hash_prompts(prompts: Prompts) -> str:
    """sha256 over all that is asked and how it is scored."""
    digest = hashlib.sha256(repr((prompts.stop, prompts.rule, prompts.max_new_tokens, prompts.choices)).encode())
    for prompt in prompts.tokens:
        digest.update(prompt.ids.tobytes() + repr((prompt.source, prompt.answer)).encode())
    return digest.hexdigest()
