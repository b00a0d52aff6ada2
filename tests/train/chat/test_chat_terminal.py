"""Ctrl-C in a chat, and a chat in a pseudo-terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from train.chat.screen import InTurn

ROOT = Path(__file__).resolve().parents[3]


def test_ctrl_c_stops_an_answer_and_keeps_what_came(session, tmp_path, monkeypatch):
    add = InTurn.add

    def interrupted(display, number, text):
        add(display, number, text)
        if text:
            os.kill(os.getpid(), signal.SIGINT)

    with session.ctrl_c.handled():
        monkeypatch.setattr(InTurn, "add", interrupted)
        shown, notes = session.type("/max 127", "ab")
        monkeypatch.setattr(InTurn, "add", add)
        session.type("/max 2", "cd")
    assert "stopped; /retry answers again" in notes
    kept, after = session.conversation(tmp_path)[1::2]
    assert shown == kept["content"] + "\n"
    assert kept["finished"] == "cancelled"
    assert 0 < len(kept["tokens"]) < 127
    assert after["finished"] == "length"


def test_ctrl_c_at_the_prompt_leaves_but_not_with_a_conversation_at_once(session):
    def read(prompt):
        line = next(lines)
        if line is None:
            raise KeyboardInterrupt
        return line

    lines = iter([None])
    with pytest.raises(KeyboardInterrupt):
        session.chat.run(read)
    lines = iter(["ab", None, "cd", None, None])
    with pytest.raises(KeyboardInterrupt):
        session.chat.run(read)
    assert session.notes.getvalue().count("Ctrl-C again leaves") == 2


_IN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches the processes of this terminal
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, arguments, environment):
        self._master, slave = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen([sys.executable, "-c", _IN_TERMINAL, *arguments], env=environment, **streams)
        os.close(slave)
        self.shown, self._seen = "", 0
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            while data := os.read(self._master, 4096):
                with self._news:
                    self.shown += re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", data.decode(errors="replace"))
                    self._news.notify_all()
        except OSError:  # the program has ended
            pass

    def wait_for(self, pattern, seconds=120):
        """Wait until a pattern appears after what was waited for last; gives the match."""
        with self._news:
            assert self._news.wait_for(lambda: re.search(pattern, self.shown[self._seen :]), seconds), self.shown
            found = re.search(pattern, self.shown[self._seen :])
            self._seen += found.end()
            return found

    def type(self, text):
        os.write(self._master, text.encode())


@pytest.mark.slow
def test_a_conversation_in_a_terminal(files, tmp_path):
    environment = os.environ | {
        "JAXSTEER_CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "TERM": "xterm",
    }
    arguments = ["-m", "train", "chat", str(files / "talk.safetensors"), "--max-new-tokens", "450"]
    terminal = Terminal(arguments, environment)
    try:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for("talk >")
        terminal.type("ab\r")
        terminal.wait_for(r"ab[\s⠀-⣿.]+[^\s⠀-⣿.]")  # behind the spinner
        terminal.type("\x03")
        terminal.wait_for("stopped; /retry answers again")
        terminal.wait_for("talk >")
        terminal.type("/str\t")
        terminal.wait_for("/strength")
        terminal.type(" 0.5\r")
        terminal.wait_for("talk 0.5 >")
        terminal.type("/history\r")
        terminal.wait_for("> ab")
        terminal.wait_for("talk 0.5 >")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again leaves")
        terminal.wait_for("talk 0.5 >")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
    history = tmp_path / "chat_history"
    assert [line for line in history.read_text().splitlines() if line.startswith("+")] == [
        "+ab",
        "+/strength 0.5",
        "+/history",
    ]
    assert history.stat().st_mode & 0o077 == 0
