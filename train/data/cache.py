"""A cache of encoded training data, keyed by content, so that the next run need not tokenise again."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.io import Tokenizer
from jaxsteer.io.files import replacing
from train.data import Encoding, Example, Report, TokenizedExample, encode
from train.data.tokenize import CHUNK

WORTH_SECONDS = 2.0
"""Data that took less time than this to tokenise is not cached."""

_FORMAT = 3
"""Version of the file format and of the encoding; it is part of a file's key, so that others are not found."""

Encoded = tuple[list[TokenizedExample], Report]
Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given the total number of examples, a context manager whose value is called with the number done so far."""


def _unwatched(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def encode_cached(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    encoding: Encoding,
    folder: Path,
    *,
    watch: Watch = _unwatched,
) -> Encoded:
    """`train.data.encode` with a cache: read from `folder` if the same data was encoded before.

    A file is named by a hash of the examples, the tokenizer and the settings, and is written atomically, so several
    processes may share the folder. A damaged file is replaced.

    Args:
        examples, tokenizer, encoding: as in `encode`.
        folder: the cache folder; created if needed. If it cannot be written to, nothing is cached.
        watch: shows progress; entered only if there is more than one chunk of examples to tokenise.

    Returns:
        What `encode` returns, bit for bit.

    Raises:
        ValueError: as `encode`; errors are not cached.
    """
    encoding = encoding.dated(tokenizer)
    path = folder / f"{_key(examples, tokenizer, encoding)}.npz"
    if (cached := _read(path)) is not None:
        return cached
    start = time.perf_counter()
    if len(examples) > CHUNK:
        with watch(len(examples)) as advance:
            encoded = encode(examples, tokenizer, encoding, advance=advance)
    else:
        encoded = encode(examples, tokenizer, encoding)
    if time.perf_counter() - start >= WORTH_SECONDS:
        _write(path, *encoded)
    return encoded


def _key(examples: Sequence[Example], tokenizer: Tokenizer, encoding: Encoding) -> str:
    """sha256, in hexadecimal, of everything that the tokens depend on."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value, ensure_ascii=True).encode() + b"\n")

    add([_FORMAT, asdict(encoding)])
    add([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
    add([tokenizer.special_tokens_map, tokenizer.eos_token_id])
    for example in examples:
        add([example.turns, example.source, example.gold, example.weight, example.turn_weights])
    return digest.hexdigest()


def _write(path: Path, rows: Sequence[TokenizedExample], report: Report) -> None:
    """Store the examples as concatenated arrays; a full disk or an unwritable folder is not an error."""
    arrays = {
        "ids": np.concatenate([row.ids for row in rows]),
        "completion": np.concatenate([row.completion for row in rows]),
        "weights": np.concatenate([row.weights for row in rows]),
        "lengths": np.array([len(row) for row in rows]),
        "prompt_lengths": np.array([row.prompt_length for row in rows]),
        "texts": np.array(json.dumps({"named": [(r.source, r.answer) for r in rows], "report": asdict(report)})),
    }
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for other arguments


def _read(path: Path) -> Encoded | None:
    """What `_write` stored; None if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        texts = json.loads(str(stored["texts"]))
    except (OSError, ValueError, KeyError, EOFError, RecursionError, zipfile.BadZipFile):
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
