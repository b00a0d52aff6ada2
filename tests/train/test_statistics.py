"""Answers that are kept, found again and compared; no model is run."""

import numpy as np
import pytest

from train import evaluate
from train.evaluation.answers import (
    ScoredAnswer,
    write_answers,
)
from train.evaluation.journal import FileJournal
from train.evaluation.statistics import compare_answers, compare_scores, find_answers


def answer(number, correct, source="s"):
    return ScoredAnswer(f"p{number}", "o", "o", "g", correct, False, f"{source}:{number}")


def test_new_answers_are_not_taken_for_those_of_an_old_identity(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    with FileJournal(path, {"steering": "old"}) as journal:
        journal.add(0, answer(1, True))
        journal.finish()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.evaluation.journal.write_json", killed)
    with FileJournal(path, {"steering": "new"}) as journal:
        journal.add(0, answer(1, False))
        with pytest.raises(KeyboardInterrupt):
            journal.finish()
    with pytest.raises(ValueError, match="unfinished evaluation with another steering"):
        FileJournal(path, {"steering": "old"}, reuse=True)


def test_paired_comparison_by_hand():
    here = [True] * 9 + [False] * 3 + [True] * 8
    there = [False] * 9 + [True] * 3 + [True] * 8
    found = compare_scores(here, there)
    assert (found.total, found.only_here, found.only_there) == (20, 9, 3)
    assert found.difference == pytest.approx(0.3)
    # Twice the tail of a fair coin's 12 throws: (1 + 12 + 66 + 220) / 4096.
    assert found.p == pytest.approx(2 * 299 / 4096)
    spread = np.std(np.subtract(here, there, dtype=float)) / np.sqrt(20)
    assert found.low == pytest.approx(0.3 - 1.96 * spread, abs=0.05)
    assert found.high == pytest.approx(0.3 + 1.96 * spread, abs=0.05)
    same = compare_scores([True, False], [True, False])
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="two scores"):
        compare_scores([True], [])


@pytest.mark.parametrize("lines", ["[1]\n", '{"evaluation": {}}\n7\n', '{"evaluation": {}}\n{"prompt": "p"}\n'])
def test_a_damaged_journal_is_refused(tmp_path, lines):
    (tmp_path / "a.jsonl.unfinished").write_text(lines)
    with pytest.raises(ValueError, match=r"a\.jsonl\.unfinished: damaged; delete the file to start over"):
        FileJournal(tmp_path / "a.jsonl", {})


def test_answers_of_another_name_are_said_or_refused(tmp_path, capsys):
    there = [answer(0, True)]
    write_answers(tmp_path / "steered.jsonl", there)
    assert find_answers(tmp_path, "steered", named=True) == there
    assert find_answers(tmp_path / "steered.jsonl", "lora_only", named=True) == there
    assert capsys.readouterr().err == ""
    assert find_answers(tmp_path, "lora_only") == there
    said = capsys.readouterr().err
    assert "has no lora_only.jsonl; lora_only is compared with" in said
    assert "steered.jsonl\n" in said
    config = evaluate.EvaluateConfig("x", against=str(tmp_path), parts=("all", "lora_only"))
    with pytest.raises(
        ValueError, match=r"has no lora_only\.jsonl to compare lora_only with; evaluate the same --parts"
    ):
        evaluate.find_others(config, ["base", "steered", "lora_only"])


def test_only_the_same_examples_are_compared(tmp_path):
    here, there = ([answer(i, right) for i, right in enumerate(s)] for s in ([True, False, True], [False, False, True]))
    assert compare_answers(here, there[::-1]).difference == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="3 here, 2 there, 2 in common"):
        compare_answers(here, there[:2])
    (tmp_path / "evaluation").mkdir()
    with pytest.raises(ValueError, match="no answers there"):
        find_answers(tmp_path)
    write_answers(tmp_path / "evaluation" / "steered.jsonl", there)
    assert find_answers(tmp_path) == find_answers(tmp_path / "evaluation" / "steered.jsonl") == there
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="not answers"):
        find_answers(tmp_path / "x.jsonl")
