"""What the sandbox must prove before it is used: a program of assertions, run inside it like model-written code.

It tests behaviour, not names: it allocates, forks, connects, opens and kills. The first thing weaker than promised ends
it, and its message becomes the reason of the refusal. Nothing imports it; `run_code.verify` defines the three names.
"""

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
import time
from pathlib import Path

# ruff: noqa: F821 - `verify` assigns in front of the program HOST_FOLDER, which exists outside, RLIMITS (name → soft and
# hard limit) and FOLDER_BYTES, the size of the private folder

libc = ctypes.CDLL(None, use_errno=True)


def error_of(call, *arguments):
    """The errno that a call fails with, 0 if it succeeds."""
    try:
        call(*arguments)
    except MemoryError:
        return errno.ENOMEM
    except OSError as error:
        return error.errno
    return 0


# who
assert 0 not in os.getresuid() + os.getresgid(), "it runs as root"
header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, capabilities) == 0 and not any(capabilities), "it has capabilities"
assert libc.prctl(39, 0, 0, 0, 0) == 1, "no_new_privs is not set"
assert libc.prctl(21, 0, 0, 0, 0) == 2, "no system call filter is in force"
assert not os.environ, f"its environment has {list(os.environ)}"

# system calls that would get around the rest
for name, arguments in [("unshare", (0x10000000,)), ("shmget", (0, 4096, 0o1600)), ("msgget", (0, 0o1600))]:
    assert getattr(libc, name)(*arguments) == -1 and ctypes.get_errno() == errno.EPERM, f"the call {name} is not denied"
assert error_of(os.memfd_create, "probe") == errno.EPERM, "the call memfd_create is not denied"

# files
ROOT = {"/": "dev etc lib lib64 python tmp usr", "/etc": "ld.so.cache", "/usr": "lib lib64"}
for folder, expected in {**ROOT, "/dev": "null urandom", "/tmp": "", "/python": "bin lib lib64"}.items():
    beyond = set(os.listdir(folder)) - set(expected.split())
    assert not beyond, f"{folder} shows {sorted(beyond)[:5]}"
for path in ["/root", "/home", "/proc", "/sys", "/etc/shadow", HOST_FOLDER]:
    assert not Path(path).exists(), f"{path} of the host is visible"
for folder in ["/", "/usr/lib", "/python/lib", "/dev"]:
    assert error_of(Path(folder, "probe").touch) in (errno.EROFS, errno.EACCES), f"{folder} can be written to"

# processes
assert os.getpid() < 10 and os.getppid() == 1, "it has no process namespace"
# -1: everything visible except itself and process 1
assert error_of(os.kill, -1, 0) == errno.ESRCH, "it sees other processes"

# network
assert os.uname().nodename == "sandbox", "it shares the host's name"
for family in {*range(3, 46)} - {socket.AF_INET6}:
    assert error_of(socket.socket, family, socket.SOCK_DGRAM), f"sockets of family {family} can be opened"
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
    for index in range(1, 33):
        try:
            name = socket.if_indextoname(index)
        except OSError:
            continue
        flags = struct.unpack("16xH", fcntl.ioctl(plain, 0x8913, struct.pack("16sH14x", name.encode(), 0))[:18])[0]
        assert name == "lo" or not flags & 1, f"the network interface {name} is up"


def connect(family, address):
    socket.socket(family, socket.SOCK_STREAM).connect((address, 80))


for family, address in [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "2001:db8::1")]:
    number = error_of(connect, family, address)
    unreachable = number in (errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    assert unreachable, f"a network can be reached: connecting to {address} ended with error {number}"

# limits
for name, limit in RLIMITS.items():
    assert resource.getrlimit(getattr(resource, name)) == tuple(limit), f"the limit {name} is not in force"
most_bytes, most_file_bytes, most_processes = (RLIMITS[f"RLIMIT_{name}"][0] for name in ("AS", "FSIZE", "NPROC"))
assert error_of(bytearray, most_bytes) == errno.ENOMEM, "more memory than the limit can be allocated"
Path("/tmp/large").touch()
too_large = error_of(os.truncate, "/tmp/large", most_file_bytes + 1)
assert too_large == errno.EFBIG, "a file larger than the limit can be written"
folder = os.statvfs("/tmp")
assert folder.f_blocks * folder.f_frsize <= FOLDER_BYTES, "the private folder is larger than its limit"
children = []


def start_children():
    while len(children) <= most_processes:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)


assert error_of(start_children) == errno.EAGAIN, "more processes than the limit can be started"
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
