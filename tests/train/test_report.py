"""The report on a run: what it says, that it is one safe file, and runs that are unfinished or damaged."""

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_model import TINY

from jaxsteer.interventions import DiReFT, DoRA, FixedVector, JoLA, LoFiT, LoRA, LoReFT, NonlinearSteering, PiSSA
from jaxsteer.io import save_steering
from jaxsteer.io.files import write_json
from jaxsteer.optim import OptimConfig
from jaxsteer.plans import parse_plan
from jaxsteer.steering import count_parameters, init_steering
from jaxsteer.types import Context
from train.cli import load_config_file
from train.config import TrainConfig
from train.evaluation.answers import ScoredAnswer, write_answers
from train.report import __main__ as program
from train.report.chart import Chart, Series, draw, path_of, thinned
from train.report.page import make_page
from train.report.record import read_record
from train.report.replies import reply_table
from train.report.settings import as_yaml
from train.report.updates import parts_of
from train.run.folder import RunFolder
from train.run.result import notes_of
from train.run.starts import command
from train.tasks import JsonlTask

STEPS = 40
CONFIG = TrainConfig(
    task=JsonlTask("letters.jsonl", validation="letters.jsonl"),
    model="some/model",
    plan=("lora(rank=2) @ mlp.down layers=last:2", "nonlinear(rank=4) @ block name=post"),
    optim=OptimConfig(lr=1e-2),
    steps=STEPS,
    evaluate_every=20,
)
KINDS = {"gained": (False, True), "lost": (True, False), "right": (True, True), "wrong": (False, False)}
START = {
    "time": "2026-01-31T10:00:00+00:00",
    "done": 0,
    "steps": STEPS,
    "command": ["jaxsteer", "sft", "jsonl", "--task.train", "my letters.jsonl"],
    "trainable": 100,
    "parameters": 1000,
    "device": "cpu: 1 x cpu",
    "machine": {"processor": "A processor", "cores": 2, "memory_gb": 8.0, "system": "Linux"},
    "versions": {"jaxsteer": "1.0", "jax": "0.10"},
}


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes, and the text of those with an id or a class."""

    VOID = ("meta", "link", "img", "br", "col", "input", "image", "line", "rect", "circle", "path")

    def __init__(self, html):
        super().__init__()
        self.elements, self._open, self._texts = [], [], []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.handle_data(" ")
        self.elements.append((tag, dict(attributes)))
        self._texts.append([])
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._texts.append([])

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag
        self.handle_data(" ")

    def handle_data(self, data):
        for index in self._open:
            self._texts[index].append(data)

    def texts(self, tag=None, **attributes):
        """The text of every element of a tag, or with a class."""
        wanted = attributes.get("of")
        return [
            " ".join("".join(text).split())
            for (name, values), text in zip(self.elements, self._texts, strict=True)
            if (tag is None or name == tag) and (wanted is None or wanted in values.get("class", "").split())
        ]

    @property
    def text(self):
        return self.texts("body")[0]


def answers(kinds, after):
    return [
        ScoredAnswer(f"{n}>", f"{kind}{after}", None, "gold", KINDS[kind][after], False, f"letters.jsonl:{n}")
        for n, kind in enumerate(kinds, 1)
    ]


def metrics():
    rows = [{"step": 0, "validation_loss": 3.0, "token_accuracy": 0.1, "accuracy": 0.2, "low": 0.1, "high": 0.4}]
    for step in range(1, STEPS + 1):
        row = {"step": step, "loss": 3 / step, "penalty": 0.1, "grad_norm": 1 / step, "overlap": [0.0, step / 100]}
        row |= {"tokens": 50.0, "supervised": 10.0, "data_wait": 0.01, "step_seconds": 0.1}
        rows.append(row | {"lr_weights": 1e-3, "lr_activations": 1e-2 * (1 - step / STEPS)})
        if step % 20 == 0:
            rows.append({"step": step, "validation_loss": 2 / step, "accuracy": 0.5, "low": 0.3, "high": 0.7})
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, config=CONFIG, kinds=("gained",) * 6 + ("lost", "right", "right", "wrong")):
    """The folder of a finished run, without the training."""
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    write_json(run.config, config.to_json())
    source = {"sha256": "ab" * 32, "examples": 100, "sources": ["letters.jsonl"]}
    write_json(
        run.inputs,
        {
            "train": source | {"tokens": 5000, "supervised": 1000},
            "start_from": {"path": "runs/earlier", "sha256": "cd" * 32, "model": "m", "inputs": {"train": source}},
        },
    )
    write_lines(run.metrics, metrics())
    write_lines(run.starts, [START])
    rate = lambda value: {"value": value, "interval": [value - 0.1, value + 0.1], "examples": len(kinds)}
    write_json(
        run.summary,
        {
            "accuracy_before": rate(0.3),
            "accuracy_after": rate(0.8),
            "trainable_parameters": 1632,
            "trainable_share": 0.05,
            "seconds": 135.0,
            "data_wait_seconds": 1.0,
            "tokens_per_second": 1234.0,
            "peak_memory_bytes": 2.3e9,
            "step": STEPS,
            "finished": "2026-01-31T10:05:00+00:00",
            "validation": {"before": {"loss": 3.0}, "after": {"loss": 0.05}},
        },
    )
    plan = parse_plan(config.plan, TINY)
    steering = jax.tree.map(lambda leaf: leaf + 0.1, init_steering(plan, TINY, jax.random.key(0)))
    save_steering(run.steering, steering, plan, model_name="some/model", config=TINY, notes=notes_of(config))
    write_answers(run.answers_before, answers(kinds, False))
    write_answers(run.answers_after, answers(kinds, True))
    shown = {"source": "v:1", "prompt": "q>", "gold": "b", "truncated": False}
    outputs = [(0, "a", False), (20, "b", True), (40, "b", True)]
    write_lines(run.answers_during, [shown | {"step": s, "output": o, "correct": c} for s, o, c in outputs])
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "letters")


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be changed."""
    return RunFolder(Path(shutil.copytree(finished.folder, tmp_path / "letters")))


def page_of(*runs, examples=50):
    return Page(make_page([str(each.folder) for each in runs], examples))


def test_a_report_says_what_was_trained_and_what_came_of_it(finished):
    page = page_of(finished)
    assert page.texts(of="problem") == []
    assert "80.0 % (70.0 to 90.0)" in page.text
    assert "30.0 % (20.0 to 40.0)" in page.text
    assert "5 % of the model's 1,000" in page.text
    assert "validation loss 3.0000 0.0500" in page.text
    # D and U [4, 32] in 3 layers; A [2, 48] and B [32, 2] in 2 layers.
    assert "post nonlinear(rank=4, alpha=1.0, activation='silu', init_scale=0.001) block 0-2 all 768" in page.text
    assert f"total {768 + 2 * 2 * (48 + 32)}" in page.text.replace(",", "")
    assert "100 examples, 5,000 tokens, 1,000 of them with a loss from letters.jsonl" in page.text
    assert "2026-01-31 10:00 UTC" in page.text
    assert "from start to end 5 min" in page.text
    assert "processor A processor, 2 cores, 8.0 GB" in page.text
    steps = page.texts("li")
    assert any(step.startswith("runs/earlier (steering for m, SHA-256 cdcd") for step in steps)
    assert any(step.startswith("training: model some/model") for step in steps)
    assert "jaxsteer sft jsonl --task.train 'my letters.jsonl'" in page.texts("pre")
    assert f"jaxsteer generate {finished.folder} '10>' --compare" in page.texts("pre")


def test_curves_and_the_overlap_of_a_joint_plan(finished):
    page = page_of(finished)
    assert [caption.split(" ")[0] for caption in page.texts("figcaption")] == [
        "Loss", "Accuracy", "Tokens", "Learning", "Gradient", "Penalty", "Throughput", "Waiting", "Overlap", "Overlap",
    ]  # fmt: skip
    titles = page.texts("title")
    assert "step 20: each step 0.15 · smoothed" in " ".join(titles)
    assert "validation 0.1" in next(title for title in titles if title.startswith("step 20: each"))
    assert "step 20: validation 50.0 % (95 %: 30 to 70)" in titles
    assert "step 40: mean over layers 0.2 · largest 0.4" in titles
    pictures = [values["href"] for tag, values in page.elements if tag == "image"]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0].partition(",")[2]).startswith(b"\x89PNG")
    labels = page.texts("text")
    assert {"1", "2"} <= set(labels)  # the layers that have both


def test_settings_that_are_not_defaults_come_first(finished):
    page = page_of(finished)
    changed = page.texts("tr", of="changed")
    assert "optim.lr 0.01 default" not in page.text
    assert "optim.lr 0.01 0.0009" in changed
    assert not [row for row in changed if row.startswith("seed")]
    assert "seed 0" in page.texts("tr")


def test_the_settings_make_the_same_run_again(finished, tmp_path):
    (tmp_path / "run.yaml").write_text(as_yaml(json.loads(finished.config.read_text())))
    assert load_config_file(tmp_path / "run.yaml", TrainConfig) == CONFIG


def test_answers_are_counted_and_each_kind_is_shown(finished):
    page = page_of(finished, examples=5)
    labels = page.texts("label")
    assert labels == [
        "all",
        "became right: 6 (2 shown)",
        "became wrong: 1",
        "stayed right: 2 (1 shown)",
        "stayed wrong: 1",
    ]
    assert "5 of 10 test questions. The difference in accuracy is +50.0 points (95 %:" in page.text
    assert Counter(values.get("class") for tag, values in page.elements if tag == "tr")["gained"] == 2
    assert "step 0 ✗ a" in page.text
    assert "step 20 to 40 ✓ b" in page.text


def test_at_most_so_many_answers():
    before, after = answers(["right"] * 30, False), answers(["right"] * 30, True)
    assert len(reply_table(before, after, 7).rows) == 7
    assert reply_table(before, after, 0).rows == []
    assert reply_table([], [], 7) is None
    with pytest.raises(ValueError, match="must answer the same examples"):
        reply_table(before, after[1:], 7)


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


def test_what_happened_on_the_way(run):
    rows = metrics()
    rows[5] |= {"examples": [["letters.jsonl:3"]], "skipped": 1, "loss": "NaN"}
    write_lines(run.metrics, rows)
    write_lines(run.starts, [START | {"steps": 60}, START | {"done": 20, "steps": 60}])
    write_lines(run.history, [{"time": "2026-01-31T11:00:00+00:00", "steps": 20, "changed": {"optim.lr": [0.1, 0.2]}}])
    summary = json.loads(run.summary.read_text())
    write_json(run.summary, summary | {"step": 20})
    assert page_of(run).texts(of="note") == [
        "It was resumed once, from step 20.",
        "Changed on purpose after 20 steps (2026-01-31 11:00 UTC): optim.lr from 0.1 to 0.2.",
        "Loss or gradient was not finite at step 5: the updates were skipped.",
        "It stopped early, after 40 of 60 steps, because it did not improve any more.",
        "The state of step 20 was kept, the best by validation.",
    ]


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


def test_free_text_has_losses_and_no_marks(run):
    for path in (run.answers_before, run.answers_after):
        path.unlink()
    summary = json.loads(run.summary.read_text()) | {"accuracy_before": None, "accuracy_after": None}
    write_json(run.summary, summary | {"test": {"before": {"loss": 2.0}, "after": {"loss": 1.0}}})
    page = page_of(run)
    assert page.texts(of="problem") == []
    assert "test loss 2.0000 1.0000" in page.text
    assert "test loss 1 from 2 before" in page.text


def test_evaluations_made_later_are_shown(run):
    (run.folder / "evaluation").mkdir()
    found = {"accuracy": 0.75, "interval": [0.6, 0.9], "truncated": 0, "low_margin": 0}
    write_json(
        run.folder / "evaluation" / "summary.json",
        {"split": "test", "perturbed": None, "examples": 20, "strength": {"post": 0.5}, "lora_only": found},
    )
    assert "lora_only, 20 test examples, strength {'post': 0.5} (95 %) 75.0 % (60.0 to 90.0)" in page_of(run).text


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


@pytest.mark.parametrize(
    "plan", [("lora(rank=2) @ attn.q", "dora(rank=2) @ attn.o"), ("jola @ attn.heads", "fixed @ mlp"), ()]
)
def test_any_plan(tmp_path, plan):
    config = replace(CONFIG, plan=plan, train_base=not plan)
    run = make_run(tmp_path / "run", config) if plan else make_run(tmp_path / "run")
    if not plan:
        write_json(run.config, config.to_json())
        run.steering.unlink()
    page = page_of(run)
    assert page.texts(of="problem") == []
    assert ("all weights" in page.text) == (not plan)
    used = page.texts("pre")
    assert (f"jaxsteer generate none 'YOUR QUESTION' --model {run.folder / 'model'}" in used) == (not plan)


METHODS = {
    "block": [
        NonlinearSteering(rank=2, alpha=3.0, activation="tanh"),
        LoReFT(rank=2, activation="silu"),
        DiReFT(rank=2),
    ],
    "mlp.down": [LoRA(rank=2, alpha=6.0), DoRA(rank=2), PiSSA(rank=2)],
    "attn.heads": [JoLA(), LoFiT(), FixedVector()],
}


@pytest.mark.parametrize(("site", "method"), [(site, each) for site in METHODS for each in METHODS[site]], ids=str)
def test_the_size_of_an_update_is_that_of_its_map(site, method):
    """Against the map itself, from unit vectors through the method (with the identity for its activation)."""
    from jaxsteer.models.config import site_dims

    dims, key = site_dims(TINY, site), jax.random.key(1)
    specs = method.param_specs(dims)
    keys = jax.random.split(key, len(specs))
    params = {name: jax.random.normal(k, (2, *spec.shape)) for (name, spec), k in zip(specs.items(), keys, strict=True)}
    found = {part.what.split(",")[0]: part.norms for part in parts_of(method, params)}
    assert all(norms.shape == (2,) for norms in found.values())
    if method.kind == "weight":
        expected = {
            "‖s B A‖": [
                np.linalg.norm(LoRA.delta(method, one) if isinstance(method, DoRA) else method.delta(one))
                for one in layers(params)
            ]
        }
    else:
        plain = linear(method)
        context = Context(layer=np.int32(0))
        apply = lambda one, y: np.asarray(plain.apply(one, y, y, context) - y, np.float64)
        zero = np.zeros((1, 1, *dims.y), np.float32)
        shift = [apply(one, zero) for one in layers(params)]
        units = np.eye(int(np.prod(dims.y)), dtype=np.float32).reshape(-1, 1, *dims.y)
        map_ = [np.linalg.norm(apply(one, units) - at) for one, at in zip(layers(params), shift, strict=True)]
        expected = {"‖linear part‖": map_, "‖scale‖": map_, "‖shift‖": [np.linalg.norm(at) for at in shift]}
    assert found
    for what, norms in found.items():
        if what in expected:
            np.testing.assert_allclose(norms, expected[what], rtol=1e-4)


def layers(params):
    return [{name: leaf[n] for name, leaf in params.items()} for n in range(2)]


def linear(method):
    from jaxsteer.interventions import LinearSteering

    if isinstance(method, NonlinearSteering):
        return LinearSteering(method.rank, method.alpha)
    return replace(method, activation="none") if hasattr(method, "activation") else method


def test_paths_leave_gaps():
    assert path_of(np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 2, np.nan, 4, np.nan])) == "M0 1L1 2M3 4h0"


def test_thinned_values_keep_their_extremes():
    values = np.sin(np.arange(10_000.0))
    values[4321], values[77], values[5000:5100] = 9.0, -9.0, np.nan
    kept = thinned(values, 200)
    assert len(kept) <= 300
    assert {0, 77, 4321, 9999} <= set(kept.tolist())
    assert thinned(values[:50], 200).tolist() == list(range(50))


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 1e9], [np.nan, 3.0], [-5.0, 5.0]])
@pytest.mark.parametrize("style", ["line", "points", "raw"])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values, style, log):
    x = np.arange(1.0, len(values) + 1)
    drawing = draw(Chart("t", "u", [Series("s", x, np.array(values), style)], log=log))
    ticks = [tick.at for tick in (*drawing.x_ticks, *drawing.y_ticks)]
    assert np.isfinite(ticks).all()
    assert len({tick.label for tick in drawing.y_ticks}) == len(drawing.y_ticks)


def test_the_command_writes_the_file(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(run.folder)])
    program.main()
    written = run.folder / "report.html"
    assert capsys.readouterr().out == f"report: {written}\n"
    assert written.read_text().startswith("<!doctype html>")
    assert not run.begun or read_record(run.folder, "x").steps  # a report is nothing that starting over would lose


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which run"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "not a run"),
        (["RUN", "RUN"], "given twice"),
        (["RUN", "--out", "x.txt"], r"ends in \.html"),
        (["RUN", "--out", "no/x.html"], "there is no folder no"),
        (["RUN", "--examples", "-1"], "at least 0"),
    ],
)
def test_what_cannot_be_reported(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", *(str(run.folder) if each == "RUN" else each for each in arguments)])
    with pytest.raises(ValueError, match=message):
        program.main()


def test_the_two_runs_of_lofit(finished, tmp_path):
    for stage in ("scale", "shift"):
        shutil.copytree(finished.folder, tmp_path / "lofit" / stage)
    write_json(tmp_path / "lofit" / "config.json", {"run": {}, "heads": 4, "share": 0.4})
    assert "2 runs compared" in page_of(RunFolder(tmp_path / "lofit")).text


def test_the_command_of_a_start(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(Path(program.__file__).parents[1] / "sft.py"), "jsonl", "--steps", "3"])
    assert command() == ["jaxsteer", "sft", "jsonl", "--steps", "3"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest"])
    assert command() is None


def test_counts_agree_with_the_tree(finished):
    record = read_record(finished.folder, "x")
    assert count_parameters(record.steering.steering) == 768 + 320
    assert asdict(record.summary)["trainable"] == 1632
