"""Every number among a command's settings says which numbers it can be, and a wrong one is refused at once."""

import dataclasses
import importlib
import inspect
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
from train.config import TrainConfig
from train.lofit import LofitConfig
from train.theory.tangent import TangentStudy

CHECKED_ELSEWHERE = {
    "ConvertConfig": ("rank", "alpha", "feature", "strength", "fit_lora"),  # by the format; not all have a use for it
    "DistributedConfig": ("processes", "process"),  # beside what the environment says
    "OrdersStudy": ("smallest", "largest"),  # of either sign; beside each other
    "ContrastConfig": ("layers", "strengths"),  # beside the model's layers; with advice
}
PARTS = {
    "Teacher",
    "Method",
    "Entry",
    "LoFiT",
    "Orthogonality",
    "Sampling",
    "Preference",
    "Kto",
    "Grpo",
    "Distillation",
    "Keeping",
}
FILES = {"PeftConfig", "ModelConfig"}  # what a file holds, which its reader checks


def dataclasses_of_commands():
    """All dataclasses of the modules that the commands import, by name."""
    for command in (*COMMANDS, "serve.command"):
        package = find_spec(f"train.{command}").submodule_search_locations is not None
        importlib.import_module(f"train.{command}.__main__" if package else f"train.{command}")
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("jaxsteer", "train"):
            found |= {key: each for key, each in vars(module).items() if dataclasses.is_dataclass(each)}
    return {name: each for name, each in found.items() if isinstance(each, type)}


def hints_of(kind):
    """The types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


def without_range(hint):
    """Whether a type holds a number that may be any."""
    if any(isinstance(each, Range) for each in getattr(hint, "__metadata__", ())):
        return False
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(map(without_range, typing.get_args(hint)))


def test_every_number_has_a_range_that_is_checked():
    found = dataclasses_of_commands()
    settings = {name for name in found if name.endswith(("Config", "Bench", "Study", "Loss"))} | PARTS
    assert {"TrainConfig", "GrpoConfig", "CompareConfig", "TrainBench", "PredictStudy", "ServeConfig"} <= settings
    for name in settings - FILES:
        hints = hints_of(found[name])
        free = {field for field, hint in hints.items() if without_range(hint)}
        assert free == set(CHECKED_ELSEWHERE.get(name, ())), name
        if any("Range(" in repr(hint) for hint in hints.values()):
            sources = [inspect.getsource(base) for base in found[name].__mro__ if dataclasses.is_dataclass(base)]
            assert any("check_ranges(self" in source for source in sources), name


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: DecodeBench(adapters=-1), "--adapters must be at least 1, got -1"),
        (lambda: LoadBench(devices=(1, 0)), "--devices must be at least 1, got 0"),
        (lambda: ServeBench(clients=(0,)), "--clients must be at least 1, got 0"),
        (lambda: TangentStudy(every=0), "--every must be at least 1, got 0"),
        (lambda: LofitConfig(TrainConfig(), share=float("inf")), "--share must be above 0 and below 1, got inf"),
        (lambda: TrainConfig(seed=2**32), "--seed must be from 0 to 4294967295, got 4294967296"),
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
