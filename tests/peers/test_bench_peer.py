"""The real opponent on a tiny model: every row's two sides are compared, which they refuse to be measured without."""

import json
import sys
from pathlib import Path

import jax
import pytest
from asked import python_of

from jaxsteer.io import save_hf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import init_base
from train.bench.against import contest
from train.bench.against.arena import AgainstBench
from train.bench.against.bound import Roof
from train.bench.against.command import bench_against
from train.bench.against.rows import ROWS

sys.path.insert(0, str(Path(__file__).parents[1] / "train" / "data"))
from tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=259, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48, tied_head=True, max_length=256
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The smallest settings, with a tiny model and data of a few letters."""
    folder = tmp_path_factory.mktemp("against")
    save_hf(folder / "tiny", CONFIG, init_base(CONFIG, jax.random.key(3)), "llama", tiny_tokenizer())
    data = folder / "data.jsonl"
    rows = [{"question": "ab" * (1 + n % 7), "answer": chr(97 + n % 25) * (1 + n % 5)} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "peer_python": str(python_of("bench")),
        "pairs": 1,
        "steps": 2,
        "model": str(folder / "tiny"),
        "data": str(data),
        "boolq": str(data),
        "batch_size": 2,
        "sequence_length": 64,
        "new_tokens": 4,
        "questions": 9,
    }


@pytest.mark.parametrize("row", [row.name for row in ROWS])
def test_a_row(row, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "measure_roof", lambda: Roof(1e11, 1e10))
    path = tmp_path / "out.json"
    bench_against(AgainstBench(rows=(row,), json=str(path), **settings))
    figures = json.loads(path.read_text())["rows"][row]
    assert figures["ours"]["median"] > 0
    assert figures["theirs"]["median"] > 0
    if len(figures.get("tried", {})) > 1:
        best = max if figures["better"] == "higher" else min
        assert figures["theirs"]["name"] == best(figures["tried"], key=figures["tried"].get)
    if "answers" in figures["checked"]:
        assert figures["checked"]["answers_agreeing"] == figures["checked"]["answers"] > 0
