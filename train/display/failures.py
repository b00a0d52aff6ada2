"""How a command ends that cannot go on: the error as a sentence for the person at the keyboard, and an exit status."""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

FAILED, BUG = 1, 70
"""Exit statuses: an error that the user can fix, and one that is jaxsteer's own (EX_SOFTWARE)."""

_EXTRAS = {
    **dict.fromkeys(
        ("datasets", "pyarrow", "orbax", "etils", "tyro", "rich", "prompt_toolkit", "matplotlib", "scipy"), "train"
    ),
    "filelock": "train",
    **dict.fromkeys(
        ("starlette", "uvicorn", "sse_starlette", "pydantic", "prometheus_client", "httpx2"), "train,serve"
    ),
    "tensorboardX": "train,tensorboard",
    "wandb": "train,wandb",
    "lm_eval": "lm-eval",
    "libtpu": "train,tpu",
}
"""The extra that installs a package."""

_HUB = ("huggingface_hub", "datasets", "httpx", "requests", "fsspec", "aiohttp")
"""Packages whose errors are about what they could not fetch."""

_LESS_MEMORY = (
    "Use fewer rows at a time (--batch-size, --eval-batch-size, or --grad-accumulation in training) or shorter ones "
    "(--sequence-length), --dtype bfloat16, --quantise int8, or more devices (--mesh). `jaxsteer plan` says what fits"
)


def report(error: Exception) -> int:
    """Print an error on standard error, as a sentence or as a bug.

    Returns:
        The exit status.
    """
    from rich.console import Console
    from rich.text import Text

    message, status = sentence_of(error), FAILED
    if message is None:
        message, status = _bug(error), BUG
    text = Text("error: ", style="bold red").append(Text(message, style="not bold default"))
    with suppress(OSError):  # nobody is there to read it
        Console(stderr=True).print(text)
    return status


def sentence_of(error: Exception) -> str | None:
    """What an error means to a user; None for one that no input should cause."""
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, UnicodeError):
        return _not_text(error)
    if isinstance(error, OSError):
        return _not_done(error)
    if isinstance(error, ImportError):
        return _not_installed(error)
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read"
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if str(error) else ''}{error}. {_LESS_MEMORY}"
    if isinstance(error, RuntimeError) or str(error).startswith("RESOURCE_EXHAUSTED: Out of memory"):
        return _not_computed(error)
    if isinstance(error, (ValueError, FloatingPointError)) or package in _HUB:
        return str(error) or type(error).__name__
    return None


def _not_text(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"the input is not UTF-8 text: byte {byte:#04x} at position {error.start} ({error.reason})"
    if isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 20) : error.end + 20].encode("ascii", "backslashreplace").decode()
        return f"text that is not valid Unicode, at character {error.start}: {near!r} ({error.reason})"
    return str(error)


def _not_done(error: OSError) -> str:
    """Without "[Errno 2]"."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _not_installed(error: ImportError) -> str | None:
    name = (error.name or "").partition(".")[0]
    if not name or name in ("jaxsteer", "train"):
        return None
    if not isinstance(error, ModuleNotFoundError):
        return f"the package {name} cannot be used: {error}"
    wanted = f'"jaxsteer[{_EXTRAS[name]}]"' if name in _EXTRAS else name
    return f"the package {name} is not installed; install it with: pip install {wanted}"


def _not_computed(error: RuntimeError) -> str | None:
    """JAX's errors about the machine: memory, a backend that is not there, processes that have died."""
    text = str(error)
    first = text.strip().partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return f"out of memory on the device ({_shortened(first)}). {_LESS_MEMORY}"
    if "Unable to initialize backend" in text or "Unknown backend" in text:
        return f"{_shortened(first)} (the variable JAX_PLATFORMS chooses the backend)"
    if re.search(r"coordination service|[Hh]eartbeat|Gloo|Connection (closed|reset) by peer|UNAVAILABLE", text):
        return (
            f"another process of this run has ended or cannot be reached ({_shortened(first)}). Its own output says why"
        )
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _bug(error: Exception) -> str:
    """A report of a bug; the traceback goes to a file, or to standard error where none can be written."""
    from jaxsteer import __version__

    lines = "".join(traceback.format_exception(error))
    facts = f"jaxsteer {__version__}, Python {platform.python_version()}, {platform.platform()}\n{sys.argv}\n\n"
    what = f"{type(error).__name__}: {_shortened(str(error).strip().partition(chr(10))[0])}"
    asked = "This is a bug in jaxsteer: please report it"
    try:
        file = Path(tempfile.mkstemp(prefix="jaxsteer-", suffix=".txt")[1])
        file.write_text(facts + lines, encoding="utf-8", errors="backslashreplace")
    except OSError:
        print(lines, file=sys.stderr)
        return f"{what}. {asked}, with the lines above"
    return f"{what}. {asked}, with the file {file}"


def make_printable() -> None:
    """Let nothing that is printed be an error or noise.

    Characters that the terminal's encoding lacks are escaped, and what Orbax logs of an error, with its traceback, is
    left to the error itself.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def flush() -> None:
    """Write what standard output holds back, while an error of it can still be told."""
    if sys.stdout is not None:
        sys.stdout.flush()


def close_output() -> int:
    """Drop what standard output holds back, because nobody reads it.

    Returns:
        The exit status, that of a process that the signal SIGPIPE ended.
    """
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    return 128 + signal.SIGPIPE
