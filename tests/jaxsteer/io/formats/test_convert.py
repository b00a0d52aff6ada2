"""Export and load around any format: refusals, verdicts, folders that are whole or absent, plans that come back."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import fast_jit, identical, random_steering

import jaxsteer
from jaxsteer import parse_plan
from jaxsteer.interventions import METHODS, LoRA, NonlinearSteering
from jaxsteer.io import SteeredModel, check_export, export, load_model, save_hf, save_steering
from jaxsteer.io.files import new_folder
from jaxsteer.io.formats import FORMATS, convert
from jaxsteer.io.formats.sidecar import NAME, restore
from jaxsteer.io.formats.updates import as_lora, refuse_lora
from jaxsteer.models.quantise import is_quantised, quantise

JOINT = ("lora(rank=2, alpha=3) @ attn.q,mlp.down layers=0,2", "nonlinear(rank=2, alpha=0.5) @ block")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tiny_config, tiny_base):
    """A tiny model in a folder, as it is loaded from there."""
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, tiny_config, tiny_base, "llama")
    return load_model(folder)


def steered(loaded, *texts, source=""):
    plan = parse_plan(texts, loaded.config)
    return SteeredModel(loaded, plan, random_steering(plan, loaded.config), source, {"date": "2026-01-01"})


def same(got, want):
    assert got.plan == want.plan
    identical(got.steering, want.steering)


def test_what_is_exported_comes_back(loaded, tmp_path):
    want = steered(loaded, *JOINT)
    verdict = export(want, "jaxsteer", tmp_path / "out")
    assert verdict.verbatim
    assert verdict.exact
    assert verdict.logit_difference == 0
    assert verdict.moved > 0.1
    assert 0 < verdict.bf16.base_kl < 0.1
    assert 0 < verdict.bf16.kl < 0.1
    assert "computed in bf16" in str(verdict)
    got = jaxsteer.load(tmp_path / "out", loaded)
    same(got, want)
    assert got.notes == want.notes
    np.testing.assert_array_equal(
        got.network(batch := jaxsteer.make_batch(np.zeros((1, 3), np.int32))).hidden, want.network(batch).hidden
    )
    record = json.loads((tmp_path / "out" / NAME).read_text())
    assert record["verdict"]["exactness"] == "exact"
    assert set(record["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {NAME}


def test_another_base_is_refused(loaded, tmp_path, tiny_config, tiny_base):
    export(steered(loaded, *JOINT), "jaxsteer", tmp_path / "out")
    save_hf(tmp_path / "other", tiny_config, jax.tree.map(lambda leaf: leaf * 1.5, tiny_base), "llama")
    with pytest.raises(ValueError, match="which is another model"):
        jaxsteer.load(tmp_path / "out", tmp_path / "other")
    assert jaxsteer.load(tmp_path / "out", tmp_path / "other", other_base=True).plan
    with pytest.raises(ValueError, match=r"cannot be loaded .*--model"):
        jaxsteer.load(tmp_path / "out")


def test_a_steering_file_alone_knows_its_base(loaded, tmp_path, tiny_config, tiny_base):
    want, file = steered(loaded, *JOINT), tmp_path / "steering.safetensors"
    keep = {"model_name": str(tmp_path / "base"), "config": tiny_config, "sample": loaded.sample}
    save_steering(file, want.steering, want.plan, **keep, notes={"config": {"quantise": "int8"}})
    save_hf(tmp_path / "base", tiny_config, tiny_base, "llama")
    save_hf(tmp_path / "other", tiny_config, jax.tree.map(lambda leaf: leaf * 1.5, tiny_base), "llama")
    got = jaxsteer.load(file)
    same(got, want)
    assert is_quantised(got.base)  # as in training
    with pytest.raises(ValueError, match="another model"):
        jaxsteer.load(file, tmp_path / "other")
    assert jaxsteer.load(file, tmp_path / "other", other_base=True).source == str(tmp_path / "other")


def test_an_id_of_the_hub(loaded, tmp_path, monkeypatch):
    want, asked = steered(loaded, *JOINT), []
    about = {"model_name": "tiny", "config": loaded.config, "sample": loaded.sample}
    save_steering(tmp_path / "steering.safetensors", want.steering, want.plan, **about)
    download = lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    same(jaxsteer.load("owner/steering", loaded), want)
    ((name, patterns),) = asked
    assert name == "owner/steering"
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in patterns)
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in ("steering.safetensors", NAME))


def test_a_folder_in_use_is_left_alone(loaded, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export(steered(loaded, *JOINT), "jaxsteer", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("to", "word"), [("pft", "no format 'pft' .did you mean"), ("jaxsteer", "there is no steering to write")]
)
def test_what_cannot_be_written_is_refused(loaded, tmp_path, to, word):
    with pytest.raises(ValueError, match=word):
        export(SteeredModel(loaded), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_steerable_base_is_compared_with_the_base(loaded, tmp_path):
    """It holds no steering: that comes with the adapters over it."""
    verdict = export(steered(loaded, *JOINT), "hf-steerable", tmp_path / "out")
    assert verdict.exact
    assert verdict.moved == 0
    assert not verdict.lost
    assert [slot.name for slot in jaxsteer.load(tmp_path / "out").plan] == ["steering"]


def test_an_int8_base_is_refused(loaded, tmp_path):
    model = replace(loaded, base=quantise(loaded.base))
    with pytest.raises(ValueError, match="int8"):
        export(steered(model, *JOINT), "jaxsteer", tmp_path / "out")


def test_what_is_read_otherwise_is_not_kept(loaded, tmp_path, monkeypatch):
    """A writer that errs is found out before the folder has its name."""
    row = FORMATS["jaxsteer"]
    double = lambda model, options: replace(model, steering=jax.tree.map(lambda leaf: 2 * leaf, model.steering))
    write = lambda model, folder, options: row.write(double(model, options), folder, options)
    monkeypatch.setitem(FORMATS, "jaxsteer", replace(row, write=write))
    with pytest.raises(RuntimeError, match="other values"):
        export(steered(loaded, *JOINT), "jaxsteer", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_lossy_export_says_how_far_it_is(loaded, tmp_path, monkeypatch):
    row = FORMATS["jaxsteer"]
    half = lambda model, options: replace(model, steering=jax.tree.map(lambda leaf: leaf / 2, model.steering))
    monkeypatch.setitem(FORMATS, "jaxsteer", replace(row, reduce=half))
    verdict = export(steered(loaded, *JOINT), "jaxsteer", tmp_path / "out")
    assert not verdict.exact
    assert not verdict.verbatim
    assert verdict.kl > 1e-4
    assert 0 < verdict.logit_difference < verdict.moved
    assert "approximate: KL" in str(verdict)


def test_killed_while_exporting(loaded, tmp_path):
    """The folder does not exist under its name until it is complete; the next export removes what was left."""
    code = (
        "import os, signal, sys; from pathlib import Path; from jaxsteer.io.files import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    out = tmp_path / "out"
    root = Path(convert.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(os.listdir(tmp_path)) == 1
    export(steered(loaded, *JOINT), "jaxsteer", out)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "texts",
    [
        ("lora(rank=2, alpha=3) @ attn.q,mlp.down layers=0,2", "rslora(rank=3) @ attn.v name=other"),
        ("pissa(rank=2) @ attn.o",),
        ("dora(rank=2) @ mlp.up layers=1",),
    ],
    ids=["lora", "pissa", "dora"],
)
def test_a_plan_comes_back_from_plain_lora(loaded, texts):
    want = steered(loaded, *texts)
    reduced = as_lora(want)
    assert reduced.plan != want.plan
    same(restore(want.plan, reduced), want)


def test_padded_ranks_come_back(loaded):
    want = steered(loaded, "nonlinear(rank=2, alpha=0.5) @ block layers=1,2")
    (slot,) = want.plan
    widen = {"D": ((0, 0), (0, 3), (0, 0)), "U": ((0, 0), (0, 0), (0, 3))}
    leaves = {name: np.pad(leaf, widen[name]) for name, leaf in want.steering[slot.name]["block"].items()}
    wide = dataclasses.replace(slot, name="steer", method=NonlinearSteering(rank=5, alpha=0.5))
    padded = replace(want, plan=(wide,), steering={"steer": {"block": leaves}})
    same(restore(want.plan, padded), want)
    leaves["D"][0, 4, 0] = leaves["U"][0, 0, 4] = 1.0
    assert restore(want.plan, padded).plan == (wide,)


def test_another_plan_does_not_come_back(loaded):
    reduced = as_lora(steered(loaded, "lora(rank=2, alpha=3) @ attn.q"))
    for text in ("lora(rank=2, alpha=4) @ attn.q", "lora(rank=2, alpha=3) @ attn.k", "lora(rank=3, alpha=3) @ attn.q"):
        assert restore(parse_plan([text], loaded.config), reduced).plan == reduced.plan


@pytest.mark.parametrize(
    "texts",
    [
        ("pissa(rank=2) @ mlp.up", "lora(rank=4) @ mlp.up,attn.o", "linear(rank=2) @ attn"),
        ("dora(rank=2) @ attn.o", "linear(rank=2) @ mlp.in", "linear(rank=1, alpha=3) @ mlp.in name=second layers=1"),
        ("linear(rank=2) @ mlp", "lora(rank=3) @ mlp.down layers=0,1"),
    ],
    ids=["weights", "inputs", "outputs"],
)
def test_affine_steering_and_updates_are_lora(loaded, texts):
    want = steered(loaded, *texts)
    assert not refuse_lora(want.plan, loaded.config)
    got = as_lora(want)
    assert {type(slot.method).__name__ for slot in got.plan} <= {"LoRA", "DoRA"}
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (2, 5), np.int32)
    hidden = lambda model: fast_jit(lambda network: network(jaxsteer.make_batch(tokens)).hidden)(model.network)
    np.testing.assert_allclose(hidden(got), hidden(want), atol=3e-6)


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["nonlinear @ block"], "--to hf-steered"),
        (["linear @ block"], "--fit-lora RANK"),
        (["fixed @ mlp"], "a shift needs a bias"),
        (["lofit_scale @ attn.heads"], "a scale has full rank"),
        (["lora @ attn.q positions=last"], "updates positions last"),
        (["dora @ attn.o", "lora @ attn.o"], "DoRA depends"),
    ],
)
def test_what_is_no_lora_is_refused_with_an_alternative(tiny_config, texts, word):
    reasons = refuse_lora(parse_plan(texts, tiny_config), tiny_config)
    assert len(reasons) == 1
    assert word in reasons[0]


def test_pissa_comes_back_from_a_steering_file(loaded, tmp_path):
    want = steered(loaded, "pissa(rank=2) @ attn.q")
    assert export(want, "jaxsteer", tmp_path / "out").verbatim
    same(jaxsteer.load(tmp_path / "out", loaded), want)


@pytest.mark.parametrize(
    "change",
    [{"positions": "last"}, {"layers": [99]}, {"sites": []}, {"sites": ["attn.k"]}, {"method": {"name": "fixed"}}],
)
def test_a_plan_that_is_not_that_of_the_files_is_left_out(loaded, tmp_path, change):
    """The files say what is computed, whatever jaxsteer.json says."""
    export(steered(loaded, "lora(rank=2, alpha=3) @ attn.q"), "peft", tmp_path / "out")
    record = json.loads((tmp_path / "out" / NAME).read_text())
    record["plan"][0] |= {"name": "edited"} | change
    (tmp_path / "out" / NAME).write_text(json.dumps(record))
    (slot,) = jaxsteer.load(tmp_path / "out", loaded).plan
    assert (slot.name, slot.sites, slot.layers, slot.positions.kind) == ("lora", ("attn.q",), None, "all")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan", None),
        ("plan", [None]),
        ("plan", [{"name": 1}]),
        ("plan", [{"name": "a", "method": {"name": "lora", "rank": True}, "sites": ["attn.q"], "positions": "all"}]),
        ("plan", [{"name": "a", "method": {"name": "lora", "alpha": "x"}, "sites": ["attn.q"], "positions": "all"}]),
        ("lost", "text"),
        ("notes", []),
        ("base", None),
    ],
)
def test_a_damaged_sidecar_is_refused(loaded, tmp_path, field, value):
    export(steered(loaded, "lora(rank=2, alpha=3) @ attn.q"), "peft", tmp_path / "out")
    record = json.loads((tmp_path / "out" / NAME).read_text())
    (tmp_path / "out" / NAME).write_text(json.dumps(record | {field: value}))
    with pytest.raises(ValueError, match=rf"{NAME}: cannot be read .*delete it"):
        jaxsteer.load(tmp_path / "out", loaded)


def test_steering_and_tokens_that_do_not_fit(loaded, tmp_path):
    want = steered(loaded, "lora(rank=2, alpha=3) @ attn.q")
    for changed, words in (
        ({}, "is missing"),
        (jax.tree.map(lambda leaf: leaf[:1], want.steering), "has shape"),
        (jax.tree.map(lambda leaf: leaf * np.nan, want.steering), "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            export(replace(want, steering=changed), "peft", tmp_path / "out")
    for tokens in (np.zeros(4, np.int32), np.zeros((1, 4)), np.zeros((0, 4), np.int32), np.full((1, 4), 10**6)):
        with pytest.raises(ValueError, match="tokens: "):
            export(want, "peft", tmp_path / "out", tokens=tokens)
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_folder(tmp_path):
    """The second is refused, and the first one's files stay."""
    out = tmp_path / "out"
    with new_folder(out) as partial:
        (partial / "half").write_text("x")
        with pytest.raises(ValueError, match="another process is writing"), new_folder(out):
            pass
    assert [path.name for path in out.iterdir()] == ["half"]
    assert not list(tmp_path.glob(".*"))


@dataclasses.dataclass(frozen=True)
class Doubled(LoRA):
    """A weight method that says nothing of factors."""

    def factors(self, p):
        return None


def test_an_update_that_is_no_product_is_refused(tiny_config, monkeypatch):
    monkeypatch.setitem(METHODS, "doubled", Doubled)
    (reason,) = refuse_lora(parse_plan(["doubled @ attn.q"], tiny_config), tiny_config)
    assert "no product of two factors; merge it (--to hf)" in reason


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_weights_that_depend_on_each_other_are_refused_before_they_are_read(loaded, to):
    """DoRA beside LoRA on one projection: nothing merges both, and no weights are needed to know."""
    plan = parse_plan(["dora @ attn.o", "lora @ attn.o"], loaded.config)
    shapes = jax.eval_shape(lambda: loaded.base)
    with pytest.raises(ValueError, match="depends on kernels that other slots are merged into"):
        check_export(to, plan, replace(loaded, base=shapes))
