"""peft's side of the comparison on an accelerator, at a tiny shape on this machine."""

import math

import pytest
from asked import python_of

from train.bench.accelerator import peft
from train.bench.accelerator.records import Context, Device
from train.bench.accelerator.settings import AcceleratorBench

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("peer", peft.PEERS, ids=lambda peer: peer.name)
def test_peft_trains_lora_at_all_projections(peer):
    config = AcceleratorBench(small=True, steps=2, peer_python=str(python_of("accelerator")))
    row = next(row for row in peft.rows(config, []) if row.name == f"{peer.name}, 2 rows, 1")
    figures = row.measure(Context(config, Device("cpu", "cpu", 0, {}), []))
    model = config.shapes.model
    projections = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert figures["trainable"] == model.layers * peft.RANK * sum(map(sum, projections))
    assert abs(figures["loss"] - math.log(model.vocab_size)) < 0.5
    assert figures["tokens/s"] > 0
