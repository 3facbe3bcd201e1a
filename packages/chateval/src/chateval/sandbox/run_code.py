"""Run model-written Python in isolation: call `find_isolation` once, then `run_code` for every program.

    caller            needs no privilege (root works too); nothing is written to the host's disk
      unshare         new mount, process, network, IPC, host name and cgroup namespaces; also a user namespace for an
        |             ordinary user, or a root without its own user ids
        process 1     build_sandbox.py: builds the root folder, drops every privilege and waits. Closing its standard
          |           input ends it, and then the kernel kills every other process of the namespace
          interpreter a fresh python -I -S -B: only the standard library, one private folder (/tmp), no /proc, rlimits,
                      the filter of seccomp.py; runs the program

As root, every run gets its own unused user id: RLIMIT_NPROC counts per user id, so parallel runs as `nobody` would use
up each other's processes. There is no weaker fallback.

Proof of success. A program, a solution followed by its tests, has passed if a secret, 32 random characters per run,
appears in its output. While the program runs the secret is not in the interpreter: not in an argument, the environment,
a file, a stack frame, an object or a pipe. The interpreter holds a random ticket, hands it in once the program has run
to its end, and only then receives the secret, prints it and exits through os._exit. So exiting early in any way,
raising, printing "passed" or searching for the secret all count as not passed.

Limits. Solution and tests share one interpreter, so a solution passes if it tampers with what the tests use (replaces
`check`, patches builtins, overloads ==) or hands in the ticket from its caller's frame. Both take intent to cheat this
scorer; HumanEval's tests are not written to run in another process. Kernel flaws are not covered; time and processor
model are visible. Memory is limited per process: num_processes * memory_bytes + folder_bytes in all.
"""

import contextlib
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from chateval.errors import SandboxError
from chateval.sandbox.seccomp import AUDIT_ARCH, build_filter

Ending = Literal["passed", "failed", "timeout", "cpu", "memory", "output", "killed"]

UNPRIVILEGED = 65534  # nobody, in the user namespace of an ordinary caller
UNUSED_UIDS = range(1_879_048_192, 2_147_483_647)  # unused according to systemd, docs/UIDS-GIDS.md
START_S, STOP_S = 30.0, 10.0  # starting and stopping take about 0.1 s
MAX_DETAIL = 200  # characters
BUILD_SANDBOX = Path(__file__).with_name("build_sandbox.py")
PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Isolation:
    """How to run code in isolation on this machine; find_isolation makes one and checks that it works."""

    command: tuple[str, ...]  # builds the sandbox; takes its settings as JSON
    as_root: bool  # each run gets one of UNUSED_UIDS; if not, UNPRIVILEGED in a user namespace
    binds: tuple[tuple[str, str], ...]  # (file or folder of the host, its read-only path inside)
    links: tuple[tuple[str, str], ...]  # (target, path) of symbolic links
    covered: tuple[str, ...]  # folders hidden by an empty one: installed packages


class Limits(NamedTuple):
    """What one program may use. Wall-clock time is run_code's timeout_s."""

    memory_bytes: int = 512 * 2**20  # address space per process
    cpu_s: int = 20  # per process
    num_processes: int = 4  # processes and threads at a time, including the interpreter
    file_bytes: int = 16 * 2**20  # per file
    folder_bytes: int = 32 * 2**20  # all files in the private folder
    output_bytes: int = 2**20  # standard output and standard error together


class Outcome(NamedTuple):
    """How a program ended.

    passed: it printed the secret. failed: it ended without. timeout, cpu, output: it was stopped at that limit.
    memory: it ended with MemoryError. killed: a signal ended it.
    """

    passed: bool
    ending: Ending
    detail: str  # last line of standard error, printable, at most 200 characters; empty if passed
    duration_s: float  # from start to the death of the last process


def find_isolation() -> Isolation:
    """Find out how to isolate code here and prove it by running a probe. Takes about 0.2 s.

    Raises SandboxError with the reason if there is no isolation here, or if any part is weaker than promised.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"model-written code runs in Linux namespaces only; this is {sys.platform}")
    machine = os.uname().machine
    if machine not in AUDIT_ARCH:
        raise SandboxError(f"no system call filter for {machine}, only for {', '.join(AUDIT_ARCH)}")
    unshare = shutil.which("unshare", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if unshare is None:
        raise SandboxError("the program unshare is missing; apt-get install util-linux")
    isolation = describe_isolation(unshare, os.geteuid() == 0 and _has_own_uids())
    verify(isolation)
    return isolation


def describe_isolation(unshare: str, as_root: bool) -> Isolation:
    """The sandbox of this machine, without trying it. unshare: path of the program."""
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child=KILL"]
    if not as_root:
        namespaces += ["--user", f"--map-user={UNPRIVILEGED}", f"--map-group={UNPRIVILEGED}", "--keep-caps"]
    binds, links = [(executable, "/python/bin/python3")], []
    binds += [(os.path.realpath(f"{sys.base_prefix}/{name}"), f"/python/{name}") for name in {"lib", sys.platlibdir}]
    for path in map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64")):
        if path.is_symlink():
            links.append((str(path.readlink()), str(path)))
        elif path.is_dir():
            binds.append((str(path), str(path)))
    binds += [(path, path) for path in ("/etc/ld.so.cache", "/dev/null", "/dev/urandom") if Path(path).exists()]
    version = f"python{sysconfig.get_python_version()}"
    packages = f"lib/{version}/site-packages", f"lib/{version}/dist-packages", "lib/python3/dist-packages"
    covered = [f"{prefix}/{folder}" for prefix in ("/python", "/usr") for folder in packages]
    command = (unshare, *namespaces, executable, "-I", "-S", "-B", str(BUILD_SANDBOX))
    return Isolation(command, as_root, tuple(binds), tuple(links), tuple(covered))


def verify(isolation: Isolation) -> None:
    """Run the probe. Raises SandboxError naming the first thing that is weaker than promised."""
    limits = Limits()
    known = str(BUILD_SANDBOX.parent), _rlimits(limits, isolation.as_root), limits.folder_bytes
    program = f"HOST_FOLDER, RLIMITS, FOLDER_BYTES = {known!r}\n" + PROBE.read_text()
    outcome = run_code(isolation, program, START_S, limits)
    if not outcome.passed:
        raise SandboxError(f"the isolation here is weaker than promised: {outcome.detail or outcome.ending}")


def run_code(isolation: Isolation, program: str, timeout_s: float = 10.0, limits: Limits | None = None) -> Outcome:
    """Run a program, a solution followed by its tests, and report how it ended. Thread-safe.

    When it returns or raises, every process it started is dead and nothing is left on the host.
    program: Python source, run as __main__ in a fresh interpreter with empty standard input.
    Raises SandboxError if the sandbox cannot be built, never because of what the program does.
    """
    limits = limits or Limits()
    started = time.monotonic()
    channel, inner = socket.socketpair()
    with channel, inner:
        settings = {name: getattr(isolation, name) for name in ("binds", "links", "covered")}
        settings |= {"channel": inner.fileno(), "filter": build_filter(os.uname().machine).hex()}
        settings["uid"] = secrets.choice(UNUSED_UIDS) if isolation.as_root else UNPRIVILEGED
        settings |= {"folder_bytes": limits.folder_bytes, "rlimits": _rlimits(limits, isolation.as_root)}
        command = [*isolation.command, json.dumps(settings)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        apart = {"env": {}, "cwd": "/", "start_new_session": True}
        process = subprocess.Popen(command, bufsize=0, pass_fds=[inner.fileno()], **pipes, **apart)
        inner.close()
        with process:
            try:
                _wait_until_ready(process, channel)
                ending, errors = _follow(process, channel, program, timeout_s, limits.output_bytes)
            finally:
                _stop(process)
    details = {"timeout": f"not done after {timeout_s:g} s", "output": f"more than {limits.output_bytes} bytes"}
    ending, detail = (ending, details.get(ending, "")) if ending else _ending_of(process.returncode, errors)
    return Outcome(ending == "passed", ending, detail, time.monotonic() - started)


def _wait_until_ready(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    """Read process 1's first line. Raises SandboxError if it is not `ready` or missing."""
    channel.settimeout(START_S)
    try:
        line = channel.recv(4096).decode(errors="replace").strip()
    except TimeoutError:
        line = f"not ready after {START_S:g} s"
    if line != "ready":
        _stop(process)
        reason = line or _last_line(process.stderr.read()) or f"unshare ended with code {process.returncode}"
        remedy = "run as root with CAP_SYS_ADMIN, or where ordinary users may create user namespaces"
        raise SandboxError(f"cannot build the sandbox for model-written code here: {reason}; {remedy}")


def _follow(
    process: subprocess.Popen[bytes], channel: socket.socket, program: str, timeout_s: float, output_bytes: int
) -> tuple[Ending | None, bytes]:
    """Hand over the program, read its output, exchange the ticket for the secret.

    Returns the ending, or None and standard error: then these and the exit code decide.
    """
    ticket, secret = secrets.token_bytes(16), secrets.token_hex(16).encode()
    source = program.encode(errors="surrogatepass")
    deadline = time.monotonic() + timeout_s
    unread, received = {process.stdout, process.stderr}, {process.stdout: b"", process.stderr: b"", channel: b""}
    with selectors.DefaultSelector() as selector:
        for file in received:
            selector.register(file, selectors.EVENT_READ)
        channel.settimeout(timeout_s)
        try:
            channel.sendall(ticket + len(source).to_bytes(8, "big") + source)
        except TimeoutError:
            return "timeout", b""
        except OSError:  # the interpreter did not start; its exit code and standard error say why
            selector.unregister(channel)
        channel.settimeout(0)
        while unread:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return "timeout", b""
            for key, _ in selector.select(remaining_s):
                file, part = key.fileobj, b""
                with contextlib.suppress(OSError):  # the interpreter is gone
                    part = os.read(key.fd, 16 if file is channel else 65536)
                    received[file] += part
                    if file is channel and secrets.compare_digest(received[file], ticket):
                        channel.sendall(secret)
                # one try for a ticket, because the code can write here too
                if not part or (file is channel and len(received[file]) >= len(ticket)):
                    selector.unregister(file)
                    unread.discard(file)
                if len(received[process.stdout]) + len(received[process.stderr]) > output_bytes:
                    return "output", b""
    return "passed" if secret in received[process.stdout] else None, received[process.stderr]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End process 1 and with it every process of the sandbox; unshare ends last, so all are dead then."""
    process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:  # never seen: process 1 only waits for this
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending_of(exit_code: int, errors: bytes) -> tuple[Ending, str]:
    """The ending of a program that did not print the secret. exit_code: 128 + n for signal n."""
    line = _last_line(errors)
    if exit_code == 128 + signal.SIGXCPU:
        return "cpu", "the limit of processor time"
    if exit_code > 128:
        return "killed", f"signal {exit_code - 128}"
    if line.startswith("MemoryError"):
        return "memory", line
    return "failed", line or f"it exited with code {exit_code} before its tests ended"


def _last_line(text: bytes) -> str:
    lines = text[-4096:].decode(errors="replace").strip().splitlines()
    return "".join(c if c.isprintable() else "?" for c in lines[-1][:MAX_DETAIL]) if lines else ""


def _rlimits(limits: Limits, as_root: bool) -> dict[str, tuple[int, int]]:
    """Soft and hard limits by their names in `resource`."""
    same_user = 1 if as_root else 2  # process 1; in a user namespace also unshare, which waits outside
    values = {"RLIMIT_AS": limits.memory_bytes, "RLIMIT_NPROC": limits.num_processes + same_user}
    values |= {"RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_NOFILE": 64}
    values |= dict.fromkeys(("RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"), 0)
    rlimits = {name: (value, value) for name, value in values.items()}
    return {**rlimits, "RLIMIT_CPU": (math.ceil(limits.cpu_s), math.ceil(limits.cpu_s) + 1)}  # SIGXCPU, then SIGKILL


def _has_own_uids() -> bool:
    """Whether UNUSED_UIDS exist here; they do not for the root of a container with 65,536 ids."""
    ranges = [map(int, line.split()) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= UNUSED_UIDS[0] and UNUSED_UIDS[-1] < first + count for first, _, count in ranges)
