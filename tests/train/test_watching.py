"""Watching a run: the share of the peak, trackers of a resumed run, traces, and steps that are not finite."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.optim import OptimConfig
from train.base_models import load
from train.config import TrainConfig, parse_steps
from train.devices.chips import chip_of
from train.devices.machine import peak_flops
from train.run import log
from train.run import training as setup
from train.run.loop import train
from train.run.metrics import read_metrics
from train.run.profiling import Profiler
from train.run.trackers import numbers
from train.run.training import make_training, step_batch
from train.tasks import JsonlTask


@pytest.fixture
def config(tiny_folder, tiny_data, tmp_path):
    return TrainConfig(
        task=JsonlTask(str(tiny_data)),
        model=str(tiny_folder),
        plan=("nonlinear(rank=2) @ block",),
        optim=OptimConfig(lr=1e-2),
        steps=6,
        batch_size=4,
        sequence_length=32,
        grad_accumulation=2,
        test_examples=0,
        checkpoint_every=2,
        out=str(tmp_path / "run"),
    )


# ---- the share of the peak


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
    ],
)
def test_devices_are_known_by_jax_s_name(kind, name):
    assert chip_of(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"])
def test_other_devices_have_no_figures(kind):
    assert chip_of(kind) is None


def test_the_peak_depends_on_the_dtype():
    h100, v5e = chip_of("NVIDIA H100 80GB HBM3"), chip_of("TPU v5 lite")
    assert h100.peak(jnp.float32) == h100.peak(jnp.bfloat16) / 2
    assert v5e.peak(jnp.float32) == v5e.peak(jnp.bfloat16)
    assert v5e.peak(jnp.int8) is None
    assert peak_flops(None, jnp.float32) is None  # a CPU: rather none than a made-up one


def test_mfu_is_useful_arithmetic_by_seconds_and_peak(config, monkeypatch, capsys):
    monkeypatch.setattr(log, "peak_flops", lambda mesh, dtype: 1e12)
    result = train(config)
    rows = read_metrics(result.run.metrics)
    training = make_training(config, load(config.model))
    assert "mfu" not in rows[0]
    for row in rows[1:]:
        want = training.flops(row["supervised"]) / row["step_seconds"] / 1e12
        np.testing.assert_allclose(row["mfu"], want, rtol=1e-9)
    last = next(line for line in capsys.readouterr().out.splitlines() if "6/6" in line)
    assert all(word in last for word in ("loss", "grad norm", "tokens/s", "MFU"))


# ---- trackers


def test_a_missing_package_is_named_before_anything_is_made(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed.*\[train,wandb\]"):
        train(replace(config, track=("wandb",)))
    assert not (Path(config.out)).exists()


class FakeWandB(types.ModuleType):
    """Keeps what it is told, and refuses steps that go back, as W&B does."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished, self.last = [], [], 0, {}
        self.__spec__ = types.SimpleNamespace(name="wandb")

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values, step):
        own = self.started[-1]["id"]
        if step >= self.last.get(own, 0):
            self.last[own] = step
            self.logged.append((own, step, values))

    def finish(self):
        self.finished += 1


def killed_at(monkeypatch, config, step):
    """Run until the batch of a step (from 0), then fail as a crash would."""

    def crash(config, data, at, own=None):
        if at == step:
            raise RuntimeError("crash")
        return original(config, data, at, own)

    original = setup.step_batch
    with monkeypatch.context() as patch:
        patch.setattr(setup, "step_batch", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(config)


def test_a_resumed_run_goes_on_in_the_same_trackers(config, monkeypatch):
    from tensorboardX.proto.event_pb2 import SessionLog

    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = replace(config, track=("tensorboard", "wandb"))
    killed_at(monkeypatch, config, 5)  # steps 1 to 5 are done, 4 is saved: 5 comes again
    run = train(replace(config, resume=True)).run
    assert len({settings["id"] for settings in wandb.started}) == 1
    assert [settings["resume"] for settings in wandb.started] == ["allow", "allow"]
    assert wandb.finished == 2
    events = [event for file in sorted((run.folder / "tensorboard").iterdir()) for event in events_of(file)]
    curve = {}
    for event in events:
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            assert event.step == 5
            curve = {step: value for step, value in curve.items() if step < event.step}  # what TensorBoard does
        for value in event.summary.value:
            if value.tag == "loss":
                assert event.step not in curve
                curve[event.step] = value.simple_value
    rows = read_metrics(run.metrics)
    assert list(curve) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(curve.values()), [row["loss"] for row in rows], rtol=1e-6)


def events_of(path):
    from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size


def test_only_numbers_are_drawn():
    drawn = numbers({"loss": 1.5, "overlap": [0.25, 0.75], "examples": [["a:1"]], "name": "x", "none": None})
    assert drawn == {"loss": 1.5, "overlap": 0.5}


# ---- traces


@pytest.mark.parametrize("text", ["10", "3:3", "4:2", "0:2", "a:b", "1:2:3", "-1:2", ":3"])
def test_bad_ranges_are_refused(config, text):
    with pytest.raises(ValueError, match="first:stop"):
        replace(config, profile=text)


def test_steps_that_the_run_does_not_do_are_refused(tmp_path):
    assert list(parse_steps("10:13")) == [10, 11, 12]
    for start, steps in ((0, 11), (10, 20)):
        with pytest.raises(ValueError, match=f"steps {start + 1} to {steps}"):
            Profiler("10:13", tmp_path, start, steps)


def test_exactly_the_asked_steps_are_traced(config, monkeypatch, capsys):
    calls, seen = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", len(seen), folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", len(seen))))
    original = setup.Training.step
    monkeypatch.setattr(setup.Training, "step", lambda *a: seen.append(1) or original(*a))
    run = train(replace(config, profile="3:5")).run
    assert calls == [("start", 2, str(run.profile)), ("stop", 4)]  # before the third step, after the fourth
    assert "Traced steps 3 to 4" in capsys.readouterr().out


def test_a_trace_is_written(tmp_path):
    with Profiler("1:2", tmp_path, 0, 1) as profiler:
        profiler.before(1)
        assert "xprof" in profiler.after(1, jnp.ones(3) + 1)
    assert list(tmp_path.rglob("*.xplane.pb"))


# ---- steps that are not finite


def poison(monkeypatch, *steps):
    """Make the batches of these steps (from 0) ones without a finite loss, in one microbatch alone."""

    def poisoned(config, data, step, own=None):
        batch = original(config, data, step, own)
        weights = np.array(batch.weights)
        if step in steps:
            weights[-1] *= np.nan
        return batch._replace(weights=weights)

    original = setup.step_batch
    monkeypatch.setattr(setup, "step_batch", poisoned)


def test_a_skipped_step_changes_nothing_but_its_number(config):
    training = make_training(replace(config, nonfinite="skip"), load(config.model))
    state, _ = training.step(training.state, training.batch(0))
    before = jax.device_get((state.params, state.opt_state))
    batch = training.batch(1)
    bad = batch._replace(weights=batch.weights.at[-1].set(jnp.nan))
    state, metrics = training.step(state, bad)
    assert not np.isfinite(metrics.loss)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    assert state.step == 2
    state, metrics = training.step(state, training.batch(2))
    assert np.isfinite(metrics.loss)
    moved = zip(jax.tree.leaves(before[0]), jax.tree.leaves(jax.device_get(state.params)), strict=True)
    assert any(np.any(a != b) for a, b in moved)
    assert training.program.jitted._cache_size() == 1


def test_without_skipping_the_step_is_the_same_program(config):
    loaded = load(config.model)

    def text(**changes):
        training = make_training(replace(config, **changes), loaded)
        batch = step_batch(config, training.data, 0)
        return training.program.jitted.lower(training.state, batch, training.frozen).as_text()

    assert "is_finite" not in text()
    assert "is_finite" in text(nonfinite="skip")


def test_skipped_steps_are_counted_and_named_and_the_bound_holds_over_resumption(config, monkeypatch, capsys):
    poison(monkeypatch, 1, 3, 4)
    config = replace(config, nonfinite="skip", max_skipped=2)
    with pytest.raises(FloatingPointError, match=r"step 5: .*letters\.jsonl:\d+.*--max-skipped 2 .*step 4"):
        train(config)
    assert "Skipped step 2" in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match="step 5"):  # two were skipped before step 4, which it resumes from
        train(replace(config, resume=True))
    run = train(replace(config, resume=True, max_skipped=3)).run
    assert "3 steps were skipped" in capsys.readouterr().out
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "examples" in row] == [2, 4, 5]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 2, 3, 3]
    assert json.loads(run.summary.read_text())["trainable_parameters"]


def test_the_examples_named_are_those_of_the_batch(config, monkeypatch):
    training = make_training(config, load(config.model))
    poison(monkeypatch, 2)
    with pytest.raises(FloatingPointError, match="--nonfinite skip"):
        train(config)
    row = read_metrics(Path(config.out) / "metrics.jsonl")[-1]
    assert row["step"] == 3
    by_source = {example.source: example.ids for example in training.data.examples}
    batch = step_batch(replace(config, grad_accumulation=1), training.data, 2)
    for tokens, segments, members in zip(batch.tokens, batch.segments, row["examples"], strict=True):
        held = np.concatenate([by_source[source] for source in members])
        np.testing.assert_array_equal(tokens[segments > 0], held)
    assert train(replace(config, resume=True, nonfinite="skip")) is not None
