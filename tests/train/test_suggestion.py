"""The command that a finished run suggests: a real question, as a shell and the program read it."""

import shlex
from pathlib import Path

import pytest
import tyro

from train.data import Example
from train.data.examples import Turn
from train.generate import GenerateConfig
from train.run.result import Question, question_of, suggestion

CHAT = Example((Turn("system", "Be brief."), Turn("user", "What's 7?"), Turn("assistant", "7")), "chat:1")


def test_a_conversation_is_asked_as_its_user_asks_it():
    assert question_of(CHAT, "{prompt}") == Question("What's 7?", "Be brief.")
    assert question_of(Example.of("Q: 1+1\nA:", "2", "plain:1"), "Q: {prompt}\nA:") == Question("1+1")
    assert question_of(Example((Turn("system", "S"), Turn("assistant", "A")), "chat:2"), "{prompt}") == Question(
        "", "S"
    )


@pytest.mark.parametrize("prompt", ["What's 7?", 'say "hi" to $HOME `now`', "-5 + 3 = ", "two\nlines", "--compare"])
@pytest.mark.parametrize("system", [None, "Be 'brief'."])
def test_the_command_is_read_back_unchanged(prompt, system):
    words = shlex.split(suggestion(Path("runs/my run/steering.safetensors"), Question(prompt, system)))
    assert words[1:3] == ["-m", "train.generate"]
    config = tyro.cli(GenerateConfig, args=words[3:])
    assert config.system == system
    assert (config.steering, config.prompts, config.compare) == ("runs/my run/steering.safetensors", (prompt,), True)
