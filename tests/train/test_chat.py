"""`jaxsteer chat` as a user sees it: through a terminal that is a script, a pipe, and a pseudo-terminal."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_model import TINY
from tiny_tokenizer import tiny_tokenizer

from jaxsteer import LinearSteering, LoRA, Slot, init_steering
from jaxsteer.inference.draws import Sampling
from jaxsteer.io import save_hf, save_steering
from jaxsteer.models.transformer import init_base
from train.chat import __main__ as command
from train.chat.answers import Talker
from train.chat.commands import Chat
from train.chat.interrupts import CtrlC
from train.chat.lines import piped_lines, read_message
from train.chat.manual import HELP
from train.chat.screen import InTurn, visible
from train.chat.settings import Settings
from train.cli import run_main
from train.serving.engine import Engine
from train.serving.models import open_roster

CONFIG = replace(TINY, max_length=512)
PLAN = (Slot("lora", LoRA(rank=2), ("attn.q",)), Slot("post_block", LinearSteering(rank=2), ("block",)))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and steering for chats (`talk`) and for plain prompts (`plain`)."""
    folder = tmp_path_factory.mktemp("chat")
    save_hf(folder / "tiny", CONFIG, init_base(CONFIG, jax.random.key(3)), "llama", tiny_tokenizer())
    zeros = init_steering(PLAN, CONFIG, jax.random.key(0))
    for seed, (name, notes) in enumerate({"talk": {"chat": True}, "plain": {"template": "{prompt}>"}}.items()):
        draw = np.random.default_rng(seed)
        steering = jax.tree.map(lambda leaf, draw=draw: np.float32(2 * draw.standard_normal(leaf.shape)), zeros)
        notes = {**notes, "max_new_tokens": 6}
        save_steering(
            folder / f"{name}.safetensors", steering, PLAN, model_name=str(folder / "tiny"), config=CONFIG, notes=notes
        )
    return folder


@pytest.fixture(scope="module")
def engine(files):
    """With the programs of `jaxsteer chat --context 128`, so that they are compiled once."""
    sources = tuple(str(files / f"{name}.safetensors") for name in ("talk", "plain"))
    start = command.prepare(command.ChatConfig(sources, context=128))
    with Engine(open_roster(start.sources, places=2), start.sizes) as engine:
        engine.start()
        yield engine


class Session:
    """A chat, what it shows, and what it asks the engine for."""

    def __init__(self, engine, *, width=99, terminal=False, **options):
        self.shown, self.notes = io.StringIO(), io.StringIO()
        self.ctrl_c = CtrlC()
        consoles = [
            Console(file=file, force_terminal=terminal, color_system="truecolor" if terminal else None, width=width)
            for file in (self.shown, self.notes)
        ]
        settings = Settings(adapter="talk", max_new_tokens=8)
        self.chat = Chat(Talker(engine, 128, self.ctrl_c), settings, *consoles, **options)

    def type(self, *lines):
        """Type lines; gives what is shown, and what is said beside it."""
        starts = self.shown.tell(), self.notes.tell()
        given = iter(lines)
        self.chat.run(lambda prompt: _next(given))
        return tuple(file.getvalue()[start:] for file, start in zip((self.shown, self.notes), starts, strict=True))

    def conversation(self, tmp_path):
        """The messages, as /save writes them."""
        self.type(f"/save {tmp_path / 'talk.json'}")
        return json.loads((tmp_path / "talk.json").read_text())["messages"]


def _next(lines):
    for line in lines:
        return line
    raise EOFError


@pytest.fixture
def session(engine):
    return Session(engine)


@pytest.fixture
def asked(engine, monkeypatch):
    """The requests that reach the engine."""
    requests, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, *rest: (requests.append(request), submit(request, *rest))[1])
    return requests


def text_of(request, engine):
    return engine.roster.loaded.tokenizer.decode(request.prompt.ids)


# ---- conversations


def test_a_conversation_is_put_to_the_model_as_a_whole(session, engine, asked, tmp_path):
    first, _ = session.type("/system be brief", "ab")
    session.type("cd")
    answer = session.conversation(tmp_path)[2]["content"]
    assert first == answer + "\n"
    start = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(asked[0], engine) == start
    assert text_of(asked[1], engine).startswith(start + answer)
    assert text_of(asked[1], engine).endswith("<|im_start|>user\ncd<|im_end|>\n<|im_start|>assistant\n")


def test_completions_stand_alone_in_the_template_of_the_training(session, engine, asked):
    session.type("ab", "/adapter plain", "cd", "/mode chat", "ef", "/mode auto", "/base", "gh")
    assert [text_of(request, engine) for request in asked[1::2]] == ["cd>", "gh>"]
    chat = text_of(asked[2], engine)
    assert "ab<|im_end|>" in chat
    assert "cd" not in chat
    assert [request.adapter for request in asked] == ["talk", "plain", "plain", None]
    assert [request.max_new_tokens for request in asked] == [8] * 4


def test_strength_turns_the_steering(session, asked, tmp_path):
    session.type("ab", "/strength 0", "/retry")
    at_0 = session.conversation(tmp_path)[1]
    session.type("/base", "/retry")
    base = session.conversation(tmp_path)[1]
    session.type("/base", "/strength 0.5", "/strength lora=2", "/retry", "/strength 1", "/retry")
    steered = session.conversation(tmp_path)[1]
    assert [request.strength for request in asked] == [
        {}, {"lora": 0, "post_block": 0}, {}, {"lora": 2, "post_block": 0.5}, {}
    ]  # fmt: skip
    assert at_0["content"] == base["content"] != steered["content"]
    assert (at_0["model"], at_0["strength"]) == ("talk", {"lora": 0, "post_block": 0})
    assert (base["model"], steered["model"]) == (None, "talk")


def test_the_prompt_says_who_answers(session):
    prompt = lambda *lines: (session.type(*lines), session.chat.prompt)[1]
    assert prompt() == "talk > "
    assert prompt("/strength 0.5") == "talk 0.5 > "
    assert prompt("/strength lora=1", "/temperature 0.7") == "talk post_block=0.5 T=0.7 > "
    assert prompt("/adapter plain", "/temperature 0") == "plain completion > "
    assert prompt("/base") == "base completion > "
    assert prompt("/strength 2", "/mode chat") == "plain 2 > "


def test_draws_depend_on_the_seed_and_the_number_of_the_answer(session, asked):
    session.type("/temperature 1", "/top_k 9", "/top_p 0.5", "/seed 3", "ab", "/retry", "/seed 3", "/retry")
    assert [request.seed for request in asked] == [3 << 32, 3 << 32 | 1, 3 << 32]
    assert {request.sampling for request in asked} == {Sampling(1.0, 9, 0.5)}


def test_undo_reset_and_history(session, tmp_path):
    shown, notes = session.type("ab", "cd", "/undo", "/history")
    assert "1 message left" in notes
    assert "> ab" in shown
    assert "> cd" not in shown
    _, notes = session.type("/reset", "/history", "/undo", "/retry", "/why")
    assert notes.count("nothing has been said yet") == 4


def test_a_saved_conversation_goes_on(session, engine, asked, tmp_path):
    session.type("/system be brief", "ab", "/adapter plain", "/strength 0.5", "cd", f"/save {tmp_path / 'a.json'}")
    other = Session(engine)
    _, notes = other.type(f"/load {tmp_path / 'a.json'}", f"/save {tmp_path / 'b.json'}", "ef")
    assert notes.startswith("2 messages\n")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "be brief" not in text_of(asked[-1], engine)  # the last message was asked without
    assert "ab<|im_end|>" in text_of(asked[-1], engine)
    shown, _ = other.type("/undo", "/why")
    assert "plain 0.5 against base" in shown
    saved = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(saved | {"model": "another"}))
    elsewhere, notes = other.type(f"/load {tmp_path / 'c.json'}", "/why")
    assert notes == "2 messages, with another base model: another\n"
    assert "plain 0.5 against base" in elsewhere


# ---- base and steered


def test_compare_keeps_the_answer_of_the_adapter(session, asked, tmp_path):
    shown, _ = session.type("ab", "/compare", "/compare cd")
    messages = session.conversation(tmp_path)
    assert [each["content"] for each in messages[::2]] == ["ab", "cd"]
    assert {each["model"] for each in messages[1::2]} == {"talk"}
    assert [request.adapter for request in asked] == ["talk", None, "talk", None, "talk"]
    assert shown.count("base:\n") == shown.count("talk:\n") == 2
    assert shown.endswith(f"talk:\n{messages[3]['content']}\n")


def test_answers_stand_side_by_side_where_there_is_room(engine):
    shown, _ = Session(engine, width=120, terminal=True).type("/strength 0.5", "/compare ab")
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert re.search(r"base {20,}talk 0\.5", plain)


def test_answers_in_turn_wait_for_each_other():
    console = Console(file=io.StringIO(), width=80)
    display = InTurn(console, ["one", "two"])
    for number, text in ((1, "b"), (0, "a"), (1, "c")):
        display.add(number, text)
    display.end(1)
    assert console.file.getvalue() == "one:\na"
    display.end(0)
    assert console.file.getvalue() == "one:\na\ntwo:\nbc\n"


def test_answers_cannot_control_the_terminal():
    assert visible("a\x1b[2J\tb\n\x07") == "a\\x1b[2J\tb\n\\x07"


# ---- what steering did


def test_why_shows_the_last_exchange(session, tmp_path):
    shown, _ = session.type("xy", "ab", "/why", f"/why {tmp_path / 'tokens.png'}")
    assert "‖Δh‖ / ‖h‖ of each token" in shown
    assert "\nab<|im_end|>" in shown
    assert "xy" not in shown.partition("‖Δh‖")[2]
    assert re.search(r"layers 0 to 2: [▁-█]{3} largest \d", shown)
    assert (tmp_path / "tokens.png").stat().st_size > 0
    every, _ = session.type("/why all")
    rows = re.findall(r"^│ +(\d+) │ (\S+)", every, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert [text for _, text in rows[:3]] == ["'a'", "'b'", "'<|im_end|>'"]
    one, _ = session.type("/why 2")
    assert one.startswith("token 2, 'b' of the prompt")
    assert "likeliest tokens in its place" in one


def test_why_follows_the_answer_and_not_the_settings(session):
    session.type("ab")
    steered, _ = session.type("/why")
    assert session.type("/strength 0", "/why")[0] == steered
    zero, _ = session.type("/retry", "/why")
    assert "(largest 0.0000)" in zero
    would, notes = session.type("/base", "/retry", "/strength 1", "/why")
    assert "talk against base" in would
    assert "error" not in notes


def test_answers_can_be_coloured_as_they_come(engine):
    shown, _ = Session(engine, terminal=True, show_shift=True).type("ab", "/base", "/retry")
    answer, coloured = shown.split("\n")[:2]
    assert "\x1b[" not in answer
    assert re.search(r"\x1b\[[\d;]*48;2;", coloured)
    assert shown.count("48;2;") == coloured.count("48;2;")


# ---- what cannot be


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/strenght 1"], "no command /strenght (did you mean strength?)"),
        (["/ hello"], "no command /"),
        (["/undo 3"], "/undo takes nothing more, got '3'"),
        (["/strength post_blok=1"], "/strength post_blok=1: no slot 'post_blok' (did you mean post_block?)"),
        (["/strength much"], "/strength much: neither a number nor SLOT=NUMBER\n"),
        (["/strength nan"], "/strength nan: must be a finite number"),
        (["/adapter tlak"], "no model 'tlak' (did you mean talk?)"),
        (["/temperature -1"], "/temperature -1: give a number of at least 0"),
        (["/temperature inf"], "/temperature inf: give a number of at least 0"),
        (["/top_p 0"], "/top_p 0: give a number above 0"),
        (["/top_k 1.5"], "/top_k 1.5: give a whole number"),
        (["/seed -1"], "/seed -1: give a whole number from 0"),
        (["/max 0"], "/max 0: give a whole number of at least 1"),
        (["/max 128"], "/max 128: answers have up to 127 tokens here"),
        (["/mode talk"], "/mode talk: give chat, completion or auto"),
        (["/adapter plain", "/system be brief"], "/system: completions have no system message"),
        (["/save"], "/save: give a file"),
        (["ab", "/save talk.txt"], "talk.txt: conversations are saved as JSON"),
        (["ab", "/save no/such/a.json"], "there is no folder no/such"),
        (["ab", "/save own.json"], "own.json: exists and holds no conversation"),
        (["/load missing.json"], "missing.json: no such file"),
        (["/load own.json"], "own.json: not a conversation that /save wrote"),
        (["/load open.json"], "open.json: the last message has no answer"),
        (["/load odd.json"], "odd.json: messages[0].role must be"),
        (["/load ids.json"], "ids.json: has token ids that tiny does not have"),
        (["ab", "/why 1000"], "/why 1000: the last exchange has tokens 1 to"),
        (["ab", "/why him"], "/why him: give the number of a token"),
        (["ab", "/why no/such/a.png"], "there is no folder no/such"),
        (["a\udcffb"], "the message: not valid Unicode"),
        (['"""', "ab"], 'a message that began with """ has no """ at its end'),
        (["x" * 150], "no answer fits into the context of 128"),
    ],
)
def test_errors_are_a_sentence_and_the_chat_goes_on(lines, message, session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk = lambda *messages, model="m": json.dumps({"format": "jaxsteer chat 1", "model": model, "messages": messages})
    Path("own.json").write_text('{"mine": 1}')
    Path("open.json").write_text(talk({"role": "user", "content": "a"}))
    Path("odd.json").write_text(talk({"role": "robot", "content": "a"}))
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tokens": [999]}
    Path("ids.json").write_text(talk(asked, answer, model="tiny"))
    _, notes = session.type("/max 2", *lines)
    assert re.search(f"^error: .*{re.escape(message)}", notes, re.MULTILINE)
    assert notes.count("error") == 1
    assert session.chat.failed
    assert Path("own.json").read_text() == '{"mine": 1}'
    shown, notes = session.type("/max 2", "ab")
    assert shown
    assert "error" not in notes


def test_only_the_base_model_is_here(engine):
    session = Session(engine)
    session.chat._settings = Settings(max_new_tokens=2)
    shown, notes = session.type("ab", "/strength 1", "/base", "/compare", "/why")
    assert session.chat.prompt == "base > "
    assert shown
    assert notes.count("error: only the base model is here") == 4


def test_what_fills_the_context_is_said(session, asked):
    _, notes = session.type("/max 100", "x" * 60)
    assert asked[0].max_new_tokens < 100
    assert f"ended after {asked[0].max_new_tokens} tokens; that is all the context has room for" in notes
    _, notes = session.type("ab")
    assert "shorten it with /undo, begin anew with /reset" in notes
    assert "--context (the model reads up to 512)" in notes
    assert len(asked) == 1
    _, notes = session.type("/reset", "/max 2", "ab")
    assert "ended after 2 tokens; /max N allows more" in notes


def test_a_failure_of_the_model_is_no_end(session, engine, monkeypatch, tmp_path):
    """Steering that is too strong gives no logits to draw from."""
    session.type("ab")
    _, notes = session.type("/strength 1e38", "cd", "/why")
    assert "non-finite logits" in notes
    assert len(session.conversation(tmp_path)) == 2
    assert session.type("/strength 1", "cd")[0]


# ---- lines


def read_all(text):
    read, messages = piped_lines(io.BytesIO(text)), []
    while True:
        try:
            messages.append(read_message(read, "> "))
        except EOFError:
            return messages


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (b"a\r\nb", ["a", "b"]),
        (b"a\\\nb\\\n\nc\n", ["a\nb\n", "c"]),
        (b"a\\\n", ["a\n"]),
        (b'"""\na\n\n b\\\n"""\nc\n', ["a\n\n b\\", "c"]),
        (b'"""a\nb"""\n', ["a\nb"]),
        (b'"""a"""\n', ["a"]),
        (b'say """a\n', ['say """a']),
        ("ü→\n".encode(), ["ü→"]),
        (b"", []),
    ],
)
def test_messages_of_several_lines(text, messages):
    assert read_all(text) == messages


def test_slashes_and_empty_lines(session, engine, asked):
    session.type("", "   ", "//ab")
    assert [text_of(request, engine) for request in asked] == [
        "<|im_start|>user\n/ab<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_every_command_is_in_the_help(session):
    shown, _ = session.type("/help")
    assert all(f"/{name}" in shown for name in HELP)
    assert session.type("/adapter")[0].count("linear(rank=2) @ block") == 2
    assert session.chat.words()["/adapter"] == {"tiny": None, "talk": None, "plain": None}
    _, notes = session.type("/seed", "/max", "/strength", "/mode", "/system", "/quit", "never")
    assert notes.split("\n")[:-1] == [
        "seed 0", "max 8", "strength lora 1, post_block 1", "chat", "system message: none"
    ]  # fmt: skip


# ---- Ctrl-C


def test_ctrl_c_stops_an_answer_and_keeps_what_came(session, tmp_path, monkeypatch):
    add = InTurn.add

    def interrupted(display, number, text):
        add(display, number, text)
        if text:
            os.kill(os.getpid(), signal.SIGINT)

    with session.ctrl_c.handled():
        monkeypatch.setattr(InTurn, "add", interrupted)
        shown, notes = session.type("/max 100", "ab")
        monkeypatch.setattr(InTurn, "add", add)
        session.type("/max 2", "cd")
    assert "stopped; /retry answers again" in notes
    kept, after = session.conversation(tmp_path)[1::2]
    assert shown == kept["content"] + "\n"
    assert kept["finished"] == "cancelled"
    assert 0 < len(kept["tokens"]) < 100
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


# ---- the command


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command as its own process would; gives what it prints, and what it reports if it fails."""

    def call(*arguments, stdin=b"", fails=False):
        monkeypatch.setattr(sys, "argv", ["chat", *map(str, arguments)])
        stream = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) if fails else nullcontext() as exit:
            run_main(command.main)
        printed = capsys.readouterr()
        assert not fails or exit.value.code == 1
        return " ".join(printed.err.split()) if fails else printed.out

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strength", "post_blok=1"), "no slot 'post_blok' (did you mean post_block?)"),
        (("--temperature", "-1"), "temperature=-1.0"),
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
