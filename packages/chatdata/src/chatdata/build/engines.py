"""Who renders the units: this process, worker processes, or a Ray cluster. The files they write are the same."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from queue import SimpleQueue
from typing import Any, TypeVar

from chatdata.build.units import Rendered, Renderer, Unit, render_unit
from chatdata.errors import BuildError

# a worker starts in about a second: what one process renders in that time is not shared out
BYTES_PER_WORKER = 8 << 20
# by the fork server, once for all workers; what is not installed is passed over
PRELOADED = ["chatdata.build.units", "pyarrow.parquet", "tiktoken", "gigatoken", "fastokens"]
ENGINES = ("local", "ray")
OnRows = Callable[[Unit, int], None]  # some rows of a unit were rendered
OnUnit = Callable[[Unit, Rendered], None]  # a unit was finished

_T = TypeVar("_T")
_renderer: Renderer  # a worker process has one


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_early() -> None:
    """Start the server that workers are forked from: it imports for 0.8 s, beside which a large build is planned."""
    _fork_server()
    forkserver.ensure_running()


def _fork_server() -> BaseContext:
    # a fork of this process would take over its threads' locks; the fork server has none and imports only once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def render_units(
    renderer: Renderer,
    units: list[Unit],
    engine: str,
    workers: int,
    on_rows: OnRows,
    on_unit: OnUnit,
    prepare: Callable[[], _T],
) -> _T:
    """Render `units`, in any order, and return what `prepare` did, which this process calls while others start.

    What was finished when an error or an interruption comes is kept.
    Raises the error of the first unit that cannot be rendered, BuildError if a worker was killed.
    """
    renderer.folder.mkdir(parents=True, exist_ok=True)
    workers = min(workers, len(units), max(1, sum(unit.num_bytes for unit in units) // BYTES_PER_WORKER))
    if engine == "ray" and units:
        return _render_on_ray(renderer, units, on_rows, on_unit, prepare)
    if workers > 1:
        return _render_in_processes(renderer, units, workers, on_rows, on_unit, prepare)
    prepared = prepare()
    for unit in units:
        on_unit(unit, _render_here(renderer, unit, on_rows, lambda: None))
    return prepared


def _render_in_processes(
    renderer: Renderer, units: list[Unit], workers: int, on_rows: OnRows, on_unit: OnUnit, prepare: Callable[[], _T]
) -> _T:
    """This process is one of the workers, once it has prepared. A thread hands units to each of the others."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers - 1, mp_context=_fork_server(), initializer=_start_worker, initargs=(renderer,))
    waiting = deque(sorted(units, key=lambda unit: -unit.num_bytes))  # the longest first; taking one is atomic
    finished: SimpleQueue[tuple[Unit, Rendered] | BaseException] = SimpleQueue()

    def next_unit() -> Unit | None:
        try:
            return waiting.popleft()
        except IndexError:
            return None

    def keep_busy() -> None:
        try:
            while unit := next_unit():
                finished.put((unit, pool.submit(_render_in_worker, unit).result()))
        except BaseException as error:
            waiting.clear()
            finished.put(error)

    def collect() -> None:
        while not finished.empty():
            item = finished.get()
            if isinstance(item, BaseException):
                raise item
            on_unit(*item)
            on_rows(item[0], item[0].num_rows)

    threads = [threading.Thread(target=keep_busy, daemon=True) for _ in range(workers - 1)]
    try:
        for thread in threads:
            thread.start()
        prepared = prepare()
        while unit := next_unit():
            on_unit(unit, _render_here(renderer, unit, on_rows, collect))
        for thread in threads:
            while thread.is_alive():
                thread.join(0.05)
                collect()
        collect()
        return prepared
    except BaseException as error:
        waiting.clear()
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise BuildError(
                "a worker was killed (out of memory?); what was rendered is kept: run the same command again, "
                "with fewer --workers if memory is short"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _render_here(renderer: Renderer, unit: Unit, on_rows: OnRows, meanwhile: Callable[[], None]) -> Rendered:
    def progress(num_rows: int) -> None:
        on_rows(unit, num_rows)
        meanwhile()

    return render_unit(renderer, unit, progress)


def _render_on_ray(
    renderer: Renderer, units: list[Unit], on_rows: OnRows, on_unit: OnUnit, prepare: Callable[[], _T]
) -> _T:
    """The same on a Ray cluster (RAY_ADDRESS), or on one started here. Ray runs a unit again if its worker is lost.

    Sources and cache must lie under the same paths on all machines.
    """
    # under `uv run` Ray would upload this folder and have its workers run from the copy (0: read when it is imported)
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise BuildError('--engine ray needs Ray: pip install "chatdata[ray]"') from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        shared = [ray.put(renderer)]  # in a list it stays a reference: read once by a worker, not with each unit
        remote = ray.remote(num_cpus=1, max_retries=3)(_render_remotely)
        waiting = {remote.remote(shared, unit): unit for unit in sorted(units, key=lambda unit: -unit.num_bytes)}
        prepared = prepare()
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            unit = waiting.pop(done)
            rendered = ray.get(done)
            if not rendered.path.is_file():
                raise BuildError(
                    f"{rendered.path}: a Ray worker wrote it, but it is not here; CHATDATA_CACHE must name a folder "
                    "that all machines share"
                )
            on_unit(unit, rendered)
            on_rows(unit, unit.num_rows)
        return prepared
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise BuildError(f"Ray gave up on a unit: {reason}; what was rendered is kept") from None
    finally:
        if started_here:
            ray.shutdown()


@cache
def _renderer_of(shared: Any) -> Renderer:
    import ray

    return ray.get(shared)


def _render_remotely(shared: list[Any], unit: Unit) -> Rendered:
    return render_unit(_renderer_of(shared[0]), unit)


def _start_worker(renderer: Renderer) -> None:
    global _renderer
    _renderer = renderer
    gc.freeze()  # as the command does: what it starts with stays
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one stops the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose build was killed -9 would wait for its next unit for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _render_in_worker(unit: Unit) -> Rendered:
    return render_unit(_renderer, unit)
