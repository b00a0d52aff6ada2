"""Every family as llama.cpp's converter writes it, against its Hugging Face folder."""

import numpy as np
import pytest
from tiny import close, run

from jaxsteer import Model, make_batch
from jaxsteer.io import load_model
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import logits_of, output_embedding


def logits(model):
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 24))
    hidden = run(Model(model.config), model.base, {}, make_batch(ids)).hidden
    return logits_of(hidden, output_embedding(model.base), model.config.final_softcap)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_as_the_folder(family_files, family):
    folder, file = family_files(family)
    theirs, ours = load_model(folder), load_model(file)
    assert ours.config == theirs.config
    assert ours.family == family
    close(logits(ours), logits(theirs), 1e-5)
