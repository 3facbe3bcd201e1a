"""Builds the sandbox from inside: `unshare` runs this file in new namespaces; nothing imports it.

It is process 1 of its namespace and the only trusted process there. It turns an empty tmpfs into the root folder, with
read-only parts of the host, gives up every privilege, starts a fresh interpreter (runner.py) for the code, and waits.
It ends when that interpreter ends, or when the caller closes the lifeline (also by dying); the kernel then kills every
other process of the namespace, whatever signals they ignore and wherever they forked to.

It knows no secret. Everything it needs is JSON in its only argument. Under -S, it has only the standard library.
"""

import ctypes
import json
import os
import resource
import select
import socket
import struct
import sys
from pathlib import Path

RUNNER = Path(__file__).with_name("runner.py").read_text()  # read here: from the new root folder it cannot be
PYTHON = "/python/bin/python3"
NEW_ROOT = "/proc"  # the root folder while it is built: none of the host's folders that are bound is in it

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MNT_DETACH = 2, 4, 4096, 16384, 2  # <sys/mount.h>
READ_ONLY, NO_SUID, NO_DEV, RECURSIVE = 1, 2, 4, 0x8000  # MOUNT_ATTR_*, AT_RECURSIVE
MOUNT_SETATTR = 442  # the same number on every architecture; Linux 5.12
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 22, 24, 38, 47
SECCOMP_MODE_FILTER, PR_CAP_AMBIENT_CLEAR_ALL, CAPABILITY_VERSION_3 = 2, 4, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    settings = json.loads(sys.argv[1])
    with socket.socket(fileno=settings["channel"]) as channel:
        try:
            build_root(settings)
            give_up_privileges(settings["uid"], bytes.fromhex(settings["filter"]))
        except OSError as error:
            channel.sendall(f"{error}\n".encode())
            os._exit(1)
        channel.sendall(b"ready\n")  # no untrusted code exists yet that could send this
        child = os.fork()
        if child == 0:
            start_interpreter(settings, channel)
    os._exit(wait_for(child))


def build_root(settings: dict) -> None:
    """Build a new root folder and leave the host's for good. Raises OSError naming the mount that failed."""
    if os.getpid() != 1:  # started by hand, it would take apart the machine's mounts
        raise OSError("not process 1 of a new process namespace")
    Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out, the kernel kills this first
    socket.sethostname("sandbox")
    os.umask(0o022)
    # Only this mount namespace sees the tmpfs that everything is built on: the host needs no cleanup.
    mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for target, path in settings["links"]:
        Path(f"{NEW_ROOT}{path}").symlink_to(target)
    for source, path in settings["binds"]:
        bind(source, f"{NEW_ROOT}{path}")
    for path in settings["covered"]:
        if Path(f"{NEW_ROOT}{path}").is_dir():
            mount("tmpfs", f"{NEW_ROOT}{path}", "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=555")
    Path(f"{NEW_ROOT}/tmp").mkdir()
    # nr_inodes: empty files do not count towards the size, but take kernel memory
    options = "size={folder_bytes},nr_inodes=4096,uid={uid},gid={uid},mode=700".format_map(settings)
    mount("tmpfs", f"{NEW_ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    restrict(NEW_ROOT, READ_ONLY | NO_SUID | NO_DEV, 0)
    os.chdir(NEW_ROOT)
    check(libc.syscall(ctypes.c_long(PIVOT_ROOT[os.uname().machine]), b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/tmp")


def bind(source: str, target: str) -> None:
    """Bind a file, device or folder of the host, with all mounts below it, read-only."""
    if Path(source).is_dir():
        Path(target).mkdir(parents=True)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).touch()
    mount(source, target, None, MS_BIND | MS_REC, None)
    is_device = target.startswith(f"{NEW_ROOT}/dev/")
    restrict(target, READ_ONLY | NO_SUID | (0 if is_device else NO_DEV), RECURSIVE)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    texts = [text and text.encode() for text in (source, target, kind, options)]
    check(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount of {source} on {target}")


def restrict(path: str, attributes: int, flags: int) -> None:
    """mount_setattr(2): only adds flags, so it never clears one that a user namespace must keep."""
    change = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    number, size = ctypes.c_long(MOUNT_SETATTR), ctypes.c_size_t(ctypes.sizeof(change))
    check(libc.syscall(number, -100, path.encode(), flags, change, size), f"mount_setattr of {path}")


def give_up_privileges(uid: int, program: bytes) -> None:
    """Drop every capability for good, become an unprivileged user, install the system call filter. Raises OSError."""
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # until the kernel does not know the number
        capability += 1
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "clearing ambient capabilities")
    if os.getuid() != uid:  # as root; in a user namespace it already is that user
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, none), "capset")
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")  # the code must not look into process 1
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    instructions = ctypes.create_string_buffer(program)
    filter_program = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_program, 0, 0), "PR_SET_SECCOMP")


def start_interpreter(settings: dict, channel: socket.socket) -> None:
    """Become the interpreter that runs the code, with only the two outputs and the channel open."""
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    channel.set_inheritable(True)
    for name, value in settings["rlimits"].items():
        resource.setrlimit(getattr(resource, name), tuple(value))
    # A shared libpython would be looked up under the host's prefix; runner.py clears the environment again.
    command = [PYTHON, "-I", "-S", "-B", "-c", RUNNER, str(channel.fileno())]
    os.execve(PYTHON, command, {"LD_LIBRARY_PATH": "/python/lib"})


def wait_for(child: int) -> int:
    """Wait for the child or the end of the lifeline (standard input). Returns an exit code; 128 + n is signal n."""
    ended = os.pidfd_open(child)
    select.select([ended, sys.stdin.fileno()], [], [])
    pid, status = os.waitpid(child, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status) if pid else 1
    return code if code >= 0 else 128 - code


def check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
