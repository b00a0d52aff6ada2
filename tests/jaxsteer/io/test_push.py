"""Uploads, to a Hub that is a class of this file."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from jaxsteer.io.push import push
from jaxsteer.io.source import is_hub_id


class HubError(OSError):
    """As HfHubHTTPError: an error with a response."""

    def __init__(self, status):
        super().__init__(f"{status} Client Error. (Request ID: Root=1)\n\nURL: https://huggingface.co/api")
        self.response = SimpleNamespace(status_code=status)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with a public and a private repository; `errors` says which call fails."""
    hub = SimpleNamespace(private={"me/public": False, "me/private": True}, uploads=[], errors={})

    class Api:
        def call(self, name):
            if name in hub.errors:
                raise hub.errors[name]

        def create_repo(self, repo_id, *, private, exist_ok):
            self.call("create_repo")
            assert exist_ok
            hub.private.setdefault(repo_id, private)
            return f"https://hub/{repo_id}"

        def model_info(self, repo_id):
            return SimpleNamespace(private=hub.private[repo_id])

        def upload_folder(self, **arguments):
            self.call("upload_folder")
            hub.uploads.append(arguments)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return hub


@pytest.fixture
def exported(tmp_path):
    (tmp_path / "jaxsteer.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("repo", "private"), [("me/new", True), ("me/new", False), ("me/public", False), ("me/private", True)]
)
def test_the_folder_is_uploaded(hub, exported, repo, private):
    assert push(exported, repo, private=private) == f"https://hub/{repo}"
    assert hub.private[repo] == private
    (upload,) = hub.uploads
    assert (upload["repo_id"], upload["folder_path"]) == (repo, exported)
    hidden = [".git/x", ".a", "b/.c"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*hidden, "a.b", "b/c.json"], ignore_patterns=upload["ignore_patterns"]
    )
    assert list(kept) == ["a.b", "b/c.json"]


def test_nothing_private_goes_to_a_public_repository(hub, exported):
    with pytest.raises(ValueError, match="me/public: this repository exists and is public; nothing was uploaded"):
        push(exported, "me/public", private=True)
    assert not hub.uploads


def test_only_exports_are_uploaded(hub, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"has no jaxsteer\.json"):
            push(folder, "me/new")
    assert "me/new" not in hub.private


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("create_repo", HubError(401), r"hf auth login.*\(401 Client Error\. \(Request ID: Root=1\)\)$"),
        ("create_repo", HubError(403), "may not write there: use a token with the role write"),
        ("create_repo", HubError(404), "no such namespace: the part before the slash"),
        ("create_repo", HubError(500), r"the Hub refused \(500"),
        (
            "create_repo",
            ConnectionError("[Errno -2] Name or service not known"),
            "cannot be reached.*check the network",
        ),
        ("upload_folder", HubError(413), "too large"),
        ("upload_folder", TimeoutError(), r"broke off \(TimeoutError\); check the network"),
    ],
)
def test_every_error_is_a_sentence(hub, exported, call, error, message):
    hub.errors[call] = error
    with pytest.raises(ValueError, match=f"^--push me/new: .*{message}"):
        push(exported, "me/new")
    assert not hub.uploads


def test_without_a_login_nothing_is_asked(hub, exported, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="not logged in; run `hf auth login`, or set HF_TOKEN"):
        push(exported, "me/new")
    assert "me/new" not in hub.private


def test_what_is_an_id_is_what_the_hub_says(hub, exported):
    ids = ("me/x", "a/b", "_a/b_", "Org-1/m.o-d_e.l", "a/" + "x" * 96)
    others = (
        "x",
        "a/b/c",
        "a/..b",
        "a/b--c",
        "-a/b",
        "a/b.",
        "a/b.git",
        "a/",
        "/b",
        "a b/c",
        "a/" + "x" * 97,
        "a/" + "x" * 200,
    )
    for text in ids:
        validate_repo_id(text)
        assert is_hub_id(text), text
    for text in others:
        if "/" in text:
            with pytest.raises(HFValidationError):
                validate_repo_id(text)
        with pytest.raises(ValueError, match="not an id of the Hugging Face Hub; expected owner/name"):
            push(exported, text)
    assert not is_hub_id("a/b\n")
    assert not is_hub_id("ä/b")
