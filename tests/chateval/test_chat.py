"""`chateval chat` on a terminal: commands, Ctrl-C, and what the model is sent."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import pytest

import chateval.chat
from chateval.ask.generate import Sampling, generate

LIST = "/clear starts over, /help shows this line, /quit or Ctrl-D exits. Ctrl-C ends an answer."


class Terminal:
    """A process whose terminal is ours."""

    def __init__(self, *arguments: object) -> None:
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "chateval", *map(str, arguments)]
        ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
        # its own session, with this terminal: Ctrl-C goes to it alone
        login = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", login, *command]
        self.process = subprocess.Popen(command, **ends, env=environment, start_new_session=True)
        os.close(theirs)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def read(self, until: Callable[[str], Any]) -> str:
        """What is shown from here on, until it fulfils a condition or the process ends."""
        shown, deadline = "", time.monotonic() + 60
        while not until(shown):
            assert time.monotonic() < deadline, self.text + shown
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(self.ours, 1 << 16).decode(errors="replace")
                except OSError:  # Linux: the process has ended
                    break
        self.text += shown
        return shown

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture(scope="module")
def checkpoint(save_random, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("chat") / "checkpoints", num_positions=16384)


def ends_with_prompt(shown: str) -> bool:
    return shown.endswith("you ")


def test_a_chat_on_a_terminal(checkpoint) -> None:
    """Ctrl-C ends an answer, which would take minutes, and at the prompt the chat."""
    command = ["chat", "--checkpoint", checkpoint, "--max-new-tokens", 16000, "--temperature", 0]
    with closing(Terminal(*command)) as terminal:
        assert LIST in terminal.read(ends_with_prompt)
        terminal.type("/help\n")
        assert LIST in terminal.read(ends_with_prompt)
        terminal.type("/nothing\n")
        assert LIST in terminal.read(ends_with_prompt)
        for _ in range(2):
            terminal.type("Hello\n")
            terminal.read(lambda shown: len(shown) > 40)
            terminal.type("\x03")
            assert terminal.read(ends_with_prompt)
        terminal.type("/clear\n")
        assert "a new conversation" in terminal.read(ends_with_prompt)
        for _ in range(10):  # readline misses a signal that comes between its prompt and its wait for a key
            terminal.type("\x03")
            with suppress(subprocess.TimeoutExpired):
                terminal.process.wait(5)
                break
        end = terminal.read(lambda shown: False)
        assert terminal.process.wait(20) == 130 and end.endswith("\r\nError: interrupted\r\n")
        assert "Traceback" not in terminal.text


def test_ctrl_c_ends_a_command_that_says_something(checkpoint) -> None:
    with closing(Terminal("chat", "--checkpoint", checkpoint, "--max-new-tokens", 16000, "--say", "Hello")) as terminal:
        terminal.read(lambda shown: len(shown) > 60)
        terminal.type("\x03")
        end = terminal.read(lambda shown: False)
        assert terminal.process.wait(20) == 130
        assert end.endswith("\r\nError: interrupted\r\n") and "Traceback" not in end


def test_an_answer_that_was_ended_stays_in_the_conversation(random_subject, monkeypatch) -> None:
    special, prompts = random_subject.tokenizer.special_ids, []

    def interrupted(subject: Any, given: Any, on_token: Any) -> Any:
        prompts.append(given[0].tokens)
        count = iter(range(100))

        def show(*token: Any) -> bool:
            if next(count) == 4 and len(prompts) == 1:
                signal.raise_signal(signal.SIGINT)
            return on_token(*token)

        yield from generate(subject, given, show)

    monkeypatch.setattr(chateval.chat, "generate", interrupted)
    monkeypatch.setattr(chateval.chat, "_typed", lambda: iter(["Hi", "/help", "So?"]))
    before = signal.getsignal(signal.SIGINT)
    chateval.chat.converse(random_subject, Sampling(max_new_tokens=8), ())
    assert signal.getsignal(signal.SIGINT) is before
    first, second = prompts
    said = second[len(first) :]
    assert second[: len(first)] == first and said[5] == special["<|assistant_end|>"]
    assert said[6] == special["<|user_start|>"] and special["<|assistant_end|>"] not in said[:5]
