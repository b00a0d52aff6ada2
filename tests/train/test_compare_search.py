"""The search for a learning rate, with accuracies that are given instead of trained."""

from dataclasses import replace

import pytest

from train.compare.config import Entry, Method
from train.compare.records import MethodResult
from train.compare.runs import search

ENTRY = Entry("post-block", Method(("nonlinear(rank=2) @ block",)), lr=1e-2)


class Fake:
    """A comparison whose validation accuracy is a function of the learning rate's exponent."""

    def __init__(self, config, rate):
        self.config, self.rate = config, rate

    def finish(self, entry, runs):
        return [{"diverged": self.rate(e) is None, "validation": [self.rate(e) or 0]} for e, _ in runs]


@pytest.mark.parametrize(
    ("rate", "best", "tried"),
    [
        (lambda e: 1 - abs(e) / 10, 0, 3),
        (lambda e: 1 - abs(e - 2) / 10, 2, 5),
        (lambda e: 1 - abs(e + 1) / 10, -1, 4),
        (lambda e: e / 10, 4, 6),  # ever better: at the edge after all extensions
        (lambda e: None if e > 0 else 1 + e / 10, 0, 3),  # too high a rate diverges
        (lambda e: 0.5, 0, 3),
    ],
)
def test_the_grid_grows_until_its_best_is_inside(rate, best, tried, tiny_comparison):
    fake = Fake(replace(tiny_comparison, extensions=3), rate)
    exponent, records = search(fake, ENTRY, lambda text: None)
    assert (exponent, len(records)) == (best, tried)


def test_a_single_rate_is_taken_as_it_is(tiny_comparison):
    config = replace(tiny_comparison, rates=1, extensions=3, seeds=4)
    assert config.timed_runs == 4
    fake = Fake(config, lambda e: 0.5)
    exponent, records = search(fake, ENTRY, lambda text: None)
    assert (exponent, len(records)) == (0, 1)
    assert not MethodResult(ENTRY, exponent, [{"exponent": 0}], records, None).at_edge
