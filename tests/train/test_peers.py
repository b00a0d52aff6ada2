"""Running peers: with a program that answers what a test laid beside it, and with programs that fail in every way."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import fast_jit, random_steering
from tiny_model import TINY

import train.peers as peers
from jaxsteer.io import LoadedModel
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.transformer import init_base
from jaxsteer.plans import parse_plan
from train.peers import Probe, probe, run_peer, verify

PYTHON = Path(sys.executable)
NOWHERE = Path("nowhere").absolute()

ECHO = """
import json, shutil, sys
request = json.load(sys.stdin)
shutil.copy(request["path"] + "/values.npy", request["out"])
said = json.load(open(request["path"] + "/said.json"))
json.dump(request, open(request["path"] + "/request.json", "w"))
print("loading the model ...")
print(json.dumps(said))
print()
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """(name, code): add a peer's program."""
    monkeypatch.setattr(peers, "PROGRAMS", tmp_path)
    return lambda name, code: (tmp_path / f"{name}_peer.py").write_text(code)


@pytest.fixture
def answering(programs, tmp_path):
    """(values, said) -> the folder of an export of which the peer "echo" says this."""
    programs("echo", ECHO)

    def answer(values, **said):
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        np.save(folder / "values.npy", values)
        said = {"versions": {"echo": "1.2"}, "kind": "logits", "generated": []} | said
        (folder / "said.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
        return folder

    return answer


@pytest.fixture(scope="module")
def ours():
    """A probe of 3 rows of 4 tokens, of a vocabulary of 7, and 5 new tokens."""
    draw = np.random.default_rng(0)
    logits = draw.standard_normal((3, 4, 7), np.float32)
    margins = np.arange(15, dtype=np.float32).reshape(3, 5)
    return Probe(draw.integers(0, 7, (3, 4)), logits, draw.integers(0, 7, (3, 5)), margins)


def test_the_same_answer_has_no_difference(answering, ours):
    folder = answering(ours.logits, generated=ours.generated.tolist())
    assert verify("echo", folder, ours, python=PYTHON, base=Path("base"), dtype="bfloat16") == {
        "peer": "echo",
        "versions": {"echo": "1.2"},
        "dtype": "bfloat16",
        "compared": "logits",
        "positions": 12,
        "largest_difference": 0.0,
        "mean_difference": 0.0,
        "top1_agreement": 1.0,
        "answers": 3,
        "answers_agreeing": 3,
        "generated": 15,
        "generated_agreeing": 15,
        "largest_diverging_margin": None,
    }
    request = json.loads((folder / "request.json").read_text())
    assert request.pop("out").endswith(".npy")
    assert request == {
        "path": str(folder),
        "base": str(Path("base").absolute()),
        "tokens": ours.tokens.tolist(),
        "generate": 5,
        "dtype": "bfloat16",
    }


def test_differences_are_found(answering, ours):
    values = ours.logits.copy()
    values[1, 2, ours.logits[1, 2].argmin()] += 20
    generated = ours.generated.copy()
    generated[1, 2:] = (generated[1, 2:] + 1) % 7
    generated[2, 4] = (generated[2, 4] + 1) % 7
    found = verify("echo", answering(values, generated=generated.tolist()), ours, python=PYTHON)
    assert found["largest_difference"] == pytest.approx(20, abs=1e-5)
    assert found["mean_difference"] == pytest.approx(20 / ours.logits.size, rel=1e-5)
    assert found["top1_agreement"] == 11 / 12
    assert (found["answers_agreeing"], found["generated_agreeing"]) == (1, 5 + 2 + 4)
    assert found["largest_diverging_margin"] == ours.margins[2, 4]
    json.dumps(found)


def test_tokens_that_agree_by_chance_after_the_first_difference_do_not_count(answering, ours):
    generated = ours.generated.copy()
    generated[:, 0] = (generated[:, 0] + 1) % 7
    found = verify("echo", answering(ours.logits, generated=generated.tolist()), ours, python=PYTHON)
    assert found["generated_agreeing"] == found["answers_agreeing"] == 0
    assert found["largest_diverging_margin"] == ours.margins[2, 0]


def test_log_probabilities_are_compared_with_ours(answering, ours):
    values = np.asarray(jax.nn.log_softmax(ours.logits + 100, axis=-1))
    none = replace(ours, generated=np.zeros((3, 0), int), margins=np.zeros((3, 0)))
    found = verify("echo", answering(values, kind="logprobs"), none, python=PYTHON)
    assert found["compared"] == "logprobs"
    assert 0 < found["largest_difference"] < 1e-5
    assert "generated" not in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hidden"}, "expected an answer with versions and a kind"),
        ({"versions": None}, "expected an answer with versions and a kind"),
        ({"generated": [[1], [1, 2], []]}, "cannot be read"),
        ({"generated": [["a"]] * 3}, "rows of new tokens"),
        ({"generated": 5}, "cannot be read"),
        ({"generated": [[10**30]] * 3}, "rows of new tokens"),
        ({"generated": [[1, 2]] * 3}, r"tokens \[3, 2\]; this model has .* \[3, 5\]"),
        ({"generated": []}, r"tokens \[3, 0\]"),
        ({"values": np.zeros((3, 4, 8), np.float32)}, r"logits \[3, 4, 8\]"),
        ({"values": np.zeros((3, 4, 7))}, "expected float32"),
        ({"values": np.float32(1)}, "expected float32"),
        ({"values": np.full((3, 4, 7), np.nan, np.float32)}, "not finite in row 0"),
    ],
)
def test_answers_that_are_none(answering, ours, change, message):
    values = change.pop("values", ours.logits)
    folder = answering(values, **({"generated": ours.generated.tolist()} | change))
    with pytest.raises(ValueError, match=f"^echo: .*{message}"):
        verify("echo", folder, ours, python=PYTHON)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such folder')", r"failed with status 1: no such folder$"),
        (
            "import sys\nfor i in range(9): print(i, file=sys.stderr)\nsys.exit(3)",
            r"failed with status 3: 6 \| 7 \| 8$",
        ),
        ("raise SystemExit(2)", "failed with status 2: it said nothing"),
        (
            "import not_a_package.at_all",
            "does not have the package not_a_package; make the environment of bad with `make",
        ),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("print('half an ans')", "last line that it printed: not valid JSON"),
        ("", "last line that it printed: not valid JSON"),
        ("print('[' * 1000 + ']' * 1000)", "nested too deeply"),
        ("print('[1]')", "expected an answer with versions"),
        ('print(\'{"versions": {}, "kind": "logits"}\')', "cannot be read .*No such file"),
    ],
)
def test_programs_that_fail(programs, code, message):
    programs("bad", code)
    with pytest.raises(ValueError, match=f"^bad: .*{message}"):
        run_peer("bad", {}, PYTHON)


def test_a_peer_that_takes_too_long_is_stopped_with_its_children(programs, tmp_path):
    programs(
        "slow",
        "import subprocess, time\n"
        f"child = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)",
    )
    timeout = 0.3
    while not (tmp_path / "child").exists():  # on a busy machine it may not even have begun
        timeout *= 2
        with pytest.raises(ValueError, match=f"^slow: no answer within {timeout:g} seconds, so it was stopped"):
            run_peer("slow", {}, PYTHON, timeout=timeout)
    status = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    for _ in range(100):
        if not status.exists() or ") Z " in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the peer's child is alive")


def test_without_an_interpreter_the_message_says_how_to_get_one(programs, monkeypatch):
    programs("peft", "")
    monkeypatch.setattr(peers, "ENVIRONMENTS", NOWHERE)
    with pytest.raises(
        ValueError, match=r"nowhere/hf/bin/python; make the environment of hf with `make peers`.*--peer-py"
    ):
        run_peer("peft", {})
    with pytest.raises(ValueError, match="no peer of this name; there are peft"):
        run_peer("../peft", {})
    os.chmod(peers.PROGRAMS / "peft_peer.py", 0o600)
    with pytest.raises(ValueError, match=r"cannot be run \(Permission denied\)"):
        run_peer("peft", {}, peers.PROGRAMS / "peft_peer.py")


def test_a_peer_sees_nothing_of_this_environment(programs, monkeypatch, tmp_path):
    """Neither jaxsteer's folder nor the variables that name it, or else a peer could import what it lacks."""
    monkeypatch.setenv("PYTHONPATH", str(NOWHERE))
    programs("look", "import os, sys; sys.exit(f'{os.getcwd()} {os.environ.get(\"PYTHONPATH\")} {sys.path[0]}')")
    with pytest.raises(ValueError, match=rf"jaxsteer-peer-\w+ None {tmp_path}$"):
        run_peer("look", {}, PYTHON)


def test_our_own_probe():
    """Its continuations are greedy by logits that no cache was used for, however many rows there are."""
    plan = parse_plan(["nonlinear(rank=4) @ block"], TINY)
    base = fast_jit(init_base, static_argnums=0)(TINY, jax.random.key(0))
    steering = random_steering(plan, TINY, scale=0.3)
    draw = np.random.default_rng(1)
    loaded = LoadedModel(TINY, base, None, "tiny", "", "llama", ())
    tokens = draw.integers(0, TINY.vocab_size, (peers.ROWS + 1, 5))
    steered = SteeredModel(loaded, plan, steering)
    found = probe(steered, tokens, 3)
    assert found.logits.shape == (len(tokens), 5, TINY.vocab_size)
    longer = probe(steered, np.concatenate([tokens, found.generated], axis=1))
    np.testing.assert_allclose(longer.logits[:, :5], found.logits, atol=1e-5)
    np.testing.assert_array_equal(longer.logits[:, 4:7].argmax(-1), found.generated)
    second, first = np.sort(longer.logits[:, 4:7])[..., -2:].transpose(2, 0, 1)
    np.testing.assert_allclose(found.margins, first - second, atol=1e-5)
    assert longer.generated.shape == longer.margins.shape == (len(tokens), 0)
