"""Everything that reads or writes files: pretrained models, tokenizers, steering files, and the
formats of other programs.

No other package of the library opens a file. How a family's fields and tensors map to ours is data, in
`jaxsteer.models.families`.
"""

from jaxsteer.io.formats import FORMATS, Format, Given, WriteOptions
from jaxsteer.io.formats.convert import check_export, export, recognise
from jaxsteer.io.formats.verdict import Verdict
from jaxsteer.io.hf_folder import save_hf
from jaxsteer.io.identity import config_from_json, config_to_json, fingerprint
from jaxsteer.io.load import (
    LoadedModel,
    compute_dtype,
    describe_model,
    load_base,
    load_config,
    load_model,
    load_tokenizer,
    sample_weights,
)
from jaxsteer.io.named import WHEEL_MODELS, cache_folder, fetch_named
from jaxsteer.io.provenance import derived_notes
from jaxsteer.io.sample import Comparison, WeightSample, compare_samples
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.steering_file import SteeringFile, load_steering, save_steering
from jaxsteer.io.tokenizer import Tokenizer

__all__ = [
    "FORMATS",
    "WHEEL_MODELS",
    "Comparison",
    "Format",
    "Given",
    "LoadedModel",
    "SteeredModel",
    "SteeringFile",
    "Tokenizer",
    "Verdict",
    "WeightSample",
    "WriteOptions",
    "cache_folder",
    "check_export",
    "compare_samples",
    "compute_dtype",
    "config_from_json",
    "config_to_json",
    "derived_notes",
    "describe_model",
    "export",
    "fetch_named",
    "fingerprint",
    "load_base",
    "load_config",
    "load_model",
    "load_steering",
    "load_tokenizer",
    "recognise",
    "sample_weights",
    "save_hf",
    "save_steering",
]
