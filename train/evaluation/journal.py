"""Answers kept on disk as they are given, so that a killed evaluation resumes where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsteer.io.files import parse_json, write_json, write_text
from jaxsteer.types import PyTree
from train.devices.processes import fetch, is_first, on_first
from train.evaluation.answers import Prompts, answer_from_json


class Codec(NamedTuple):
    """How answers become JSON objects, and back."""

    to_json: Callable[[Any], dict[str, Any]]
    from_json: Callable[[dict[str, Any]], Any]


ANSWERS = Codec(asdict, answer_from_json)
"""Scored answers."""


class MemoryJournal:
    """Keeps the answers in memory only."""

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}

    def add(self, index: int, answer: Any) -> None:
        """Keep an answer."""
        self.done[index] = answer

    def finish(self) -> None:
        """Nothing is left to do."""

    def __enter__(self) -> MemoryJournal:
        """The journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class FileJournal:
    """An append-only file beside the final answers: a header that identifies the evaluation, then one answer per line.

    A context manager. Process 0 alone writes; every process knows what is done. `finish` writes the answers to `path`
    and the identity beside them, and removes the journal.

    Args:
        path: the .jsonl file of the finished answers; the journal is `path` + ".unfinished".
        identity: everything that determines the answers, JSON values.
        reuse: take over finished answers that are already at `path` with the same identity.
        codec: of the answers.

    Raises:
        ValueError: the journal belongs to another evaluation.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, reuse: bool = False, codec: Codec = ANSWERS) -> None:
        self.answers_path, self.path = path, path.with_name(path.name + ".unfinished")
        self._identity_path = path.with_suffix(".identity.json")
        self._identity = json.loads(json.dumps(dict(identity)))  # tuples become lists, as in the file
        self._file, self._codec = None, codec
        self.done: dict[int, Any] = {}
        self.complete = reuse and on_first(self._is_complete)
        if self.complete:
            lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
            rows = [parse_json(line, f"{path}:{number}") for number, line in lines if line]
            self.done = dict(enumerate(map(codec.from_json, rows)))
            return
        try:
            self.done = {int(index): codec.from_json(answer) for index, answer in on_first(self._read)}
        except TypeError as error:
            raise ValueError(
                f"{self.path}: written by another version of jaxsteer ({error}); delete the file to start over"
            ) from None
        if is_first():
            self._file = self.path.open("a", encoding="utf-8")
            if not self.path.stat().st_size:
                self._write({"evaluation": self._identity})

    def add(self, index: int, answer: Any) -> None:
        """Keep an answer; it is on disk when this returns."""
        self.done[index] = answer
        if self._file is not None:
            self._write({"index": index, **self._codec.to_json(answer)})

    def finish(self) -> None:
        """Write the answers and their identity, and remove the journal."""
        if self.complete:
            return
        self.__exit__()
        if is_first():
            self._identity_path.unlink(missing_ok=True)  # killed here, old identity and new answers must not meet
            rows = (self._codec.to_json(self.done[index]) for index in range(len(self.done)))
            write_text(self.answers_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            write_json(self._identity_path, self._identity)
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> FileJournal:
        """The journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_complete(self) -> bool:
        if not (self.answers_path.exists() and self._identity_path.exists()):
            return False
        return parse_json(self._identity_path.read_bytes(), str(self._identity_path)) == self._identity

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # what it holds back cannot be written either
                self.__exit__()
            self._file = None
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _read(self) -> list[list[Any]]:
        """(index, answer) of each line; a half-written last line is cut off."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
        lines = whole.split(b"\n")
        rows = [parse_json(line, f"{self.path}:{number}") for number, line in enumerate(lines, 1) if line]
        indexed = all(isinstance(row, dict) and isinstance(row.get("index"), int) for row in rows[1:])
        if not indexed or not all(isinstance(row, dict) for row in rows[:1]):
            raise ValueError(f"{self.path}: damaged; delete the file to start over")
        if not rows:
            return []
        before = rows[0].get("evaluation", {})
        if before != self._identity:
            keys = sorted({*before, *self._identity})
            differing = ", ".join(key for key in keys if before.get(key) != self._identity.get(key))
            raise ValueError(
                f"{self.path}: holds an unfinished evaluation with another {differing}. Resume that one, delete the "
                "file to start over, or choose another --out"
            )
        return [[row.pop("index"), row] for row in rows[1:]]


def hash_tree(tree: PyTree) -> str:
    """sha256 over the paths and bytes of a tree's leaves; every process must call it. One leaf at a time is fetched."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(fetch(leaf)).tobytes())
    return digest.hexdigest()


def hash_prompts(prompts: Prompts) -> str:
    """sha256 over everything that is asked and how it is scored."""
    digest = hashlib.sha256(repr((prompts.stop, prompts.rule, prompts.max_new_tokens, prompts.choices)).encode())
    for prompt in prompts.tokens:
        digest.update(prompt.ids.tobytes() + repr((prompt.source, prompt.answer)).encode())
    return digest.hexdigest()
