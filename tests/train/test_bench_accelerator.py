"""The measurements on an accelerator, rehearsed on a CPU: what is saved, skipped, stopped and left out."""

import json
import math
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from jaxsteer.io.files import read_json
from train.bench.accelerator import (
    attention,
    budgets,
    decoding,
    memory,
    numerics,
    peft,
    records,
    runner,
    sweep,
    training,
    worker,
)
from train.bench.accelerator.command import bench_accelerator
from train.bench.accelerator.records import NVIDIA, Context, Device, OutOfMemory, Row, Stage, Store
from train.bench.accelerator.settings import AcceleratorBench

CPU = Device("cpu", "cpu", 0, {"jax": "0"})


def first_of(stage, count=1):
    """A stage with its first rows alone."""
    return replace(stage, rows=lambda config, records: stage.rows(config, records)[:count])


@pytest.fixture
def config(tmp_path):
    return AcceleratorBench(small=True, isolate=False, steps=1, json=str(tmp_path / "results.json"))


@pytest.fixture
def only(monkeypatch):
    """Puts stages in the place of all others."""
    return lambda *stages: monkeypatch.setattr(runner, "STAGES", stages)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def stage(calls):
    """Makes a stage of rows that note that they ran: name -> what it measures, raises, or fields of its row."""

    def make(**rows):
        def row(name, does, fields):
            def measure(context):
                calls.append(name)
                if isinstance(does, Exception):
                    raise does
                return does

            return Row(name, measure, {"of": name}, **{"seconds": 10.0, "needs": ()} | fields)

        made = [row(name, *(does if isinstance(does, tuple) else (does, {}))) for name, does in rows.items()]
        return Stage("made up", "what a test says", lambda config, records: made)

    return make


def outcomes(store):
    return {record.row: record.outcome for record in store.records}


def check_figures(store):
    """Every row has numbers, and all are finite."""
    for record in store.records:
        numbers = [value for value in record.figures.values() if isinstance(value, float)]
        assert numbers
        assert all(map(math.isfinite, numbers))


def test_a_rehearsal_measures_saves_and_does_not_repeat(config, only, tmp_path, monkeypatch):
    only(first_of(attention.STAGE), first_of(training.STAGE), memory.STAGE)
    store = runner.run(config)
    assert {record.outcome for record in store.records} == {"measured"}
    by_stage = {record.stage: record for record in store.records}
    assert [record.stage for record in store.records] == ["attention", "train8b", "memory"]
    assert max(by_stage["attention"].figures[f"error of {name}"] for name in ("output", "dq", "dk", "dv")) < 1e-5
    assert abs(by_stage["train8b"].figures["loss"] - math.log(61)) < 0.5
    check_figures(store)
    saved = read_json(config.json)["records"]
    assert [record["row"] for record in saved] == [record.row for record in store.records]
    assert {"stage", "row", "settings", "device", "code", "commit", "time", "seconds"} <= set(saved[0])
    assert saved[0]["device"]["versions"]["jax"]

    monkeypatch.setattr(runner, "attempt", lambda *_: pytest.fail("measured again"))
    assert runner.run(config).records == store.records
    bench_accelerator(replace(config, table=str(tmp_path / "table.md")))
    table = (tmp_path / "table.md").read_text()
    assert "### train8b (cpu, jax" in table
    assert "| post-block, 2 rows | " in table
    assert "Measured with" in table
    bench_accelerator(replace(config, list=True))

    monkeypatch.setattr(records, "code_digest", lambda: "other code")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        runner.run(config)


def test_the_time_limit_stops_before_a_row_that_would_not_end_in_time(config, only, stage, calls):
    only(stage(a={"x": 1.0}, long=({"x": 2.0}, {"seconds": 80.0}), b={"x": 3.0}))
    limited, now = replace(config, time_limit=100.0), [0.0]

    def clock():
        now[0] += 7.0
        return now[0]

    runner.run(limited, clock)
    assert calls == ["a", "b"]  # what still fits is done
    runner.run(limited, clock)
    assert calls == ["a", "b", "long"]
    runner.run(limited, clock)
    assert calls == ["a", "b", "long"]


def test_the_first_row_of_a_call_is_tried_however_long_it_is(config, only, stage, calls):
    only(stage(long=({"x": 2.0}, {"seconds": 1e6})))
    runner.run(replace(config, time_limit=60.0))
    assert calls == ["long"]


def test_a_row_that_is_stopped_is_tried_twice_and_one_that_resumes_always(config, only, stage, calls):
    stopped = worker.TookTooLong("the time limit came first")
    only(stage(once=stopped, resumes=(stopped, {"resumes": True})))
    for _ in range(3):
        runner.run(config)
    assert calls.count("once") == 2
    assert calls.count("resumes") == 3
    assert {record.attempts for record in Store(config.json).records} == {2, 3}


def test_running_out_of_memory_is_a_result(config, only, stage, calls):
    family = lambda size: {"family": "f", "size": size}
    only(
        stage(
            small=({"x": 1.0}, family(1)),
            large=(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."), family(4)),
            larger=({"x": 1.0}, family(8)),
            between=({"x": 1.0}, family(2)),
            of_torch=OutOfMemory("CUDA out of memory"),
        )
    )
    store = runner.run(config)
    assert calls == ["small", "large", "between", "of_torch"]
    full = {"large", "larger", "of_torch"}
    assert outcomes(store) == {name: "out of memory" if name in full else "measured" for name in outcomes(store)}
    assert next(r for r in store.records if r.row == "larger").message == "not tried: large did"
    calls.clear()
    runner.run(replace(config, retry=True))
    assert calls == []


def test_what_fails_is_told_and_tried_again_when_asked(config, only, stage, calls):
    only(stage(bad=ValueError("no cuDNN here"), gpu=({"x": 1.0}, {"needs": (NVIDIA,)})))
    store = runner.run(config)
    assert outcomes(store) == {"bad": "failed", "gpu": "not here"}
    bad, gpu = store.records
    assert bad.message.startswith("ValueError: no cuDNN here (test_bench_accelerator.py:")
    assert gpu.message == "needs an NVIDIA GPU; this is cpu"
    runner.run(config)
    runner.run(replace(config, retry=True))
    assert calls == ["bad", "bad"]


def test_settings_that_cannot_be(config, tmp_path):
    with pytest.raises(ValueError, match=r"no stage .atention.*attention"):
        bench_accelerator(replace(config, stage="tests,atention"))
    other = tmp_path / "other.json"
    other.write_text('{"records": 3}')
    with pytest.raises(ValueError, match="not a file of results"):
        bench_accelerator(replace(config, json=str(other), list=True))
    other.write_text('{"records": [{"stage": "tests"}]}')
    with pytest.raises(ValueError, match=r"other\.json"):
        bench_accelerator(replace(config, json=str(other), list=True))


@pytest.fixture
def fake_peft(tmp_path):
    """Makes a program that stands for the Python with peft in it, and prints an answer."""

    def make(answer):
        path = tmp_path / "python"
        path.write_text(
            f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'asked.json')!r}, 'w').write(sys.stdin.read())\n"
            f"print({json.dumps(answer)!r})\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


def test_peft_is_asked_for_the_same_shapes(config, only, fake_peft, tmp_path, monkeypatch):
    versions = {"torch": "2", "peft": "0"}
    answer = {"versions": versions, "seconds": [2.0, 1.0, 4.0], "loss": 4.0, "peak_bytes": 3e9, "trainable": 9}
    monkeypatch.setattr(training, "measure_training", lambda trial, shapes, steps: {"tokens/s": 48.0})
    only(first_of(peft.STAGE, 6))
    found = runner.run(replace(config, peer_python=fake_peft(answer))).records
    asked = read_json(tmp_path / "asked.json")
    assert (asked["rows"], asked["length"], asked["rank"]) == (2, 32, 8)
    assert (asked["config"]["hidden_size"], asked["config"]["num_key_value_heads"]) == (32, 2)
    assert [record.row.split(", 2 rows")[0] for record in found] == ["jaxsteer", "peft", "peft, checkpointing"] * 2
    theirs = next(record for record in found if record.row == "peft, 2 rows, 1")
    assert theirs.figures["tokens/s"] == 32.0
    assert theirs.figures["peft"] == "0"
    assert peft.summary(found) == ["2 rows: 1.50 times peft's tokens/s (pairs: 1.50, 1.50); the goal is 1.3."]


def test_peft_may_run_out_of_memory_or_be_missing(config, only, fake_peft):
    only(first_of(replace(peft.STAGE, rows=lambda config, records: peft.rows(config, records)[1:2])))
    store = runner.run(replace(config, peer_python=fake_peft({"versions": {}, "out_of_memory": "CUDA out of memory"})))
    assert [(record.outcome, record.message) for record in store.records] == [("out of memory", "CUDA out of memory")]
    store = runner.run(replace(config, peer_python="/nowhere/python"))
    assert store.records[-1].outcome == "failed"
    assert "there is no Python at /nowhere/python" in store.records[-1].message


def test_what_pytest_reports_is_counted():
    report = ElementTree.fromstring(
        "<testsuites><testsuite><testcase classname='t.a' name='good'/>"
        "<testcase classname='t.a' name='bad'><failure message='1 != 2&#10;where 1 = f()'/></testcase>"
        "<testcase classname='t.b' name='broken'><error message='no fixture'/></testcase>"
        "<testcase classname='t.b' name='left'><skipped/></testcase></testsuite></testsuites>"
    )
    got = numerics._counted(report)
    assert (got["passed"], got["failed"], got["skipped"]) == (1, 2, 1)
    assert got["which failed"] == "t.a::bad, t.b::broken"
    assert got["why"] == "bad: 1 != 2 where 1 = f() | broken: no fixture"


def test_the_numerical_tests_are_there():
    files = [numerics.ROOT / path for paths in numerics.GROUPS.values() for path in paths]
    assert [path for path in files if not path.exists()] == []


def test_budgets_are_those_of_the_shipped_configs():
    config = AcceleratorBench(model="model.gguf", gsm8k="gsm8k_{split}.jsonl")
    gsm8k = budgets.comparison("gsm8k", config)
    assert (gsm8k.base.epochs, gsm8k.base.task.data, gsm8k.seeds) == (3, "gsm8k_{split}.jsonl", 5)
    assert [entry.name for entry in gsm8k.chosen] == list(config.methods)
    assert budgets.comparison("listops", config).base.task.problems.train == 1500
    with pytest.raises(ValueError, match="no method 'magic'; known are full fine-tuning; LoRA; "):
        budgets.comparison("listops", replace(config, methods=("magic",)))
    gpu = Device("gpu", "an H100", 0, {})
    missing = {row.name: runner.unmet(row, gpu, config) for row in budgets.rows(config, [])}
    assert missing == {"listops": "", "gsm8k": "", "boolq": "needs the data, --boolq PATH; this is an H100"}


@pytest.mark.slow
def test_decoding_and_sweeps(config, only):
    only(first_of(decoding.STAGE), first_of(sweep.STAGE, 2), memory.STAGE)
    store = runner.run(config)
    assert [record.stage for record in store.records] == ["decode", "sweep", "sweep", "memory"]
    assert {record.outcome for record in store.records} == {"measured"}
    check_figures(store)


@pytest.mark.slow
def test_a_row_in_a_process_of_its_own(config, only):
    only(first_of(attention.STAGE))
    (record,) = runner.run(replace(config, isolate=True)).records
    assert record.outcome == "measured"
    (row,) = first_of(attention.STAGE).rows(config, [])
    stopped = worker.attempt_apart("attention", row, Context(config, CPU, [], seconds_left=0.5))
    assert stopped.outcome == "stopped"


@pytest.mark.slow
def test_the_budgets_run(config, tiny_folder, tmp_path):
    config = replace(config, model=str(tiny_folder), seeds=1, runs=str(tmp_path), methods=("post-block nonlinear",))
    (row, *_) = budgets.rows(config, [])
    figures = row.measure(Context(config, CPU, []))
    assert 0 <= figures["post-block nonlinear, %"] <= 100
    assert " to " in figures["post-block nonlinear, 95 %"]
