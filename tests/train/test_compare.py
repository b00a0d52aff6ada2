"""A comparison end to end on a tiny model: what it writes, how it resumes, and how it picks learning rates."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxsteer.orthogonality import Orthogonality
from jaxsteer.params import Params
from train.compare import __main__ as command
from train.compare import report
from train.compare import runs as compare_runs
from train.compare.__main__ import compare
from train.compare.check import check_comparison
from train.compare.config import Contrast, Entry, LoFiT, Method
from train.compare.contrasts import contrast_table, judge
from train.compare.records import MethodResult, Timing, read_record
from train.compare.runs import Comparison
from train.compare.sweep import Run
from train.compare.timing import measure
from train.config import TrainConfig
from train.config.run import KeepConfig
from train.display.console import progress
from train.evaluation.neutral import NEUTRAL
from train.run.inputs import changed_data
from train.run.training import load_base_model

POST_BLOCK = "nonlinear(rank=2) @ block"
JOINT = ("lora(rank=2) @ mlp.down", POST_BLOCK)


@pytest.fixture
def config(tiny_comparison):
    return replace(
        tiny_comparison,
        entries=(
            Entry("full fine-tuning", Method((), train_base=True), lr=1e-4),
            Entry("post-block", Method((POST_BLOCK,), train_examples=5), lr=1e-2),
            Entry("LoFiT", Method(("lofit @ attn.heads",)), lr=1e-2, lofit=LoFiT(heads=3)),
            Entry("joint", Method(JOINT, orthogonality=Orthogonality("penalty")), 1e-2, 1e-3),
        ),
        contrasts=(Contrast("joint adaptation", "joint", ("post-block", "LoFiT")),),
        neutral=str(NEUTRAL),
    )


def as_made_without_neutral(folder, *slugs):
    """Remove from a comparison what neutral texts have added to some of its methods."""
    for path in (path for slug in slugs for path in (folder / "runs" / slug).glob("*.json")):
        record = json.loads(path.read_text())
        if "kl" in record:
            path.write_text(json.dumps(record | {"kl": None}))
    inputs = json.loads((folder / "inputs.json").read_text())
    del inputs["neutral"]
    (folder / "inputs.json").write_text(json.dumps(inputs))


def test_a_comparison_writes_its_table_and_resumes(config, tmp_path, monkeypatch, capsys):
    original, trained, stop_at = compare_runs.train_runs, [], [7]
    timings, bases = {}, []

    def measure_once(trainings):
        """Timing compiles two programs per method; once with a trained base and once without is enough here."""
        train_base = trainings[0].config.train_base
        if train_base not in timings:
            timings[train_base] = measure(trainings)
        return timings[train_base]

    monkeypatch.setattr(command, "measure", measure_once)

    def counting(run_config, loaded, runs, **rest):
        if len(trained) in stop_at:  # in the middle of LoFiT
            raise KeyboardInterrupt
        trained.append((run_config.plan, len(runs)))
        if run_config.train_base:  # one run after another: one is enough here
            if not bases:
                bases.extend(original(run_config, loaded, runs, **rest))
            return bases
        return original(run_config, loaded, runs, **rest)

    monkeypatch.setattr(compare_runs, "train_runs", counting)
    with monkeypatch.context() as patch:
        for plot in ("plot_comparison", "plot_overlap"):
            patch.setattr(report, plot, lambda *data, **labels: None)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    so_far = json.loads((Path(config.out) / "results.json").read_text())
    assert [row["method"] for row in so_far["methods"]] == ["full fine-tuning", "post-block"]
    assert so_far["unfinished"] == ["LoFiT", "joint"]
    assert not so_far["contrasts"]
    assert "Not finished: LoFiT; joint." in (Path(config.out) / "results.md").read_text()
    stop_at.clear()
    trained.clear()
    results = compare(config)
    # Full fine-tuning and post-block had finished; the others: three rates together, then one more seed at the best.
    assert [plan[0].split("(")[0].split(" ")[0] for plan, _ in trained] == ["lofit_scale", "lofit"] * 2 + ["lora"] * 2
    assert [count for _, count in trained] == [3, 3, 1, 1, 3, 1]
    trained.clear()
    capsys.readouterr()
    as_made_without_neutral(Path(config.out), "full_fine_tuning", "post_block")
    with monkeypatch.context() as patch:
        for plot in ("plot_comparison", "plot_overlap"):  # their files are there
            patch.setattr(report, plot, lambda *data, **labels: None)
        (row,) = compare(replace(config, methods=("post-block",)))["methods"]
        again = compare(config)
    assert not trained
    assert row == again["methods"][1] | {"minus_first": None}
    assert again == {**results, "methods": [results["methods"][0] | {"kl": None}, *results["methods"][1:]]}
    assert "full fine-tuning: no KL on neutral text" in capsys.readouterr().out
    assert "neutral" in json.loads((Path(config.out) / "inputs.json").read_text())

    folder = tmp_path / "comparison"
    data = json.loads((folder / "results.json").read_text())
    names = [row["method"] for row in data["methods"]]
    assert names == ["full fine-tuning", "post-block", "LoFiT", "joint"]
    by_name = dict(zip(names, data["methods"], strict=True))
    assert by_name["LoFiT"]["trainable"] == 3 * 8
    assert by_name["post-block"]["trainable"] == 3 * 2 * 2 * 32
    assert by_name["joint"]["trainable"] == 3 * (2 * 2 * 32 + 2 * (48 + 32))
    assert by_name.pop("full fine-tuning")["kl"] is None  # see above
    for row in data["methods"]:
        assert len(row["validation"]) == 3
        assert row["test"]["low"] <= row["test"]["mean"] <= row["test"]["high"]
        assert row["timing"]["tokens_per_second"] > 0
        assert row["timing"]["step_bytes"] > 1e5
        assert (row["timing"]["sweep_cost"] is None) == (row["method"] == "full fine-tuning")
        assert (row["overlap"] is None) == (row["method"] != "joint")
    assert all(row["kl"]["low"] < row["kl"]["mean"] for row in by_name.values())
    assert by_name["post-block"]["examples"] == 5
    assert by_name["joint"]["examples"] > 5
    assert by_name["joint"]["weights_lr"] == pytest.approx(by_name["joint"]["lr"] / 10)
    table = (folder / "results.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert all((folder / name).stat().st_size > 10_000 for name in ("results.png", "results_kl.png"))
    assert "| training examples |" in table
    assert [path.name for path in folder.glob("overlap_*.png")] == ["overlap_joint.png"]
    assert by_name["joint"]["chance_overlap"] == 2 / 32
    (contrast,) = data["contrasts"]
    assert contrast["second"] in ("post-block", "LoFiT")
    assert "| joint adaptation: joint minus " in table
    gap = data["differences"]["post-block"]["joint"]["mean"]
    assert gap == pytest.approx(by_name["post-block"]["test"]["mean"] - by_name["joint"]["test"]["mean"])

    with pytest.raises(ValueError, match=r"holds a run with other settings.*batch_size"):
        compare(replace(config, base=replace(config.base, batch_size=4)))
    drawn = replace(config.entries[1], series="steering")  # how it is drawn is no part of a run
    assert Comparison(config, load_base_model(config.base), lambda steps: None).record(drawn, 0, 0) is not None
    changed = (replace(config.entries[0], lr=2e-4), *config.entries[1:])
    with pytest.raises(ValueError, match="other settings of 'full fine-tuning'"):
        compare(replace(config, entries=changed))


def test_predictions_stand_beside_decoded_answers(config, monkeypatch):
    config = replace(config, scoring="predictions", decoded=3, neutral=None)
    comparison = Comparison(config, load_base_model(config.base), lambda steps: None)
    untouched = ((), Params(None, {}))
    assert comparison.measured(*untouched, 1)["decoded"] is None
    measured = comparison.measured(*untouched, 0)
    assert measured["kl"] is None
    assert (len(measured["test"]), len(measured["decoded"])) == (8, 3)
    monkeypatch.setattr(comparison, "answer", lambda split, plan, params: [1, 0, 1, 0])
    monkeypatch.setattr(comparison, "decoded", lambda plan, params: [1, 1, 0])
    result = MethodResult(config.entries[1], 0, [], [comparison.measured(*untouched, 0)], None)
    assert result.decoded == {"examples": 3, "predicted": 2 / 3, "decoded": 2 / 3, "agree": 1 / 3}


def test_what_a_file_of_a_comparison_lacks_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_runs, "evaluator_of", lambda *_: None)
    file = tmp_path / "timing.json"
    file.write_text('{"step_bytes": 1}')
    with pytest.raises(
        ValueError, match=r"timing\.json: incomplete: has no tokens_per_second, sweep_cost.*; delete it"
    ):
        read_record(file, Timing)
    comparison = Comparison(config, None, lambda steps: None)
    comparison.folder.mkdir(parents=True)
    (comparison.folder / "untouched.json").write_text("{}")
    with pytest.raises(ValueError, match=r"untouched\.json: incomplete: has no test"):
        comparison.untouched()
    path = comparison.path(config.entries[0], 0, 0)
    path.parent.mkdir()
    path.write_text('{"exponent": 0}')
    with pytest.raises(ValueError, match=r"seed0\.json: incomplete: has no test, kl, decoded, entry, factor, seed"):
        comparison.record(config.entries[0], 0, 0)
    (Path(config.out) / "config.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match=r"config\.json: not the settings of a comparison"):
        compare(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": 2}, "rates must be odd"),
        ({"extensions": -1}, "--extensions must be at least 0"),
        ({"factor": 1.0}, "--factor must be above 1"),
        ({"base": TrainConfig(evaluate_every=5, patience=2)}, "base.evaluate_every has no effect here"),
        (
            {"base": TrainConfig(plan=("lora(rank=2) @ mlp.down",))},
            "base.plan has no effect here; each method has its own",
        ),
        ({"base": TrainConfig(train_examples=5)}, "base.train_examples has no effect here"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"margin": 0.0}, "--margin must be above 0 and below 1"),
        ({"decoded": 5}, "--decoded 5: needs --scoring predictions"),
        (
            {"contrasts": (Contrast("q", "joint", ("LoRA",)),)},
            "contrast 'q': no entry 'LoRA'; there are full fine-tuning",
        ),
        ({"methods": ("LoRA",)}, "no method 'LoRA'; known are full fine-tuning; post-block; LoFiT; joint"),
        ({"contrasts": (Contrast("q", "joint", ()),)}, "contrast 'q': nothing to compare 'joint' with"),
        ({"entries": (Entry("a b", Method((POST_BLOCK,)), 1.0), Entry("A_B", Method((POST_BLOCK,)), 1.0))}, "'a_b'"),
    ],
)
def test_impossible_comparisons_are_refused(changes, message, config):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_what_a_method_keeps_is_read_before_the_weights(config, monkeypatch):
    monkeypatch.setattr(command, "load_base_model", None)
    kept = Entry("kept", Method((POST_BLOCK,), keep=KeepConfig(1.0, "nowhere.txt", 16)), lr=1e-2)
    with pytest.raises(ValueError, match=r"nowhere\.txt"):
        compare(replace(config, entries=(kept,), contrasts=()))
    with pytest.raises(ValueError, match="nothing to compare: give a config file"):
        compare(replace(config, entries=(), contrasts=()))
    with pytest.raises(ValueError, match=r"nothing\.txt"):
        compare(replace(config, neutral="nothing.txt"))


def test_texts_of_a_penalty_must_not_change_between_parts_of_a_comparison(config, tmp_path):
    """Each file counts by itself, so that a part with fewer methods is no other comparison."""
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    entries = []
    for path in texts:
        path.write_text("a b c d e f g\nh i j k l m n\n")
        entries.append(Entry(path.stem, Method((POST_BLOCK,), keep=KeepConfig(1.0, str(path), 16)), lr=1e-2))
    config = replace(config, entries=tuple(entries), contrasts=())
    model = load_base_model(config.base)
    before, _ = check_comparison(config, model)
    few = replace(config, methods=("two",))
    assert not changed_data(before, check_comparison(few, model)[0])
    texts[1].write_text("a b c d e f g\nh i j k l m o\n")
    (phrase,) = changed_data(before, check_comparison(few, model)[0])
    assert "texts of a penalty" in phrase
    assert "two.txt" in phrase


class Counted(Comparison):
    """A comparison whose runs take no time."""

    def __init__(self, config):
        self.config, self.together, self.records = config, [], {}

    def record(self, entry, *run):
        return self.records.get(run)

    def train(self, entry, config, runs):
        self.together.append(len(runs))
        return runs

    def keep(self, entry, exponent, seed, trained):
        assert trained == Run(self.config.factor**exponent, seed)
        self.records[exponent, seed] = (exponent, seed)


def test_no_more_runs_train_together_than_asked(config):
    asked = [(0, seed) for seed in range(5)]
    for limit, groups in ((None, [5]), (2, [2, 2, 1]), (9, [5])):
        counted = Counted(replace(config, together=limit))
        assert counted.finish(config.entries[1], asked) == asked
        assert counted.together == groups
        counted.finish(config.entries[1], [*asked, (1, 0)])
        assert counted.together == [*groups, 1]
        counted.finish(config.entries[0], [(1, 1), (1, 2)])  # full fine-tuning
        assert counted.together[-2:] == [1, 1]
    with pytest.raises(ValueError, match="--together must be at least 1, got 0"):
        replace(config, together=0)


def test_methods_with_the_same_training_examples_share_them(config, monkeypatch):
    read, original = [], compare_runs.read_data
    monkeypatch.setattr(compare_runs, "read_data", lambda *given: read.append(given) or original(*given))
    comparison = Comparison(config, load_base_model(config.base), lambda steps: None)
    full, few, _, joint = config.entries
    assert comparison.data(full) is comparison.data(joint)
    assert len(comparison.data(few).source.examples) == 5 < len(comparison.data(full).source.examples)
    assert len(read) == 2


def test_the_steps_to_come_follow_the_grids(config, monkeypatch):
    stream, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = replace(config, base=replace(config.base, steps=10))  # planned are four runs of each of four methods
    with progress(160, "Comparing", every_seconds=1e9, console=Console(file=stream)) as bar:
        counter = command._Counter(bar, config)
        clock[0] += 3600.0  # a restart reads and measures what was made before
        assert counter.hours_left() is None
        for _ in range(6):  # two more learning rates than planned
            counter.add(10)
            clock[0] += 36.0
        counter.finish(60)
        assert counter.hours_left() == pytest.approx(120 * 6 * 36.0 / 50 / 3600)
        counter.finish(40)  # made before
        counter.finish(40)
        assert bar.seconds_left() is None  # those that were made before say nothing of the speed
        for _ in range(45):
            counter.add(1)
    assert re.findall(r"\d+/\d+", stream.getvalue()) == ["10/160", "180/180", "185/190"]


def test_too_little_memory_for_runs_together_is_advice(config, monkeypatch):
    def full(*runs, **rest):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8000000000 bytes.")

    counted = Counted(config)
    counted.train = full
    runs = [(0, seed) for seed in range(4)]
    with pytest.raises(ValueError, match=r"4 runs train together .*--together 2.*8\.00 GB"):
        counted.finish(config.entries[1], runs)
    with pytest.raises(ValueError, match="--grad-accumulation"):
        counted.finish(config.entries[1], runs[:1])


def test_costs_of_single_runs_have_no_column_for_several():
    result = result_of("one", np.ones((2, 8), bool))
    rest = {"trainable": 1, "steps": 1, "losses": [1.0], "examples": 1, "overlap": [], "kl": None, "decoded": None}
    seeds = [record | rest | {"exponent": 0, "factor": 1.0, "diverged": False} for record in result.seeds]
    costs = {"tokens_per_second": 1.0, "step_bytes": 1, "sweep_cost": None, "sweep_bytes": None, "compile_seconds": []}
    for runs, column in ((1, "overlap Ω"), (3, "cost of 3 runs as one program")):
        timing = Timing(**costs, sweep_runs=runs)
        rows = report.summarise([replace(result, tried=seeds[:1], seeds=seeds, timing=timing)], 3.0)
        head, _, row = report.table(rows).splitlines()
        assert f"| memory per step, GB | {column} |" in head
        assert head.count("|") == row.count("|")
        assert " (given) |" in row  # its only rate was not searched for


def result_of(name, test, validation=0.5):
    """A method with these test scores [seeds, examples]."""
    entry = Entry(name, Method((POST_BLOCK,)), 1.0)
    records = [{"test": row.astype(int).tolist(), "validation": [validation]} for row in test]
    return MethodResult(entry, 0, [], records, None)


def test_contrasts_are_judged():
    draw = np.random.default_rng(0)
    chance = lambda share: draw.random((6, 2000)) < share
    good = chance(0.7)
    results = [
        result_of("good", good),
        result_of("same", good ^ (draw.random(good.shape) < 0.002)),
        result_of("bad", chance(0.6), validation=0.1),
        result_of("vague", np.repeat(draw.random((6, 1)) < 0.5, 2000, axis=1), validation=0.9),
    ]
    asked = [
        ("a", "good", ("bad",)),
        ("b", "bad", ("good",)),
        ("c", "good", ("same",)),
        ("d", "good", ("bad", "vague")),
    ]
    rows = judge([Contrast(*each) for each in asked], results, margin=0.01)
    assert [row["verdict"] for row in rows] == ["higher", "lower", "equal", "open"]
    assert rows[3]["second"] == "vague"  # the best by validation
    (early,) = judge([Contrast(*asked[2]), Contrast("e", "good", ("to come",))], results, margin=0.01)
    assert early["p_equal"] == pytest.approx(rows[2]["p_equal"] * 2 / 4)  # corrected for both; above for four
    assert rows[0]["difference"]["mean"] == pytest.approx(results[0].test.mean() - results[2].test.mean())
    assert rows[0]["detectable"] < 0.04 < rows[3]["detectable"]
    assert "| a: good minus bad | +" in contrast_table(rows, 0.01)
