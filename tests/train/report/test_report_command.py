"""The command `jaxsteer report`."""

import pytest

from train.report import __main__ as program


def test_the_command_writes_the_file(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(run.folder)])
    program.main()
    written = run.folder / "report.html"
    assert capsys.readouterr().out == f"report: {written}\n"
    assert written.read_text().startswith("<!doctype html>")


def test_a_run_that_only_has_a_report_can_start_over(run, monkeypatch):
    for path in run.folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    monkeypatch.setattr("sys.argv", ["report", str(run.folder)])
    program.main()
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "report.html"]
    assert not run.begun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which run"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "not a run"),
        (["PARENT"], r"holds runs but is none itself; give some of .*/"),
        (["RUN", "RUN"], "given twice"),
        (["RUN", "--out", "x.txt"], r"ends in \.html"),
        (["RUN", "--out", "no/x.html"], "there is no folder no"),
        (["RUN", "--examples", "-1"], "at least 0"),
    ],
)
def test_what_cannot_be_reported(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(run.folder), "PARENT": str(run.folder.parent)}
    monkeypatch.setattr("sys.argv", ["report", *(places.get(each, each) for each in arguments)])
    with pytest.raises(ValueError, match=message):
        program.main()
