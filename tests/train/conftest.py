"""A model folder and a data file small enough to train on in a test, as a user would have them."""

import json
import sys
from pathlib import Path

import jax
import pytest

from jaxsteer.io import save_hf
from jaxsteer.models.transformer import init_base
from jaxsteer.optim import OptimConfig
from train.compare.config import CompareConfig
from train.config import TrainConfig
from train.devices.machine import enable_compilation_cache
from train.run import result
from train.tasks import JsonlTask

sys.path.insert(0, str(Path(__file__).parent / "data"))
from tiny_model import TINY
from tiny_tokenizer import tiny_tokenizer

# For all tests of a process, not only for those after its first run, which would switch it on.
enable_compilation_cache()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder: a random Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, TINY, init_base(TINY, jax.random.key(3)), "llama", tiny_tokenizer())
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Prompts and completions that a small model can learn: the letter after a letter."""
    path = tmp_path_factory.mktemp("data") / "letters.jsonl"
    rows = [{"prompt": f"{chr(97 + i % 25)}>", "completion": chr(98 + i % 25)} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny_comparison(tiny_folder, tiny_data, tmp_path):
    """A comparison on them, as yet without methods."""
    base = TrainConfig(
        task=JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=2),
        model=str(tiny_folder),
        optim=OptimConfig(schedule="cosine"),
        steps=3,
        batch_size=2,
        sequence_length=32,
        validation_examples=6,
        test_examples=8,
        eval_batch_size=8,
    )
    return CompareConfig(base=base, extensions=0, seeds=2, out=str(tmp_path / "comparison"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes a third of a tiny run; only runs in fixtures of a wider scope, made before this one, do it."""
    monkeypatch.setattr(result, "_draw", lambda *rest: None)
