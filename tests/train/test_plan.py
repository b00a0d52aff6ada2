"""Plans: programs compiled for TPUs that are not here, the reading of compiled text, and the analytic estimate."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jaxsteer.models.families import config_from_hf
from train.cli import load_config_file
from train.config import TrainConfig
from train.devices.placement import MeshConfig
from train.plan import table
from train.plan.base_models import KNOWN, model_config_of
from train.plan.estimate import estimate_training, make_estimated, resident
from train.plan.figures import figures_of
from train.plan.hlo import Traffic, collectives
from train.plan.search import candidates
from train.plan.topology import GIB, parse_topology

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
POST_BLOCK = "configs/llama3_8b_post_block.py"

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (the extra tpu)"
)


OWN = ("JAX_OPTIMIZATION_LEVEL", "XLA_FLAGS")  # a plan's own settings are what is tested


def plan(*arguments, status=0):
    """The programs that `python -m train.plan` reports."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    command = [sys.executable, "-m", "train.plan", *arguments, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT, env=environment)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)["programs"]


@needs_libtpu
def test_8b_post_block_on_v5e():
    """The real step, packed rows and splash attention: its peak, and every weight gathered in each pass."""
    (found,) = plan(POST_BLOCK, "--topology", "v5e:4x4", "--programs", "train")
    assert found["compiled"]
    assert found["fits"]
    assert found["sold"] == "v5litepod-16"
    assert found["attention"][0] == "splash"
    assert found["needed"] <= 6 * GIB
    assert sum(found["parts"].values()) == found["needed"]
    weights = 16 * found["parts"]["weights"]
    sent = sum(traffic["sent"] for traffic in found["collectives"].values())
    assert 1.9 * weights <= sent <= 3 * weights
    assert found["estimated"] == pytest.approx(found["needed"], rel=0.1)


@needs_libtpu
@pytest.mark.slow
def test_70b_post_block_on_v5p():
    (found,) = plan("configs/llama3_70b_post_block.py", "--topology", "v5p:4x4x4", "--programs", "train")
    assert found["fits"]
    assert found["sold"] == "v5p-128"
    assert found["mesh"] == "data 4 x fsdp 16 x tensor 1"
    assert found["needed"] <= 18 * GIB


@needs_libtpu
def test_what_cannot_fit_is_said_in_words():
    (found,) = plan("configs/llama3_70b_post_block.py", "--topology", "v5e:4x4", "--programs", "train", status=2)
    assert not found["fits"]
    assert found["needed"] > found["limit"]
    assert "exceeds" in found["words"]
    assert any(remedy.startswith("--grad-accumulation 8: about") for remedy in found["remedies"])
    assert any(remedy.startswith("--topology v5e:8x16: about") for remedy in found["remedies"])


@needs_libtpu
@pytest.mark.slow
def test_8b_with_256_rows_fits():
    (found,) = plan(POST_BLOCK, "--topology", "v5e:4x4", "--programs", "train", "--batch-size", "256")
    assert found["fits"]


@needs_libtpu
@pytest.mark.slow
def test_two_slices():
    """The batch is split over the slices, the weights within each: only small things go between them."""
    (found,) = plan(POST_BLOCK, "--topology", "v5e:4x4", "--slices", "2", "--programs", "train")
    assert found["fits"]
    assert found["mesh"] == "data 2 x fsdp 16 x tensor 1"
    assert found["collectives"]["all-reduce"]["sent"] < 0.01 * found["collectives"]["all-gather"]["sent"]


@needs_libtpu
@pytest.mark.slow
def test_decoding_and_a_comparison_of_chips():
    """All of a chip's new tokens are gathered for: the collectives of the data-dependent loop count as often."""
    found = plan(POST_BLOCK, "--topologies", "v5e:4x4,h100:8", "--programs", "decode")
    tpu, gpu = found
    assert (tpu["compiled"], gpu["compiled"]) == (True, False)
    assert tpu["fits"]
    assert tpu["parts"]["cache"] == 2 * 32 * 4 * (512 + 255) * 8 * 128 * 2  # k and v, layers, rows, slots, heads
    sent = sum(traffic["sent"] for traffic in tpu["collectives"].values())
    assert sent > 200 * 14 * tpu["parts"]["weights"]


@needs_libtpu
@pytest.mark.slow
def test_a_search_ranks_what_fits():
    found = plan(POST_BLOCK, "--topology", "v5e:4x4", "--search", "--best", "2")
    assert len(found) == 2
    assert all(each["fits"] and each["compiled"] for each in found)
    assert found[0]["tokens_per_second"] >= found[1]["tokens_per_second"]


@needs_libtpu
def test_slices_meet_on_the_data_axis():
    code = (
        "from train.plan.environment import prepare; prepare()\n"
        "from jaxsteer.sharding import MeshShape, make_mesh\n"
        "from train.plan.topology import parse_topology\n"
        "from train.plan.programs import tpu_devices\n"
        "devices = tpu_devices(parse_topology('v5e:2x2', slices=2))\n"
        "grid = make_mesh(MeshShape(4, 2), devices).devices\n"
        "print([sorted({d.slice_index for d in row.flat}) for row in grid])\n"
        "try:\n    make_mesh(MeshShape(1, 8), devices)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert "[[0], [0], [1], [1]]" in done.stdout, done.stderr
    assert "data a multiple of 2" in done.stdout


HLO = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%inner_body (p.0: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p.0 = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.0 = u32[] get-tuple-element(%p.0), index=0
  %two = u32[]{:T(128)} constant(2), metadata={op_name="x(y)"}
  %next.0 = u32[] add(%i.0, %two)
  %x.0 = bf16[8,4]{1,0} get-tuple-element(%p.0), index=1
  %permute = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x.0), channel_id=1
  %permuted = bf16[8,4]{1,0} collective-permute-done(%permute)
  ROOT %out.0 = (u32[], bf16[8,4]) tuple(%next.0, %permuted)
}

%inner_condition (p.1: (u32[], bf16[8,4])) -> pred[] {
  %eight = u32[] constant(8)
  %p.1 = (u32[], bf16[8,4]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  ROOT %less.1 = pred[] compare(%i.1, %eight), direction=LT
}

%body (p.2: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p.2 = (s32[], bf16[8,4]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %one = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one)
  %x.2 = bf16[8,4] get-tuple-element(%p.2), index=1
  %zero.2 = u32[] constant(0)
  %start.2 = u32[] copy(%zero.2)
  %pair.2 = (u32[], bf16[8,4]) tuple(%start.2, %x.2)
  %loop.2 = (u32[], bf16[8,4]) while(%pair.2), condition=%inner_condition, body=%inner_body
  %y.2 = bf16[8,4] get-tuple-element(%loop.2), index=1
  %gather = bf16[8,16]{1,0} all-gather(%y.2), replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %out.2 = (s32[], bf16[8,4]) tuple(%next.2, %y.2)
}

%condition (p.3: (s32[], bf16[8,4])) -> pred[] {
  %five = s32[] constant(5)
  %p.3 = (s32[], bf16[8,4]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  ROOT %less.3 = pred[] fusion(%i.3, %five), kind=kLoop, calls=%compared
}

%compared (c.0: s32[], c.1: s32[]) -> pred[] {
  %c.0 = s32[] parameter(0)
  %c.1 = s32[] parameter(1)
  ROOT %less.4 = pred[] compare(%c.0, %c.1), direction=LT
}

%data_condition (p.5: (pred[], f32[16])) -> pred[] {
  %p.5 = (pred[], f32[16]) parameter(0)
  ROOT %flag = pred[] get-tuple-element(%p.5), index=0
}

%data_body (p.6: (pred[], f32[16])) -> (pred[], f32[16]) {
  %p.6 = (pred[], f32[16]) parameter(0)
  %flag.6 = pred[] get-tuple-element(%p.6), index=0
  %x.6 = f32[16] get-tuple-element(%p.6), index=1
  %reduced = f32[16]{0} all-reduce(%x.6), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  ROOT %out.6 = (pred[], f32[16]) tuple(%flag.6, %reduced)
}

%taken (t.0: f32[16]) -> f32[4] {
  %t.0 = f32[16] parameter(0)
  ROOT %scattered = f32[4]{0} reduce-scatter(%t.0), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}

%passed (t.1: f32[4]) -> f32[4] {
  ROOT %t.1 = f32[4] parameter(0)
}

%wrapped (t.2: s8[32]) -> s8[32] {
  %t.2 = s8[32] parameter(0)
  ROOT %exchanged = s8[32] all-to-all(%t.2), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: bf16[8,4], y: f32[16], z: f32[4], flag.7: pred[], s: s8[32]) -> bf16[8,4] {
  %x = bf16[8,4] parameter(0)
  %y = f32[16] parameter(1)
  %z = f32[4] parameter(2)
  %flag.7 = pred[] parameter(3)
  %s = s8[32] parameter(4)
  %two.7 = s32[] constant(2)
  %pair = (s32[], /*index=1*/bf16[8,4]) tuple(%two.7, /*index=1*/%x)
  %loop = (s32[], bf16[8,4]) while(%pair), condition=%condition, body=%body
  %data = (pred[], f32[16]) tuple(%flag.7, %y)
  %until = (pred[], f32[16]) while(%data), condition=%data_condition, body=%data_body
  %either = f32[4] conditional(%flag.7, %y, %z), branch_computations={%taken, %passed}
  %started = ((s8[32]), s8[32], u32[]) async-start(%s), calls=%wrapped
  %done = s8[32] async-done(%started), calls=%wrapped
  ROOT %result = bf16[8,4] get-tuple-element(%loop), index=1
}
"""


def test_collectives_count_loops_through_nesting():
    """Three outer turns (2 to 5) of four inner ones (0 to 8 in twos); the loop on data as often as it is told."""
    assert collectives(HLO, other_trips=7) == {
        "all-gather": Traffic(3, 3 * 256, 3 * 256 * 3 // 4),
        "all-reduce": Traffic(7, 7 * 64, 7 * 2 * 64 * 3 // 4),
        "all-to-all": Traffic(1, 32, 16),
        "collective-permute": Traffic(12, 12 * 64, 12 * 64),
        "reduce-scatter": Traffic(1, 16, 16 * 3),
    }
    known = 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    assert collectives(HLO.replace("body=%body", known))["all-gather"].count == 9


def test_topologies():
    found = parse_topology("v5p:4x4x4", slices=2)
    assert (found.chips, found.sold, str(found)) == (128, "v5p-128", "2 x v5p:4x4x4 (128 chips, sold as 2 x v5p-128)")
    assert parse_topology("h100:8").chips == 8
    for name, words in {
        "v5litepod-16": "unknown chip",
        "v5e:4x5": "did you mean v5e:4x",
        "h100:16": "1 to 8",
    }.items():
        with pytest.raises(ValueError, match=words):
            parse_topology(name)


def test_known_features_are_the_published_ones():
    """What config.json of the 70B says, field by field."""
    published = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
    }
    assert KNOWN["meta-llama/Llama-3.1-70B"] == config_from_hf(published, "config.json")[1]
    smaller = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    assert KNOWN["meta-llama/Llama-3.1-8B-Instruct"] == config_from_hf(published | smaller, "config.json")[1]


def test_a_local_model_is_read(tiny_folder):
    assert model_config_of(TrainConfig(model=str(tiny_folder))).width == 32


@pytest.fixture(scope="module")
def post_block():
    return load_config_file(ROOT / POST_BLOCK, TrainConfig)


def test_weights_fall_with_fsdp(post_block):
    model_config, there = model_config_of(post_block), parse_topology("v5e:4x4")
    sizes = {}
    for fsdp in (1, 4, 16):
        mesh = MeshConfig(16 // fsdp, fsdp)
        sizes[fsdp] = resident(make_estimated(replace(post_block, mesh=mesh), model_config, there))["weights"]
    norms = 2 * (2 * 32 + 1) * 4096  # on every chip
    assert (sizes[1] - norms) == 4 * (sizes[4] - norms) == 16 * (sizes[16] - norms)


def test_remat_and_microbatches_save_memory(post_block):
    model_config, there = model_config_of(post_block), parse_topology("v5e:4x4")
    peak = lambda **change: (
        estimate_training(
            make_estimated(replace(post_block, **change), model_config, there), replace(post_block, **change)
        ).peak
    )
    assert peak(remat="none") > peak(remat="selective") > peak() > peak(grad_accumulation=4)


def test_a_search_begins_with_what_is_fastest_by_the_estimate(post_block):
    model_config, there = model_config_of(post_block), parse_topology("v5e:2x2")
    found = candidates(post_block, model_config, there)
    speeds = [each.tokens_per_second for each in found]
    assert all(a >= 0.99 * b for a, b in pairwise(speeds))
    assert {each.config.mesh.tensor for each in found} >= {1, 2}
    assert all(each.peak <= 1.05 * there.chip.memory for each in found)


def test_gpus_are_estimated(post_block):
    found = figures_of("train", post_block, model_config_of(post_block), parse_topology("h100:8"), 0)
    assert found.fits
    assert not found.compiled
    assert found.attention[0] == "cudnn"
    assert 0 < found.mfu <= 1


def test_the_table_is_what_its_data_say():
    """docs/plans.md has every config on every topology, and the estimate is near the compiled peaks."""
    data = json.loads(table.DATA.read_text())
    assert table.PAGE.read_text() == table.page(data)
    assert {key for key in data if key.endswith("train")} == {
        f"{name} {topology} train" for name in table.CONFIGS for topology in table.TOPOLOGIES
    }
    assert all((CONFIGS / f"{name}.py").exists() for name in table.CONFIGS)
    compiled = [key for key, each in data.items() if each["compiled"] and each["fits"] and each["which"] == "train"]
    assert compiled
    for key in compiled:  # the model of the pass was made on Llama; large vocabularies and windows are further off
        off = 0.1 if key.startswith("llama3") else 0.15
        assert data[key]["estimated"] == pytest.approx(data[key]["needed"], rel=off), key
