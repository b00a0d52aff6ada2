"""The notebook in docs: what it imports is there, and it runs."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "theory.ipynb"


@pytest.fixture(scope="module")
def cells():
    return [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]


def test_what_it_imports_is_there(cells):
    imports = [node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) > 5
    exec(compile(ast.Module(imports, []), str(NOTEBOOK), "exec"), {})


@pytest.mark.slow
def test_it_runs(cells, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    seen = {}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), seen)
    assert seen["losses"][-1] < seen["losses"][0]
    assert seen["gap"] < 1e-2
    assert {"base", "fine-tuned", "linear"} <= set(seen["rows"])
