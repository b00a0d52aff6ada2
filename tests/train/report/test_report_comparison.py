"""The report on several runs."""

import shutil
from dataclasses import replace

from parsed_page import page_of
from run_folders import CONFIG, answers, make_run

from jaxsteer.io.files import write_json
from jaxsteer.optim import OptimConfig
from train.evaluation.answers import write_answers
from train.run.folder import RunFolder


def test_several_runs_are_compared(finished, tmp_path):
    other = make_run(
        tmp_path / "other", replace(CONFIG, seed=1, optim=OptimConfig(lr=2e-2)), ["right"] * 6 + ["lost"] * 4
    )
    write_answers(
        other.answers_after, [replace(a, correct=a.source[-1] in "12") for a in answers(["right"] * 10, True)]
    )
    page = page_of(finished, other)
    assert "2 runs compared" in page.text
    differing = [row for row in page.texts("tr") if row.startswith(("optim.lr", "seed", "plan"))][:2]
    assert differing == ["optim.lr 0.01 0.02", "seed 0 1"]
    assert "other test examples" not in page.text
    assert "-60.0 points" in page.text
    charts = page.texts("figcaption")
    assert charts.count("Gradient norm before clipping, logarithmic") == 3  # together, and each
    assert "letters other, validation" not in page.text
    assert {"letters", "other", "letters, validation", "other, validation"} <= set(page.texts("li"))


def test_runs_of_one_name_are_told_apart(finished, run):
    names = [name for name in page_of(finished, run).texts("a") if name.endswith("letters")]
    assert names == [str(finished.folder), str(run.folder)]


def test_the_two_runs_of_lofit(finished, tmp_path):
    for stage in ("scale", "shift"):
        shutil.copytree(finished.folder, tmp_path / "lofit" / stage)
    write_json(tmp_path / "lofit" / "config.json", {"run": {}, "heads": 4, "share": 0.4})
    assert "2 runs compared" in page_of(RunFolder(tmp_path / "lofit")).text
