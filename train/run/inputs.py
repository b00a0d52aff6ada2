"""What a run reads besides its settings: training data, validation examples, and the steering that it starts from.

It is kept in the run's inputs.json, so that a resumed run cannot go on with other data by mistake.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data import Example, Report, StepSource
from train.data.columns import files_of


def data_inputs(data: StepSource, report: Report) -> dict[str, Any]:
    """Training data as inputs.json records it: a digest of its tokens, and figures for readers."""
    return {
        "sha256": data.digest(),
        "examples": report.kept,
        "tokens": report.tokens,
        "supervised": report.supervised,
        "sources": data.files,
    }


def example_inputs(examples: Sequence[Example]) -> dict[str, Any]:
    """Validation or test examples as inputs.json records them: a digest of their texts, and figures for readers."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.turns, example.gold, example.choices]).encode() + b"\n")
    return {
        "sha256": digest.hexdigest(),
        "examples": len(examples),
        "sources": files_of(example.source for example in examples),
    }


def text_inputs(path: str, texts: Sequence[str]) -> dict[str, Any]:
    """The texts of a file as inputs.json records them."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode())
    return {"sha256": digest.hexdigest(), "examples": len(texts), "sources": [path]}


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the data has changed, a phrase for each; [] if nothing has, or it is not known what there was."""
    kinds = {
        "train": "training data",
        "validation": "validation examples",
        "test": "test examples",
        "neutral": "neutral texts",
        "keep": "texts of a penalty",
    }
    phrases = []
    for name, new in now.items():
        old, what = before.get(name), kinds.get(name.partition(" ")[0])  # "keep texts.txt": one of several
        if old and new and what and old["sha256"] != new["sha256"]:
            files = ", ".join(dict.fromkeys([*old["sources"], *new["sources"]]))
            phrases.append(f"its {what} ({files}) had {_size(old)} and now {_has(old, new)}")
    return phrases


def _size(data: Mapping[str, Any]) -> str:
    tokens = f" with {data['tokens']:,} tokens" if "tokens" in data else ""
    return f"{data['examples']:,} examples{tokens}"


def _has(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    equal = all(old.get(name) == new.get(name) for name in ("examples", "tokens", "supervised"))
    return "as many, but others (or in another order)" if equal else f"has {_size(new)}"


def check_inputs(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, optional: bool = True) -> None:
    """Refuse to resume a run with other data than it was started with.

    Args:
        folder: of the run, for the message.
        before, now: what `open_run` takes as inputs.
        optional: whether --new-data would accept it.

    Raises:
        ValueError: the data has changed.
    """
    if phrases := changed_data(before, now):
        way = "give --new-data to continue with what there is now, " if optional else ""
        raise ValueError(f"{folder}: {'; '.join(phrases)}. Restore the data, {way}or use another --out")


def check_model(folder: Path, before: Mapping[str, Any], digest: str) -> None:
    """Refuse to resume a run with another base model than it was started with.

    Args:
        folder: of the run, for the message.
        before: the inputs in that folder.
        digest: of the model's weights, see `jaxsteer.io.WeightSample`.

    Raises:
        ValueError: the weights are not those.
    """
    if before.get("model", {}).get("sha256", digest) != digest:
        raise ValueError(
            f"{folder}: the weights of its base model have changed since the run was started. Restore them, or use "
            f"another --out (--start-from {folder} takes over the steering of a finished run)"
        )
