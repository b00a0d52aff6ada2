"""Rewards of answers: those of the tasks by name, one's own functions, and what is said where one fails."""

import pytest

from train.data import Example
from train.tasks.rewards import check_rewards, parse_rewards

EXAMPLE = Example.of("What is 3 + 4?", "7", source="sums.jsonl:3", answer="7")

OWN = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weights:
    word: float = 0.5

def words(example, answer):
    return Weights().word * len(answer.split()) + (answer == example.gold)

def raises(example, answer):
    return {}[answer]

def nan(example, answer):
    return float("nan")

def text(example, answer):
    return "0.5"

def nothing(example, answer):
    pass

def huge(example, answer):
    return 10 ** 400

number = 3
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return str(file)


@pytest.mark.parametrize(
    ("name", "rule", "answer", "expected"),
    [
        ("exact", "number", "It is 7.", 1.0),
        ("exact", "number", "It is 8.", 0.0),
        ("format", "number", "It is 8.", 1.0),
        ("format", "number", "It is eight.", 0.0),
        ("number", "digit", "so 7", 1.0),
    ],
)
def test_rewards_by_name(name, rule, answer, expected):
    (reward,) = parse_rewards([name], rule)
    assert (reward.name, reward.weight, reward.of(EXAMPLE, answer)) == (name, 1.0, expected)


def test_factors_and_own_functions(own):
    rewards = parse_rewards(["2*exact", "-0.5*format", f"1e-1*{own}:words"], "number")
    assert [reward.weight for reward in rewards] == [2.0, -0.5, 0.1]
    assert rewards[2].of(EXAMPLE, "one two three") == 1.5
    assert rewards[2].of(EXAMPLE, "7") == 1.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "KeyError: 'a b'"),
        ("nan", "gave nan, need a finite number"),
        ("text", "need a number"),
        ("nothing", "gave None, need a number"),
        ("huge", "need a number"),
    ],
)
def test_a_reward_that_fails_names_example_reward_and_answer(own, name, message):
    (reward,) = parse_rewards([f"{own}:{name}"], "number")
    with pytest.raises(ValueError, match=message) as caught:
        reward.of(EXAMPLE, "a b")
    assert all(part in str(caught.value) for part in (f"{own}:{name}", "sums.jsonl:3", "a b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exakt", r"no such reward; did you mean exact\?|no such reward.*exact"),
        ("half*exact", "'half' is not a number"),
        ("nan*exact", "the factor must be finite"),
        ("gone.py:f", "no such file gone.py"),
        ("no_such_module:f", "cannot be imported .ModuleNotFoundError"),
        ("OWN:absent", "has no function 'absent'"),
        ("OWN:number", "has no function 'number'"),
    ],
)
def test_rewards_that_do_not_exist(own, text, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards([text.replace("OWN", own)], "number")


def test_no_rewards_at_all():
    with pytest.raises(ValueError, match="give at least one"):
        parse_rewards([], "number")


@pytest.mark.parametrize(
    ("source", "message"), [("def f(:\n", "SyntaxError"), ("open('absent')\n", "FileNotFoundError.*absent")]
)
def test_a_file_that_cannot_be_imported(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ValueError, match=f"bad.py cannot be imported .{message}"):
        parse_rewards([f"{tmp_path}/bad.py:f"], "number")


def test_mistakes_show_before_training(own):
    with pytest.raises(ValueError, match=r"sums\.jsonl:3.*KeyError"):
        check_rewards(parse_rewards(["exact", f"{own}:raises"], "number"), [EXAMPLE])
