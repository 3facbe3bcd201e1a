"""Who renders the missing units: this process, worker processes, or a Ray cluster. All write the same files."""

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_some
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from queue import SimpleQueue
from typing import Any

from chatdata.build.units import Rendered, Renderer, Unit, render_unit
from chatdata.errors import BuildError

# a worker takes about a second to start: what one process renders in that time is not worth another one
BYTES_PER_WORKER = 8 << 20
# imported by the fork server, once for all workers; what is not installed is skipped
PRELOADED = ["chatdata.build.units", "pyarrow.parquet", "tiktoken", "gigatoken", "fastokens"]
ENGINES = ("local", "ray")


OnRows = Callable[[Unit, int], None]  # some rows of a unit were rendered
Render = Callable[[OnRows], list[Rendered]]

_renderer: Renderer  # of a worker process


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_early() -> None:
    """Start the server that workers are forked from: its imports take 0.8 s, in which a large build is planned."""
    _fork_server()
    forkserver.ensure_running()


def _fork_server() -> BaseContext:
    # a fork of this process would inherit its threads' locks; the fork server has no threads and imports only once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_workers(renderer: Renderer, units: list[Unit], engine: str, workers: int) -> AbstractContextManager[Render]:
    """Inside, other processes already render `units`; call what this yields to join in until all are done.

    Units are rendered in any order. Those finished before an error or an interruption stay in the cache.
    Raises the error of the first unit that cannot be rendered, BuildError if a worker was killed.
    """
    workers = min(workers, len(units), max(1, sum(unit.num_bytes for unit in units) // BYTES_PER_WORKER))
    if engine == "ray" and units:
        return _start_ray(renderer, units)
    if workers > 1:
        return _start_processes(renderer, units, workers)
    return nullcontext(partial(_render_here, renderer, deque(units)))


def _render_here(renderer: Renderer, waiting: deque[Unit], on_rows: OnRows) -> list[Rendered]:
    return [render_unit(renderer, unit, partial(on_rows, unit)) for unit in _taken(waiting)]


def _taken(waiting: deque[Unit]) -> Iterator[Unit]:
    with suppress(IndexError):
        while True:
            yield waiting.popleft()  # atomic: several threads take units


@contextmanager
def _start_processes(renderer: Renderer, units: list[Unit], workers: int) -> Iterator[Render]:
    """A thread hands units to each worker process. This process is one of the workers, once it joins in."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers - 1, mp_context=_fork_server(), initializer=_start_worker, initargs=(renderer,))
    threads = ThreadPoolExecutor(workers - 1)
    waiting = deque(sorted(units, key=lambda unit: -unit.num_bytes))  # the longest first
    finished: SimpleQueue[tuple[Unit, Rendered]] = SimpleQueue()

    def keep_busy() -> None:
        for unit in _taken(waiting):
            finished.put((unit, pool.submit(_render_in_worker, unit).result()))

    def render(on_rows: OnRows) -> list[Rendered]:
        by_others = []

        def collect(own: Unit | None = None, num_rows: int = 0) -> None:
            if own:
                on_rows(own, num_rows)
            for thread in busy:
                if thread.done():
                    thread.result()  # raises the error of its worker
            while not finished.empty():
                unit, result = finished.get()
                by_others.append(result)
                on_rows(unit, unit.num_rows)

        rendered = _render_here(renderer, waiting, collect)
        while wait_for_some(busy, 0.05).not_done:
            collect()
        collect()
        return rendered + by_others

    try:
        busy = [threads.submit(keep_busy) for _ in range(workers - 1)]
        yield render
    except BaseException as error:
        waiting.clear()
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            advice = "run the same command again, with fewer --workers if memory is short"
            raise BuildError(f"a worker was killed (out of memory?); what was rendered is kept: {advice}") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        threads.shutdown()


@contextmanager
def _start_ray(renderer: Renderer, units: list[Unit]) -> Iterator[Render]:
    """A Ray cluster (RAY_ADDRESS), or one started here. Ray renders a unit again if its worker is lost.

    Sources and cache must have the same paths on all machines.
    """
    # under `uv run` Ray would upload this folder and have its workers run from the copy (0: read when it is imported)
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise BuildError("--engine ray needs Ray: `uv sync --extra ray` installs it") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    def render(on_rows: OnRows) -> list[Rendered]:
        finished = []
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            unit = waiting.pop(done)
            rendered = ray.get(done)
            if not rendered.path.is_file():
                advice = "CHATDATA_CACHE must name a folder that all machines share"
                raise BuildError(f"{rendered.path}: a Ray worker wrote it, but it is not here; {advice}")
            finished.append(rendered)
            on_rows(unit, unit.num_rows)
        return finished

    try:
        shared = [ray.put(renderer)]  # in a list it stays a reference: read once by a worker, not with each unit
        remote = ray.remote(num_cpus=1, max_retries=3)(_render_remotely)
        waiting = {remote.remote(shared, unit): unit for unit in sorted(units, key=lambda unit: -unit.num_bytes)}
        yield render
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
    """A worker whose build was killed by SIGKILL would wait for its next unit for ever."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _render_in_worker(unit: Unit) -> Rendered:
    return render_unit(_renderer, unit)
