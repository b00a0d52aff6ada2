"""What the commands say about a tokenizer that is missing or is not the model's, before they read any weights."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from train.cli import run_main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "train.sft": ("CONFIG", "--task.train", "DATA", "--model", "MODEL", "--out", "OUT"),
    "train.lofit": ("CONFIG", "--task.train", "DATA", "--model", "MODEL", "--out", "OUT", "--heads", "2"),
    "train.generate": ("none", "a>", "--model", "MODEL"),
    "train.evaluate": ("none", "--model", "MODEL", "--config", "CONFIG", "--data", "DATA", "--out", "OUT"),
    "train.bench.__main__": ("eval", "--model", "MODEL"),
    "train.theory.__main__": ("predict", "--config", "OWN", "--out", "OUT"),
}


@pytest.fixture
def says(tmp_path, tiny_data, monkeypatch, capsys):
    """(command, model folder) -> the error that it ends with."""

    def call(command, model):
        own = tmp_path / "own.py"
        own.write_text(
            "from train.config import TrainConfig\nfrom train.tasks import JsonlTask\n\n\ndef config():\n"
            f"    return TrainConfig(model={str(model)!r}, task=JsonlTask(*[{str(tiny_data)!r}] * 3))\n"
        )
        places = {"MODEL": model, "DATA": tiny_data, "OUT": tmp_path / "out", "OWN": own}
        places["CONFIG"] = ROOT / "configs" / "jsonl.py"
        monkeypatch.setattr(sys, "argv", [command, *(str(places.get(word, word)) for word in COMMANDS[command])])
        with pytest.raises(SystemExit) as ended:
            run_main(importlib.import_module(command).main)
        assert ended.value.code == 1
        return " ".join(capsys.readouterr().err.split())

    return call


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A model whose weights must not be read: there are none."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_without_a_tokenizer(model, command, says):
    for path in model.glob("*"):
        if path.name not in ("config.json", "generation_config.json"):
            path.unlink()
    error = says(command, model)
    assert "comes without a tokenizer (none of tokenizer.json" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(model, command, says):
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"vocab_size": 257}))
    error = says(command, model)
    assert "this tokenizer has ids up to 258, but the model's embedding has 257 rows" in error
    assert "Traceback" not in error
