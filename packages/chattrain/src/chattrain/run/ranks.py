"""Ranks: one process each under torchrun, DDP with gloo on CPU and nccl on GPU; a single process without torchrun."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from chattrain.errors import DeviceError


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `num_ranks`, on `device`."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, on every rank."""
        if self.num_ranks > 1:
            values = values.to(self.device, copy=True)  # summed in place
            dist.all_reduce(values)
        return values.cpu()

    def wait(self) -> None:
        if self.num_ranks > 1:
            dist.barrier()


def find_device(wanted: str | None) -> torch.device:
    """The device of this name ("cpu", "cuda", "mps"), by default cuda if available. Raises DeviceError."""
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in available:
        raise DeviceError(f"device {name!r}: must be one of {', '.join(available)}")
    if not available[name]:
        raise DeviceError(f"device {name!r} is not available: torch {torch.__version__} does not find one")
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


@contextmanager
def join_ranks(device: str | None, wait: timedelta | None = None) -> Iterator[Ranks]:
    """Join the process group of torchrun's environment, if there is one, and leave it at the end.

    wait: how long a rank waits for others before it fails, by default torch's (10 minutes on nccl).
    """
    found = find_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        yield Ranks(0, 1, found)
        return
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo", timeout=wait)
    try:
        yield Ranks(dist.get_rank(), num_ranks, found)
    finally:
        dist.destroy_process_group()


SAME_SIGNAL_S = 2  # one Ctrl-C often comes twice, from the terminal and forwarded by a launcher


class StopRequest:
    """Set by SIGTERM or SIGINT: the run saves and ends after its step. A second signal ends it immediately."""

    def __init__(self) -> None:
        self.asked, self._asked_at = False, 0.0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and time.monotonic() - self._asked_at > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.asked:
            self._asked_at = time.monotonic()
        self.asked = True

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them."""
        return bool(ranks.sum(torch.tensor(int(self.asked))).item())
