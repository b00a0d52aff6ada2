"""Settings and models that all tests share."""

import os
from importlib.metadata import version
from pathlib import Path

# Before JAX starts, and for the processes that tests start: tolerances are those of a CPU, and a TPU's compiler without
# a TPU would be tried first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the tests' time, and most of it was XLA's code generator for fused operations and its splitting
# of a program into many modules. Flags that are already set come last, so they win.
os.environ["XLA_FLAGS"] = " ".join(
    (
        # Later versions end the process at this flag.
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith(("0.10.", "0.11.")) else []),
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    )
)

import jax
import pytest

from jaxsteer.io import load_model
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import init_base
from jaxsteer.sharding import current_platform

PLATFORM = os.environ.get("JAXSTEER_TEST_PLATFORM", "cpu")
"""cpu, gpu or tpu: where the tests of this process compute. `jaxsteer bench accelerator` runs those about numbers on
an accelerator."""

if PLATFORM != "cpu":
    jax.config.update("jax_platforms", None)  # the default; the processes that tests start stay on the CPU
    jax.config.update("jax_default_matmul_precision", "highest")  # TF32 and bf16 products are no fp32 products

# An implicit conversion or broadcast is a mistake that would otherwise pass unseen.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_collection_modifyitems(items):
    """Off the CPU, leave out what needs one; and refuse to test on another device than was asked for."""
    if PLATFORM == "cpu":
        return
    if (found := current_platform()) != PLATFORM:
        raise pytest.UsageError(f"JAXSTEER_TEST_PLATFORM is {PLATFORM}, but JAX finds {found}")
    for item in items:
        if item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CPU"))


@pytest.fixture(scope="session")
def golden():
    """The folder of golden numbers."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_config():
    return ModelConfig(vocab_size=61, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp_width=48, max_length=64)


@pytest.fixture(scope="session")
def tiny_base(tiny_config):
    """Random fp32 weights; embedding and head are scaled up, so that tokens differ and logits are not all alike."""
    quick = {"xla_backend_optimization_level": 0} if PLATFORM == "cpu" else {}
    compiled_fast = jax.jit(init_base, static_argnums=0, compiler_options=quick)
    base = compiled_fast(tiny_config, jax.random.key(7))
    return base | {
        "embed": {"embedding": base["embed"]["embedding"] * 25},
        "head": {"embedding": base["head"]["embedding"] * 15},
    }


@pytest.fixture(scope="session")
def golden_llama():
    """The tiny Llama on which the reference numbers were computed."""
    return load_model(GOLDEN / "tiny_llama")


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct, fetched once into a cache."""
    from train.base_models import resolve_model

    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return load_model(smollm2_path)
