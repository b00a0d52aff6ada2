"""The rules of the house: who may import whom, how long a file may be, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "jaxsteer").rglob("*.py"), *(ROOT / "train").rglob("*.py")])
MAX_LINES = 400

# A package may import from packages of lower rank, and from itself. Two packages of one rank never import each other.
RANKS = {
    "jaxsteer.types": 0,
    "jaxsteer.ranges": 0,
    "jaxsteer.batches": 1,
    "jaxsteer.sharding": 1,
    "jaxsteer.matmul": 2,
    "jaxsteer.models": 3,
    "jaxsteer.interventions": 3,
    "jaxsteer": 4,  # steering, plans, params, optim, objectives, training, ...
    "jaxsteer.inference": 5,
    "jaxsteer.theory": 5,
    "jaxsteer.io": 6,
    "jaxsteer.lm_eval": 7,
    "train.plain": 11,
    "train.data": 11,
    "train.devices": 11,
    "train.display": 12,
    "train.tasks": 13,
    "train.base_models": 13,
    "train.peers": 13,
    "train.evaluation": 14,
    "train.config": 14,
    "train.run": 15,
    "train.serving": 15,
    "train.cli": 15,
    **dict.fromkeys(
        (
            f"train.{name}"
            for name in (
                "sft",
                "dpo",
                "grpo",
                "distill",
                "evaluate",
                "generate",
                "inspect",
                "robustness",
                "convert",
                "create",
            )
        ),
        16,
    ),
    **dict.fromkeys(
        (f"train.{name}" for name in ("chat", "compare", "contrast", "plan", "report", "serve", "theory")), 16
    ),
    "train.bench": 17,  # measures the other commands too
    "train.lofit": 17,
    "train.quickstart": 17,
    "train.__main__": 18,
}


def room(module):
    """The longest name in RANKS that is the module or a package around it."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in RANKS), None)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from imported_by(node)


def imported_by(node):
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import of {node.module}"
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(importer, imported):
    here, there = room(importer), room(imported)
    if there is None or here == there:
        return False
    if there == "jaxsteer" and imported == "jaxsteer":
        return not here.startswith("train.")  # the package's face is for those outside
    return RANKS[there] >= RANKS[here]


def test_imports_go_one_way():
    face = ROOT / "jaxsteer" / "__init__.py"  # gathers the names of all rooms
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if path != face
        for name in imports(path)
        if forbidden(module_of(path), name)
    ]
    assert not wrong, wrong


def test_every_module_has_a_rank():
    assert [module_of(path) for path in FILES if room(module_of(path)) is None] == ["train"]


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("jaxsteer.models.layers", "jaxsteer.interventions.lora", True),
        ("jaxsteer.interventions.lora", "jaxsteer.models.config", True),
        ("jaxsteer.types", "jaxsteer.batches", True),
        ("jaxsteer.objectives.supervised", "jaxsteer.io.load", True),
        ("jaxsteer.io.load", "train.config", True),
        ("jaxsteer.theory.shifts", "jaxsteer.io.load", True),
        ("jaxsteer.training", "jaxsteer.theory.tangent", True),
        ("jaxsteer.theory.tangent", "jaxsteer.training", False),
        ("jaxsteer.steering", "jaxsteer.models.config", False),
        ("jaxsteer.training", "jaxsteer.optim", False),
        ("jaxsteer.theory.oracle", "jaxsteer.models.transformer", False),
        ("jaxsteer.theory.oracle", "jaxsteer.io", True),
        ("jaxsteer.objectives.supervised", "jaxsteer.theory.oracle", True),
        ("jaxsteer.inference.generate", "jaxsteer.training", False),
        ("jaxsteer.training", "jaxsteer.inference.generate", True),
        ("train.sft", "jaxsteer.io", False),
        ("train.run.program", "jaxsteer", False),
        ("train.run.program", "train.evaluation.answers", False),
        ("train.evaluation.answers", "train.run.program", True),
        ("train.data.cache", "train.devices.machine", True),
        ("train.evaluate", "train.generate", True),
        ("train.lofit", "train.sft", False),
        ("jaxsteer.io.load", "numpy", False),
    ],
)
def test_the_rule_itself(importer, imported, wrong):
    assert forbidden(importer, imported) == wrong


def test_no_exported_name_hides_a_module():
    hidden = []
    for face in FILES:
        if face.name == "__init__.py":
            taken = [node for node in ast.walk(ast.parse(face.read_text())) if isinstance(node, ast.ImportFrom)]
            names = {alias.name for node in taken if node.module != module_of(face) for alias in node.names}
            hidden += [f"{module_of(face)}.{path.stem}" for path in face.parent.iterdir() if path.stem in names]
    assert hidden == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_short_and_free_of_torch(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert not [name for name in imports(path) if name.split(".")[0] == "torch"]


def test_importing_the_library_is_light():
    heavy = ["transformers", "tokenizers", "gguf", "torch", "train"]
    code = f"import sys, jaxsteer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_only_the_server_needs_its_packages():
    """Those of the extra `serve`; a function may import them when it is called."""
    extra = {"starlette", "uvicorn", "sse_starlette", "pydantic", "prometheus_client", "httpx2"}
    needed = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if room(module_of(path)) != "train.serve"
        for node in ast.parse(path.read_text()).body
        for name in imported_by(node)
        if name.split(".")[0] in extra
    }
    assert needed == set()


def test_test_files_have_names_of_their_own():
    """pytest imports them by name alone, so that two of one name cannot be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))
