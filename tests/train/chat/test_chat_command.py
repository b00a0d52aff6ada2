"""`jaxsteer chat` as a command: what it refuses before a model is loaded, and its scripts."""

import jax
import pytest
from chat_session import CONFIG
from tiny_tokenizer import tiny_tokenizer

from jaxsteer.io import save_hf
from jaxsteer.models.transformer import init_base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strength", "post_blok=1"), "no slot 'post_blok' (did you mean post_block?)"),
        (("--temperature", "-1"), "--temperature must be at least 0, got -1.0"),
        (("--seed", "-1"), "--seed must be from 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("--max-new-tokens", "600"), "--max-new-tokens 600: more than fits into a context of 512 tokens"),
        (("--context", "1"), "--context must be at least 2"),
        (("--context", "513"), "--context 513: this model reads up to 512 tokens"),
        (("--system", "brief"), "--system is for a chat, but this steering was trained on plain prompts"),
        (("--system", "brief", "--mode", "completion"), "--mode completion has none"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(arguments, message, run, files, monkeypatch):
    monkeypatch.setattr("train.base_models.load_model", None)
    assert message in run(files / "plain.safetensors", *arguments, fails=True)


def test_a_chat_needs_a_chat_template(run, files, tmp_path, monkeypatch):
    save_hf(tmp_path / "bare", CONFIG, init_base(CONFIG, jax.random.key(3)), "llama", tiny_tokenizer(template=None))
    monkeypatch.setattr("train.base_models.load_model", None)
    arguments = ("none", "--model", tmp_path / "bare", "--mode", "chat")
    assert "has no chat template; it only completes texts" in run(*arguments, fails=True)


def test_a_script_of_messages_and_commands(run, files, tmp_path):
    """The exit status says whether all lines were obeyed."""
    sources = f"own={files / 'talk.safetensors'}", files / "plain.safetensors", "--max-new-tokens", "4"
    lines = b"ab\n/strength 0\n/retry\n/base\n/retry\n/adapter\n"
    steered, at_0, base, *table = run(*sources, "--context", "128", stdin=lines).split("\n")
    assert steered != at_0 == base
    names = [line.split()[0] for line in table if line[:1].strip()]
    assert names == ["model", "tiny", "own", "plain"]
    assert "no command /strenght" in run(*sources, "--context", "128", stdin=b"/strenght 1\n", fails=True)
