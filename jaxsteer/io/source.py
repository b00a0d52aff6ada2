"""Where a model comes from: a local folder, a .gguf file, a named model, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from jaxsteer.io.named import WHEEL_MODELS, fetch_named
from jaxsteer.plans import did_you_mean

CONFIG = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def locate(source: str | Path, patterns: tuple[str, ...]) -> Path:
    """The local folder or .gguf file of a source, downloaded from the Hugging Face Hub if necessary.

    Args:
        source: a folder, a .gguf file, a name in WHEEL_MODELS, or a Hugging Face id such as
            "HuggingFaceTB/SmolLM2-135M".
        patterns: glob patterns of the files to download from a repository.

    Raises:
        ValueError: nothing exists at `source`, and the Hub has no such repository or cannot be reached.
    """
    if str(source) in WHEEL_MODELS:
        return fetch_named(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ValueError(f"{path}: expected a folder, a .gguf file or a hub id; for safetensors give their folder")
    # Only what can be a repository's id is requested: a mistyped path should not reach the network.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.suffix.lower() in (".gguf", ".safetensors"):
        raise ValueError(
            f"{source}: no such folder or .gguf file, none of the named models ({', '.join(WHEEL_MODELS)}), and not an "
            f"id on the Hugging Face Hub (owner/name){did_you_mean(str(source), WHEEL_MODELS)}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # a dozen classes, for one outcome
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{source}: not a local path, and the Hugging Face Hub gave nothing by that name ({reason}). "
            "Check the spelling, the network, and for a gated model that you are logged in"
        ) from error


def is_hub_id(text: str) -> bool:
    """Whether a text can be the id of a repository of the Hugging Face Hub, owner/name, by the Hub's own rules."""
    part = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    allowed = re.fullmatch(f"{part}/{part}", text, re.ASCII) is not None
    return allowed and not any(bad in text for bad in ("--", "..")) and not text.endswith(".git")


def hub_id(source: str) -> str | None:
    """A source if it is the id of a repository of the Hugging Face Hub, and not a path that is here; else None."""
    is_file = source.endswith((".gguf", ".safetensors"))
    return source if is_hub_id(source) and not is_file and not Path(source).expanduser().exists() else None


def name_of(source: str | Path, path: Path) -> str:
    """A short name for display: the hub id, the folder's name, or the file's name without its ending."""
    if str(source) not in WHEEL_MODELS and not Path(source).expanduser().exists():
        return str(source)
    return path.stem if path.is_file() else path.resolve().name
