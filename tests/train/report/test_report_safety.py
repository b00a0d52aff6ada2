"""The report is one file that loads nothing and runs nothing of what the data says."""

import base64
import hashlib
import json
import re
from dataclasses import replace

from parsed_page import Page, page_of
from run_folders import CONFIG, START, answers, make_run, write_lines

from jaxsteer.io.files import write_json
from train.evaluation.answers import write_answers
from train.report.page import make_page


def test_the_file_loads_nothing(finished):
    html = make_page([str(finished.folder)], 50)
    page = Page(html)
    for _, values in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert values.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in html
    assert "@import" not in html
    (policy,) = [values["content"] for _, values in page.elements if "http-equiv" in values]
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='alert(3)' {{ 7 * 7 }} &amp;"


def test_everything_from_data_is_escaped(finished, tmp_path):
    config = replace(CONFIG, model=EVIL, date="2026-01-31", task=replace(CONFIG.task, train=EVIL))
    run = make_run(tmp_path / "<b>run" / "one", config)
    some = [replace(answer, prompt=EVIL, output=EVIL, gold=EVIL) for answer in answers(["gained", "lost"], False)]
    write_answers(run.answers_before, some)
    write_answers(run.answers_after, some)
    write_lines(run.starts, [START | {"command": [EVIL], "device": EVIL}])
    write_lines(run.history, [{"time": EVIL, "steps": 3, "changed": {EVIL: [EVIL, EVIL]}}])
    inputs = json.loads(run.inputs.read_text())
    inputs["train"] |= {"sources": [EVIL], "sha256": EVIL}
    write_json(run.inputs, inputs)
    shown = {"step": 1, "source": EVIL, "prompt": EVIL, "output": EVIL, "gold": EVIL, "correct": True}
    write_lines(run.answers_during, [shown | {"truncated": True}])
    for page in (page_of(run), page_of(finished, run)):
        assert [tag for tag, _ in page.elements].count("script") == 1
        assert not [name for _, values in page.elements for name in values if name.startswith("on")]
        assert not [values for tag, values in page.elements if tag == "img" and not values["src"].startswith("data:")]
        assert page.text.count(" ".join(EVIL.split())) > 10


def test_half_of_a_surrogate_pair_does_not_stop_the_report(run):
    shown = {"step": 1, "source": "a", "prompt": "\ud83d", "output": "b", "gold": "b", "correct": True}
    write_lines(run.answers_during, [shown | {"truncated": False}])
    assert "\\ud83d" in page_of(run).text
