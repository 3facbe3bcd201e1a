"""Attacks on the sandbox for model-written code, as a Markdown table: how each ended and how long it took.

uv run python benchmarks/sandbox_attacks.py

Every attack is a program that passes if it succeeds, so any ending but "passed" means that it was contained. The tests
run the same attacks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chateval.sandbox.run_code import Limits, find_isolation, run_code


@dataclass(frozen=True)
class Attack:
    name: str
    ending: str  # expected
    program: str
    timeout_s: float = 10.0
    limits: Limits | None = None


@dataclass(frozen=True)
class Host:
    """Parts of the host that the attacks try to reach."""

    secret_file: Path  # readable by everyone
    folder: Path  # writable by everyone
    port: int  # with a listener on 127.0.0.1
    abstract_name: str  # an abstract unix socket, also with a listener


# Prints everything within reach that could hold the secret; on standard output the secret would count.
SEARCH = """
import gc, os, sys
texts = {*sys.argv, *sys.orig_argv, *os.environ.values()}
def look_into(*objects):
    texts.update(text for text in gc.get_referents(*objects) if type(text) in (str, bytes))
frame = sys._getframe()
while frame:
    look_into(frame, dict(frame.f_locals), frame.f_globals, frame.f_code.co_consts)
    frame = frame.f_back
look_into(*map(vars, list(sys.modules.values())))
look_into(*gc.get_objects())
for file in range(3, 64):
    try:
        os.set_blocking(file, False)
        texts.add(os.read(file, 4096))
        os.write(file, b"please")
        texts.add(os.read(file, 4096))
    except OSError:
        pass
for start in ["/proc/self", "/proc/1", "/tmp", "/dev/shm", "/var", "/run"]:
    for folder, _, names in os.walk(start):
        for name in names:
            try:
                texts.add(open(os.path.join(folder, name), "rb").read(4096))
            except OSError:
                pass
for text in texts:
    text = text if type(text) is bytes else text.encode(errors="replace")
    sys.stdout.buffer.write(text[:4096] + b" ")
sys.exit(0)
"""

IGNORE_SIGNALS = """
import os, signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
if os.fork() == 0:
    os.setsid()
    os.fork()
while True:
    pass
"""

EACH_FAILS = """
def reached(attempt, *arguments):
    try:
        attempt(*arguments)
        return True
    except Exception:
        return False
"""

TESTS = "\ndef check(candidate):\n    assert candidate(2) == 4\ncheck(double)\n"


def attacks(host: Host) -> list[Attack]:
    much_output = Limits(output_bytes=2**26)
    return [
        Attack(
            "fork bomb", "timeout", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", timeout_s=1.0
        ),
        Attack(
            "thread bomb", "failed", "import _thread, time\nwhile True: _thread.start_new_thread(time.sleep, (60,))"
        ),
        Attack("memory bomb", "memory", "x = []\nwhile True: x.append(bytearray(2**24))"),
        Attack("memory outside the address space", "failed", "import os\nwhile True: os.memfd_create('x')"),
        Attack("endless loop", "timeout", "while True: pass", timeout_s=1.0),
        Attack("endless loop, 1 s of processor time", "cpu", "while True: pass", limits=Limits(cpu_s=1)),
        Attack("ignoring SIGTERM and all others", "timeout", IGNORE_SIGNALS, timeout_s=1.0),
        Attack("sys.exit(0) before the tests", "failed", "import sys\ndef double(x): sys.exit(0)" + TESTS),
        Attack("os._exit(0) before the tests", "failed", "import os\ndef double(x): os._exit(0)" + TESTS),
        Attack("killing itself", "killed", "import os\ndef double(x): os.kill(os.getpid(), 9)" + TESTS),
        Attack("a crash of the interpreter", "killed", "import ctypes\ndef double(x): ctypes.string_at(0)" + TESTS),
        Attack(
            'printing "passed" and leaving from atexit',
            "failed",
            "import atexit, os\natexit.register(os._exit, 0)\nprint('passed', flush=True)\nraise SystemExit(0)" + TESTS,
        ),
        Attack("closing every file", "failed", "import os\nos.closerange(0, 4096)"),
        Attack("reading the secret", "failed", SEARCH, limits=much_output),
        Attack(
            "writing outside",
            "failed",
            f"{EACH_FAILS}\n"
            f"folders = ['/', '/usr/lib', '/python/lib', '/dev', '/etc', '/proc/sys', {str(host.folder)!r}]\n"
            "assert any(reached(open, folder + '/attack', 'w') for folder in folders)",
        ),
        Attack(
            "a file of 1 GiB",
            "failed",
            "with open('large', 'wb') as f:\n  while f.tell() < 2**30: f.write(bytes(2**20))",
        ),
        Attack(
            "many large files", "failed", "for n in range(64):\n  with open(str(n), 'wb') as f: f.write(bytes(2**23))"
        ),
        Attack("a million empty files", "failed", "for n in range(10**6): open(str(n), 'w').close()"),
        Attack(
            "opening a socket",
            "failed",
            f"import socket\n{EACH_FAILS}\n"
            f"targets = [('127.0.0.1', {host.port}), ('10.0.2.2', 80), ('1.1.1.1', 53)]\n"
            f"ends = [reached(socket.create_connection, target, 2) for target in targets]\n"
            f"ends.append(reached(socket.socket(socket.AF_UNIX).connect, chr(0) + {host.abstract_name!r}))\n"
            "ends.append(reached(socket.socket, socket.AF_VSOCK, socket.SOCK_STREAM))\n"
            "assert any(ends)",
        ),
        Attack("huge output", "output", "while True: print('x' * 2**16)"),
        Attack("huge output on standard error", "output", "import os\nwhile True: os.write(2, bytes(2**16))"),
        Attack("reading the environment", "failed", "import os\nassert os.environ"),
        Attack(
            "reading the host's files",
            "failed",
            f"{EACH_FAILS}\nfiles = ['/etc/passwd', '/etc/shadow', '/proc/1/environ', '/proc/self/environ', "
            f"'/sys/kernel/notes', {str(Path.home() / '.bashrc')!r}, {str(host.secret_file)!r}, {__file__!r}]\n"
            "assert any(reached(open, file) for file in files)",
        ),
        Attack(
            "killing every process",  # -1 means everything visible except itself and process 1
            "failed",
            "import os\nos.kill(-1, 9)",
        ),
        Attack(
            "a user namespace of its own", "failed", "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0"
        ),
    ]


@contextlib.contextmanager
def open_host() -> Iterator[Host]:
    """On the host: a file, a folder and two listening sockets, open to everyone."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as listener, socket.socket(socket.AF_UNIX) as unix:
        folder = Path(name)
        folder.chmod(0o777)
        secret_file = folder / "secret.txt"
        secret_file.write_text("not for models\n")
        secret_file.chmod(0o666)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        abstract_name = f"chateval-{os.getpid()}"
        unix.bind(f"\0{abstract_name}")
        unix.listen()
        yield Host(secret_file, folder, listener.getsockname()[1], abstract_name)


def main() -> None:
    isolation = find_isolation()
    print("| attack | ending | seconds | last words |\n|---|---|---:|---|")
    with open_host() as host:
        for attack in attacks(host):
            outcome = run_code(isolation, attack.program, attack.timeout_s, attack.limits)
            ending = outcome.ending if outcome.ending == attack.ending else f"**{outcome.ending}**, not {attack.ending}"
            print(f"| {attack.name} | {ending} | {outcome.duration_s:.2f} | {outcome.detail} |", flush=True)


if __name__ == "__main__":
    main()
