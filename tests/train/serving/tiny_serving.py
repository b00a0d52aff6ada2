"""Sizes of the engines that tests serve with, and the plans of their adapters."""

from dataclasses import replace

from tiny import slot_of
from tiny_model import TINY

from train.serving.engine import CLIENTS, EngineSettings

SETTINGS = EngineSettings(replace(CLIENTS, rows=4, max_prompt=32, max_new_tokens=12, chunk=4), queue=100)


def plans():
    """a and c share a plan; b has another method; d has two slots of the names of a and b."""
    lora = (slot_of("lora", TINY, slot="lora", sites=("attn.q",)),)
    shift = (slot_of("linear", TINY, slot="shift", sites=("block",)),)
    return {"a": lora, "b": shift, "c": lora, "d": (*lora, *shift)}
