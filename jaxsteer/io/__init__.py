"""Everything that reads or writes files: pretrained models, tokenizers, steering files, export to Hugging Face.

No other package of the library opens a file. How a family's fields and tensors map to ours is data, in
`jaxsteer.models.families`.
"""

from jaxsteer.io.export import save_hf
from jaxsteer.io.identity import config_from_json, config_to_json, fingerprint
from jaxsteer.io.load import (
    LoadedModel,
    compute_dtype,
    describe_model,
    load_base,
    load_config,
    load_model,
    load_tokenizer,
)
from jaxsteer.io.steering_file import SteeringFile, load_steering, save_steering
from jaxsteer.io.tokenizer import Tokenizer

__all__ = [
    "LoadedModel",
    "SteeringFile",
    "Tokenizer",
    "compute_dtype",
    "config_from_json",
    "config_to_json",
    "describe_model",
    "fingerprint",
    "load_base",
    "load_config",
    "load_model",
    "load_steering",
    "load_tokenizer",
    "save_hf",
    "save_steering",
]
