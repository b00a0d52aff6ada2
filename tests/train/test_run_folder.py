"""A folder belongs to one run: every way to mix two is refused with what to do instead."""

import json
import math

import pytest

from jaxsteer.io.files import write_json
from train.run.folder import RunFolder, locked, open_run

CONFIG = {"model": "tiny", "optim": {"lr": 0.1, "warmup": 0.03}, "layers": (1, 2), "plan": []}
STEP = '{"step": 1, "loss": 2.5}\n'


def test_a_new_run(tmp_path):
    run = open_run(tmp_path / "deep" / "run", CONFIG, resume=False)
    assert json.loads(run.config.read_text()) == json.loads(json.dumps(CONFIG))
    paths = [run.config, run.checkpoints, run.metrics, run.plot, run.steering, run.summary]
    assert len(set(paths)) == 6
    assert all(path.parent == run.folder for path in paths)
    assert [file.name for file in run.folder.iterdir()] == ["config.json"]


def test_resuming_needs_the_same_settings(tmp_path):
    run = open_run(tmp_path, CONFIG, resume=False)
    run.metrics.write_text(STEP)
    before = run.config.read_bytes()
    assert open_run(tmp_path, CONFIG, resume=True) == run == RunFolder(tmp_path)
    other = {**CONFIG, "optim": {"lr": 0.2, "warmup": 0.03}, "seed": 1, "layers": [1, 3]}
    for resume in (False, True):
        with pytest.raises(ValueError, match="other settings") as caught:
            open_run(tmp_path, other, resume=resume)
        text = str(caught.value)
        assert "optim.lr is 0.1 there, 0.2 here" in text
        assert "seed is missing there, 1 here" in text
        assert "layers is [1, 2] there, [1, 3] here" in text
        assert "warmup" not in text
        assert "another --out" in text
        assert str(tmp_path) in text
    assert run.config.read_bytes() == before


def test_a_run_of_another_version_is_refused_with_a_sentence(tmp_path):
    open_run(tmp_path, CONFIG | {"rows": 8, "accumulate": 1}, resume=False).metrics.write_text(STEP)
    with pytest.raises(ValueError, match=r"another version of jaxsteer.*\(accumulate, rows\).*another --out"):
        open_run(tmp_path, CONFIG | {"batch_size": 8}, resume=True)


def test_the_same_run_is_not_begun_twice(tmp_path):
    open_run(tmp_path, CONFIG, resume=False).metrics.write_text(STEP)
    with pytest.raises(ValueError, match="--resume to continue it, or another --out"):
        open_run(tmp_path, CONFIG, resume=False)


def test_settings_that_never_began_to_train_do_not_block_the_folder(tmp_path):
    open_run(tmp_path, CONFIG | {"plan": "mistyped"}, resume=False)
    run = open_run(tmp_path, CONFIG, resume=False)
    assert "mistyped" not in run.config.read_text()


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("kept")
    with pytest.raises(ValueError, match="a file, but runs need a folder"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "kept"


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        open_run(tmp_path / "none", CONFIG, resume=True)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"neither empty nor a run \(holds thesis.tex\)"):
        open_run(tmp_path, CONFIG, resume=False)
    with pytest.raises(ValueError, match="need a folder"):
        open_run(tmp_path / "thesis.tex", CONFIG, resume=False)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_process_killed_while_it_began_does_not_block_the_folder(tmp_path):
    (tmp_path / ".config.json.123.partial").write_text('{"mod')
    assert open_run(tmp_path, CONFIG, resume=False).config.exists()


@pytest.mark.parametrize("there", ['{"model": ', "[]", ""])
def test_a_damaged_config_is_named(tmp_path, there):
    (tmp_path / "config.json").write_text(there)
    with pytest.raises(ValueError, match=r"config\.json"):
        open_run(tmp_path, CONFIG, resume=True)


def test_a_switch_is_not_a_number(tmp_path):
    open_run(tmp_path, {"train": True, "steps": 1}, resume=False)
    open_run(tmp_path, {"train": True, "steps": 1.0}, resume=True)
    with pytest.raises(ValueError, match="train is true there, 1 here"):
        open_run(tmp_path, {"train": 1, "steps": 1}, resume=True)


@pytest.mark.parametrize("value", [object(), math.nan])
def test_a_config_must_be_json(tmp_path, value):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        open_run(tmp_path / "run", {"odd": value}, resume=False)
    assert not (tmp_path / "run").exists()


def test_write_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"accuracy": 0.5, "loss": math.nan, "deep": [{"x": -math.inf}]})
    assert json.loads(path.read_text()) == {"accuracy": 0.5, "loss": "NaN", "deep": [{"x": "-Infinity"}]}
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_json(path, {"odd": object()})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
