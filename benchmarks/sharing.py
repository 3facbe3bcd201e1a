"""A large build by address: a Hub and an S3 server on this machine, times, kill -9, a flipped byte.

    uv run --with "moto[s3,server]" --with s3fs benchmarks/sharing.py --mb 1000

The build is a demo build with its documents repeated until it has this size. Wall seconds, one run each.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "strategies"))
from hub_server import HubServer

from chatdata.disk import write_json
from chatdata.shards.manifest import build_id_of, read_manifest


def chatdata(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    code = "import sys; from chatdata.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def last_line(*arguments: object, code: int = 0, **environment: str) -> str:
    process = chatdata(*arguments, **environment)
    out, errors = process.communicate()
    assert process.returncode == code, errors
    return (errors if code else out).splitlines()[-1]


def seconds_of(call: str, *arguments: object, **environment: str) -> float:
    """Of a call in a process of its own, without the imports that opening a folder takes."""
    code = "import sys, time, chatdata.shards.address, huggingface_hub; from chatdata.cli import main; "
    code += f"start = time.perf_counter(); {call}; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


OPEN = "from chatdata import open_build; open_build(sys.argv[1])"
PUSH = "sys.argv[1:1] = ['push']; exec('try: main()\\nexcept SystemExit as end: assert not end.code')"


def enlarge(build: Path, megabytes: int) -> None:
    """Repeat the documents of a build's train split, in place."""
    manifest = read_manifest(build)
    split = manifest["splits"]["train"]
    shard = split["shards"][0]
    times = -(-megabytes * 10**6 // sum(record["bytes"] for record in shard["files"].values()))
    paths = {kind: build / "train" / record["file"] for kind, record in shard["files"].items()}
    for kind in ("tokens", "mask"):
        np.save(paths[kind], np.tile(np.load(paths[kind]), times))
    lengths = np.tile(np.diff(np.load(paths["offsets"])), times)
    np.save(paths["offsets"], np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"))
    index = pa.concat_tables([pq.read_table(paths["index"])] * times)
    doc = pa.array(np.arange(len(index)), index.schema.field("doc").type)
    pq.write_table(
        index.set_column(index.schema.get_field_index("doc"), index.schema.field("doc"), doc), paths["index"]
    )
    for counts in (split, shard, *split["entries"]):
        for key in {"documents", "tokens", "supervised", "rows"} & counts.keys():
            counts[key] *= times
    for kind, path in paths.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shard["files"][kind] |= {"bytes": path.stat().st_size, "sha256": digest}
    write_json(build / "manifest.json", manifest | {"build_id": build_id_of(manifest)})


def killed(arguments: list[object], reached: Callable[[], bool], **environment: str) -> None:
    """Start a command, and kill -9 it when `reached`."""
    process = chatdata(*arguments, **environment)
    while not reached() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was faster"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=100)
    megabytes = parser.parse_args().mb
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    work, s3 = Path(tempfile.mkdtemp(prefix="sharing-")), ThreadedMotoServer(port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1"}
    os.environ |= {"HF_HOME": str(work / "hf"), "CHATDATA_CACHE": str(work / "cache")}
    build = work / "build"
    last_line("build", "--stage", "mid", "--demo", "--out", build)
    enlarge(build, megabytes)
    files = [file for file in build.rglob("*") if file.is_file()]
    print(f"{sum(file.stat().st_size for file in files) / 1e6:,.0f} MB in {len(files)} files")
    started = time.perf_counter()
    shutil.copytree(build, work / "copy")
    show(time.perf_counter() - started, "copy the files")
    show(seconds_of(OPEN, build), "open the folder")
    import s3fs

    store = s3fs.S3FileSystem(use_listings_cache=False)
    store.mkdir("bucket")
    damaged = "train/mask-00000.npy"
    try:
        with HubServer() as hub:
            os.environ["HF_ENDPOINT"] = hub.url

            def damage_hub() -> None:
                old = hub.commits["me/chats"][hub.refs["me/chats"]["main"]]
                hub.push("me/chats", old | {damaged: old[damaged][:-1] + bytes([old[damaged][-1] ^ 1])})

            def damage_s3() -> None:
                old = store.cat_file(f"bucket/a/mid/{damaged}")
                store.pipe_file(f"bucket/a/mid/{damaged}", old[:-1] + bytes([old[-1] ^ 1]))

            check("hf://me/chats", build, work / "cache-hub", lambda: len(hub.lfs), damage_hub)
            check("s3://bucket/a/mid", build, work / "cache-s3", lambda: len(store.find("bucket/a")), damage_s3)
        s3.stop()
        show(None, f"S3 is down: {last_line('stats', 's3://bucket/other', code=1)}")
        show(seconds_of(OPEN, "s3://bucket/a/mid", CHATDATA_CACHE=str(work / "cache-s3")), "S3 is down, fetched before")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check(address: str, build: Path, folder: Path, num_there: Callable[[], int], damage: Callable[[], None]) -> None:
    """Everything with one store. num_there: counts the files that it has; damage: flips a byte of one of them."""
    cache, builds = {"CHATDATA_CACHE": str(folder)}, folder / "builds"
    killed(["push", build, address], lambda: num_there() >= 3)
    there = num_there()
    show(None, f"{address}, push killed after {there} files: {last_line('stats', address, code=1)}")
    show(seconds_of(PUSH, build, address), "push again")
    killed(["stats", address], lambda: any(builds.glob(".tmp-*/*/train/*.npy")), **cache)
    assert not any(builds.glob("[0-9a-f]*"))
    show(seconds_of(OPEN, address, **cache), "open, after a fetch that was killed")
    shutil.rmtree(builds)
    show(seconds_of(OPEN, address, **cache), "open for the first time")
    show(seconds_of(OPEN, address, **cache), "open again")
    shutil.rmtree(builds)
    readers = [chatdata("stats", address, **cache) for _ in range(2)]
    assert [bool(reader.communicate()[0]) and reader.returncode for reader in readers] == [0, 0]
    build_id = read_manifest(build)["build_id"]
    show(
        None,
        f"two readers, then {last_line('verify', address, '--level', 'full', '--expect', build_id, **cache)[-27:]}",
    )
    shutil.rmtree(builds)
    damage()
    show(None, last_line("stats", address, code=1, **cache))
    show(seconds_of(PUSH, build, address), "push repairs it")
    show(seconds_of(OPEN, address, **cache), "open for the first time")


def show(seconds: float | None, what: str) -> None:
    print(f"{'' if seconds is None else f'{seconds:.2f}':>8}  {what}", flush=True)


if __name__ == "__main__":
    main()
