"""Where a model comes from: a local folder, a .gguf file, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

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
    """The local folder or .gguf file of a source, downloaded from the hub if need be.

    Args:
        source: a folder, a .gguf file, or a hub id such as "HuggingFaceTB/SmolLM2-135M".
        patterns: which of a hub repository's files are wanted.

    Raises:
        ValueError: there is nothing at `source`, and the hub has no such repository or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ValueError(f"{path}: expected a folder, a .gguf file or a hub id; for safetensors give their folder")
    # What cannot be a repository's id is never asked for: a mistyped path should not become a request.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.suffix.lower() in (".gguf", ".safetensors"):
        raise ValueError(f"{source}: no such folder or .gguf file, and not an id on the Hugging Face Hub (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:  # a dozen kinds, for one outcome
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{source}: not a local path, and the Hugging Face Hub gave nothing by that name ({reason}). "
            "Check the spelling, the network, and for a gated model that you are logged in"
        ) from error


def name_of(source: str | Path, path: Path) -> str:
    """A short name for people: the hub's id, the folder's name, or the file's without its ending."""
    if not Path(source).expanduser().exists():
        return str(source)
    return path.stem if path.is_file() else path.resolve().name
