"""Cells of a sweep in a file as they are measured, so that a stopped sweep goes on, or one with another --max-kl."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.io.files import write_text
from train.contrast.answers import Answered
from train.contrast.sweep import Cell, Sweep
from train.evaluation.statistics import Estimate


class KeptCells:
    """What a sweep has measured.

    A file with other cells, or a damaged one, is begun anew; of one that ends in half a line, the rest is used.

    Args:
        path: the file, JSON Lines.
        identity: digest of all that cells depend on besides their layer and strength.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._found = path, dict[tuple[int, float], Cell]()
        head = json.dumps({"of": identity})
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for line in lines[1:] if lines[:1] == [head] else []:
            try:
                self._note(_from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                break
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(line + "\n" for line in [head, *map(_line, self._found.values())]))

    def sweep(
        self, measured: Sweep, layers: Sequence[int], strengths: Sequence[float], advance: Callable[[int], None]
    ) -> list[Cell]:
        """All cells, by layer and strength; `advance` is called with the number of those that are done."""
        cells = []
        for layer in layers:
            for strength in sorted(set(strengths)):
                found = self._found.get((layer, strength))
                cells.append(self._add(measured.measure(layer, strength)) if found is None else found)
                advance(len(cells))
        return cells

    def with_answers(self, measured: Sweep, cells: Sequence[Cell]) -> list[Cell]:
        """The same with their answers."""
        for layer in dict.fromkeys(cell.layer for cell in cells):
            missing = [cell for cell in cells if cell.layer == layer and cell.answered is None]
            for cell in measured.with_answers(missing) if missing else []:
                self._add(cell)
        return [self._found[cell.layer, cell.strength] for cell in cells]

    def _note(self, cell: Cell) -> None:
        self._found[cell.layer, cell.strength] = cell

    def _add(self, cell: Cell) -> Cell:
        self._note(cell)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(cell) + "\n")
        return cell


def _line(cell: Cell) -> str:
    return json.dumps(cell._asdict() | {"answered": None if cell.answered is None else cell.answered._asdict()})


def _from_json(row: dict[str, Any]) -> Cell:
    answered = row.pop("answered")
    if answered is not None:
        score = None if answered["score"] is None else Estimate(*answered["score"])
        answered = Answered(**answered | {"texts": tuple(answered["texts"]), "score": score})
    return Cell(**row | {name: Estimate(*row[name]) for name in ("kl", "shift")}, answered=answered)
