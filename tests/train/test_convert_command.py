"""The command `convert`: what it writes and says, what it refuses before weights are read, what it leaves behind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_model import TINY

import jaxsteer
from jaxsteer import parse_plan
from jaxsteer.io import sample_weights, save_steering
from jaxsteer.io.formats import FORMATS
from jaxsteer.io.formats.sidecar import NAME
from jaxsteer.steering import steering_shapes
from train import base_models, convert, peers
from train.convert import ConvertConfig
from train.devices import interrupts

LORA = "lora(rank=2, alpha=3) @ attn.q,mlp.down"


def run_of(folder, model, *texts, notes=None):
    """A run's folder with random steering."""
    plan, draw = parse_plan(texts, TINY), np.random.default_rng(1)
    steering = jax.tree.map(
        lambda leaf: (0.1 * draw.standard_normal(leaf.shape)).astype(np.float32), steering_shapes(plan, TINY)
    )
    save_steering(
        folder / "steering.safetensors",
        steering,
        plan,
        model_name=str(model),
        config=TINY,
        sample=sample_weights(model),
        notes=notes,
    )
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tiny_folder):
    return run_of(tmp_path_factory.mktemp("lora"), tiny_folder, LORA)


@pytest.fixture(scope="module")
def block(tmp_path_factory, tiny_folder):
    return run_of(tmp_path_factory.mktemp("block"), tiny_folder, "nonlinear(rank=2) @ block positions=completion")


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if weights are read."""
    monkeypatch.setattr(base_models, "load_model", lambda *rest, **more: pytest.fail("weights were read"))


def command(source, out, **options):
    convert.convert(ConvertConfig(source=str(source), out=str(out), **options))


def test_there_and_back(lora, tmp_path, capsys):
    command(lora, tmp_path / "peft", to="peft")
    said = capsys.readouterr().out
    assert "exact: logits differ by at most" in said
    assert "adapter_model.safetensors" in said
    command(tmp_path / "peft", tmp_path / "back")
    one, two = (jaxsteer.io.load_steering(folder / "steering.safetensors") for folder in (lora, tmp_path / "back"))
    assert one.plan == two.plan
    assert one.model_name == two.model_name
    jax.tree.map(np.testing.assert_array_equal, one.steering, two.steering)
    with pytest.raises(ValueError, match="give its folder"):
        command(tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "x")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/moved"
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"made for /moved, which cannot be loaded .* give --model"):
        command(tmp_path / "peft", tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": ""}, "SOURCE: which"),
        ({"out": ""}, "--out: name a folder"),
        ({"to": "pft"}, r"no format 'pft' \(did you mean"),
        ({"to": "pyreft"}, "only read; these are written"),
        ({"rank": 8}, "--rank: peft has no use for it; .* is for --to hf-steerable"),
        ({"dtype": "float32"}, "--dtype: peft has no use for it"),
        ({"over": "somewhere"}, "--over: peft has no use for it"),
        ({"name": "mine"}, "--name: peft has no use for it"),
        ({"rank": -1}, "--rank is -1; expected an integer above 0"),
        *(({"to": "adapters", "name": name}, "--name is") for name in ("../x", "", "a.b", "x" * 300, "\n")),
        ({"to": "vllm"}, "--over FOLDER is missing"),
        ({"to": "vllm", "over": "/nope"}, "--over /nope: no such folder"),
        ({"to": "hf", "dtype": "foo"}, "--dtype foo: these folders hold"),
        ({"alpha": float("nan")}, "--alpha is nan"),
        ({"alpha": 2.0}, "--alpha: has no meaning for the format jaxsteer"),
        ({"positions": "here"}, "unknown positions 'here'"),
        ({"activation": "foo"}, "--activation is 'foo'"),
        ({"feature": -3}, "--feature is -3"),
        ({"fit_lora": 0}, "--fit-lora 0: expected a rank"),
        ({"fit_lora": 10**6}, "--fit-lora: LoRA can express every slot"),
        ({"text": "/nope"}, "--text /nope: no such file"),
        ({"text": os.devnull}, "--text /dev/null: no such file"),
        ({"push": "nonsense"}, "--push nonsense: not an id"),
        ({"push": "me/it"}, "--push me/it: not logged in"),
        ({"verify": True, "peer_python": "/nope"}, "there is no Python at /nope"),
        ({"source_format": "foo"}, "no format 'foo'"),
        ({"model": "/nope"}, "no such folder"),
    ],
)
def test_refused_before_weights_are_read(lora, tmp_path, no_weights, monkeypatch, options, words):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    options = {"source": lora, "out": tmp_path / "out", "to": "peft", **options}
    with pytest.raises(ValueError, match=words):
        command(**options)
    assert not list(tmp_path.iterdir())


def test_a_text_is_refused_before_weights_are_read(lora, tmp_path, no_weights):
    for name, data, words in (("short", b"hi", "2 tokens; at least"), ("binary", b"\xff\0" * 99, "not UTF-8")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            command(lora, tmp_path / "out", text=str(tmp_path / name))


def test_of_a_large_text_only_the_beginning_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "TEXT", 8)
    (tmp_path / "text").write_text("äöüßäöü")
    assert convert.read_text(tmp_path / "text") == "äöüß"
    (tmp_path / "cut").write_bytes("äöü".encode()[:-1])
    with pytest.raises(ValueError, match="not UTF-8"):
        convert.read_text(tmp_path / "cut")


def test_where_nothing_can_be_written(lora, tmp_path, no_weights, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path / "link", "is a file"),
        (lora, "exists already"),
        (".", "is the folder of this shell"),
        ("..", "exists already"),
        ("/", "exists already"),
    ):
        with pytest.raises(ValueError, match=words):
            command(lora, out)
    monkeypatch.setattr(os, "access", lambda *rest: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        command(lora, tmp_path / "new")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_lora_is_not_fitted_to_what_a_plain_text_does_not_steer(block, tmp_path, no_weights):
    """A text has no completion, so that the steering would do nothing there, and a LoRA that is zero would be exact."""
    with pytest.raises(ValueError, match="steers positions completion"):
        command(block, tmp_path / "out", to="peft", fit_lora=2)


def test_runs_without_steering_say_why(tmp_path, tiny_folder, no_weights):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has not finished"):
        command(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "model").symlink_to(tiny_folder)
    with pytest.raises(ValueError, match="trained the model itself; give "):
        command(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="in none of the formats"):
        command(tmp_path, tmp_path / "out")


def test_what_the_files_do_not_hold_is_said(lora, tmp_path, capsys):
    command(lora, tmp_path / "hf", to="hf", dtype="bfloat16")
    said = capsys.readouterr().out
    assert "rounded to bfloat16" in said
    assert "merged into the weights" in said
    assert "approximate" in said


def test_an_odd_tokenizer_in_the_notes(tmp_path, tiny_folder, no_weights):
    run = run_of(tmp_path, tiny_folder, LORA, notes={"config": {"tokenizer": 3}})
    with pytest.raises(ValueError, match="name the tokenizer 3"):
        command(run, tmp_path / "out")


def test_the_sidecar_names_the_format_of_a_folder_with_more(lora, block, tmp_path):
    command(lora, tmp_path / "out", to="peft")
    shutil.copy(block / "steering.safetensors", tmp_path / "out")
    steered = jaxsteer.load(tmp_path / "out")
    assert steered.plan[0].sites == ("attn.q", "mlp.down")
    assert json.loads((tmp_path / "out" / NAME).read_text())["format"] == "peft"


def test_interrupted_while_writing(lora, tmp_path, monkeypatch):
    """Ctrl-C ends the process where it is: what is half written is deleted first."""
    row = FORMATS["peft"]

    def write(*rest):
        row.write(*rest)
        assert list(tmp_path.iterdir())
        for action in interrupts._state.undone:
            action()
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "peft", dataclasses.replace(row, write=write))
    with pytest.raises(KeyboardInterrupt):
        command(lora, tmp_path / "out", to="peft")
    assert not list(tmp_path.iterdir())


def test_a_peer_does_not_outlive_ctrl_c(tmp_path):
    code = (
        "import sys, threading; from pathlib import Path\n"
        "from train import peers; from train.devices import interrupts\n"
        "def stop():\n"
        "    while not (Path(sys.argv[1]).exists() and interrupts._state.undone): pass\n"
        "    interrupts.leave(130)\n"
        "threading.Thread(target=stop).start()\n"
        "peers._run(['/bin/sh', '-c', 'echo $$ > ' + sys.argv[1] + '.x; mv ' + sys.argv[1] + '.x ' + sys.argv[1] + "
        "'; sleep 60'], '', '.', 'sh', 60)"
    )
    root = Path(peers.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "pid")], cwd=root, timeout=50)
    assert done.returncode == 130
    number = int((tmp_path / "pid").read_text())
    for _ in range(100):
        with suppress(ProcessLookupError):
            os.kill(number, 0)
            if Path(f"/proc/{number}/stat").read_text().split()[2] != "Z":
                time.sleep(0.05)
                continue
        return
    os.kill(number, signal.SIGKILL)
    pytest.fail("it is still running")


def test_a_fit_needs_text_of_its_own(tiny_folder, tmp_path, no_weights):
    """The result is compared on other text than the fit has seen."""
    run, text = run_of(tmp_path, tiny_folder, "nonlinear(rank=2) @ block"), tmp_path / "text"
    text.write_text("a b c " * 60)
    with pytest.raises(ValueError, match=r"at least 1024 are needed, to fit to others"):
        command(run, tmp_path / "out", to="peft", fit_lora=2, text=str(text))


@pytest.mark.slow
def test_a_fitted_lora_comes_near(tiny_folder, tmp_path, capsys):
    run, text = run_of(tmp_path, tiny_folder, "nonlinear(rank=2) @ block", LORA), tmp_path / "text"
    draw = np.random.default_rng(0)
    text.write_text(" ".join(map(str, draw.integers(0, 1000, 3000))))
    command(run, tmp_path / "out", to="peft", fit_lora=4, text=str(text))
    said = capsys.readouterr().out
    assert "approximate: KL" in said
    assert "the slots (nonlinear) are approximated by a LoRA of rank 4" in said
    verdict = json.loads((tmp_path / "out" / NAME).read_text())["verdict"]
    assert 0 < verdict["logit_difference"] < verdict["moved"]
