"""Reports on runs that are unfinished, damaged, or of an earlier version."""

import pytest
from parsed_page import page_of
from run_folders import metrics, write_lines


def test_an_unfinished_run_says_so(run):
    for path in (run.summary, run.steering, run.answers_after):
        path.unlink()
    write_lines(run.metrics, metrics()[:12])
    page = page_of(run)
    assert page.texts(of="problem") == [
        "This run has not finished: it had done 11 of 40 steps when this report was made."
    ]
    assert "training loss" in page.text
    assert "10.0 % of 1,000 parameters" in page.text
    assert f"jaxsteer sft --resume --out {run.folder}" in page.texts("pre")
    assert page.texts("label") == []  # nothing to compare yet
    assert "gainedFalse" in page.text


def test_a_run_without_a_step(run):
    for path in run.folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert "it had done no step yet" in page_of(run).text


FILES = ("metrics", "summary", "inputs", "starts", "history", "steering")
ANSWERS = ("answers_before", "answers_after", "answers_during")
HALF_WRITTEN = ("metrics", "starts", "answers_during")  # a last line that was being written is no damage


@pytest.mark.parametrize(
    ("content", "accepted"),
    [
        (b"", ("metrics", "starts", "history", *ANSWERS)),
        (b"{", HALF_WRITTEN),
        (b"[1, 2]\n", ()),
        (b'{"step": "x"}\n{}\n', ()),
        (b"\xff\xfe\n", ()),
        (b'{"train": {"b": [null]}}\n', ()),
    ],
)
def test_damaged_files_become_sentences(run, content, accepted):
    for name in (*FILES, *ANSWERS):
        getattr(run, name).write_bytes(content)
    page = page_of(run)
    problems = page.texts(of="problem")
    named = {name for name in (*FILES, *ANSWERS) if any(getattr(run, name).name in each for each in problems)}
    assert named == {*FILES, *ANSWERS} - {*accepted}
    assert "Settings" in page.text


def test_a_damaged_config_is_an_error_that_names_it(run):
    run.config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        page_of(run)


def test_older_runs_have_no_starts(run):
    run.starts.unlink()
    page = page_of(run)
    assert page.texts(of="problem") == []
    assert "about 32,640" in page.text
    assert "not noted" in page.text
