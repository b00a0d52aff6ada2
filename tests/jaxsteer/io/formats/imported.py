"""Shared by the tests of formats that are read: golden answers, and how far an import is from them."""

import json
import shutil

import numpy as np
from exported import logits

from jaxsteer.io.formats import FORMATS
from jaxsteer.io.steered import SteeredModel

TOLERANCE = 1e-5


def check_answers(folder, case, loaded, given):
    """Read a golden case, compare with what its program computed, and return it; the steering must matter."""
    format = FORMATS[folder.name]
    assert format.recognises(folder / case)
    steered = format.read(folder / case, loaded, given)
    answers = np.load(folder / "answers.npz")
    ids = answers["ids"] % loaded.config.vocab_size
    got = logits(steered, ids)
    np.testing.assert_allclose(got, answers[case], TOLERANCE, TOLERANCE)
    assert np.abs(got - logits(SteeredModel(loaded), ids)).max() > 0.1
    return steered


def changed(source, target, name, **fields):
    """A copy of a folder, some fields of one of its JSON files replaced; a field of ... is removed."""
    folder = shutil.copytree(source, target)
    data = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return folder
