"""What is served, and which steering files may be read."""

import os
from dataclasses import replace

import pytest
from tiny import random_steering, slot_of
from tiny_model import TINY

from jaxsteer.io import load_steering, save_hf, save_steering
from train.serving.lineup import Refused, UnknownModel
from train.serving.models import Candidate, Roster, open_roster, parse_sources


@pytest.fixture
def roster(tiny_loaded, steering_files):
    roster = Roster(tiny_loaded, "tiny", places=3, folders=[steering_files])
    roster.start_with(Candidate(name, load_steering(steering_files / f"{name}.safetensors")) for name in "ab")
    return roster


def test_names(roster):
    assert roster.names() == ["tiny", "a", "b"]
    base, lora = roster.get("tiny"), roster.get("a")
    assert (base.adapter, base.plan, base.chat, base.template, base.date) == (None, (), True, "{prompt}", None)
    assert (lora.chat, lora.template, lora.max_new_tokens) == (False, "{prompt}>", 5)
    assert lora.slots == {"lora": "lora"}
    with pytest.raises(UnknownModel, match=r"no model 'tine' .did you mean tiny.*; there are tiny, a, b"):
        roster.get("tine")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, {}), (1, {}), (0.5, {"lora": 0.5, "shift": 0.5}), ({"shift": 0}, {"shift": 0.0}), ({"lora": 1.0}, {})],
)
def test_strengths(roster, steering_files, given, expected):
    roster.start_with([Candidate("d", load_steering(steering_files / "d.safetensors"))])
    assert roster.get("d").strength(given) == expected


@pytest.mark.parametrize("given", [{"lore": 2}, float("nan"), {"lora": "much"}, True, {"lora": True}])
def test_strengths_that_are_none(roster, given):
    with pytest.raises(ValueError, match=r"strength: .*(no slot 'lore' \(did you mean lora\?\)|finite)"):
        roster.get("a").strength(given)
    with pytest.raises(ValueError, match="tiny is not steered"):
        roster.get("tiny").strength(given)


# ---- reading


def test_reading_from_an_allowed_folder(roster, steering_files, tmp_path):
    assert roster.read("new", str(steering_files / "c.safetensors")).file.plan == roster.get("a").plan
    assert roster.read("new", f"{steering_files}/../{steering_files.name}/c.safetensors").name == "new"
    link = tmp_path / "link"
    link.symlink_to(steering_files)
    assert roster.read("new", str(link / "c.safetensors")).name == "new"


def test_what_is_outside_is_refused_in_the_same_words(roster, steering_files, tmp_path):
    """Whether it exists or not, and however it is reached."""
    outside = tmp_path / "c.safetensors"
    outside.write_bytes((steering_files / "c.safetensors").read_bytes())
    inside = steering_files / "links"
    inside.mkdir(exist_ok=True)
    links = {"file": outside, "folder": tmp_path, "loop": inside / "loop"}
    for name, target in links.items():
        if not (inside / name).is_symlink():
            (inside / name).symlink_to(target)
    run = inside / "run"
    run.mkdir(exist_ok=True)
    if not (run / "steering.safetensors").is_symlink():
        (run / "steering.safetensors").symlink_to(outside)
    said = set()
    for path in (
        outside,
        tmp_path / "nothing",
        inside / "file",
        inside / "folder" / "c.safetensors",
        inside / "folder" / "nothing",
        inside / "loop",
        run,
        steering_files / ".." / ".." / "etc" / "passwd",
        f"{steering_files}-sibling/c.safetensors",
        "zero\0byte",
        "none",
    ):
        with pytest.raises(Refused) as refused:
            roster.read("new", str(path))
        said.add(str(refused.value).replace(repr(str(path)), "PATH"))
    assert len(said) == 1, said
    for name in (*links, "run/steering.safetensors"):
        os.unlink(inside / name)


def test_without_folders_nothing_is_read(tiny_loaded, steering_files):
    with pytest.raises(Refused, match="switched off"):
        Roster(tiny_loaded, "tiny").read("a", str(steering_files / "a.safetensors"))


def test_files_that_cannot_be_served(roster, tiny_loaded, tmp_path, steering_files):
    roster = Roster(tiny_loaded, "tiny", folders=[tmp_path])
    (tmp_path / "text.txt").write_text("hello")
    good = load_steering(steering_files / "a.safetensors")
    save = lambda name, config=TINY, notes=None, steering=good.steering: save_steering(
        tmp_path / f"{name}.safetensors", steering, good.plan, model_name="x", config=config, notes=notes
    )
    save("other", replace(TINY, rope_theta=5.0))
    save("template", notes={"template": 7})
    save("int8", notes={"config": {"quantise": "int8"}})
    infinite = random_steering(good.plan, TINY, scale=float("inf"))
    save("infinite", steering=infinite)
    for name, said in {
        "nothing": "no such file",
        "text.txt": "not a steering file",
        "other.safetensors": "another model",
        "template.safetensors": "template=7",
        "int8.safetensors": "int8",
        "infinite.safetensors": "not finite",
    }.items():
        with pytest.raises(Refused, match=said):
            roster.read("new", str(tmp_path / name))


@pytest.mark.parametrize("name", ["", " a", "a\nb", "x" * 101, "tiny", "b"])
def test_names_that_cannot_be_given(roster, steering_files, name):
    with pytest.raises(Refused, match=r"not a name|base model's|taken"):
        roster.read(name, str(steering_files / "c.safetensors"))


# ---- from a command line


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (tmp_path / "lr=1").mkdir()
    assert parse_sources(["none"]) == {}
    given = [
        "runs/first",
        "kind=runs/second/steering.safetensors",
        "some/polite.safetensors",
        "lr=1",
        "a/b=c.safetensors",
    ]
    assert parse_sources(given) == {
        "first": "runs/first",
        "kind": "runs/second/steering.safetensors",
        "polite": "some/polite.safetensors",
        "lr=1": "lr=1",
        "b=c": "a/b=c.safetensors",
    }
    assert parse_sources(["runs/first/steering.safetensors"]) == {"first": "runs/first/steering.safetensors"}
    with pytest.raises(ValueError, match=r"two adapters would be named 'first'.*NAME=runs/first"):
        parse_sources(["first=x", "runs/first"])
    with pytest.raises(ValueError, match="leave out the word none"):
        parse_sources(["runs/first", "none"])
    with pytest.raises(ValueError, match="adapter '': not a name"):
        parse_sources(["=runs/first"])


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tiny_loaded):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_hf(folder, TINY, tiny_loaded.base, "llama", tiny_loaded.tokenizer)
    return folder


def test_a_roster_from_files(base_folder, steering_files):
    sources = {name: str(steering_files / f"{name}.safetensors") for name in "ab"}
    roster = open_roster(sources, str(base_folder), places=5, folders=[steering_files])
    assert roster.names() == ["tiny", "a", "b"]
    assert roster.adapters.names == ("a", "b", None, None, None)
    assert open_roster({}, str(base_folder)).names() == ["tiny"]


def test_rosters_that_cannot_be(base_folder, steering_files, tmp_path):
    sources = {name: str(steering_files / f"{name}.safetensors") for name in "ab"}
    plan = (slot_of("lora", TINY, slot="lora", sites=("attn.q",)),)
    config = replace(TINY, rope_theta=5.0)
    save_steering(tmp_path / "o.safetensors", random_steering(plan, config), plan, model_name="x", config=config)
    with pytest.raises(ValueError, match="2 adapters for 1 places"):
        open_roster(sources, str(base_folder), places=1)
    with pytest.raises(ValueError, match="another model"):
        open_roster({**sources, "o": str(tmp_path / "o.safetensors")}, str(base_folder))
    with pytest.raises(ValueError, match="no such folder"):
        open_roster(sources, str(base_folder), folders=[tmp_path / "nothing"])
    with pytest.raises(ValueError, match="which model"):
        open_roster({})
    with pytest.raises(ValueError, match="base model's"):
        open_roster({"tiny": sources["a"]}, str(base_folder))
