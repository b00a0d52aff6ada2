"""Fixtures that write tiny model files."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from published import ARCHITECTURE, KEYS, SAYABLE, add_pieces, add_tokenizer, to_gguf

from jaxsteer.io import load_config
from jaxsteer.io.safetensors_file import open_safetensors

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture
def write_gguf(tmp_path):
    """(folder, **changes) -> path of a GGUF with the folder's weights; a change of None omits a key."""

    def write(
        folder,
        config,
        kind="F32",
        factors=None,
        tokenizer=True,
        name="tiny.gguf",
        arch="llama",
        tensors=None,
        **changes,
    ):
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        metadata = {
            "block_count": config.layers,
            "context_length": config.max_length,
            "embedding_length": config.width,
            "feed_forward_length": config.mlp_width,
            "attention.head_count": config.heads,
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.freq_base": config.rope_theta,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        for key, value in metadata.items():
            add = {
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            if value is not None:
                add[type(value)](f"{arch}.{key}", value)
        if tokenizer:
            (add_pieces if tokenizer == "pieces" else add_tokenizer)(writer)
        for hf, tensor in open_safetensors(folder / "model.safetensors")[0].items():
            theirs, value = to_gguf(hf, tensor.read(), arch, config.heads, config.kv_heads)
            value = np.ascontiguousarray(value)
            target = GGMLQuantizationType[kind]
            if target == GGMLQuantizationType.F32 or value.ndim == 1 or value.shape[-1] % 32:
                writer.add_tensor(theirs, value)
            else:
                writer.add_tensor(theirs, quantize(value, target), raw_dtype=target)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def family_files(golden, tmp_path, write_gguf):
    """(family) -> a tiny random model of it as a Hugging Face folder and as a GGUF file."""

    def make(family):
        source = golden / "tiny_llama" if family == "llama" else golden / "families" / family
        folder = shutil.copytree(source, tmp_path / family)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | SAYABLE.get(family, {})))
        arch = ARCHITECTURE.get(family, family)
        return folder, write_gguf(folder, load_config(folder), arch=arch, name=f"{family}.gguf", **KEYS.get(family, {}))

    return make
