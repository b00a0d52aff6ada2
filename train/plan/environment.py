"""Environment variables that libtpu needs, before JAX starts, to compile on a machine without a TPU."""

import os

SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to query
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second fit check stops at libtpu's lock file
    "JAX_PLATFORMS": "cpu",  # leave this machine's accelerators alone
}

DEFAULTS = {"JAX_OPTIMIZATION_LEVEL": "O1"}
"""Compiles many times faster than JAX's default and needs the same memory. Set O2 or O3 to match a run's own level."""


def prepare() -> None:
    """Set this process's environment; call it before importing JAX."""
    os.environ.update(SETTINGS)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
