"""Tokenised training data, kept in the user's cache folder by its content, so that the next run finds it."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from train.data import Example, Report, TokenizedExample, encode
from train.data.tokenize import CHUNK, OnLong

WORTH_SECONDS = 2.0
"""What took less to tokenise is not kept."""

Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]

_FORM = 2  # of the files; another number makes the older ones unread


def _unwatched(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def encode_cached(
    examples: Sequence[Example],
    tokenizer: Any,
    folder: Path,
    *,
    chat: bool = False,
    max_length: int | None = None,
    on_long: OnLong = "error",
    watch: Watch = _unwatched,
) -> tuple[list[TokenizedExample], Report]:
    """`train.data.encode`, read from `folder` where the same was tokenised before.

    A file's name is a hash of the examples, the tokenizer and the settings; it is written beside its place and moved
    there, so several processes may do so at once. A damaged file is made anew. `watch(total)` is
    entered where there is more than a chunk of examples to tokenise, and gives the callback for their number so far.
    """
    path = folder / f"{_key(examples, tokenizer, chat, max_length, on_long)}.npz"
    if (found := _read(path)) is not None:
        return found
    settings: dict[str, Any] = {"chat": chat, "max_length": max_length, "on_long": on_long}
    began = time.perf_counter()
    if len(examples) > CHUNK:
        with watch(len(examples)) as advance:
            done = encode(examples, tokenizer, advance=advance, **settings)
    else:
        done = encode(examples, tokenizer, **settings)
    if time.perf_counter() - began >= WORTH_SECONDS:
        _write(path, *done)
    return done


def _key(examples: Sequence[Example], tokenizer: Any, *settings: Any) -> str:
    """sha256 of all that the tokens depend on, as 64 hexadecimal digits."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        hashed.update(json.dumps(value, ensure_ascii=True).encode() + b"\n")

    add([_FORM, *settings])
    add([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
    add([tokenizer.special_tokens_map, tokenizer.eos_token_id])
    for example in examples:
        add([example.turns, example.source, example.gold])
    return hashed.hexdigest()


def _write(path: Path, rows: Sequence[TokenizedExample], report: Report) -> None:
    """Keep rows as arrays joined end to end; a full disk or a folder that cannot be written to is no error."""
    arrays = {
        "ids": np.concatenate([row.ids for row in rows]),
        "completion": np.concatenate([row.completion for row in rows]),
        "weights": np.concatenate([row.weights for row in rows]),
        "lengths": np.array([len(row) for row in rows]),
        "prompt_lengths": np.array([row.prompt_length for row in rows]),
        "texts": np.array(json.dumps({"named": [(r.source, r.answer) for r in rows], "report": asdict(report)})),
    }
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for other arguments
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()


def _read(path: Path) -> tuple[list[TokenizedExample], Report] | None:
    """What `_write` kept; None where there is nothing, or nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        texts = json.loads(str(stored["texts"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(stored["lengths"])[:-1]
    columns = (
        np.split(stored["ids"], ends),
        np.split(stored["completion"], ends),
        np.split(stored["weights"], ends),
        stored["prompt_lengths"],
        texts["named"],
    )
    rows = [
        TokenizedExample(ids, completion, int(prompt_length), source, answer, weights)
        for ids, completion, weights, prompt_length, (source, answer) in zip(*columns, strict=True)
    ]
    report = texts["report"]
    for name in ("too_long", "cut"):
        report[name] = tuple((source, length) for source, length in report[name])
    return rows, Report(**report)
