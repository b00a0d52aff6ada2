import math

import numpy as np
import pytest
import scipy.stats

from train.evaluation.statistics import crossed, crossed_interval, holm
from train.tasks.scoring import Accuracy, accuracy, extract, interval, score


@pytest.mark.parametrize(
    ("output", "rule", "answer"),
    [
        ("7", "digit", "7"),
        (" \n7\n[MAX 1", "digit", "7"),
        ("17", "digit", "1"),
        ("-3 x", "digit", "3"),
        ("7]", "digit", "7"),
        ("7.5", "digit", "7"),
        ("the answer is 7", "digit", "7"),
        ("none", "digit", None),
        ("x <answer> 4 </answer> <answer>5</answer>", "tagged", "4"),
        ("<answer>two\nlines</answer>", "tagged", "two\nlines"),
        ("<answer></answer>", "tagged", ""),
        ("<answer>4", "tagged", None),
        ("4", "tagged", None),
        ("  Paris \n", "exact", "Paris"),
        ("", "exact", ""),
        # Numbers: separators, currency, full stops, fractions, the last number, boxed.
        ("so 24+48 = <<24+48=72>>72.\nAnswer: 72", "number", "72"),
        ("Answer: $1,234.50.", "number", "1234.50"),
        ("Answer: 12,345,678", "number", "12345678"),
        ("ANSWER : 7 apples, not 8", "number", "7"),
        ("Answer: 1\n\nQuestion: x\nAnswer: 2", "number", "2"),
        ("Answer: none\nAnswer: 2 + 3 = 5.", "number", "5"),
        ("The answer is 18.", "number", "18"),
        ("The answer is: \n -3.5", "number", "-3.5"),
        ("He owes -$5 now", "number", "-5"),
        ("that is 10-3", "number", "3"),
        ("(4) - 2", "number", "2"),
        ("it is \u22127 degrees", "number", "-7"),
        ("about 3/4 of it", "number", "3/4"),
        ("Answer: 2 1/2 cups", "number", "2 1/2"),
        ("Answer: .5", "number", ".5"),
        ("x = 1\n#### 1,000", "number", "1000"),
        ("Answer: 3, as \\boxed{4} shows", "number", "4"),
        (r"\boxed{\frac{3}{8}}", "number", "3/8"),
        (r"so \(\boxed{\text{about } \$1{,}200}\) then 5", "number", "1200"),
        (r"no end \boxed{12", "number", "12"),
        ("50% of them", "number", "50"),
        ("in 1,2 and 3", "number", "3"),
        ("nothing", "number", None),
        ("Answer: none at all", "number", None),
        # Labels of choices.
        ("Answer: (B) ice.", "label", "B"),
        ("Answer: B", "label", "B"),
        ("answer: b.", "label", "B"),
        ("Answer: (c) x", "label", "C"),
        ("Answer: B ice", "label", "B"),
        ("Answer: A cat sat", "label", None),
        ("The correct answer is answer3", "label", "3"),
        ("the correct answer is option2 because", "label", "2"),
        ("Answer: Option1.", "label", "1"),
        ("**Answer: (D)**", "label", "D"),
        ("Answer: **C**", "label", "C"),
        ("Answer: (A) x\n\nQuestion: y\nAnswer: (B) z", "label", "A"),
        ("Answer: A, no. Answer: B.", "last_label", "B"),
        ("B. ice", "label", "B"),
        ("(C) ice", "label", "C"),
        ("D", "label", "D"),
        ("I think it must be (B), since ice is cold", "label", "B"),
        ("either (A) or (B)", "label", None),
        ("A cat is an animal", "label", None),
        ("", "label", None),
        # Truth and relation.
        ("Answer: True.", "truth", "true"),
        ("the correct answer is false", "truth", "false"),
        ("False, since the truth is not known", "truth", "false"),
        ("true? The answer: false", "truth", "false"),
        ("falsehood", "truth", None),
        ("Answer: ENTAILMENT.", "relation", "entailment"),
        ("not neutral. Answer: it is contradicted", "relation", "contradiction"),
        ("entails", "relation", "entailment"),
        ("unclear", "relation", None),
    ],
)
def test_extract(output, rule, answer):
    assert extract(output, rule) == answer


def test_score():
    assert score("7 ", "7", "digit")
    assert score("Paris\n", " Paris")
    assert not score("paris", "Paris")
    assert not score("17", "7", "digit")
    assert not score("7", "7", "tagged")
    assert score("so <answer>7</answer>", "7", "tagged")


@pytest.mark.parametrize(
    ("output", "gold", "rule", "right"),
    [
        ("Answer: 1,000.00", "1000", "number", True),
        ("Answer: 1,000", "1,000", "number", True),
        ("Answer: 1/4", "0.25", "number", True),
        ("Answer: 2 1/2", "2.5", "number", True),
        ("Answer: -1 1/2", "-1.5", "number", True),
        ("Answer: 33.33333", "33.333333", "number", True),
        ("Answer: 33.3", "33.333333", "number", False),
        ("Answer: 3/0", "3", "number", False),
        ("Answer: 5.0", "$5", "number", True),
        ("Answer: 72", "27", "number", False),
        ("Answer: -7", "7", "number", False),
        ("Answer: (B) x", "B", "label", True),
        ("Answer: Option1.", "Option1", "label", True),
        ("Answer: Option1.", "Option2", "label", False),
        ("the correct answer is answer3", "answer3", "label", True),
        ("Answer: (b)", "(B)", "label", True),
        ("TRUE", "True", "truth", True),
        ("Answer: False.", "True", "truth", False),
        ("Answer: neutral", "NEUTRAL", "relation", True),
    ],
)
def test_score_by_rule(output, gold, rule, right):
    assert score(output, gold, rule) == right


@pytest.mark.parametrize("rule", ["digits", "Exact"])
def test_unknown_rule(rule):
    with pytest.raises(ValueError, match=f"got '{rule}'"):
        extract("7", rule)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(k, n, low, high):
    assert interval(k, n) == pytest.approx((low, high), abs=5e-5)
    # Mirrored: failures instead of successes.
    assert interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_solves_its_equation():
    z = 1.959963984540054
    for end in interval(42, 50):
        assert abs(42 / 50 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 50))
    assert interval(20, 20)[1] == 1.0
    assert interval(0, 20)[0] == 0.0


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_no_proportion(k, n):
    with pytest.raises(ValueError, match="interval"):
        interval(k, n)
    with pytest.raises(ValueError, match="interval"):
        Accuracy(k, n)


def test_summary():
    result = accuracy([True] * 42 + [False] * 8)
    assert result == Accuracy(42, 50)
    assert result.rate == 0.84
    assert result.interval == interval(42, 50)
    assert str(result) == "84.0 % (42 of 50; 95 %: 71.5 to 91.7)"


def test_crossed_interval_of_one_seed_is_that_of_its_examples():
    scores = [[1, 0, 1, 1, 0, 1, 1, 0]]
    got = crossed_interval(scores)
    half = scipy.stats.t.ppf(0.975, 7) * np.std(scores, ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(got, (0.625, 0.625 - half, 0.625 + half))


@pytest.mark.parametrize(("seed_spread", "example_spread"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.1, 0.3)])
def test_crossed_interval_covers_the_truth(seed_spread, example_spread):
    """Scores with effects of seeds and of examples: about 95 of 100 intervals hold the true mean, never far fewer."""
    draw = np.random.default_rng(0)
    seeds = draw.normal(0, seed_spread, (400, 3, 1)) if seed_spread else np.zeros((400, 3, 1))
    examples = draw.normal(0, example_spread, (400, 1, 40)) if example_spread else np.zeros((400, 1, 40))
    scores = 0.5 + seeds + examples + draw.normal(0, 0.3, (400, 3, 40))
    found = [crossed_interval(each) for each in scores]
    held = np.mean([estimate.low <= 0.5 <= estimate.high for estimate in found])
    assert 0.92 < held <= 1


@pytest.mark.parametrize("scores", [[], [[1]], [[1, 0], [1]]])
def test_crossed_interval_needs_scores(scores):
    with pytest.raises(ValueError, match="crossed: need scores"):
        crossed_interval(scores)


def test_tests_of_one_seed_are_those_of_its_examples():
    draws = np.random.default_rng(1).normal(0.1, 1.0, 50)
    one, student = crossed([draws]), scipy.stats.ttest_1samp
    assert one.p_differs() == pytest.approx(student(draws, 0).pvalue)
    sides = student(draws, -0.5, alternative="greater").pvalue, student(draws, 0.5, alternative="less").pvalue
    assert one.p_within(0.5) == pytest.approx(max(sides))
    rejected = scipy.stats.t.ppf(0.975, 49)
    power = scipy.stats.nct.sf(rejected, 49, one.detectable(0.8) / one.error)
    assert power == pytest.approx(0.8, abs=0.01)


def test_scores_without_spread_decide():
    same, more = crossed([[0.0] * 4] * 2), crossed([[0.5] * 4] * 2)
    assert (same.p_differs(), same.p_within(0.01)) == (1.0, 0.0)
    assert (more.p_differs(), more.p_within(0.01)) == (0.0, 1.0)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
