"""Static steering after the blocks: every leaf comes back, the code fits the family, damaged folders are refused."""

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from exported import family_model, logits, read_again, refusals, steered_of, written
from tiny import identical

import jaxsteer
from jaxsteer.io import SteeredModel, WriteOptions, load_model
from jaxsteer.io.files import read_json
from jaxsteer.io.formats import FORMATS, hf_steered
from jaxsteer.io.formats.remote_code import _template
from jaxsteer.models.families import FAMILIES
from jaxsteer.plans import parse_plan

HF, HF_STEERED = FORMATS["hf"], FORMATS["hf-steered"]
TOKENS = np.arange(3, 13)[None]

EVERY = (
    "nonlinear(rank=3, alpha=2.0, activation=gelu) @ block layers=0,2 name=first",
    "fixed @ block layers=1",
    "linear(rank=2) @ block",
    "loreft(rank=2, activation=tanh) @ block",
    "direft(rank=2) @ block layers=0",
)


def export(golden, folder, family="llama", texts=EVERY, **options):
    whole = steered_of(family_model(golden, family), *texts)
    return whole, written(HF_STEERED, whole, folder, **options)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_every_method_comes_back_bit_for_bit(golden, tmp_path, family):
    whole, _ = export(golden, tmp_path, family)
    assert HF_STEERED.recognises(tmp_path)
    assert not HF.recognises(tmp_path)
    read = read_again(HF_STEERED, tmp_path)
    assert read.plan == whole.plan
    identical(read.steering, whole.steering)
    identical(read.base, whole.base)
    assert read.loaded.config == whole.loaded.config
    assert read.loaded.family == family


def test_a_bf16_base_keeps_fp32_steering(golden, tmp_path):
    whole, reduced = export(golden, tmp_path, dtype="bfloat16")
    read = read_again(HF_STEERED, tmp_path)
    identical(read.steering, whole.steering)
    assert read_json(tmp_path / "config.json")["dtype"] == "bfloat16"
    assert reduced.base["embed"]["embedding"].dtype == "bfloat16"


def test_other_slots_are_merged(golden, tmp_path):
    whole, _ = export(golden, tmp_path, texts=("lora(rank=2) @ mlp.down", "linear(rank=2) @ mlp", "nonlinear @ block"))
    read = read_again(HF_STEERED, tmp_path)
    assert [slot.name for slot in read.plan] == ["nonlinear"]
    assert abs(logits(read, TOKENS) - logits(whole, TOKENS)).max() < 1e-5


def test_a_slot_after_the_block_and_elsewhere_is_divided(golden, tmp_path):
    whole, _ = export(golden, tmp_path, texts=("linear(rank=2) @ mlp,block",))
    read = read_again(HF_STEERED, tmp_path)
    assert [slot.sites for slot in read.plan] == [("block",)]
    assert abs(logits(read, TOKENS) - logits(whole, TOKENS)).max() < 1e-5


def test_nothing_else_loads_it_as_the_bare_model(golden, tmp_path):
    export(golden, tmp_path)
    with pytest.raises(ValueError, match=r"load both with jaxsteer\.load"):
        load_model(tmp_path)
    assert isinstance(jaxsteer.load(tmp_path), SteeredModel)
    config = read_json(tmp_path / "config.json")
    assert config["model_type"] == "jaxsteer_llama"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def classes_in(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_names_classes_of_transformers(golden, tmp_path, family):
    export(golden, tmp_path, family, texts=("fixed @ block",))
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    tree = ast.parse((tmp_path / "modeling_jaxsteer.py").read_text())
    imports = {node.module: [a.name for a in node.names] for node in tree.body if isinstance(node, ast.ImportFrom)}
    known = classes_in(models / family / f"modeling_{family}.py") | classes_in(
        models / family / f"configuration_{family}.py"
    )
    assert set(imports["transformers"]) <= known
    assert set(imports[f"transformers.models.{family}.modeling_{family}"]) <= known
    ours = classes_in(tmp_path / "modeling_jaxsteer.py")
    config = read_json(tmp_path / "config.json")
    assert {name.split(".")[1] for name in config["auto_map"].values()} <= ours
    assert config["architectures"][0] in ours - known


def test_names_of_a_person_stay_out_of_the_code(golden, tmp_path):
    slots = 'fixed @ block name=$stem""";import(os)'
    whole = steered_of(family_model(golden, "llama"), "fixed @ block")
    plan = parse_plan([slots], whole.loaded.config)
    other = SteeredModel(whole.loaded, plan, {plan[0].name: whole.steering["fixed"]})
    for name, model in (("plain", whole), ("hostile", other)):
        HF_STEERED.write(model, tmp_path / name, WriteOptions())
    code = [(tmp_path / name / "modeling_jaxsteer.py").read_text() for name in ("plain", "hostile")]
    assert code[0] == code[1]
    assert read_again(HF_STEERED, tmp_path / "hostile").plan == plan


def test_refusals(golden):
    llama = family_model(golden, "llama")
    (reason,) = refusals(HF_STEERED, llama, "nonlinear @ block positions=last:1")
    assert "steers positions last:1" in reason
    assert reason.endswith("Use jaxsteer itself")
    (reason,) = refusals(HF_STEERED, llama, "nonlinear @ block", "nonlinear @ attn name=inside")
    assert reason.startswith("slot 'inside' (nonlinear @ attn)")
    assert "--to hf-steered" in reason
    (reason,) = refusals(HF_STEERED, llama, "lora @ attn.q")
    assert reason.endswith("--to hf")
    assert refusals(HF_STEERED, llama, "fixed @ block", dtype="Q8_0")[0].startswith("--dtype")


def broken(entry, *path):
    """A change of the description of the steering in config.json."""

    def change(about):
        at = about
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = entry

    return change


CHANGES = {
    "no plan": broken(None, "plan"),
    "a number": broken(3, "plan"),
    "an alpha of text": broken("2", "plan", 0, "method", "alpha"),
    "an infinite alpha": broken(float("inf"), "plan", 0, "method", "alpha"),
    "a true rank": broken(True, "plan", 0, "method", "rank"),
    "a huge rank": broken(10**9, "plan", 0, "method", "rank"),
    "another rank": broken(2, "plan", 0, "method", "rank"),
    "an unknown method": broken("os.system", "plan", 0, "method", "name"),
    "layers of text": broken(["0"], "plan", 0, "layers"),
    "layers beyond": broken([0, 99], "plan", 0, "layers"),
    "more layers": broken([0, 1, 2], "plan", 0, "layers"),
    "another site": broken(["attn"], "plan", 0, "sites"),
    "positions": broken("prompt", "plan", 0, "positions"),
    "a name that is a list": broken([], "plan", 0, "name"),
    "a slot too few": lambda about: about["plan"].pop(),
    "another kind": broken("steerable", "kind"),
}


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered")
    export(golden, folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_descriptions_are_refused(folder, tmp_path, change):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = read_json(folder / "config.json")
    CHANGES[change](config["jaxsteer"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_again(HF_STEERED, tmp_path)


def test_only_methods_of_the_template_are_held(monkeypatch, golden):
    """A method that someone adds is refused until the template computes it."""
    template = _template("steered")
    assert ast.literal_eval(template[template.index("{") : template.index("}") + 1]).keys() == set(hf_steered.HELD)
    monkeypatch.setattr(hf_steered, "HELD", ("fixed",))
    (reason,) = refusals(FORMATS["hf-steered"], family_model(golden, "llama"), "linear @ block")
    assert "linear @ block is not among" in reason
