"""A model that is loaded part by part onto eight devices is the model that is loaded whole."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from published import into_files
from safetensors.numpy import load_file, save_file

from jaxsteer.io import load_config, save_hf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import init_base

ROOT = Path(__file__).parents[3]

SETUP = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jaxsteer.io import load_base, safetensors_file, stored
from jaxsteer.sharding import MeshShape, base_sharding, make_mesh

stored.PIECE = 500  # elements: a tensor in several pieces
count = 0

def on(*sizes):
    mesh = make_mesh(MeshShape(*sizes))
    return lambda path, shape: base_sharding(path, shape, mesh)
"""

EQUAL = """
for source in sys.argv[1:]:
    for dtype in ("float32", "bfloat16"):
        whole = load_base(source, dtype=dtype)
        for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
            seen = []
            place = on(*sizes)
            parts = load_base(source, dtype=dtype, place=place, progress=lambda *at: seen.append(at))
            assert seen[-1][0] == seen[-1][1] and seen == sorted(seen), seen
            jax.tree.map(np.testing.assert_array_equal, parts, whole)
            q = parts["blocks"]["attn"]["q"]["kernel"]
            assert q.dtype == dtype and q.sharding == place("blocks/attn/q/kernel", q.shape)
            print("equal")

from dataclasses import replace
stored.transform_of = lambda row, layout, own=stored.transform_of: replace(own(row, layout), group=None)
jax.tree.map(np.testing.assert_array_equal, load_base(source, place=on(2, 2, 2)), load_base(source))
print("equal from whole tensors")
"""

EVERY_FAMILY = """
for source in sys.argv[1:]:
    whole = load_base(source)
    for sizes in ((1, 4, 2), (1, 2, 4)):
        place = on(*sizes)
        parts = load_base(source, place=place)
        jax.tree.map(np.testing.assert_array_equal, parts, whole)
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
            name = "/".join(key.key for key in path)
            assert leaf.sharding == place(name, leaf.shape), name
        cut = [leaf for leaf in jax.tree.leaves(parts) if not leaf.sharding.is_fully_replicated]
        assert len(cut) >= 7, len(cut)
        print("equal")
"""

COUNTED = """
class Half:
    '''What a process sees of a sharding that has four of its eight devices.'''
    def __init__(self, sharding):
        self.sharding = sharding
    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self.sharding.devices_indices_map(shape).items() if d.id < 4}

def read_part(*arguments, own=safetensors_file.read_part):
    global count
    part = own(*arguments)
    count += part.nbytes
    return part

def hold(shape, sharding, arrays):
    global held
    held += len(set(map(str, sharding.addressable_devices_indices_map(shape).values()))) * arrays[0].nbytes

safetensors_file.read_part = read_part
jax.make_array_from_single_device_arrays = hold
stored.jax.block_until_ready = lambda arrays: arrays
for sizes in ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)):
    count, held, seen, place = 0, 0, [], on(*sizes)
    load_base(sys.argv[1], place=lambda *leaf: Half(place(*leaf)), progress=lambda *at: seen.append(at))
    print(count, held, *seen[-1])
"""


def run(code, *arguments):
    command = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save(folder, config):
    """A folder with random weights, biases too."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    save_hf(folder, config, jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), shapes), "llama")


@pytest.fixture
def two_files(golden, tmp_path):
    """tiny_llama in bf16, in two files."""
    folder = shutil.copytree(golden / "tiny_llama", tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}, folder / "model.safetensors")
    return into_files(folder, 2)


def test_parts_are_the_whole(golden, two_files, write_gguf, tmp_path):
    """fp32 and bf16 files, quantised blocks that the shards cut, heads that the shards cut, a tied head, biases."""
    save(tmp_path / "hf", ModelConfig(64, 64, 2, 4, 2, 16, 96, tied_head=True))
    save(tmp_path / "biased", ModelConfig(64, 32, 2, 4, 4, 8, 48, attn_bias=True, mlp_bias=True))
    llama = golden / "tiny_llama"
    sources = [
        llama,
        two_files,
        golden / "families" / "phi3",  # fused tensors
        tmp_path / "biased",
        write_gguf(tmp_path / "hf", load_config(tmp_path / "hf"), "Q8_0", name="quantised.gguf"),
        write_gguf(llama, load_config(llama), name="plain.gguf"),
    ]
    lines = run(EQUAL, *sources).splitlines()
    assert lines == ["equal"] * (len(sources) * 2 * 4) + ["equal from whole tensors"]


def test_parts_are_the_whole_in_every_family(family_files):
    """Heads, MLP and width cut; weights in three files with an index, and in a GGUF file."""
    sources = [source for family in FAMILIES for source in family_files(family)]
    for folder in sources[::2]:
        into_files(folder, 3)
    assert run(EVERY_FAMILY, *sources).splitlines() == ["equal"] * (len(sources) * 2)


def test_only_what_the_devices_hold_is_read(golden):
    """Four of eight devices, as one of two processes has them: their bytes in the file are read, each once."""
    path = golden / "tiny_llama"
    whole = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    norms = 4 * 48 * (2 * 3 + 1)
    lines = [tuple(map(int, line.split())) for line in run(COUNTED, path).splitlines()]
    for counted, held, done, total in lines:
        assert counted == held == done == total
    copies, fsdp, tensor, both = (line[0] for line in lines)
    assert copies == both == whole  # the first four devices hold a copy of every part
    assert fsdp == (whole + norms) // 2
    assert fsdp <= tensor < whole
