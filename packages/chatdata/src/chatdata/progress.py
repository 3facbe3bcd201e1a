"""What commands print besides tables: lines, JSON, and the progress of long work. No text in them drives a terminal.

Progress is the same for builds, training and scoring: bars on a terminal, plain lines elsewhere.

with shown_progress(quiet=not ranks.is_first) as progress:
    progress("mid", start, num_steps, "steps")  # starts the clock
    ...
    progress("mid", step + 1, num_steps, "steps", f"loss {loss:.4f}")

mid: 50 of 100 steps, 3.4/s, 0:00:15 left, loss 1.2300
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

from chatdata.errors import printable

MAX_LINE = 4_000  # characters of a line; a key of a damaged file can have a million


def say(line: str, error: bool = False) -> None:
    """Print one line, on standard error if `error`. Newlines in it are shown as `\\n`."""
    line = printable(line, keep="")
    cut = f"{line[:MAX_LINE]}… ({len(line):,} characters)" if len(line) > MAX_LINE else line
    print(cut, file=sys.stderr if error else sys.stdout, flush=True)


def say_json(value: Any) -> None:
    """Print a value as one line of JSON in ASCII: every other character is escaped, and DEL. NaN becomes null."""
    text = json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))
    print(text.replace("\x7f", "\\u007f"), flush=True)


class Progress(Protocol):
    """Called whenever more of the work `name` is done; the first call, or one with 0 done, starts its clock.

    done, total: counted in `unit` ("rows", "tokens", "bytes", "steps", "answers"). note: shown at the end of the line.
    part: the work is part of other work that is shown, so only its last line is printed.
    """

    def __call__(self, name: str, done: int, total: int, unit: str, note: str = "", *, part: bool = False) -> None: ...


def no_progress(name: str, done: int, total: int, unit: str, note: str = "", *, part: bool = False) -> None:
    """Show nothing."""


@contextmanager
def shown_progress(quiet: bool = False) -> Iterator[Progress]:
    """A Progress that writes to stderr: bars on a terminal, plain lines elsewhere, nothing if `quiet`."""
    if quiet:
        yield no_progress
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        started, printed = dict[str, tuple[float, int]](), dict[str, int]()

        def show(name: str, done: int, total: int, unit: str, note: str = "", *, part: bool = False) -> None:
            text, tenths = _status(started, name, done, total, unit, note), 10 * done // max(total, 1)
            due = tenths != printed.get(name) and (done >= total or (tenths > 0 and not part))
            if due:
                say(f"{name}: {text}", error=True)
            if due or not done:  # work that is done again is shown again
                printed[name] = tenths

        yield show  # a line for every tenth of the work


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress
    from rich.console import Console

    text = partial(progress.TextColumn, markup=False)
    columns = (text("{task.description}"), progress.BarColumn(), text("{task.fields[status]}"))
    with progress.Progress(*columns, console=Console(stderr=True)) as shown:
        started, bars = dict[str, tuple[float, int]](), dict[str, progress.TaskID]()

        def show(name: str, done: int, total: int, unit: str, note: str = "", *, part: bool = False) -> None:
            status = _status(started, name, done, total, unit, note)
            if name not in bars:
                bars[name] = shown.add_task(printable(name, keep=""), total=total, status=status)
            shown.update(bars[name], completed=done, status=status)

        yield show


def _status(started: dict[str, tuple[float, int]], name: str, done: int, total: int, unit: str, note: str) -> str:
    """How far work is, as text; with speed and time left once a second has passed since its first call.

    started: name → when its clock was started, and what was done by then.
    """
    now = time.monotonic()
    if not done or name not in started:
        started[name] = now, done
    since, before = started[name]
    parts = [f"{done:,} of {total:,} {unit}"]
    if now - since >= 1 and done > before:
        rate = (done - before) / (now - since)
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        if done < total:
            parts.append(f"{timedelta(seconds=round((total - done) / rate))} left")
    return ", ".join([*parts, note] if note else parts)
