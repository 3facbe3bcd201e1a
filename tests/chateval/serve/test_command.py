"""`chateval serve` as a process: its address, Ctrl-C, and what it refuses in one line."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import openai


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "chateval", "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_served_and_stopped_in_the_middle_of_an_answer(save_random, tmp_path) -> None:
    save_random(tmp_path / "chat" / "checkpoints", num_positions=100_000)
    process = start("--checkpoint", tmp_path / "chat", "--port", 0)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and f" {tmp_path / 'chat'} " in line, process.stderr.read()
        client = openai.OpenAI(base_url=line.split(": ")[0] + "/v1", api_key="any", max_retries=0)
        answer = client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "a"}], temperature=0, stream=True
        )
        for _ in range(5):
            next(iter(answer))
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - started < 3
        assert process.stdout.read() + process.stderr.read() == ""
    finally:
        process.kill()


def test_what_is_refused(chateval, tmp_path, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = chateval("serve", "--checkpoint", tmp_path, "--port", port)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith("Error: address already in use") and str(port) in result.stderr
    for host in ("0.0.0.0", "192.0.2.1"):
        result = chateval("serve", "--checkpoint", tmp_path, "--host", host)
        assert result.returncode == 1 and "set a --token (or CHATEVAL_TOKEN)" in result.stderr
        assert result.stderr.count("\n") == 1
    result = chateval("serve", "--checkpoint", tmp_path / "none", "--port", 0)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = chateval("serve", "--checkpoint", tmp_path)
    assert (result.returncode, result.stderr) == (
        1,
        "Error: serve needs starlette and uvicorn: `uv sync --extra serve` installs them\n",
    )
