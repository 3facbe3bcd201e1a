"""A build handed on through a Hub server, an S3 server and a folder: killed pushes, damage, two readers, times.

    uv run --with "moto[server]" --with s3fs python benchmarks/sharing.py --work /tmp/sharing
    uv run --with "moto[server]" --with s3fs python benchmarks/sharing.py --work /tmp/sharing --times out/large

For each store, with demo-sft:

    push      killed (SIGKILL) once the server has three files, then run again: what is sent the second time
    pull      on a machine with an empty cache: the same build_id, every file but report.json equal by SHA-256
    train     10 steps from the address, with an empty cache: losses and batches of a run from the folder
    reproduce from the address: equal to the byte
    damage    one byte of the tokens flipped on the server: a reader with an empty cache refuses it by name
    two       readers that fill one empty cache at once: both succeed, one build is in it

`--times BUILD` pushes a build of your own and times opening it by address, for the first and the second time, next to
copying the same files. Exit code 1 if anything is not as it should be.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chatdata.disk import file_sha256
from strategies.hub_server import HubServer

TRAIN = "--init random:2x64x2 --seq-len 768 --device-batch-size 4 --steps 10 --device cpu"
OPEN = "import sys, chatdata; print(chatdata.open_build(sys.argv[1]).manifest['build_id'])"


@dataclass
class Store:
    address: str
    environment: dict[str, str]
    taken: Callable[[], dict[str, str]]  # files the server has taken, and when
    flip: Callable[[str], None]  # change a byte of a file there


@contextmanager
def hub() -> Iterator[Store]:
    with HubServer() as server:
        server._http.handle_error = lambda *_: None  # a reader was killed
        times: dict[str, str] = {}
        server.on_put = lambda: times.setdefault(f"file {len(times)}", f"{time.time()}")  # new files alone are sent
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "secret"}

        def flip(name: str) -> None:
            files = server.commits["me/build"][server.refs["me/build"]["main"]]
            files[name] = changed(files[name])

        yield Store("hf://me/build", environment, lambda: dict(times), flip)


@contextmanager
def s3() -> Iterator[Store]:
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}
    os.environ |= environment
    client = boto3.client("s3")
    client.create_bucket(Bucket="builds")

    def flip(name: str) -> None:
        content = client.get_object(Bucket="builds", Key=f"mid/{name}")["Body"].read()
        client.put_object(Bucket="builds", Key=f"mid/{name}", Body=changed(content))

    def taken() -> dict[str, str]:
        return {
            one["Key"]: str(one["LastModified"]) for one in client.list_objects_v2(Bucket="builds").get("Contents", [])
        }

    try:
        yield Store("s3://builds/mid", environment, taken, flip)
    finally:
        server.stop()


@contextmanager
def disk() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="store-") as name:
        root = Path(name) / "mid"

        def taken() -> dict[str, str]:
            files = [path for path in root.rglob("*") if path.is_file()]
            return {path.relative_to(root).as_posix(): str(path.stat().st_mtime_ns) for path in files}

        def flip(file: str) -> None:
            (root / file).write_bytes(changed((root / file).read_bytes()))

        yield Store(f"file://{root}", {}, taken, flip)


def changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


class Machine:
    """Runs commands with a cache of its own."""

    def __init__(self, store: Store, folder: Path) -> None:
        folder.mkdir(parents=True)
        caches = {"CHATDATA_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **store.environment, **caches}

    def start(self, *command: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, *command], env=self.environment, text=True, **pipes)

    def run(self, *command: str, fails: bool = False) -> str:
        """What a command prints; on standard error if it is expected to fail."""
        process = self.start(*command)
        out, err = process.communicate()
        if (process.returncode != 0) != fails:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{err}")
        return err if fails else out

    def chatdata(self, *words: str, fails: bool = False) -> str:
        return self.run("-c", "from chatdata.cli import main; main()", *words, fails=fails)


def files_of(build: Path) -> dict[str, str]:
    files = (path for path in sorted(build.rglob("*")) if path.is_file() and path.name != "report.json")
    return {str(path.relative_to(build)): file_sha256(path) for path in files}


def train(machine: Machine, data: str, out: Path) -> list[tuple[int, float, str]]:
    machine.run("-m", "chattrain", "run", "--data", data, "--out", str(out), *TRAIN.split())
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["batch"]) for line in lines if "batch" in line]


def check(store: Store, folder: Path) -> None:
    author, number = Machine(store, folder / "author"), iter(range(100))

    def new_machine() -> Machine:
        return Machine(store, folder / f"machine-{next(number)}")

    def say(what: str, is_right: bool, text: str) -> None:
        print(f"{store.address}  {what:9} {text}", flush=True)
        if not is_right:
            sys.exit(1)

    build = folder / "sft"
    author.chatdata("build", "--stage", "sft", "--demo", "--out", str(build))
    build_id = json.loads((build / "manifest.json").read_text())["build_id"]
    num_files = len(files_of(build)) + 1

    pushing = author.start("-c", "from chatdata.cli import main; main()", "push", str(build), store.address)
    while pushing.poll() is None and len(store.taken()) < 3:
        time.sleep(0.002)
    pushing.send_signal(signal.SIGKILL)
    pushing.communicate()
    time.sleep(1.5)  # a time on S3 is in whole seconds
    before = store.taken()
    refused = new_machine().chatdata("stats", store.address, fails=True)
    author.chatdata("push", str(build), store.address)
    sent = sum(before.get(name) != when for name, when in store.taken().items())
    text = f"killed with {len(before)} data files there, which none can open; again: {sent} files sent"
    say("push", pushing.returncode == -9 and "no manifest.json" in refused, text)

    machine = new_machine()
    machine.chatdata("pull", store.address, "--out", str(folder / "pulled"))
    is_equal = files_of(folder / "pulled") == files_of(build)
    say("pull", is_equal, f"build {build_id[:12]}, {num_files} files, equal: {is_equal}")

    steps = train(author, str(build), folder / "run"), train(new_machine(), store.address, folder / "run-address")
    say("train", steps[0] == steps[1], f"{len(steps[0])} steps, losses and batches equal: {steps[0] == steps[1]}")

    told = new_machine().chatdata("reproduce", store.address, "--out", str(folder / "again"))
    say("reproduce", "equal to the byte" in told, told.strip().splitlines()[-1])

    machine = new_machine()
    readers = [machine.start("-c", OPEN, store.address) for _ in range(2)]
    found = [reader.communicate()[0].strip() for reader in readers]
    kept = [path.name for path in (Path(machine.environment["CHATDATA_CACHE"]) / "builds").iterdir() if path.is_dir()]
    kept = [name for name in kept if not name.startswith(".")]
    say(
        "two", found == [build_id] * 2 and kept == [build_id], f"both opened {build_id[:12]}; in the cache: {len(kept)}"
    )

    store.flip("train/tokens-00000.npy")
    refused = new_machine().chatdata("stats", store.address, fails=True)
    say("damage", "tokens-00000.npy" in refused, refused.strip().splitlines()[-1])


def measure(store: Store, folder: Path, build: Path) -> None:
    author, reader = Machine(store, folder / "author"), Machine(store, folder / "reader")
    author.chatdata("push", str(build), store.address)
    started = time.perf_counter()
    shutil.copytree(build, folder / "copy")
    os.sync()
    times = {"copy of the files": time.perf_counter() - started}
    for name, command in (
        ("first opening", ("-c", OPEN, store.address)),
        ("second opening", ("-c", OPEN, store.address)),
        ("the folder itself", ("-c", OPEN, str(build))),
    ):
        started = time.perf_counter()
        reader.run(*command)
        times[name] = time.perf_counter() - started
    num_bytes = sum(path.stat().st_size for path in build.rglob("*"))
    print(f"{store.address}, {num_bytes / 1e9:.2f} GB: " + ", ".join(f"{k} {v:.2f} s" for k, v in times.items()))


STORES: dict[str, Any] = {"hub": hub, "s3": s3, "file": disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where folders are made (default: the system's)")
    parser.add_argument("--times", type=Path, metavar="BUILD", help="time opening this build instead")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    options = parser.parse_args()
    for name in options.stores:
        with (
            tempfile.TemporaryDirectory(prefix=f"sharing-{name}-", dir=options.work) as folder,
            STORES[name]() as store,
        ):
            if options.times:
                measure(store, Path(folder), options.times.resolve())
            else:
                check(store, Path(folder))


if __name__ == "__main__":
    main()
