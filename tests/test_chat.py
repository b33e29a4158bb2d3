"""A conversation in the terminal: streaming, history, commands, Ctrl-C, wide characters, mistakes."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cqlora.chat
import cqlora.engine_config
from cqlora.chat import ChatConfig, chat
from cqlora.engine import LlamaEngine
from cqlora.engine_config import LLAMA_CPP
from cqlora.errors import DataError, ModelError
from cqlora.inference.requests import Sampling
from cqlora.inference.terminal import HELP, Conversation, PipedTerminal, printable, talk
from tests.conftest import HANG_SECONDS, ROOT, run_verb
from tests.inference.conftest import *  # noqa: F403 - its fixtures

BEGIN, END = "\x1b[?2004h", "\x1b[?2004l"
"""What the line editor sends when it begins and when it ends to read a line."""


class Script:
    """Lines that are read, and what was written; an exception among the lines is raised."""

    def __init__(self, *lines) -> None:
        self.lines = list(lines)
        self.written = ""

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str, end: str = "\n") -> None:
        self.written += text + end


class Parrot:
    """Repeats the last message in parts; an exception among the parts is raised."""

    def __init__(self, *parts) -> None:
        self.parts = parts
        self.heard: list[list[dict[str, str]]] = []

    def stream(self, messages, **sampling):
        self.heard.append(messages)
        for part in self.parts or messages[-1]["text"]:
            if isinstance(part, BaseException):
                raise part
            yield part


def converse(parrot: Parrot, *lines, conversation=None) -> str:
    script = Script(*lines)
    talk(conversation or Conversation(), lambda: parrot, Sampling(), script)
    return script.written


def test_replies_are_heard_again_and_reset_forgets_all_but_the_system():
    parrot = Parrot()
    written = converse(parrot, "你好", "Go on", "/reset", "New", conversation=Conversation("Be kind."))
    assert "你好\nGo on\n" in written
    said = [[(message["role"], message["text"]) for message in messages] for messages in parrot.heard]
    system = ("system", "Be kind.")
    assert said[1] == [system, ("user", "你好"), ("assistant", "你好"), ("user", "Go on")]
    assert said[2] == [system, ("user", "New")]


def test_reset_begins_anew_though_the_engine_keeps_what_it_has_read(base):
    lines = ["The longest river in Asia", "长江", "/reset", "长江", "The longest river in Asia"]
    asked = Sampling(temperature=0, max_new_tokens=6)
    written = []
    for gib in (0.0, 0.1):
        engine, script = LlamaEngine(base, "", use_lora=False, dtype="float32", prefix_cache_gib=gib), Script(*lines)
        talk(Conversation("Be kind."), lambda engine=engine: engine, asked, script)
        written.append(script.written)
    assert written[0] == written[1] and "forgotten" in written[0]


def test_ctrl_c_stops_a_reply_keeps_what_was_said_and_does_not_end_the_program():
    parrot = Parrot("Once", " upon", KeyboardInterrupt())
    written = converse(parrot, "Tell", KeyboardInterrupt(), "More", "/exit", "never read")
    assert "Once upon [stopped]\n" in written and len(parrot.heard) == 2
    assert parrot.heard[1][1] == {"role": "assistant", "text": "Once upon"}


def test_a_conversation_that_is_too_long_is_reported_and_the_message_taken_back():
    parrot = Parrot(DataError("the prompt has 9 tokens."))
    conversation = Conversation()
    assert "error: the prompt has 9 tokens. /reset" in converse(parrot, "long", conversation=conversation)
    assert conversation.turns == []


def test_a_model_that_cannot_be_loaded_ends_the_program_with_its_error():
    def fail():
        raise ModelError("no such model")

    with pytest.raises(ModelError):
        talk(Conversation(), fail, Sampling(), Script("hello"))


def test_saved_conversations_are_lines_that_a_run_can_train_on(tmp_path):
    file = tmp_path / "talk" / "train.jsonl"
    assert "cannot be written" in converse(Parrot(), "你好", f"/save {file}")
    file.parent.mkdir()
    assert "Saved" in converse(Parrot(), "你好", f"/save {file}", f"/save {file}")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [[{"role": "user", "text": "你好"}, {"role": "assistant", "text": "你好"}]] * 2


def test_nothing_is_saved_before_anything_was_said(tmp_path):
    file = tmp_path / "train.jsonl"
    assert "Nothing has been said yet." in converse(Parrot(), f"/save {file}", conversation=Conversation("Be kind."))
    assert not file.exists()


def test_the_end_does_not_wait_for_the_model(tmp_path, monkeypatch):
    loaded, left = threading.Event(), []
    monkeypatch.setattr(ChatConfig, "check_folders", lambda self: None)
    monkeypatch.setattr(ChatConfig, "load_engine", lambda self: loaded.wait(timeout=HANG_SECONDS))
    monkeypatch.setattr("cqlora.chat.open_terminal", lambda: Script("/exit"))
    monkeypatch.setattr("os._exit", lambda code: left.append((code, loaded.is_set())) or loaded.set())
    chat(ChatConfig(base="."))
    assert left == [(0, False)]


def test_lines_from_a_pipe_are_utf_8_or_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode() + "你好\n".encode("gb18030"))))
    terminal = PipedTerminal()
    assert terminal.read() == "你好\n"
    with pytest.raises(DataError, match=r"standard input is not UTF-8; convert it with iconv first\."):
        terminal.read()


def test_an_unknown_command_and_a_save_without_a_file_show_the_help():
    assert converse(Parrot(), "/what", "/save").count(HELP) == 3


def test_a_reply_cannot_command_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\n\t你") == "a[2Jb\n\t你"


STRANGE = [
    "\x00\x1b[2J\x07", "\ud83d", "a\ud800b", "x" * 1_000_000, "/save \x00", "/save \ud800/a", "/save ~nobody/a",
    "/save /", "/save " + "x" * 5000, "/\x1b[2J", "\u202e\u2066", " \x0b\x0c ", "<|im_start|>system",
]  # fmt: skip


@pytest.mark.parametrize("line", STRANGE, ids=ascii)
def test_no_pasted_text_ends_the_conversation(line, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = LlamaEngine(base, "", use_lora=False)
    script = Script("hello", line, "/reset", "hello")
    talk(Conversation(), lambda: engine, Sampling(max_new_tokens=2, seed=1), script)
    assert script.written.count("forgotten") == 1 and not script.lines
    assert "\x1b" not in script.written and "\x00" not in script.written
    script.written.encode()


def run_chat(base, tmp_path, redirections: str, **environment) -> subprocess.CompletedProcess[bytes]:
    command = f'"{sys.executable}" -m cqlora.chat base="{base}" max_new_tokens=4 temperature=0 {redirections}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    "redirections, environment",
    [("<&-", {}), (">&- <<< hello", {}), ("<<< hello | head -c 1", {}), ("<<< 你好", {"PYTHONIOENCODING": "ascii"}),
     ("< <(printf 'a\\xff\\n')", {})],
    ids=["no input", "no output", "a reader that leaves", "ascii", "not UTF-8"],
)  # fmt: skip
def test_without_a_terminal_there_is_no_traceback(redirections, environment, base, tmp_path):
    done = run_chat(base, tmp_path, redirections, **environment)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
    assert done.returncode in (0, 1, 2) and done.stderr.count(b"\n") <= 2


def test_lines_from_a_pipe_are_answered(base, tmp_path):
    done = run_verb(tmp_path, "chat", f"base={base}", "max_new_tokens=3", "temperature=0", expect=0)
    assert done.stdout.startswith(HELP)


@pytest.mark.parametrize(
    "device, gpus, on_gpu", [("cpu", 1, False), ("auto", 0, False), ("auto", 1, True), ("cuda:0", 1, True)]
)
def test_who_wants_speed_is_sent_to_llama_cpp_or_vllm_in_one_line(device, gpus, on_gpu, base, monkeypatch):
    terminal = Script()
    monkeypatch.setattr(ChatConfig, "load_engine", lambda config: Parrot())
    monkeypatch.setattr(cqlora.engine_config, "list_gpus", lambda: ("a GPU",) * gpus)
    monkeypatch.setattr(cqlora.chat, "open_terminal", lambda: terminal)
    monkeypatch.setattr(cqlora.chat, "leave", lambda: None)
    chat(ChatConfig(base=str(base), device=device))
    vllm = f"For speed on GPUs, and many users, there is vLLM: `vllm serve {base}`."
    assert terminal.written == f"{HELP}\n{vllm if on_gpu else LLAMA_CPP}\n"


def test_an_adapter_is_merged_first_for_vllm():
    told = ChatConfig(base="models/my base", adapter="outputs/chat/adapter", device="cuda").name_faster()
    merge = "cqlora merge 'base=models/my base' adapter=outputs/chat/adapter output_dir=models/merged"
    assert told.endswith(f"vLLM: `{merge}`, then `vllm serve models/merged`.")


@pytest.mark.parametrize(
    "arguments, described, code",
    [(["base=nowhere"], "nowhere does not exist", 1), (["base={base}", "adapter={base}"], "no adapter_config.json", 2),
     (["base={base}", "temperature=-1"], "temperature=-1", 2), (["base={base}", "dtype=int4"], "dtype=int4", 2),
     (["base={base}", "device=gpu"], "device=gpu is unknown", 2),
     (["base={base}", "prefix_cache_gib=-1"], "prefix_cache_gib=-1", 2)],
    ids=["base", "adapter", "temperature", "dtype", "device", "prefix cache"],
)  # fmt: skip
def test_mistakes_are_reported_before_the_prompt(arguments, described, code, base, tmp_path):
    done = run_verb(tmp_path, "chat", *(argument.format(base=base) for argument in arguments), expect=code)
    assert described in done.stderr and done.stderr.count("\n") == 1 and HELP not in done.stdout


def test_a_person_at_a_terminal_writes_chinese_interrupts_a_reply_and_goes_on(base, nf4_adapter, tmp_path):
    """In a pseudo-terminal: the wide characters that were typed come back whole, and Ctrl-C ends only the reply."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [
        sys.executable,
        "-m",
        "cqlora.chat",
        f"base={base}",
        f"adapter={nf4_adapter}",
        "max_new_tokens=200",
        "seed=1",
    ]
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(sys.executable, command, environment)
    wait_for(terminal, BEGIN)
    os.write(terminal, "你好，世界".encode())
    wait_for(terminal, "你好，世界")
    os.write(terminal, b"\x7f\x7f\r")
    wait_for(terminal, END)
    wait_for(terminal, BEGIN)
    os.write(terminal, b"more\r")
    wait_for(terminal, END)
    os.write(terminal, b"\x03")
    wait_for(terminal, BEGIN)
    os.write(terminal, f"/save {tmp_path}/talk.jsonl\r".encode())
    wait_for(terminal, "Saved")
    wait_for(terminal, BEGIN)
    os.write(terminal, b"\x04")
    assert exit_code(child, terminal) == 0
    assert json.loads(Path(tmp_path, "talk.jsonl").read_text(encoding="utf-8"))[0]["text"] == "你好，"


def exit_code(child: int, terminal: int, seconds: float = HANG_SECONDS) -> int:
    """How a child ended; one that does not end is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if select.select([terminal], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # the terminal of a child that has ended
                os.read(terminal, 4096)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def wait_for(terminal: int, text: str, seconds: float = HANG_SECONDS) -> str:
    """Read until the terminal shows a text."""
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{text!r} did not come in {seconds:g} s; what came: {seen!r}"
        seen += os.read(terminal, 1).decode("latin-1") if text.isascii() else read_characters(terminal)
    return seen


def read_characters(terminal: int) -> str:
    return os.read(terminal, 4096).decode("utf-8", errors="replace")
