"""The record of a run survives kills and resumption; progress says the same on a terminal and in a file."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from train.display.console import progress
from train.run.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).parents[2]


def test_lines_come_back_with_their_types(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {
        "loss": jnp.float32(0.1),
        "rate": np.float64(0.2),
        "tokens": 12,
        "split": "test",
        "on": True,
        "no": None,
    }
    with MetricsWriter(path) as writer:
        writer.write(1, **row)
        assert len(path.read_text().splitlines()) == 1  # on disk before the file is closed
        writer.write(np.int64(2), loss=math.nan, high=np.float32(np.inf), low=-math.inf, one=jnp.ones((1,)))
    first, second = read_metrics(path)
    assert first == {"step": 1, **row, "loss": float(np.float32(0.1))}
    assert first["on"] is True
    assert math.isnan(second.pop("loss"))
    assert second == {"step": 2, "high": math.inf, "low": -math.inf, "one": 1.0}


def test_lines_are_json_for_any_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, loss=math.nan, high=math.inf)

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1,
        "loss": "NaN",
        "high": "Infinity",
    }


def write(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps) + tail)


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6, "loss": 1.0}', "\x00\x00"])
def test_resuming_drops_later_and_half_lines(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6), tail)
    with MetricsWriter(path, resume_from=4) as writer:
        writer.write(4, loss=7.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 7.0),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1], '{"step": 2, "loss": 0.5}')
    with MetricsWriter(path, resume_from=3) as writer:
        writer.write(3, loss=0.1)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in ('{"loss": 1}', "[1]", '{"step": "x"}', '{"step": 1'):
        path.write_text('{"step": 1}\n' + bad + "\n" + '{"step": 3}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
            read_metrics(path)


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1])
    with pytest.raises(ValueError, match="holds the metrics of another run"):
        MetricsWriter(path)
    with MetricsWriter(tmp_path / "new.jsonl", resume_from=6) as writer:  # nothing there to cut
        writer.write(6, loss=1.0)


@pytest.mark.parametrize("value", [[1, object()], jnp.ones(2), {"a": 1}, object()])
def test_what_is_no_number_is_refused_by_name(tmp_path, value):
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="'odd'"):
        writer.write(1, odd=value)
    with MetricsWriter(tmp_path / "n.jsonl") as writer, pytest.raises(ValueError, match="'step'"):
        writer.write(1, **{"step": 2})


KILLED = """
import os, signal, sys
from train.run.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1])
for step in range(1, 4):
    writer.write(step, loss=1.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_every_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, env=os.environ).returncode == -9
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def plain(total, facts, start=0, seconds=1.0, first=30.0):
    """The lines printed for updates `seconds` apart, the first after a compilation."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=60)
    with progress(total, "train", start, console=console, every_seconds=5.0, clock=clock) as bar:
        for index, (step, values) in enumerate(facts):
            clock.now += first if index == 0 else seconds
            bar.update(step, **values)
    return out.getvalue().splitlines()


def test_plain_lines_first_last_and_now_and_then():
    facts = [(step, {"loss": 1.5, "tokens_per_second": 12345.6}) for step in range(1, 13)]
    lines = plain(12, facts)
    assert [line.split()[1] for line in lines] == ["1/12", "6/12", "11/12", "12/12"]
    assert lines[0] == "train  1/12  loss 1.5000  12,346 tokens/s"
    assert lines[1] == "train  6/12  loss 1.5000  12,346 tokens/s  0:06 left"
    assert lines[-1] == "train  12/12  loss 1.5000  12,346 tokens/s"


def test_a_run_that_stops_early_prints_its_last_step():
    lines = plain(100, [(step, {"loss": 1.0}) for step in range(51, 54)], start=50)
    assert [line.split()[1] for line in lines] == ["51/100", "53/100"]


def test_time_left_forgets_compilation_and_the_distant_past():
    clock = Clock()
    with progress(1000, "train", console=Console(file=io.StringIO()), clock=clock) as bar:
        clock.now += 60.0  # compilation
        bar.update(1)
        assert bar.seconds_left() is None
        for step in range(2, 101):
            clock.now += 10.0
            bar.update(step)
        assert bar.seconds_left() == pytest.approx(9000.0)
        for step in range(101, 201):
            clock.now += 1.0
            bar.update(step)
        assert bar.seconds_left() == pytest.approx(800.0)


def test_steps_that_were_made_before_say_nothing_of_the_speed():
    clock = Clock()
    with progress(1000, "train", console=Console(file=io.StringIO()), clock=clock) as bar:
        for done in (200, 400):
            clock.now += 0.1
            bar.skip(done)
        for step in range(401, 405):
            clock.now += 10.0
            bar.update(step)
        assert bar.seconds_left() == pytest.approx(5960.0)


def test_hours_other_facts_and_notes():
    out, clock = io.StringIO(), Clock()
    with progress(10_000, "train", console=Console(file=out), every_seconds=0.0, clock=clock) as bar:
        bar.update(1)
        clock.now += 1.0
        bar.note("[saved] step 1")
        bar.update(2, loss=jnp.float32(2.0), grad_norm=0.123456, epoch=1)
    assert out.getvalue().splitlines() == [
        "train  1/10000",
        "[saved] step 1",
        "train  2/10000  loss 2.0000  grad norm 0.1235  epoch 1  2:46:38 left",
    ]


def test_a_terminal_shows_the_same_facts():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False, color_system=None)
    with progress(4, "train", console=console, clock=clock) as bar:
        for step in range(1, 4):
            clock.now += 2.0
            bar.update(step, loss=0.25, tokens_per_second=1000.0)
    shown = out.getvalue()
    assert "3/4  loss 0.2500  1,000 tokens/s  0:02 left" in shown


def test_an_error_in_the_block_passes_through():
    def fail():
        with progress(3, "train", console=Console(file=io.StringIO(), force_terminal=True)) as bar:
            bar.update(1, loss=1.0)
            raise RuntimeError("the loss is not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        fail()


def test_a_list_of_numbers_comes_back(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(1, overlap=[0.5, math.nan])
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["overlap"][0] == 0.5
    assert math.isnan(row["overlap"][1])
