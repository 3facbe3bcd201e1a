"""A build on a Ray cluster of several nodes that share only the sources and the cache: the bytes of a local build.

    uv run python benchmarks/ray_nodes.py --shared ../shared/data --nodes 2 --limit 20000

Each node is a `ray start` of its own on this machine: one CPU, an empty working folder and a temporary folder of its
own. Nothing but `$CHATDATA_CACHE` is shared between them. The build runs with `--engine ray` and RAY_ADDRESS; then the
same build runs locally with an empty cache. Printed: the CPU-seconds that each node's workers took, so that one sees
that all took part; then whether every file but report.json is equal by SHA-256 (exit code 1 if not).
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from build import build_command
from build_growth import processes_of_session
from build_sides import add_inputs

from chatdata.disk import file_sha256

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def start_node(number: int, folder: Path, cache: Path, port: int) -> subprocess.Popen[bytes]:
    """A node in a session of its own: with its processes it can be measured, and stopped."""
    home = folder / f"node-{number}"
    (home / "work").mkdir(parents=True)
    role = (
        ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
        if number == 0
        else [f"--address=127.0.0.1:{port}"]
    )
    command = [str(Path(sys.executable).parent / "ray"), "start", *role, "--num-cpus=1", "--block"]
    command += [f"--temp-dir={home / 'ray'}", "--object-store-memory=200000000", "--disable-usage-stats"]
    environment = {**os.environ, "CHATDATA_CACHE": str(cache), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with (home / "log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=home / "work", env=environment, stdout=log, stderr=log, start_new_session=True
        )


def wait_for_nodes(address: str, nodes: int, patience_s: float) -> None:
    """Ask until so many nodes are there, each time in a new process: a driver that failed once stays broken."""
    program = (
        "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
    )
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        environment = {**os.environ, "RAY_ADDRESS": address}
        asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        if asked.returncode == 0 and int(asked.stdout.split()[-1]) >= nodes:
            return
        time.sleep(1)
    sys.exit(f"fewer than {nodes} nodes after {patience_s:.0f} s: {asked.stderr.strip().splitlines()[-1:]}")


def worker_ticks(session: int) -> dict[int, int]:
    """User and system time of each of a node's workers so far: processes that Ray names after the task."""
    ticks = {}
    for pid in processes_of_session(session):
        with suppress(OSError):  # it has just ended
            stat = Path(f"/proc/{pid}/stat").read_text()
            if "(ray::_render" in stat:
                ticks[pid] = sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return ticks


def build(command: list[str], environment: dict[str, str], sessions: list[int]) -> tuple[float, list[float]]:
    """Wall seconds of a build, and CPU-seconds of each node's workers: read while it runs, as they end with it."""
    ticks: list[dict[int, int]] = [{} for _ in sessions]
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for known, session in zip(ticks, sessions, strict=True):
                known |= worker_ticks(session)
            time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - started, [sum(known.values()) / TICKS_PER_SECOND for known in ticks]


def files_of(build: Path) -> dict[str, str]:
    files = (path for path in sorted(build.rglob("*")) if path.is_file() and path.name != "report.json")
    return {str(path.relative_to(build)): file_sha256(path) for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--port", type=int, default=46_379)
    parser.add_argument("--patience-s", type=float, default=90)
    options = parser.parse_args()
    nodes: list[subprocess.Popen[bytes]] = []
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # not the one in the home folder
    with tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as name:
        folder, address = Path(name), f"127.0.0.1:{options.port}"
        builds = {}
        try:
            for number in range(options.nodes):
                nodes.append(start_node(number, folder, folder / "shared", options.port))
                wait_for_nodes(address, number + 1, options.patience_s)
            for engine in ("ray", "local"):
                cache = folder / ("shared" if engine == "ray" else "alone")
                environment = {**os.environ, "CHATDATA_CACHE": str(cache), "RAY_ADDRESS": address}
                command = build_command(options, folder / engine, "--engine", engine, "--workers", "1")
                wall_s, shares = build(command, environment, [node.pid for node in nodes])
                listed = ", ".join(f"{cpu_s:.1f}" for cpu_s in shares)
                print(f"{engine:6} {wall_s:6.1f} s; CPU-seconds of the nodes' workers: {listed}", flush=True)
                builds[engine] = files_of(folder / engine)
        finally:
            for node in nodes[::-1]:
                node.send_signal(signal.SIGTERM)
                node.wait(30)
                for pid in processes_of_session(node.pid):
                    os.kill(pid, signal.SIGKILL)
    differ = [file for file in builds["ray"] | builds["local"] if builds["ray"].get(file) != builds["local"].get(file)]
    print(
        f"{len(builds['local'])} files: {'all equal by SHA-256' if not differ else 'different: ' + ', '.join(differ)}"
    )
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
