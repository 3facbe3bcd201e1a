"""Plant damages in a build, one at a time: which level of verify notices, and what do other commands make of it?

    uv run python benchmarks/damages.py --damages 200 --seed 1

Each damage changes one thing: a token, a mask bit, an offset, a cell of the index, the order of two documents, a count
or a name in the manifest, the tokenizer, bytes of any file, a file more or less, a link. For every other damage, sizes,
hashes and build_id are written anew, as somebody would who forges a build. The build is of a kind that the semantic
level can check: its sources are there. (World, damages and forks are those of fuzz.py.)

verify     noticed, missed, or a traceback
others     refused; same: prints what it prints for the whole build; other: prints something else, which is what the
           files say now; or a traceback
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz import SEMANTIC, TRAIN, Damager, Ended, Fuzzer, correct_hashes, fork, import_everything, run

VERIFY = {"quick": "chatdata verify p", "full": "chatdata verify p --level full", "semantic": f"{SEMANTIC} --share 1"}
OTHERS = {
    "stats": "chatdata stats p",
    "inspect": "chatdata inspect p --doc 3 --json",
    "report": "chatdata report p --out x.html",
    "plan": "chatdata plan p --seq-len 64 --mask last-turn",
    "diff": "chatdata diff whole p",
    "to_dataset": "to_dataset p last-turn",
    "tokenizer": "chatdata tokenizer show p --text Hi!",
    "chattrain": f"{TRAIN} --data p --stage sft --mask last-turn --steps 1 --out x",
}
KINDS = ("token", "mask", "offset", "index", "order", "count", "text", "tokenizer", "bytes", "cut", "files", "any")


class Planter:
    """Plants one damage in the build `p` of a world; `done` says which."""

    def __init__(self, draw: random.Random, world: Path) -> None:
        self.draw, self.world, self.build = draw, world, world / "p"
        self.done = ""

    def plant(self, kind: str) -> None:
        getattr(self, f"plant_{kind}")()

    def file(self, pattern: str) -> Path:
        return self.draw.choice(sorted(self.build.glob(pattern)))

    def array(self, kind: str, values: list[int]) -> None:
        """Another value somewhere: one of `values`, or one more than before."""
        import numpy as np

        path = self.file(f"*/{kind}-*.npy")
        data, array = path.read_bytes(), np.load(path)
        at = self.draw.randrange(len(array))
        array[at] = self.draw.choice([value for value in (*values, int(array[at]) + 1) if value != array[at]])
        self.done = f"{kind}[{at}] = {array[at]}"
        path.write_bytes(data[:128] + array.tobytes())

    def plant_token(self) -> None:
        self.array("tokens", [self.draw.randrange(400), 0, 65_535])

    def plant_mask(self) -> None:
        self.array("mask", [0, 1, 2, 255])

    def plant_offset(self) -> None:
        self.array("offsets", [0, -1, 2**40, -(2**63)])

    def plant_index(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.file("*/index-*.parquet")
        table = pq.ParquetFile(path).read()
        rows, damager = table.to_pylist(), Damager(self.draw, self.world)
        at, name = self.draw.randrange(len(rows)), self.draw.choice(table.column_names)
        for _ in range(30):
            changed = [{**row, name: damager.like(row[name])} if i == at else row for i, row in enumerate(rows)]
            try:
                made = pa.Table.from_pylist(changed, table.schema)
            except (pa.ArrowException, OverflowError):
                continue
            if not made.equals(table):
                break
        self.done = f"index {name}[{at}] = {changed[at][name]!r}"[:100]
        pq.write_table(made, path, compression="zstd")

    def plant_order(self) -> None:
        """Two neighbours change places, everywhere."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.build / "train"
        arrays = {kind: np.load(folder / f"{kind}-00000.npy") for kind in ("tokens", "mask", "offsets")}
        offsets = arrays["offsets"]
        at = self.draw.randrange(len(offsets) - 2)
        a, b, c = offsets[at : at + 3].tolist()
        for kind in ("tokens", "mask"):
            values = arrays[kind]
            values[a:c] = np.concatenate([values[b:c], values[a:b]])
        offsets[at + 1] = a + c - b
        for kind, values in arrays.items():
            np.save(folder / f"{kind}-00000.npy", values)
        table = pq.ParquetFile(folder / "index-00000.parquet").read()
        rows = table.to_pylist()
        rows[at], rows[at + 1] = {**rows[at + 1], "doc": at}, {**rows[at], "doc": at + 1}
        pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "index-00000.parquet", compression="zstd")
        self.done = f"documents {at} and {at + 1} change places"

    def plant_count(self) -> None:
        self.manifest(int, lambda old: self.draw.choice([old + 1, max(old - 1, 0), 0, old * 1000, 2**53, -1]))

    def plant_text(self) -> None:
        self.manifest(str, lambda old: self.draw.choice([old + "x", old[:-1], "", "../x", "\x1b]0;x\x07", "train"]))

    def manifest(self, kind: type, change: Any) -> None:
        path = self.build / "manifest.json"
        manifest = json.loads(path.read_text())
        places = [
            (holder, key, where)
            for holder, key, where in _leaves(manifest, "")
            if type(holder[key]) is kind and "sha256" not in where and where not in (".build_id", ".version", ".format")
        ]
        holder, key, where = self.draw.choice(places)
        old = holder[key]
        while holder[key] == old:
            holder[key] = change(old)
        self.done = f"manifest{where} = {holder[key]!r}"[:100]
        path.write_text(json.dumps(manifest))

    def plant_tokenizer(self) -> None:
        damager = Damager(self.draw, self.world)
        path = self.build / "tokenizer/tokenizer.json"
        damager.json(path)
        self.done = f"tokenizer.json {' '.join(damager.done)}"[:100]

    def plant_bytes(self) -> None:
        path = self.file("*/*")
        data = bytearray(path.read_bytes())
        at = self.draw.randrange(len(data))
        data[at] ^= 1 << self.draw.randrange(8)
        path.write_bytes(data)
        self.done = f"{path.relative_to(self.build)}: a bit of byte {at:,} of {len(data):,}"

    def plant_cut(self) -> None:
        path = self.file("*/*")
        data = path.read_bytes()
        length = self.draw.choice([0, len(data) - 1, self.draw.randrange(len(data))])
        path.write_bytes(data[:length])
        self.done = f"{path.relative_to(self.build)}: {length:,} of {len(data):,} bytes"

    def plant_files(self) -> None:
        path, kind = self.file("*/*"), self.draw.choice(["gone", "more", "link", "folder", "swapped"])
        self.done = f"{path.relative_to(self.build)}: {kind}"
        if kind == "more":
            (path.parent / "notes.txt").write_text("x")
        elif kind == "swapped":
            other = self.draw.choice([p for p in sorted(self.build.glob("*/*")) if p.read_bytes() != path.read_bytes()])
            a, b = path.read_bytes(), other.read_bytes()
            path.write_bytes(b)
            other.write_bytes(a)
        else:
            if kind == "link":
                shutil.copy(path, self.world / "elsewhere")
            path.unlink()
            if kind == "link":
                path.symlink_to(self.world / "elsewhere")
            elif kind == "folder":
                path.mkdir()

    def plant_any(self) -> None:
        path, damager = self.file("*/*"), Damager(self.draw, self.world)
        damager.damage(path)
        self.done = f"{path.relative_to(self.build)}: {' '.join(damager.done)}"[:100]


def _leaves(value: Any, where: str) -> list[tuple[Any, Any, str]]:
    found = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        at = f"{where}.{key}" if isinstance(value, dict) else f"{where}[{key}]"
        found += _leaves(inner, at) if isinstance(inner, (dict, list)) else [(value, key, at)]
    return found


def said(ended: Ended, place: Path) -> str:
    """What a command printed, without speed and the size of a page."""
    text = (ended.out + ended.err).replace(str(place), "")
    return re.sub(r"\d+(\.\d+)? (MB|s)\b|[\d,.e+-]+ ?(tokens)?/s|\d:\d\d:\d\d left|, loss \S+", "", text)


def outcome(name: str, ended: Ended, whole: Ended, place: Path) -> str:
    if "Traceback" in ended.err or ended.signal or ended.code not in (0, 1, 2, 3):
        return "traceback"
    if name in VERIFY:
        return "missed" if ended.code == 0 else "noticed"
    if "Error:" in ended.err:
        return "refused"
    return "same" if said(ended, place) == said(whole, place) else "other"


def contents_of(build: Path) -> dict[str, Any]:
    found: dict[str, Any] = {str(p): p.read_bytes() for p in build.rglob("*") if p.is_file()}
    found[str(build / "manifest.json")] = json.loads(found[str(build / "manifest.json")])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first damage")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop planting after this many")
    parser.add_argument("--only", type=int, help="plant this damage of the seed alone, and print what commands say")
    parser.add_argument("--work", type=Path, help="folder for the world, kept if given")
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="damages-"))).resolve()
    os.environ |= {"HF_HOME": str(work / "hf")}
    import_everything()
    fuzzer = Fuzzer(work, arguments.seed)
    fuzzer.prepare()
    if not (fuzzer.world / "whole").exists():
        shutil.copytree(fuzzer.world / "p", fuzzer.world / "whole")
    place, commands = fuzzer.place, VERIFY | OTHERS
    whole = {}
    for name, command in commands.items():
        fuzzer.fresh()
        whole[name] = run(command, place)
        assert whole[name].code == 0, (command, whole[name])
    before, started = contents_of(fuzzer.world / "p"), time.monotonic()
    tables: dict[str, dict[str, Counter[str]]] = {
        hashes: {name: Counter() for name in commands} for hashes in ("hashes as they were", "hashes corrected")
    }
    for number in [arguments.only] if arguments.only is not None else range(arguments.first, arguments.damages):
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped before damage {number}")
            break
        draw, kind = random.Random(f"{arguments.seed}/{number}"), KINDS[number // 2 % len(KINDS)]
        corrected = number % 2 == 1
        while True:  # until something has changed
            fuzzer.fresh()
            planter = Planter(draw, place)

            def plant() -> None:
                planter.plant(kind)  # noqa: B023
                if corrected:  # noqa: B023
                    correct_hashes(place / "p")
                print(planter.done)  # noqa: B023

            planted = fork(plant, place)
            draw.random()  # a fork has drawn from a copy
            damaged = contents_of(place / "p") if (place / "p/manifest.json").is_file() else {}
            if planted.code == 0 and {k.replace(str(place), ""): v for k, v in damaged.items()} != {
                k.replace(str(fuzzer.world), ""): v for k, v in before.items()
            }:
                break
        shutil.copytree(place, work / "planted", symlinks=True)
        ends = {}
        for name, command in commands.items():
            shutil.rmtree(place)
            shutil.copytree(work / "planted", place, symlinks=True)
            ended = run(command, place)
            ends[name] = outcome(name, ended, whole[name], place)
            tables["hashes corrected" if corrected else "hashes as they were"][name][ends[name]] += 1
            if arguments.only is not None:
                print(f"--- {name}: {ends[name]}\n{ended.out[-1500:]}{ended.err[-3000:]}")
        shutil.rmtree(work / "planted")
        odd = [name for name, end in ends.items() if end == "traceback"]
        odd += ["semantic"] if ends["semantic"] == "missed" else []
        odd += [name for name in OTHERS if ends[name] == "other" and not corrected]
        if odd or arguments.only is not None:
            shown = planted.out.strip().encode("unicode_escape").decode()
            print(
                f"{number}{' corrected' * corrected}: {shown}: {', '.join(f'{n} {ends[n]}' for n in odd)}", flush=True
            )
    for hashes, table in tables.items():
        for names, endings in (
            (VERIFY, ("noticed", "missed", "traceback")),
            (OTHERS, ("refused", "same", "other", "traceback")),
        ):
            print(f"\n{hashes:20}" + "".join(f"{ending:>11}" for ending in endings))
            for name in names:
                print(f"{name:20}" + "".join(f"{table[name][ending]:>11}" for ending in endings), flush=True)
    if arguments.work is None:
        shutil.rmtree(work, ignore_errors=True)
    return int(any(counts["traceback"] for table in tables.values() for counts in table.values()))


if __name__ == "__main__":
    sys.exit(main())
