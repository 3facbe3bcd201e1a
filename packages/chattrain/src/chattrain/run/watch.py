"""When a rank dies the others must not wait for it: on nccl they would for 10 minutes, and not say why."""

import os
import select
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from chatdata.progress import say
from chattrain.errors import RankError

GRACE_S = 5.0  # between a rank's end and that of the others, where it does not stop them by itself


def open_peers() -> dict[int, int]:
    """Handles of the processes of this machine's other ranks → their ranks; none where the system has no pidfd."""
    here = ""
    if hasattr(os, "pidfd_open"):
        here = f"{Path('/proc/sys/kernel/random/boot_id').read_text()}{Path('/proc/self/ns/pid').readlink()}"
    found, peers = [("", 0)] * dist.get_world_size(), {}
    dist.all_gather_object(found, (here, os.getpid()))
    for rank, (machine, pid) in enumerate(found):
        if here and machine == here and rank != dist.get_rank():
            try:
                peers[os.pidfd_open(pid)] = rank
            except ProcessLookupError:
                raise RankError(_line([rank])) from None
    return peers


@contextmanager
def watched(peers: Mapping[int, int]) -> Iterator[None]:
    """What is inside ends within seconds when one of `peers` ends, with a RankError that names its rank.

    On gloo, what is inside fails by itself when a rank is gone, and gets the right words here. On nccl it hangs outside
    of Python: then a thread, which waits for the ends of processes, prints the line and ends this one. Ranks of other
    machines are not watched: torchrun ends them.
    """
    lost: list[int] = []
    found, done = threading.Event(), threading.Event()

    def watch() -> None:
        ends = select.poll()
        for handle in peers:
            ends.register(handle, select.POLLIN)
        while not done.is_set() and not lost:
            lost.extend(peers[handle] for handle, _ in ends.poll(200))
        found.set()
        if not done.wait(GRACE_S):
            say(f"Error: {_line(lost)}", error=True)
            os._exit(1)

    thread = threading.Thread(target=watch, name="ranks", daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if found.wait(GRACE_S):
            raise RankError(_line(lost)) from error
        raise
    finally:
        done.set()
        thread.join()
        for handle in peers:
            os.close(handle)


def _line(ranks: list[int]) -> str:
    names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, sorted(ranks)))}"
    return f"{names} ended before the others, so this one ends, too: see what it printed"
