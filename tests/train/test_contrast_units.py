"""`train.contrast`: figures of different kinds are not mixed, and what the model cannot read is refused early."""

from dataclasses import replace

import numpy as np
import pytest

from train.base_models import describe
from train.contrast import report
from train.contrast.answers import Answered
from train.contrast.material import read_material
from train.contrast.settings import ContrastConfig
from train.contrast.sweep import Cell
from train.evaluation.statistics import Estimate


def exactly(value):
    return Estimate(value, value, value)


def scored(score):
    return Answered(("a",), exactly(score), -1.0, 0.0)


@pytest.fixture
def outcome():
    """Of a scorer, with a strength beyond the budget: its shift of 77.7 is no score."""
    before = Cell(-1, 0.0, exactly(0.0), exactly(0.0), scored(0.1))
    within = Cell(1, 0.5, exactly(0.1), exactly(55.5), scored(0.8))
    beyond = Cell(1, 2.0, exactly(4.0), exactly(77.7))
    return report.Outcome(before, [within, beyond], [within], within, np.ones(3), "score by f.py:f", 0.2)


def test_only_scores_are_drawn_as_scores(outcome, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "plot_lines", lambda path, panels, title: drawn.extend(panels))
    report.plot_outcome(tmp_path / "x.png", outcome, "")
    series = drawn[0].series
    assert series["layer 1"] == ([0.1], [0.8])
    assert series["_budget"] == ([0.2, 0.2], [0.8, 0.8])


def test_only_scores_are_printed_as_scores(outcome, capsys):
    report.print_outcome(outcome)
    shown = capsys.readouterr().out
    assert "+0.800" in shown
    assert "4.000" in shown
    assert "77.7" not in shown


def test_without_a_scorer_all_that_is_finite_is_shown(outcome):
    plain = replace(outcome, before=outcome.before._replace(answered=scored(0.1)._replace(score=None)))
    assert [plain.shows(cell) for cell in outcome.cells] == [True, True]
    assert not plain.shows(Cell(1, 9.0, exactly(float("nan")), exactly(1.0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ("a" * 65,)}, "--text: takes up to 65 tokens"),
        ({"max_new_tokens": 62}, "takes up to 6"),
    ],
)
def test_learned_positions_end_before_weights_are_read(tiny_folder, tmp_path, options, message):
    pairs, neutral = tmp_path / "pairs.jsonl", tmp_path / "neutral.txt"
    rows = [f'{{"prompt": "{letter}??", "chosen": "aa", "rejected": "zz"}}\n' for letter in "bcdefghi"]
    pairs.write_text("".join(rows))
    neutral.write_text("the river rises\nbread needs water\n")
    described = describe(str(tiny_folder))
    learned = replace(described.config, learned_positions=True, max_length=64)
    config = ContrastConfig(str(pairs), neutral=str(neutral), max_new_tokens=4)
    read_material(config, replace(described, config=learned))
    with pytest.raises(ValueError, match=message):
        read_material(replace(config, **options), replace(described, config=learned))
