"""Measuring against a peer: who is timed when, what is refused, what is kept; with a peer that only pretends."""

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_model import TINY

import train.peers as peers
from jaxsteer.flops import step_flops
from jaxsteer.models.transformer import Model
from jaxsteer.plans import parse_plan
from train.base_models import describe
from train.bench.against import command, contest, fresh, page, texts
from train.bench.against.arena import MARGIN, AgainstBench
from train.bench.against.bound import Needed, Roof, decoding_needs, training_needs
from train.bench.against.contest import Contest, Part, Side, hold, parts_of
from train.bench.against.decoding import compare
from train.bench.against.rows import ROWS, chosen
from train.bench.against.training import work_of
from train.data import TokenizedExample
from train.peers import converse

ROOT = Path(__file__).resolve().parents[2]
ROOF = Roof(1e9, 1e9)

PRETENDER = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
(here / "started").open("a").write("x")
for line in sys.stdin:
    request = json.loads(line)
    op = request["op"]
    if op == "load":
        said = {"versions": {"torch": "9.9"}}
    elif op == "batches":
        said = {"batches": [sum(len(row) for step in request["steps"] for row in step)]}
    elif op == "step":
        said = {"seconds": 2.0, "loss": 1.0}
    else:
        said = json.loads((here / "said.json").read_text()) if op == "check" else {}
    print(json.dumps(said), flush=True)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder for peers' programs."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setattr(peers, "PROGRAMS", folder)
    return folder


def side(name, *times, work=1.0, log=None):
    """A side whose parts take these times, and note who ran."""

    def part(seconds):
        def run():
            if log is not None:
                log.append(name)
            return seconds

        return Part(run, work)

    return Side(name, [part(seconds) for seconds in times])


def test_the_sides_take_turns_and_the_best_opponent_is_measured():
    log = []
    ours, slow, fast = (
        side("ours", 1.0, 1.0, log=log),
        side("slow", 8.0, 8.0, log=log),
        side("fast", 0.5, 1.0, 0.5, log=log),
    )
    match = Contest(ours, [slow, fast], {"loss": 1.0})
    count = [0]
    result = hold(match, 2, "higher", lambda: count.__setitem__(0, count[0] + 1))
    assert log[:7] == ["ours"] * 2 + ["slow"] * 2 + ["fast"] * 3
    assert log[7:] == ["fast", "ours", "fast", "ours", "fast"] * 2
    assert count[0] == parts_of(match, 2) == len(log)
    assert result["tried"] == {"slow": 2 / 16, "fast": 1.5}
    assert result["theirs"] == {"name": "fast", "median": 1.5, "figures": [1.5, 1.5]}
    assert result["ours"]["figures"] == [1.0, 1.0]
    assert result["ratio"] == {"median": 2 / 3, "lowest": 2 / 3, "highest": 2 / 3}
    assert "bound" not in result


def test_who_begins_alternates():
    log = []
    hold(Contest(side("ours", 1.0, log=log), [side("theirs", 1.0, log=log)]), 2, "higher", lambda: None)
    assert log == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]


def test_figures_that_are_not_times_need_no_warming_up():
    log = []
    match = Contest(side("ours", 2.0, work=None, log=log), [side("theirs", 8.0, work=None, log=log)], limited_by="x")
    result = hold(match, 1, "lower", lambda: None)
    assert log == ["ours", "theirs"]
    assert (result["ours"]["median"], result["ratio"]["median"], result["limited_by"]) == (2.0, 0.25, "x")


def test_the_share_of_the_bound(monkeypatch):
    monkeypatch.setattr(contest, "measure_roof", lambda: ROOF)
    for needed, limit in ((Needed(2e9, 1e9), "arithmetic"), (Needed(1e9, 2e9), "memory")):
        match = Contest(side("ours", 4.0, work=6.0), [side("theirs", 8.0, work=6.0)], needed=needed)
        result = hold(match, 1, "higher", lambda: None)
        assert result["bound"]["share"] == 0.5
        assert result["bound"]["figure"] == 3.0
        assert result["limited_by"] == limit


def test_padding_masked_scores_and_recomputation_are_not_needed():
    for plan, train_base in ((("nonlinear(rank=2) @ block",), False), ((), True)):
        model = Model(TINY, parse_plan(plan, TINY), train_base=train_base)
        one = [False] * 4 + [True] * 6
        exact = step_flops(model, 1, 10, 6, causal_share=55 / 100).useful
        assert training_needs(model, [one], 1).flops == pytest.approx(exact)
        assert training_needs(model, [one] * 3, 1).flops == pytest.approx(3 * exact)


def test_decoding_in_batches_reads_the_weights_less_often():
    alone, together = (decoding_needs(TINY, [5, 7], 4, rows) for rows in (1, 2))
    assert alone.flops == together.flops
    assert alone.bytes > together.bytes
    longer = decoding_needs(TINY, [5, 7], 8, 2)
    assert longer.flops > together.flops
    assert longer.bytes > together.bytes


def prompts(count):
    return [TokenizedExample(np.arange(3), np.zeros(3, bool), 3, f"q{n}") for n in range(count)]


def test_our_rows_have_the_length_that_costs_least_and_theirs_are_padded(tiny_folder):
    model = describe(str(tiny_folder), "float32")
    model = replace(model, config=replace(model.config, max_length=1024))
    examples = [TokenizedExample(np.full(40, i), np.ones(40, bool), 1, f"q{i}") for i in range(64)]
    arena = SimpleNamespace(
        config=AgainstBench(batch_size=8, sequence_length=64), loaded=model, training_examples=lambda kind: examples
    )
    work = work_of(arena, "gsm8k", 2)
    rows, length = work.source.batch_size, work.source.sequence_length
    assert length > 64  # of which 24 would be padding
    assert 8 * 64 - length < rows * length <= 8 * 64
    padded, packed = work.asked("padded"), work.asked("packed")
    assert (padded["rows"], padded["length"], packed["length"]) == (8, 64, length)
    assert padded["steps"] == packed["steps"]


def test_answers_may_differ_only_where_rounding_decides():
    ours = np.array([[1, 2, 3], [4, 5, 6]])
    said = {"tokens": [[1, 2, 3], [4, 9, 9]], "margins": [[1.0] * 3, [1.0, MARGIN / 2, 1.0]]}
    peer = SimpleNamespace(ask=lambda op, **rest: said)
    assert compare("row", peer, prompts(2), ours) == {"answers": 2, "answers_agreeing": 1}
    said["margins"][1][1] = 2 * MARGIN
    with pytest.raises(ValueError, match=r"row: the answers to q1 differ at token 2.*nothing is measured"):
        compare("row", peer, prompts(2), ours)
    said["tokens"] = [[1, 2]]
    with pytest.raises(ValueError, match=r"\[1, 2\], ours \[2, 3\]"):
        compare("row", peer, prompts(2), ours)


def said_loss(error, name):
    return float(re.search(rf"{name} ([-\d.e]+)", str(error.value))[1])


def test_a_row_is_compared_measured_saved_and_not_measured_again(
    programs, tmp_path, tiny_folder, tiny_data, monkeypatch, capsys
):
    """One run after another: another loss, another gradient, the same work, a second run, and --again."""
    (programs / "bench_peer.py").write_text(PRETENDER)
    said, path = programs / "said.json", tmp_path / "out.json"
    monkeypatch.setattr(contest, "measure_roof", lambda: ROOF)
    config = AgainstBench(
        peer_python=sys.executable,
        rows=("post-block-boolq",),
        pairs=2,
        steps=1,
        model=str(tiny_folder),
        data=str(tiny_data),
        boolq=str(tiny_data),
        batch_size=2,
        sequence_length=32,
        json=str(path),
    )
    said.write_text('{"loss": 0.5, "grad_norm": 0.0}')
    with pytest.raises(ValueError, match=r"loss of 0\.500000 .* nothing is measured") as error:
        command.bench_against(config)
    loss = said_loss(error, "and jaxsteer")
    said.write_text(json.dumps({"loss": loss, "grad_norm": 0.0}))
    with pytest.raises(ValueError, match=r"gradient .* nothing is measured") as error:
        command.bench_against(config)
    norm = float(re.search(r"that of jaxsteer ([-\d.e]+)", str(error.value))[1])
    assert not path.exists()

    said.write_text(json.dumps({"loss": loss, "grad_norm": norm}))
    command.bench_against(config)
    printed, figures = capsys.readouterr().out, json.loads(path.read_text())
    row = figures["rows"]["post-block-boolq"]
    assert page.table(figures) in printed
    assert row["checked"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert row["versions"]["torch"] == "9.9"
    assert len(row["ours"]["figures"]) == len(row["theirs"]["figures"]) == 2
    assert row["theirs"]["name"] == "PyTorch hooks, padded to 32"
    examples = 2 * row["theirs"]["median"]  # its only batch takes 2 seconds
    assert examples == round(examples) > 2
    assert set(figures["machine"]) == {"processor", "cores", "memory_gb", "system"}

    measured, result = [], {name: value for name, value in row.items() if name not in ("code", "settings")}
    monkeypatch.setattr(command, "_measure", lambda arena, new, heading: measured.append(new.name) or result)
    for settings, times in (({}, 0), ({"again": True}, 1), ({"pairs": 1}, 1), ({"pairs": 1}, 0)):
        measured.clear()
        command.bench_against(replace(config, **settings))
        assert len(measured) == times


def test_what_cannot_be_measured_is_said_before_anything_is_loaded(programs, tmp_path):
    (programs / "bench_peer.py").write_text(PRETENDER)
    here = AgainstBench(peer_python=sys.executable, json=str(tmp_path / "out.json"))
    for config, message in (
        (replace(here, rows=("trainin",)), "no row 'trainin' .did you mean training"),
        (replace(here, peer_python="nowhere/python"), "there is no Python at .*nowhere/python"),
        (replace(here, json=str(tmp_path / "no" / "out.json")), "the folder .* does not exist"),
        (replace(here, data=str(tmp_path / "no.jsonl")), r"no\.jsonl: no such file"),
        (replace(here, table=str(tmp_path / "no.json")), r"no\.json: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            command.bench_against(config)
    with pytest.raises(ValueError, match="--pairs must be at least 1, got 0"):
        AgainstBench(pairs=0)
    with pytest.raises(ValueError, match="--table"):
        AgainstBench(into="page.md")
    assert not (programs / "started").exists()


def test_rows_are_chosen_by_name_and_by_group():
    assert chosen(()) == list(ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert [row.name for row in chosen(("decoding,lora-gsm8k",))] == [
        "lora-gsm8k",
        "decoding-1",
        "decoding-8",
        "decoding-32",
    ]


def test_texts_of_a_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{"instruction": "b", "output": "2", "answer": "x"}\n')
    data = texts.read_texts(str(path))
    assert data.texts == [("a", "1"), ("b", "2")]
    assert data.origin.startswith("data.jsonl (")
    out = tmp_path / "out.jsonl"
    data.write(out)
    assert json.loads(out.read_text().splitlines()[0]) == {"prompt": "a\n", "completion": "1"}
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no prompt with a completion; expected the fields prompt and"):
        texts.read_texts(str(path))


def test_made_up_texts_are_reproducible_and_of_many_lengths():
    for make in texts.KINDS.values():
        assert make() == make()
    lengths = [len(text.prompt) + len(text.completion) for text in texts.problems().texts]
    assert max(lengths) > 3 * min(lengths)


def test_a_peer_that_ends_or_says_nothing(programs):
    (programs / "bench_peer.py").write_text(
        "import sys, time\nfor line in sys.stdin:\n    'slow' in line and time.sleep(60)\n    sys.exit('no memory')\n"
    )
    with converse("bench", Path(sys.executable)) as peer, pytest.raises(ValueError, match="status 1: no memory"):
        peer.ask("load")
    with converse("bench", Path(sys.executable)) as peer, pytest.raises(ValueError, match=r"no answer within 0\.1 s"):
        peer.ask("slow", timeout=0.1)


def test_a_process_is_watched_until_its_steps_are_done(tmp_path, monkeypatch):
    @contextmanager
    def running(code):
        monkeypatch.setattr(fresh, "_command", lambda arena, row, folder: [sys.executable, "-c", code, str(folder)])
        yield SimpleNamespace(data={"gsm8k": texts.Data([texts.Text("a", "b")], "made up")}), chosen(("lora-gsm8k",))[0]

    log = "run = pathlib.Path(sys.argv[1], 'run'); run.mkdir(); (run / 'metrics.jsonl').write_text('{}\\n{}\\n')"
    with running(f"import os, pathlib, sys, time; assert os.environ['JAXSTEER_CACHE']; {log}; time.sleep(60)") as on:
        done = fresh.train_afresh(*on, 2, tmp_path)
        assert 0 < done.seconds < 50
        assert done.peak > 1e6
    with running("import sys; sys.exit('no such model')") as on, pytest.raises(ValueError, match="no such model"):
        fresh.train_afresh(*on, 1, tmp_path)


@pytest.fixture
def figures():
    row = {
        "title": "LoRA",
        "unit": "examples/s",
        "ours": {"name": "jaxsteer", "median": 123.4},
        "theirs": {"name": "peft", "median": 0.98765},
        "ratio": {"median": 1.25, "lowest": 1.0, "highest": 1.5},
        "bound": {"share": 0.654},
        "limited_by": "arithmetic",
        "tried": {"peft": 0.98765, "peft, slowly": 0.5},
        "versions": {"jax": "1", "torch": "2"},
        "pairs": 5,
        "settings": {"model": "m"},
    }
    return {"machine": {"cores": 2, "processor": "P"}, "rows": {"lora": row}}


def test_the_table(figures):
    text = page.table(figures)
    assert "m, float32, on 2 cores (P); jax 1, torch 2. Medians of 5 interleaved pairs" in text
    assert (
        "| LoRA, against peft | 123 examples/s | 0.988 examples/s | 1.25 (1.00 to 1.50) | 65 % | arithmetic |" in text
    )
    assert "- LoRA (examples/s): peft: 0.988; peft, slowly: 0.5" in text


def test_the_table_finds_its_place(figures, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"# Speed\n\n{page.BEGIN}\nold\n{page.END}\n\nmore\n")
    page.write_into(str(path), figures)
    assert path.read_text() == f"# Speed\n\n{page.BEGIN}\n{page.table(figures)}\n{page.END}\n\nmore\n"
    path.write_text("# Speed\n")
    with pytest.raises(ValueError, match=r"page\.md: no place for the table"):
        page.write_into(str(path), figures)
    for wrong in ({}, {"rows": {"a": {}}}):
        with pytest.raises(ValueError, match="jaxsteer bench against"):
            page.table(wrong)


def test_the_page_is_what_its_figures_say():
    """docs/performance.md has the table of docs/performance.json."""
    path = ROOT / "docs" / "performance.md"
    figures, text = json.loads((ROOT / "docs" / "performance.json").read_text()), path.read_text()
    assert page.placed(text, figures, str(path)) == text
