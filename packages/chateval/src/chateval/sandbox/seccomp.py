"""The seccomp filter: which system calls the sandbox denies, as bytes, installed before model-written code starts.

Namespaces, an unprivileged user and rlimits leave a few ways around them. Each rule closes one:

    unshare, clone and clone3 with a new namespace   in its own user namespace the code would have capabilities, and
                                                     with them tmpfs mounts that no limit counts
    memfd_create, memfd_secret, shmget, msgget,      memory that outlives its mapping, so RLIMIT_AS does not limit it
    semget
    socket, except unix, IPv4 and IPv6               a network namespace does not hide vsock, so a virtual machine's
                                                     guest could still talk to its host
    io_uring_setup                                   opens sockets without the call `socket`
    keyctl, add_key, request_key                     keyrings have no namespace: the code would hold the caller's
    bpf, perf_event_open, userfaultfd                a large attack surface with no use here

clone3 returns "not implemented": its flags are behind a pointer that no filter can follow; glibc falls back to clone.
Numbers: <asm/unistd_64.h> and <asm-generic/unistd.h>; program format: <linux/filter.h>, <linux/seccomp.h>.
"""

import errno
import socket
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# (number on x86_64, on aarch64), as in AUDIT_ARCH. These three are denied depending on their arguments, the rest always
SPECIAL = {"clone": (56, 220), "clone3": (435, 435), "socket": (41, 198)}
DENIED = {"unshare": (272, 97), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194)}
DENIED |= {"msgget": (68, 186), "semget": (64, 190), "io_uring_setup": (425, 425), "keyctl": (250, 219)}
DENIED |= {"add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280), "perf_event_open": (298, 241)}
DENIED |= {"userfaultfd": (323, 282)}
NUMBERS = SPECIAL | DENIED
NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
X32 = 0x40000000  # set in the numbers of x86_64's x32 calls, which would pass every rule below

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data; the argument's low half
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def build_filter(machine: str) -> bytes:
    """The filter as struct sock_filter[], 8 bytes per instruction. machine: a key of AUDIT_ARCH, as in os.uname."""
    number = {name: numbers[list(AUDIT_ARCH).index(machine)] for name, numbers in NUMBERS.items()}
    deny = _instruction(RETURN, ERRNO | errno.EPERM)
    allow = _instruction(RETURN, ALLOW)
    program = [_instruction(LOAD, ARCHITECTURE), _instruction(EQUAL, AUDIT_ARCH[machine], 1, 0)]
    program += [_instruction(RETURN, KILL), _instruction(LOAD, NUMBER), _instruction(AT_LEAST, X32, 0, 1), deny]
    program += [_instruction(EQUAL, number["clone3"], 0, 1), _instruction(RETURN, ERRNO | errno.ENOSYS)]
    for name in DENIED:
        program += [_instruction(EQUAL, number[name], 0, 1), deny]
    program += [_instruction(EQUAL, number["clone"], 0, 4), _instruction(LOAD, ARGUMENT_0)]
    program += [_instruction(ANY_BIT, NEW_NAMESPACE, 0, 1), deny, allow]
    program += [_instruction(EQUAL, number["socket"], 0, 5), _instruction(LOAD, ARGUMENT_0)]
    for family, skip in ((socket.AF_UNIX, 3), (socket.AF_INET, 2), (socket.AF_INET6, 1)):
        program.append(_instruction(EQUAL, family, skip, 0))
    program += [deny, allow]
    return b"".join(program)


def _instruction(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if, skip_else, value)
