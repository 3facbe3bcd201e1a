"""The sandbox: every attack contained, every weaker isolation refused, nothing left behind."""

import dataclasses
import importlib.util
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chateval.errors import SandboxError
from chateval.sandbox import run_code as sandbox
from chateval.sandbox.run_code import Isolation, Limits, describe_isolation, find_isolation, run_code, verify
from chateval.sandbox.seccomp import AUDIT_ARCH, NUMBERS, build_filter

ROOT = Path(__file__).parents[3]
TESTS = "\ndef check(candidate):\n    assert candidate(2) == 4\ncheck(double)\n"
DOUBLE = "def double(x):\n    return 2 * x\n"

_spec = importlib.util.spec_from_file_location("sandbox_attacks", ROOT / "benchmarks" / "sandbox_attacks.py")
sandbox_attacks = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = sandbox_attacks
_spec.loader.exec_module(sandbox_attacks)
NOBODY = sandbox_attacks.Host(Path("file"), Path("folder"), 0, "name")

# Becomes another process image with a mark in its arguments, so that it can be found from outside.
MARKED = "os.execv('/python/bin/python3', ['python3', '-ISc', 'while True: pass', {mark!r}])"


@pytest.fixture(scope="module")
def host():
    with sandbox_attacks.open_host() as host:
        yield host


def marked(mark: str) -> list[str]:
    """Processes of this machine that carry the mark, leaving out the one that asks."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(process.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("program", "ending", "detail"),
    [
        (DOUBLE + TESTS, "passed", ""),
        ("", "passed", ""),
        ("assert __name__ == '__main__'\nassert input is not None", "passed", ""),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nassert A().x == 1", "passed", ""),
        ("print('é \\ud800')", "failed", "UnicodeEncodeError"),
        ("def double(x):\n    return None\n" + TESTS, "failed", "AssertionError"),
        (TESTS, "failed", "NameError: name 'double' is not defined"),
        ("def double(x):\n  return (" + TESTS, "failed", "SyntaxError: '(' was never closed"),
        ("def double(x):\n    return double(x)" + TESTS, "failed", "RecursionError: maximum recursion depth exceeded"),
        ("input()", "failed", "EOFError: EOF when reading a line"),
        ("raise ValueError('a\\x1b[31m' + 'b' * 1000)", "failed", "ValueError: a?[31mb"),
        ("x = '" + "x" * 2_000_000 + "'", "passed", ""),  # more than a socket holds at once
    ],
)
def test_endings(isolation, program, ending, detail):
    outcome = run_code(isolation, program)
    assert (outcome.ending, outcome.passed) == (ending, ending == "passed")
    assert outcome.detail.startswith(detail)
    assert len(outcome.detail) <= 200 and outcome.detail.isprintable()
    assert bool(detail) == bool(outcome.detail)


@pytest.mark.parametrize("name", [attack.name for attack in sandbox_attacks.attacks(NOBODY)])
def test_attack_is_contained(isolation, host, name):
    (attack,) = (attack for attack in sandbox_attacks.attacks(host) if attack.name == name)
    mounts, files = Path("/proc/self/mountinfo").read_text(), sorted(os.listdir(host.folder))
    outcome = run_code(isolation, attack.program, attack.timeout_s, attack.limits)
    print(f"{name}: {outcome.ending} after {outcome.duration_s:.2f} s, {outcome.detail}")
    assert (outcome.ending, outcome.passed) == (attack.ending, False)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert sorted(os.listdir(host.folder)) == files and host.secret_file.read_text() == "not for models\n"


@pytest.mark.parametrize(
    "leak",
    [
        "def run(hidden):\n    exec(SEARCH, {{}})\nrun({secret})",
        "import json\njson.hidden = {secret}\nexec(SEARCH, {{}})",
        "def keep():\n    hidden = {secret}\n    yield\nkept = keep()\nnext(kept)\nexec(SEARCH, {{}})",
        "import os\nos.environ['HIDDEN'] = {secret}\nexec(SEARCH, {{}})",
        "import sys\nsys.orig_argv.append({secret})\nexec(SEARCH, {{}})",
        "import os\nos.write(os.pipe()[1], {secret}.encode())\nexec(SEARCH, {{}})",
        "open('hidden', 'w').write({secret})\nexec(SEARCH, {{}})",
    ],
)
def test_the_search_finds_a_leaked_secret(isolation, monkeypatch, leak):
    """So the attack "reading the secret" fails because there is none to find, not for want of searching."""
    secret = "5ec7e700" * 4
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda num_bytes: secret)
    program = f"SEARCH = {sandbox_attacks.SEARCH!r}\n" + leak.format(
        secret=f"bytes.fromhex({secret.encode().hex()!r}).decode()"
    )
    assert run_code(isolation, program, limits=Limits(output_bytes=2**26)).ending == "passed"
    assert run_code(isolation, sandbox_attacks.SEARCH, limits=Limits(output_bytes=2**26)).ending == "failed"


@pytest.mark.parametrize("leave", ["", "raise ValueError", "while True: pass"])
def test_every_process_is_dead_on_return(isolation, leave):
    mark = f"chateval-{os.urandom(8).hex()}"
    daemon = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready, started = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.fork() or {MARKED.format(mark=mark)}
    os._exit(0)
os.close(started)
os.read(ready, 1)  # ends when the pipe is closed, by the exec
time.sleep(0.3)
"""
    seen = []
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_code, isolation, daemon + leave, 3.0 if "while" not in leave else 1.0)
        while not running.done():
            seen += marked(mark)
            time.sleep(0.05)
    left = marked(mark)
    assert running.result().ending == {"": "passed", "raise ValueError": "failed"}.get(leave, "timeout")
    assert seen, "the marked process never ran: the test shows nothing"
    assert left == []


def test_sandbox_ends_with_its_caller(isolation):
    mark = f"chateval-{os.urandom(8).hex()}"
    script = "import sys\nfrom chateval.sandbox.run_code import *\nrun_code(find_isolation(), sys.argv[1], 60.0)"
    program = "import os\n" + MARKED.format(mark=mark)
    caller = subprocess.Popen([sys.executable, "-c", script, program])
    deadline = time.monotonic() + 20
    while not marked(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marked(mark)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marked(mark) == []


def test_threads_do_not_share_limits(isolation):
    """A program that needs all its processes passes beside fork bombs."""
    needs_four = "import os, time\nfor _ in range(3):\n    os.fork() or (time.sleep(60), os._exit(0))\ntime.sleep(0.3)"
    bomb = next(attack for attack in sandbox_attacks.attacks(NOBODY) if attack.name == "fork bomb").program
    with ThreadPoolExecutor(8) as pool:
        bombs = [pool.submit(run_code, isolation, bomb, 1.5) for _ in range(3)]
        good = [pool.submit(run_code, isolation, program) for program in (needs_four, DOUBLE + TESTS) * 3]
    assert [outcome.result().ending for outcome in good] == ["passed"] * 6
    assert [outcome.result().ending for outcome in bombs] == ["timeout"] * 3


@pytest.mark.parametrize(
    ("limits", "program", "ending"),
    [
        (Limits(memory_bytes=100 * 2**20), "bytearray(120 * 2**20)", "memory"),
        (Limits(memory_bytes=200 * 2**20), "bytearray(120 * 2**20)", "passed"),
        (Limits(file_bytes=1000), "with open('a', 'wb') as f: f.write(bytes(1001))", "failed"),
        (Limits(file_bytes=1000), "with open('a', 'wb') as f: f.write(bytes(1000))", "passed"),
        (Limits(folder_bytes=2**20), "for n in 'ab':\n  with open(n, 'wb') as f: f.write(bytes(600_000))", "failed"),
        (Limits(num_processes=1), "import os\nos.fork()", "failed"),
        (Limits(num_processes=2), "import os\nos.fork() or os._exit(0)", "passed"),
        (Limits(output_bytes=1000), "print('x' * 1000)\nimport sys\nsys.stdout.flush()", "output"),
        (Limits(output_bytes=1000), "print('x' * 900)\nimport sys\nsys.stdout.flush()", "passed"),
    ],
)
def test_limits(isolation, limits, program, ending):
    assert run_code(isolation, program, limits=limits).ending == ending


def test_private_folder_is_empty_and_new_each_time(isolation):
    program = "import os\nassert os.listdir('.') == os.listdir('/tmp') == []\nopen('a', 'w').write('b')"
    assert [run_code(isolation, program).detail for _ in range(2)] == ["", ""]


def test_only_the_standard_library(isolation):
    program = (
        "import glob, sys\nsys.path += glob.glob('/*/lib/python*/*-packages')\nimport sqlite3, ctypes, decimal, json\n"
    )
    assert run_code(isolation, program).ending == "passed"
    assert run_code(isolation, program + "import pip").detail == "ModuleNotFoundError: No module named 'pip'"


def without(isolation: Isolation, argument: str) -> Isolation:
    return dataclasses.replace(isolation, command=tuple(a for a in isolation.command if a != argument))


def test_weaker_isolation_is_refused(isolation, tmp_path, monkeypatch):
    verify(isolation)
    with pytest.raises(SandboxError, match=r"weaker than promised: AssertionError: .*(network|interface)"):
        verify(without(isolation, "--net"))
    with pytest.raises(SandboxError, match="model-written code here: not process 1 of a new process namespace"):
        verify(without(isolation, "--pid"))
    (tmp_path / "readable").write_text("")
    with pytest.raises(SandboxError, match="weaker than promised: AssertionError: / shows"):
        verify(dataclasses.replace(isolation, binds=(*isolation.binds, (str(tmp_path), "/shown"))))
    rlimits = sandbox._rlimits(Limits(), isolation.as_root)
    for name, wrong in [("RLIMIT_NPROC", (100, 100)), ("RLIMIT_AS", (2**40, 2**40))]:
        # the first call is the probe's, for what to expect; the second sets the limits
        answers = iter([rlimits, rlimits | {name: wrong}])
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "_rlimits", lambda *_, answers=answers: next(answers))
            with pytest.raises(SandboxError, match=f"limit {name} is not in force"):
                verify(isolation)
    monkeypatch.setattr(sandbox, "build_filter", lambda machine: struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))
    with pytest.raises(SandboxError, match="the call unshare is not denied"):
        verify(isolation)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is exempt from the limit of processes")
def test_root_inside_a_user_namespace_is_refused(isolation):
    """It looks unprivileged there, but the kernel does not hold the real root to RLIMIT_NPROC."""
    with pytest.raises(SandboxError, match="more processes than the limit can be started"):
        verify(describe_isolation(isolation.command[0], as_root=False))


@pytest.mark.skipif(os.geteuid() != 0, reason="all other tests run as an ordinary user here")
def test_works_for_an_ordinary_user(isolation, tmp_path):
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or Path(python).resolve().is_relative_to(Path.home()):
        pytest.skip("no interpreter that ordinary users can reach")
    version = subprocess.check_output([python, "-c", "import sys; print(sys.version_info >= (3, 11))"], text=True)
    if version.strip() != "True":
        pytest.skip(f"{python} is older than 3.11")
    package = Path("/tmp") / f"chateval-{os.urandom(8).hex()}"
    try:
        shutil.copytree(Path(sandbox.__file__).parents[1], package / "chateval")
        package.chmod(0o755)
        script = f"import sys\nsys.path.insert(0, {str(package)!r})\nfrom chateval.sandbox.run_code import *\n"
        script += f"here = find_isolation()\nprint(run_code(here, {DOUBLE + TESTS!r}).ending)\n"
        # the limit is the program's own here too, for all that has the same user beside it
        forks = "import os\nos.fork() or os._exit(0)"
        script += f"print([run_code(here, {forks!r}, limits=Limits(num_processes=n)).ending for n in (1, 2)])"
        drop = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
        result = subprocess.run([*drop, python, "-BIc", script], capture_output=True, text=True, cwd="/")
    finally:
        shutil.rmtree(package)
    assert (result.stdout, result.stderr) == ("passed\n['failed', 'passed']\n", "")


def test_refusals_name_the_reason(isolation, tmp_path, monkeypatch):
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    message = (
        "model-written code here: unshare: unshare failed: Operation not permitted; run as root with CAP_SYS_ADMIN"
    )
    with pytest.raises(SandboxError, match=message):
        run_code(dataclasses.replace(isolation, command=(str(refusing),)), DOUBLE + TESTS)
    monkeypatch.setattr(sandbox.shutil, "which", lambda *a, **k: None)
    with pytest.raises(SandboxError, match="unshare is missing; apt-get install util-linux"):
        find_isolation()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="Linux namespaces only; this is darwin"):
        find_isolation()


def test_humaneval_share(isolation, shared):
    """Every 16th item: the canonical solution passes, a body that returns None fails."""
    import pyarrow.parquet as pq

    rows = pq.read_table(shared / "data/hub/openai/openai_humaneval/openai_humaneval").to_pylist()[::16]
    good = [f"{r['prompt']}{r['canonical_solution']}\n{r['test']}\ncheck({r['entry_point']})" for r in rows]
    bad = [f"{r['prompt']}    return None\n{r['test']}\ncheck({r['entry_point']})" for r in rows]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda program: run_code(isolation, program), good + bad))
    assert len(rows) == 11
    assert [o.ending for o in outcomes] == ["passed"] * 11 + ["failed"] * 11


def decide(program: bytes, architecture: int, number: int, argument: int) -> int:
    """What the filter answers: a reading of <linux/filter.h> apart from the module's."""
    data, value, at = {0: number, 4: architecture, 16: argument}, 0, 0
    while True:
        code, skip_if, skip_else, constant = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            value = data[constant]
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: value & constant != 0}[code]
            at += skip_if if holds else skip_else


@pytest.mark.parametrize("machine", list(AUDIT_ARCH))
def test_filter(machine):
    allow, kill, denied, missing = 0x7FFF0000, 0x80000000, 0x50000 + 1, 0x50000 + 38
    number = {name: numbers[list(AUDIT_ARCH).index(machine)] for name, numbers in NUMBERS.items()}

    def answer(name, argument=0, architecture=AUDIT_ARCH[machine]):
        return decide(build_filter(machine), architecture, number.get(name, name), argument)

    assert {n: answer(n) for n in number} == dict.fromkeys(number, denied) | {"clone": allow, "clone3": missing}
    assert [answer("socket", family) for family in range(45)] == [
        allow if f in (1, 2, 10) else denied for f in range(45)
    ]
    assert answer("clone", 0x01200011) == allow  # a fork, as glibc asks for it
    assert [answer("clone", 1 << bit) == denied for bit in range(32)] == [b in (17, *range(25, 31)) for b in range(32)]
    assert answer("clone", 0, architecture=0x40000003) == kill  # 32-bit calls
    ordinary = set(range(460)) - set(number.values())
    assert {answer(n) for n in ordinary} == {allow}
    assert {answer(n + 0x40000000) for n in range(460)} == {denied}
