"""Every number among a command's settings says which numbers it can be, and a wrong one is refused at once."""

import dataclasses
import importlib
import sys
import typing
from importlib.util import find_spec

import pytest

from jaxsteer.optim import OptimConfig
from jaxsteer.ranges import Range
from train.__main__ import COMMANDS
from train.bench.decoding import DecodeBench
from train.bench.load import LoadBench
from train.bench.serve import ServeBench
from train.compare.config import Entry, Method
from train.serve.command import ServeConfig
from train.theory.tangent import TangentStudy

CHECKED_ELSEWHERE = {
    "ConvertConfig": ("rank", "alpha", "feature", "strength", "fit_lora"),  # by the format; not all have a use for it
    "LofitConfig": ("heads", "share"),  # beside the model's heads and the run's steps
    "DistributedConfig": ("processes", "process", "timeout"),  # beside what the environment says
    "OrdersStudy": ("smallest", "largest"),  # of either sign; beside each other
    "ContrastConfig": ("layers", "strengths"),  # beside the model's layers; with advice
}
FILES = {"PeftConfig", "ModelConfig"}  # what a file holds, which its reader checks


def settings():
    """The classes of settings that the commands have, by name."""
    for command in COMMANDS:
        package = find_spec(f"train.{command}").submodule_search_locations is not None
        importlib.import_module(f"train.{command}.__main__" if package else f"train.{command}")
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("jaxsteer", "train"):
            found |= {key: kind for key, kind in vars(module).items() if dataclasses.is_dataclass(kind)}
    return {name: kind for name, kind in found.items() if name.endswith(("Config", "Bench", "Study", "Loss"))}


def without_range(hint):
    """Whether a type holds a number that may be any."""
    if any(isinstance(each, Range) for each in getattr(hint, "__metadata__", ())):
        return False
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(map(without_range, typing.get_args(hint)))


def test_every_number_has_a_range():
    found = settings()
    assert {
        "TrainConfig",
        "GrpoConfig",
        "CompareConfig",
        "TrainBench",
        "PredictStudy",
        ServeConfig.__name__,
    } <= found.keys()
    for name in found.keys() - FILES:
        hints = typing.get_type_hints(found[name], include_extras=True)
        free = {each.name for each in dataclasses.fields(found[name]) if without_range(hints[each.name])}
        assert free == set(CHECKED_ELSEWHERE.get(name, ())), name


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: DecodeBench(adapters=-1), "--adapters must be at least 1, got -1"),
        (lambda: LoadBench(devices=(1, 0)), "--devices must be at least 1, got 0"),
        (lambda: ServeBench(clients=(0,)), "--clients must be at least 1, got 0"),
        (lambda: TangentStudy(every=0), "--every must be at least 1, got 0"),
        (lambda: OptimConfig(b1=1.0), r"optim\.b1 must be from 0 to below 1, got 1\.0"),
        (lambda: OptimConfig(b2=float("nan")), r"optim\.b2 must be from 0 to below 1, got nan"),
        (lambda: OptimConfig(weight_decay=-0.1), r"optim\.weight_decay must be at least 0"),
        (lambda: OptimConfig(eps=0.0), r"optim\.eps must be above 0"),
        (lambda: Entry("LoRA", Method(()), lr=-1.0), "entry 'LoRA': lr must be above 0"),
    ],
)
def test_impossible_numbers_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()
