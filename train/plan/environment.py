"""What the environment must say before JAX starts, so that libtpu compiles on a machine without a TPU."""

import os

SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second plan stops at a lock file
    "JAX_PLATFORMS": "cpu",  # leave the accelerators of this machine alone
}

DEFAULTS = {"JAX_OPTIMIZATION_LEVEL": "O1"}
"""Compiles many times faster than the default and needs the same memory; set it to O2 or O3 for a run's own level."""


def prepare() -> None:
    """Set the environment of this process; call it before JAX is imported."""
    os.environ.update(SETTINGS)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
