"""The Python code in the documentation runs, on tiny models."""

import re
import sys
import types
from pathlib import Path

import chex
import jax
import pytest

from jaxsteer import init_steering, parse_plan, plan_to_json
from jaxsteer.interventions import METHODS
from jaxsteer.io import load_config, load_steering, save_hf, save_steering
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import init_base
from train.run.checkpoints import open_checkpoints
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


@pytest.fixture
def quickstart(run, tiny_model):
    """The plan and the steering of a quickstart on the tiny model, in runs/quickstart."""
    plan = parse_plan(["nonlinear(rank=2) @ block name=steer"], tiny_model)
    steering = init_steering(plan, tiny_model, jax.random.key(0))
    path = Path("runs/quickstart/steering.safetensors")
    save_steering(path, steering, plan, model_name="smollm2-135m-instruct", config=tiny_model)
    return plan, steering


def test_the_steering_file_of_getting_started(run, quickstart):
    assert run("docs/getting_started.md", "First run").model.plan == quickstart[0]


def test_the_recipe_for_answering(run, quickstart, capsys):
    shown = run("docs/recipes.md", "Load steering and answer")
    tokens = shown.answer.tokens[0, : shown.answer.lengths[0]]
    assert capsys.readouterr().out == shown.loaded.tokenizer.decode(tokens) + "\n"


def test_the_directions_of_pairs(run, tiny_model):
    shown = run("docs/contrast.md", "Directions")
    assert shown.directions.vectors.shape == (3, 32)
    assert shown.steering["contrast"]["block"]["v"].shape == (1, 32)
    assert shown.plan[0].layers == (1,)


@pytest.mark.slow
def test_the_recipe_for_merging(run, tiny_model):
    shown = run("docs/recipes.md", "Merge steering into the weights")
    assert [slot.name for slot in shown.rest] == list(shown.rest_steering) == ["nonlinear"]
    assert load_config("runs/merged") == tiny_model


@pytest.mark.slow
def test_the_recipe_for_seeds(run, tiny_model):
    with jax.numpy_dtype_promotion("standard"):  # as users run it; optax.adam needs it
        shown = run("docs/recipes.md", "Train several seeds at once")
    assert shown.losses.shape == (4,)
    assert len({float(loss) for loss in shown.losses}) == 4
    assert shown.best["nonlinear"]["block"]["U"].shape == shown.seeds["nonlinear"]["block"]["U"].shape[1:]


def test_the_recipe_for_checkpoints(run, quickstart):
    plan, steering = quickstart
    with open_checkpoints(Path("runs/quickstart/checkpoints")) as checkpoints:
        checkpoints.save(3, {"steering": steering}, {"plan": plan_to_json(plan), "model": "tiny"})
    run("docs/recipes.md", "Read a checkpoint without jaxsteer's programs")
    again = load_steering("runs/from_checkpoint.safetensors")
    assert again.plan == plan
    chex.assert_trees_all_equal(again.steering, steering)
