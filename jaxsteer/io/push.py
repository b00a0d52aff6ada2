"""Upload an export to a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.io.formats.sidecar import NAME
from jaxsteer.io.source import is_hub_id

_WHY = {
    401: "the Hub does not accept this token: log in with `hf auth login`, or set HF_TOKEN to a token that can write",
    403: "this account may not write there: use a token with the role write, and a namespace of yours",
    404: "there is no such namespace: the part before the slash must be your user name or an organisation of yours",
    413: "the files are too large for this account",
    429: "the Hub asks to wait; try again later",
}
"""What a status of the Hub means, and what to do."""


def check_push(repo_id: str) -> None:
    """Refuse an upload that cannot succeed, without network.

    Raises:
        ValueError: not an id, or not logged in.
    """
    if not is_hub_id(repo_id):
        raise ValueError(
            f"--push {repo_id}: not an id of the Hugging Face Hub; expected owner/name, such as me/my-steering"
        )
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise ValueError(f"--push {repo_id}: not logged in; run `hf auth login`, or set HF_TOKEN")


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload all files of an export, but hidden ones, as one commit.

    Args:
        folder: the export; jaxsteer.json in it shows that it is complete.
        repo_id: the repository, owner/name. It is created if it does not exist.
        private: create it as a private one, and refuse one that is public.

    Returns:
        The address of the repository.

    Raises:
        ValueError: not an export, not an id, not logged in, no right to write there, no network, or a public
            repository that should be private; the message says what to do.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        raise ValueError(f"{folder}: has no {NAME}, so it is no export that is complete; write one with --to")
    check_push(repo_id)
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        public = private and not api.model_info(repo_id).private
        if not public:
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Upload from jaxsteer",
                ignore_patterns=[".*", "**/.*"],
            )
    except Exception as error:  # a dozen classes, of three packages
        raise ValueError(f"--push {repo_id}: {_reason(error)}") from error
    if public:
        raise ValueError(
            f"--push {repo_id}: this repository exists and is public; nothing was uploaded. Make it private in its "
            "settings, name another, or leave out --private"
        )
    return str(address)


def _reason(error: Exception) -> str:
    """An error of huggingface_hub in a phrase, with what to do."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _WHY:
        return f"{_WHY[status]} ({said})"
    if status is not None:
        return f"the Hub refused ({said})"
    return f"the Hub cannot be reached, or broke off ({said}); check the network, and give the same command again"
