"""Ranges of numbers in the types of settings."""

import math
import re
from dataclasses import dataclass
from typing import Annotated

import pytest

from jaxsteer.ranges import Count, Finite, Fraction, Natural, NonNegative, Positive, Range, check_ranges


@dataclass
class Settings:
    batch_size: Count = 8
    patience: Natural = 0
    layers: tuple[Count, ...] = (1,)
    shift: Finite = 0.0
    rate: Positive | None = None
    decay: NonNegative = 0.0
    warmup: Fraction = 0.0
    share: Annotated[float, Range(0, 1, open_low=True)] = 0.5
    port: Annotated[int, Range(0, 65535)] = 8000
    name: str = "any"

    def __post_init__(self):
        check_ranges(self)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"patience": -1}, "--patience must be at least 0, got -1"),
        ({"layers": (3, 0)}, "--layers must be at least 1, got 0"),
        ({"shift": math.nan}, "--shift must be finite, got nan"),
        ({"shift": -math.inf}, "--shift must be finite, got -inf"),
        ({"rate": 0.0}, "--rate must be above 0, got 0.0"),
        ({"rate": math.inf}, "--rate must be above 0 and finite, got inf"),
        ({"warmup": math.inf}, "--warmup must be from 0 to below 1, got inf"),
        ({"port": 10**400}, f"--port must be from 0 to 65535, got {10**400}"),
        ({"decay": -1e-9}, "--decay must be at least 0, got -1e-09"),
        ({"warmup": 1.0}, "--warmup must be from 0 to below 1, got 1.0"),
        ({"share": 0.0}, "--share must be above 0 and at most 1, got 0.0"),
        ({"port": 65536}, "--port must be from 0 to 65535, got 65536"),
    ],
)
def test_a_number_out_of_range_is_named(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**given)


def test_ends_that_are_not_open_are_allowed():
    Settings(1, 0, (), -3.5, 1e-9, 0.0, 0.0, 1.0, 65535)
    Settings(10**400, warmup=0.999, port=0, rate=None)


def test_names_in_a_file_keep_their_underscores():
    settings = Settings()
    settings.batch_size = 0
    with pytest.raises(ValueError, match=r"^optim\.batch_size must be"):
        check_ranges(settings, "optim.")
