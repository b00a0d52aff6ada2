"""What a format is: how to recognise, refuse, reduce, write and read it. One record for each file of this package."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from jaxsteer.interventions.loreft import NONE
from jaxsteer.interventions.low_rank import ACTIVATION_FUNCTIONS
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.provenance import BaseOptions
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import Family
from jaxsteer.types import Plan, Positions

ACTIVATIONS = (NONE, *ACTIVATION_FUNCTIONS)
"""Activations of low-rank steering; "none" is linear steering."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class WriteOptions:
    """How to write; see `Format.options` for what a format has a use for.

    dtype  of whole models' weights: float32, bfloat16 or float16, in GGUF files also Q8_0, Q4_0, ...; None = as loaded
    rank   of the steering layers in a steerable base; None = the plan's largest
    over   folder of the steerable base that an adapter is for
    name   of the adapter, where the format stores one: letters, digits, _ and -

    Raises:
        ValueError: a rank or name that no format can have.
    """

    dtype: str | None = None
    rank: int | None = None
    over: Path | None = None
    name: str = "jaxsteer"

    def __post_init__(self) -> None:
        """Refuse what is wrong for every format."""
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"--rank is {self.rank!r}; expected an integer above 0")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"--name is {self.name!r:.80}; expected 1 to 64 letters, digits, _ or -")
        if self.over is not None:
            object.__setattr__(self, "over", Path(self.over).expanduser())


@dataclass(frozen=True)
class Given:
    """What the person says of a file that does not say it itself; None = not said.

    alpha       factor of the shift
    activation  of low-rank steering: none, silu, relu, gelu or tanh
    positions   which tokens are steered, as in a plan ("all", "last", ...)
    feature     row of a sparse autoencoder's decoder
    strength    factor of that row

    Raises:
        ValueError: a value that no file could have.
    """

    alpha: float | None = None
    activation: str | None = None
    positions: str | None = None
    feature: int | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is wrong for every format."""
        for name in ("alpha", "strength"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                raise ValueError(f"--{name} is {value!r}; expected a finite number")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"--activation is {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        if self.feature is not None and (type(self.feature) is not int or self.feature < 0):
            raise ValueError(f"--feature is {self.feature!r}; expected an integer from 0 on")
        if self.positions is not None:
            Positions.parse(self.positions)


def unused(said: WriteOptions | Given, used: Collection[str]) -> list[str]:
    """The options that the person has set, other than those in `used`."""
    fields = [field for field in dataclasses.fields(said) if field.name not in used]
    return [f"--{field.name}" for field in fields if getattr(said, field.name) != field.default]


JAXSTEER = """\
import jaxsteer
steered = jaxsteer.load("FOLDER")
hidden = jaxsteer.forward(steered.model, steered.base, steered.steering, batch).hidden"""
"""Loads any format in jaxsteer."""


@dataclass(frozen=True)
class Use:
    """How the programs that a format is for load it, as its model card says it.

    library   its name as a library on the Hugging Face Hub
    relation  to the base model there: adapter or finetune; "" = none of those that the Hub knows
    code      that loads it; FOLDER and BASE stand for this folder and the base model
    language  of the code
    tags      for the Hub
    needs     what has to be known besides, a sentence; ""
    """

    library: str
    relation: str
    code: str
    language: str = "python"
    tags: tuple[str, ...] = ()
    needs: str = ""


@dataclass(frozen=True)
class Format:
    """A format of other programs.

    name         on the command line and in `FORMATS`
    holds        what it holds, for the list of formats: a few words
    programs     that use it, for the list and the model card
    check        (path, base model, whether other weights are accepted): refuse weights that the files were not made
                 for, if they say for which
    base         (path) -> where the base model can be loaded from, if the files say so
    base_options (path) -> how it was loaded in training, if the files say so
    whole        whether it holds a whole model, else what is trained on one
    unsteered    whether it holds the base model alone, prepared for the steering, which `reduce` leaves out
    recognises   whether a file or folder is in this format, from names and headers alone
    read         (path, base model, what the person says) -> what it holds; the base model is None for whole models, and
                 where it is not known. Raises ValueError, and nothing else, for whatever the files may hold
    refuse       (plan, family, config, options) -> why it cannot hold that plan, a sentence for each slot that ends in
                 the nearest alternative
    reduce       (steered, options) -> the same in the terms of the format: slots merged into weights or turned into
                 LoRA, factors padded. `read` returns this, leaf by leaf and bit for bit
    write        (reduced, folder, options): write the files into an empty folder
    options      fields of `WriteOptions` that it has a use for; a folder in `over` has to be given
    asks         fields of `Given` that its files may leave to the person
    use          how the programs load it, for the model card
    verify       name of the program that loads the files in `--verify`: NAME of tests/peers/NAME_peer.py
    over         the format of the base model that this program needs beside them
    """

    name: str
    holds: str
    programs: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, LoadedModel | None, Given], SteeredModel]
    check: Callable[[Path, LoadedModel, bool], None] | None = None
    base: Callable[[Path], str | None] | None = None
    base_options: Callable[[Path], BaseOptions] | None = None
    whole: bool = False
    unsteered: bool = False
    refuse: Callable[[Plan, Family, ModelConfig, WriteOptions], list[str]] | None = None
    reduce: Callable[[SteeredModel, WriteOptions], SteeredModel] | None = None
    write: Callable[[SteeredModel, Path, WriteOptions], None] | None = None
    options: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    use: Use | None = None
    verify: str | None = None
    over: str | None = None

    @property
    def writable(self) -> bool:
        """Whether it can be written."""
        return self.write is not None
