"""What must hold for the files of every family: all that is wrong is named at once, and a hub's shards are found."""

import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
from published import ARCHITECTURE, KEYS, into_files, to_gguf
from safetensors.numpy import load_file, save_file
from tiny import identical

from jaxsteer.io import load_base, load_config, load_model
from jaxsteer.io.files import read_json
from jaxsteer.models.families import FAMILIES, config_from_hf

NAMES = ("model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight")
GPT2_NAMES = ("transformer.h.1.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight", "transformer.ln_f.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_wrong_tensors_are_named_at_once(family_files, write_gguf, family):
    folder, _ = family_files(family)
    path, config = folder / "model.safetensors", load_config(folder)
    tensors = load_file(path)
    out, down, norm = GPT2_NAMES if family == "gpt2" else NAMES
    right, wrong = tensors[down], tensors[down][1:]
    kept = {name: tensor for name, tensor in tensors.items() if name not in (out, norm)}
    save_file(kept | {down: wrong, "some.more.weight": np.ones(3, np.float32)}, path)
    arch = ARCHITECTURE.get(family, family)
    file = write_gguf(folder, config, arch=arch, name="spoilt.gguf", **KEYS.get(family, {}))

    def in_gguf(name, value):
        return to_gguf(name, value, arch, config.heads, config.kv_heads)

    for source, stored in ((folder, lambda *tensor: tensor), (file, in_gguf)):
        with pytest.raises(ValueError, match=source.name) as error:
            load_base(source)
        lost = [stored(name, tensors[name])[0] for name in (out, norm)]
        (name, got), (_, expected) = stored(down, wrong), stored(down, right)
        for words in (
            f"not those of a {family} model",
            f"missing: {', '.join(lost)};",
            "unknown: some.more.weight;",
            f"misshapen: {name} has shape {list(got.shape)}, expected {list(expected.shape)}.",
        ):
            assert words in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hub_id_with_several_shards(family_files, family, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    repository, _ = family_files(family)
    expected = load_model(repository)
    into_files(repository, 3)
    for other in ("README.md", "pytorch_model.bin", "consolidated.safetensors"):
        (repository / other).write_text("not wanted")

    def download(name, allow_patterns):
        assert name == "owner/model"
        wanted = lambda folder, names: [n for n in names if not any(fnmatch(n, p) for p in allow_patterns)]
        return str(shutil.copytree(repository, tmp_path / "snapshot", ignore=wanted, dirs_exist_ok=True))

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert load_config("owner/model") == expected.config
    assert not list((tmp_path / "snapshot").glob("*.safetensors"))
    model = load_model("owner/model")
    assert (model.name, model.family, model.config) == ("owner/model", family, expected.config)
    identical(model.base, expected.base)
    assert len(list((tmp_path / "snapshot").glob("*.safetensors"))) == 3
    assert not (tmp_path / "snapshot" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("longrope", {"short_factor": [1.0] * 4, "long_factor": [1.5] * 4}),
        ("su", {"short_factor": [1.0] * 4, "long_factor": [1.5] * 4}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}),
        ("dynamic", {"factor": 2.0}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_that_is_not_followed_is_named(golden, family, kind, more, place):
    folder = golden / "tiny_llama" if family == "llama" else golden / "families" / family
    raw = read_json(folder / "config.json")
    raw.pop("rope_parameters", None)
    with pytest.raises(ValueError, match=f"config.json: rope_type is '{kind}'; supported are default, linear, llama3"):
        config_from_hf(raw | {place: {"rope_type": kind, **more}}, "config.json")
