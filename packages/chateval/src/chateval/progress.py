"""How far a scoring run is: a bar on a terminal, plain lines otherwise; the first rank speaks for all."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

PLAIN_LINES = 5  # off a terminal: a line for each fifth of a task


class Progress:
    """Counts answers of one task after the other. `shown` is false on other ranks and where nothing is to be said."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._bar: Any = None

    def begin(self, task: str, num_draws: int) -> None:
        """A task of `num_draws` answers on this rank; at most one at a time."""
        self._task, self._num_draws, self._done = task, num_draws, 0
        self._started, self._said = time.perf_counter(), 0
        if self.shown and sys.stderr.isatty():
            self._bar = click.progressbar(length=num_draws, label=task, file=sys.stderr, show_pos=True)
            self._bar.__enter__()

    def advance(self, num_draws: int) -> None:
        """`num_draws` answers more."""
        self._done += num_draws
        if self._bar is not None:
            self._bar.update(num_draws)
        elif self.shown and self._done * PLAIN_LINES // max(self._num_draws, 1) > self._said:
            self._said = self._done * PLAIN_LINES // self._num_draws
            rate = self._done / (time.perf_counter() - self._started)
            click.echo(f"{self._task}: {self._done:,} of {self._num_draws:,} · {rate:,.1f} a second", err=True)

    def end(self) -> None:
        """The bar is left standing, at its last state."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
