"""Shared by the tests of formats: steered models, what is written and read of them, what they compute."""

from functools import cache

import numpy as np
from tiny import random_steering

from jaxsteer.batches import make_batch
from jaxsteer.io import load_model
from jaxsteer.io.files import read_json
from jaxsteer.io.formats import FORMATS, Given, WriteOptions
from jaxsteer.io.formats.updates import updates_of
from jaxsteer.io.formats.verdict import logits as logits_at
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.families import FAMILIES
from jaxsteer.plans import parse_plan


def folder_of(golden, name):
    """The folder of a family's tiny model, or of one by the name of its folder."""
    llama = {"llama": "tiny_llama"}.get(name, name)
    return golden / llama if (golden / llama).exists() else golden / "families" / name


@cache
def family_model(golden, name):
    """The tiny model of a family, read once."""
    return load_model(folder_of(golden, name))


def steered_of(loaded, *texts, seed=1, scale=0.1, **fields):
    """A model with a plan and random steering."""
    plan = parse_plan(texts, loaded.config)
    return SteeredModel(loaded, plan, random_steering(plan, loaded.config, seed, scale), **fields)


def refusals(format, loaded, *texts, **options):
    """Why a format cannot hold a plan."""
    plan = parse_plan(texts, loaded.config)
    return format.refuse(plan, FAMILIES[loaded.family], loaded.config, WriteOptions(**options))


def written(format, steered, folder, **options):
    """Write a model, which the format must not refuse, into a folder, which may exist; what was to be written."""
    options = WriteOptions(**options)
    folder.mkdir(exist_ok=True)
    assert format.refuse(steered.plan, FAMILIES[steered.loaded.family], steered.loaded.config, options) == []
    reduced = format.reduce(steered, options)
    format.write(reduced, folder, options)
    return reduced


def read_again(format, folder, steered=None):
    """What is read of a folder, over the base of a model where it is no whole one."""
    return format.read(folder, None if steered is None else steered.loaded, Given())


def logits(steered, tokens):
    """Our own logits of rows of tokens, as NumPy."""
    tokens = np.asarray(tokens, np.int32)
    batch = make_batch(tokens, None, np.zeros(tokens.shape, np.float32))
    return np.asarray(logits_at(steered.network, batch))


def same_updates(read, steered):
    """Assert that the LoRAs of two models are the same maps, and that magnitudes are still there."""
    ours, theirs = updates_of(steered), updates_of(read)
    assert ours.keys() == theirs.keys()
    for place, update in ours.items():
        other = theirs[place]
        np.testing.assert_allclose(other.scale * (other.b @ other.a), update.scale * (update.b @ update.a), atol=1e-6)
        if update.magnitude is not None:
            np.testing.assert_allclose(other.magnitude, update.magnitude, atol=1e-6)


def check_theirs(name, golden, case):
    """What is read of a folder that another program wrote; it must give the logits that the program computed."""
    folder = golden / "interop" / name
    read = FORMATS[name].read(folder / case, family_model(golden, theirs(golden, name)[case]), Given())
    expected = np.load(folder / "logits.npz")
    assert abs(logits(read, expected["ids"]) - expected[case]).max() <= 1e-5
    return read


def theirs(golden, name):
    """The folders that another program wrote, and the base of each."""
    return read_json(golden / "interop" / name / "bases.json")
