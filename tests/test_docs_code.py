"""The Python code in the documentation runs, on tiny models."""

import re
import sys
import types
from pathlib import Path

import jax
import pytest

from jaxsteer.interventions import METHODS
from jaxsteer.io import save_hf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import init_base
from train.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code_of(page, heading):
    """The Python blocks of a section, each padded to its own lines so that errors name the page's."""
    text = (ROOT / page).read_text(encoding="utf-8")
    start = text.index(f"\n## {heading}\n")
    end = text.find("\n## ", start + 1)
    for block in BLOCK.finditer(text, start, len(text) if end < 0 else end):
        before = text.count("\n", 0, block.start(1))
        yield compile("\n" * before + block[1], str(ROOT / page), "exec")


@pytest.fixture(autouse=True, scope="module")
def compiled_fast():
    """What is tested here is the code, on models so small that compiling takes all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the blocks of a section, one after another in one module, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_section(page, heading):
        module = types.ModuleType("documentation")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look up annotations
        blocks = list(code_of(page, heading))
        assert blocks
        for block in blocks:
            exec(block, module.__dict__)
        return module

    return run_section


@pytest.fixture
def restored():
    """The tables that the walk-throughs add to are as before afterwards."""
    tables = [(table, dict(table)) for table in (METHODS, FAMILIES, TASKS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """The folder and config of a tiny random model with a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/train/data"))
        from tiny_tokenizer import tiny_tokenizer

    config = ModelConfig(vocab_size=259, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, config, jax.jit(init_base, static_argnums=0)(config, jax.random.key(3)), "llama", tiny_tokenizer())
    return folder, config


@pytest.fixture
def tiny_model(monkeypatch, tiny_folder):
    """A tiny model in place of the one that the documentation fetches."""
    folder, config = tiny_folder
    monkeypatch.setattr("jaxsteer.io.source.fetch_named", lambda name: folder)
    return config


def test_the_example_of_the_readme(run, tiny_model, capsys):
    shown = run("README.md", "In Python")
    tokens = len("Paris is the capital of France.")
    assert shown.shift.shape == (3, 1, tokens, 32)
    assert capsys.readouterr().out.endswith(f"(3, 1, {tokens}, 32)\n")


def test_the_plan_of_the_concepts(run):
    assert run("docs/concepts.md", "Plans").plan[0].layers == (8, 9, 10)


@pytest.mark.parametrize("heading", ["Add a method", "Add a model family", "Add a task"])
def test_walk_throughs(run, restored, heading):
    run("CONTRIBUTING.md", heading)


def test_the_steering_file_of_getting_started(run, tiny_model):
    from jaxsteer import init_steering, parse_plan
    from jaxsteer.io import save_steering

    plan = parse_plan(["nonlinear(rank=2) @ block"], tiny_model)
    steering = init_steering(plan, tiny_model, jax.random.key(0))
    path = Path("runs/quickstart/steering.safetensors")
    save_steering(path, steering, plan, model_name="smollm2-135m-instruct", config=tiny_model)
    assert run("docs/getting_started.md", "First run").model.plan == plan
