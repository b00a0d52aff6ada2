"""The studies `orders` and `tangent` on a tiny model, end to end."""

import json
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from jaxsteer import LoRA, Slot
from jaxsteer.io import load_model, save_hf, save_steering
from jaxsteer.steering import steering_shapes
from train.theory.__main__ import STUDIES, main
from train.theory.orders import OrdersStudy
from train.theory.tangent import TangentStudy

pytestmark = pytest.mark.xdist_group("theory_studies")


@pytest.fixture(scope="module")
def config(tiny_folder, tiny_data, tmp_path_factory):
    """A config file."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(
        "from train.config import TrainConfig\n"
        "from train.tasks import JsonlTask\n\n"
        "def config():\n"
        f"    task = JsonlTask({str(tiny_data)!r}, test={str(tiny_data)!r})\n"
        f"    return TrainConfig(task=task, model={str(tiny_folder)!r}, batch_size=4, sequence_length=16)\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def tuned(tiny_folder, tmp_path_factory):
    """A LoRA file and a folder of a model whose every weight has moved."""
    loaded, draw = load_model(tiny_folder), np.random.default_rng(0)
    move = lambda leaf: (0.02 * draw.standard_normal(leaf.shape)).astype(np.float32)
    plan = (Slot("l", LoRA(rank=2), ("attn.q", "mlp.down")),)
    lora, full = tmp_path_factory.mktemp("lora") / "steering.safetensors", tmp_path_factory.mktemp("full") / "model"
    steering = jax.tree.map(lambda leaf: 5 * move(leaf), steering_shapes(plan, loaded.config))
    save_steering(lora, steering, plan, model_name="tiny", config=loaded.config)
    base = jax.tree.map(lambda leaf: np.asarray(leaf) + move(leaf), loaded.base)
    save_hf(full, loaded.config, base, loaded.family, loaded.tokenizer)
    return str(lora), str(full)


def test_orders(config, tuned, tmp_path):
    study = OrdersStudy(
        tuned=tuned,
        config=config,
        sites=("mlp", "block"),
        order=2,
        smallest=-11,
        largest=1,
        sequence_length=18,
        out=str(tmp_path),
    )
    study.run()
    data = json.loads((tmp_path / "orders.json").read_text())
    assert data["tokens"] == 2 * 16  # examples of 4 tokens; the padding of a row does not count
    names = [name for name in data if isinstance(data[name], dict)]
    assert len(names) == 2
    for name in names:
        whole = data[name]["whole"]
        for order in (1, 2):
            np.testing.assert_allclose(whole["slope"][str(order)]["block"], order + 1, atol=0.1)
        share = np.array(whole["share"]["1"]["block"])
        assert share.shape == (13, 3)
        assert np.all(share[0] > 0.999)
        assert np.all(share[-1] < share[0])
        assert data[name]["local"]["layers"] == [0]
    # Of LoRA, whose embedding stays: at layer 0 its own update is all there is.
    lora, one = data[names[0]], [data[names[0]][kind]["scales"].index(1.0) for kind in ("local", "whole")]
    local, whole = (lora[kind]["share"]["1"]["block"][at][0] for kind, at in zip(("local", "whole"), one, strict=True))
    np.testing.assert_allclose(local, whole, rtol=1e-3)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"orders.json", "share.png", "reach.png", *(f"remainders_{name}.png" for name in names)}


@pytest.mark.slow
def test_tangent(config, tmp_path):
    plan = ("lora(rank=2) @ projections",)
    TangentStudy(config=config, plan=plan, lr=0.05, steps=6, every=3, sequence_length=16, out=str(tmp_path)).run()
    rows = json.loads((tmp_path / "tangent.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 3, 6]
    names = ("full", "lazy", "lazy_in_full", "full_in_lazy")
    np.testing.assert_allclose([rows[0][name] for name in names], rows[0]["full"], rtol=1e-5)
    assert rows[-1]["full"] < rows[0]["full"]
    assert rows[-1]["lazy"] < rows[0]["lazy"]
    assert rows[-1]["lazy"] != rows[-1]["full"]
    assert (tmp_path / "tangent.png").exists()


def test_bad_settings_are_refused(config, tuned, tmp_path):
    with pytest.raises(ValueError, match=r"order must be at least 1"):
        OrdersStudy(tuned=tuned, config=config, order=0).run()
    with pytest.raises(ValueError, match=r"no site 'mlp.experts'"):
        OrdersStudy(tuned=tuned, config=config, sites=("mlp.experts",)).run()
    with pytest.raises(ValueError, match=r"nowhere: no such fine-tuning"):
        OrdersStudy(tuned=(str(tmp_path / "nowhere"),), config=config).run()
    with pytest.raises(ValueError, match=r"--every must be at least 1"):
        TangentStudy(config=config, every=0).run()


@pytest.mark.parametrize("name", STUDIES)
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["theory", name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out


DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMANDS = [
    line.split("-m train.theory ")[1]
    for name in ("theory.md", "theory_oracle.md")
    for line in (DOCS / name).read_text(encoding="utf-8").splitlines()
    if "-m train.theory " in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_understood(command):
    study = tyro.extras.subcommand_cli_from_dict(STUDIES, args=shlex.split(command))
    assert study.name == command.split()[0]


def test_every_study_is_documented():
    assert {command.split()[0] for command in COMMANDS} == set(STUDIES)
