"""Damage a file, run a command on it, over and over: no traceback, no hang, no memory that the file does not explain.

    uv run python benchmarks/fuzz.py --tries 1000 --seed 1
    uv run python benchmarks/fuzz.py --seed 1 --only 617 --show        # one try again, with what it printed

A world is made once: sources of every kind, three tokenizer files, builds, a cache, a run, an export, a checkpoint of
nanochat, results folders, a recipe and a persona. Each try copies it, damages one file (bits, truncation, another file
in its place, wrong encodings; in JSON and TOML other types, huge numbers, deep nesting, equal keys, control characters;
in arrays, Parquet and safetensors other headers, types, counts and values), corrects the hashes that would give it away
in half of the tries, and runs one command that reads the file. Commands run in a fork of this process, so that a try
takes a fraction of a second.

A try is bad if the command

    traceback   prints one, or an API call raises what is no error of ours
    killed      ends by a signal
    hang        takes more than 10 s of CPU time or 60 s in all
    memory      takes over 256 MiB and 32 times the file more than on the whole file, or runs out of it
    escape      prints a control character
    form        ends with 1 or 2 and not exactly one line that starts with "Error:", with 130, or prints broken JSON

`unnamed` counts, among the good ones, the errors that only the last resort in `run_command` put into a line.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb", "COLUMNS": "200"}
CPU_S, WALL_S = 10, 60
MEMORY_BYTES, MEMORY_TIMES = 256 << 20, 32
# beyond what the imports take: a fork that allocates more gets a MemoryError. Address space is not limited: the charts'
# V8 reserves much more of it than it ever uses
PRIVATE_BYTES = 8 << 30
LAST_RESORT = "--debug shows where"

TRAIN = "chattrain run --init random:1x64x2 --seq-len 64 --device-batch-size 4 --device cpu"
RESUME = f"{TRAIN} --data o --steps 3 --save-every 1 --eval-every 2 --resume --out r"
SCORE = "chateval run --device cpu --tasks demo_math,demo_choice --limit 3 --max-new-tokens 4"
OWN = "chatdata build --recipe own.toml --data-dir hub --workers 1 --decontaminate off --out x"
SEMANTIC = "chatdata verify p --level semantic --recipe own.toml --data-dir hub"

OF_A_BUILD = [
    *(f"chatdata verify {{}} --level {level}" for level in ("quick", "full", "full --json", "semantic")),
    "chatdata inspect {} --doc 3",
    "chatdata inspect {} --split val --json",
    "chatdata inspect {} --task demo_math --stage sft",
    "chatdata stats {}",
    "chatdata stats {} --json",
    "chatdata report {} --out x.html",
    "chatdata plan {} --seq-len 64",
    "chatdata plan {} --seq-len 64 --mask last-turn --json",
    "chatdata diff {} q",
    "chatdata diff q {} --json",
    "chatdata diff {} {}",
    "chatdata build --stage mid --demo --limit 20 --workers 1 --out {} --force",
    "to_dataset {}",
    "to_dataset {} last-turn",
    f"{TRAIN} --data {{}} --steps 1 --out x",
    f"{TRAIN} --data {{}} --stage sft --mask last-turn --long truncate --dry-run",
    f"{TRAIN} --data {{}} --order nanochat --dry-run",
    "chattrain trace r --step 1 --data {}",
]
OF_A_TOKENIZER = [
    "chatdata tokenizer show {} --text Hi!",
    "chatdata tokenizer show {} --json",
    "chatdata tokenizer import {} --out x",
    f"{OWN} --tokenizer {{}}",
    "chatdata inspect --conversation conversation.json --tokenizer {} --stage sft",
]
OF_A_RUN = [
    RESUME,
    "chattrain trace r --step 1",
    "chattrain export r --out x",
    f"{TRAIN} --data o --init r --steps 1 --out x",
    f"{SCORE} --checkpoint r --out x",
    "chateval chat --checkpoint r --say Hi! --max-new-tokens 4 --device cpu",
]
OF_RESULTS = [
    "chateval compare s t",
    "chateval compare t s --json",
    "chateval compare s t --markdown x.md",
    f"{SCORE} --checkpoint r --out s",
    f"{SCORE} --checkpoint r --out s --firewall q/firewall.json --json",
]
OF_SOURCES = [f"{OWN} --tokenizer o", f"{OWN} --tokenizer o --json", f"{OWN} --tokenizer o --dry-run", SEMANTIC]

# file of the world (a pattern) → commands that read it
TARGETS: dict[str, list[str]] = {
    "o/manifest.json": [command.format(*"oo") for command in OF_A_BUILD],
    "o/*/*.npy": [command.format(*"oo") for command in OF_A_BUILD],
    "o/*/*.parquet": [command.format(*"oo") for command in OF_A_BUILD],
    "o/report.json": ["chatdata report o --out x.html", "chatdata verify o --level full"],
    "o/tokenizer/*": [
        *(command.format("o") for command in OF_A_TOKENIZER),
        "chatdata verify o --level full",
        "chatdata inspect o",
        "chatdata report o --out x.html",
        f"{TRAIN} --data o --init r --steps 1 --out x",
    ],
    "p/manifest.json": [SEMANTIC, "chatdata verify p --level semantic", "chatdata diff p o", "chatdata stats p"],
    "p/train/*": [SEMANTIC, "chatdata verify p --level full", "chatdata stats p", "to_dataset p"],
    "cache/units/*": [f"{OWN} --tokenizer o", "chatdata cache", "chatdata cache --prune 30"],
    "tokenizer.pkl": [
        *(command.format("tokenizer.pkl") for command in OF_A_TOKENIZER),
        "chattrain import-nanochat nanochat --tokenizer tokenizer.pkl --out x",
    ],
    "tokenizer.tiktoken": [command.format("tokenizer.tiktoken") for command in OF_A_TOKENIZER],
    "tokenizer.pattern": [command.format("tokenizer.tiktoken") for command in OF_A_TOKENIZER],
    "chats.jsonl": [*OF_SOURCES, "chatdata tokenizer train chats.jsonl --vocab-size 300 --out x"],
    "chats.parquet": [*OF_SOURCES, "chatdata tokenizer train chats.parquet --vocab-size 300 --out x"],
    "words.txt": OF_SOURCES,
    "hub/*/*/*/*": [*OF_SOURCES, f"{OWN.replace('off', 'report')} --tokenizer o"],
    "own.toml": OF_SOURCES,
    "me.toml": ["chatdata identity me.toml --rows 20 --out x.jsonl", "chatdata identity me.toml --out x.jsonl --json"],
    "conversation.json": [
        "chatdata inspect --conversation conversation.json --tokenizer o --stage mid",
        "chatdata inspect --conversation conversation.json --tokenizer o --json",
    ],
    "r/run.json": OF_A_RUN,
    "r/log.jsonl": OF_A_RUN[:3],
    "r/checkpoints/step-00000002/*": OF_A_RUN,
    "r/checkpoints/step-00000002/tokenizer/*": OF_A_RUN,
    "e/*": [f"{SCORE} --checkpoint e --out x", "chateval chat --checkpoint e --say Hi! --max-new-tokens 4"],
    "nanochat/*": ["chattrain import-nanochat nanochat --tokenizer tokenizer.pkl --out x"],
    "s/*.json*": OF_RESULTS,
    "q/firewall.json": [OF_RESULTS[-1]],
}

RECIPE = """stage = "sft"

[[train]]
task = "conversations"
path = "chats.jsonl"

[[train]]
task = "conversations"
path = "chats.parquet"
epochs = 2

[[train]]
task = "simple_spelling"
words = "words.txt"
rows = 20

[[train]]
task = "gsm8k"

[[val]]
task = "conversations"
path = "chats.jsonl"
stop = 10
"""
PERSONA = """name = "Pebble"
description = "a tiny demo chat model"
languages = ["English", "Spanish"]
facts = ["I was trained on a laptop.", { question = "How big are you?", answer = ["I am tiny.", "Very small."] }]
"""


# ---- running a command in a fork of this process


@dataclass
class Ended:
    """How a fork ended. signal: 0 if it did not end by one."""

    code: int
    signal: int
    cpu_s: float
    wall_s: float
    memory_bytes: int
    out: str
    err: str


def import_everything() -> None:
    """What commands import lazily: a fork has it already. Nothing here may start a thread: a fork would hang."""
    names = "numpy pyarrow.parquet pyarrow.ipc polars torch safetensors.torch tiktoken tokenizers datasets rustbpe"
    names += " rich.table jinja2 altair vl_convert matplotlib.figure chatdata.cli chattrain.cli chateval.cli"
    for name in names.split():
        importlib.import_module(name)
    for package in ("chatdata", "chattrain", "chateval"):
        root = Path(importlib.import_module(package).__path__[0])
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            if parts[-1] not in ("__main__", "__init__", "probe", "runner"):
                importlib.import_module(".".join(parts))


def fork(work: Callable[[], None], folder: Path) -> Ended:
    """Run `work` in `folder` in a fork, and wait. What it prints goes to files next to the folder."""
    prints = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.chdir(folder)
            os.environ["CHATDATA_CACHE"] = str(folder / "cache")
            for stream, path in zip((1, 2), prints, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            pages = int(Path("/proc/self/statm").read_text().split()[5])
            space = pages * resource.getpagesize() + PRIVATE_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (space, space))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 2))
            signal.alarm(WALL_S)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    out, err = (path.read_bytes().decode("utf-8", "replace") for path in prints)
    signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
    cpu_s = usage.ru_utime + usage.ru_stime
    return Ended(code, signalled, cpu_s, time.monotonic() - started, usage.ru_maxrss << 10, out, err)


def run(command: str, folder: Path) -> Ended:
    name, *arguments = command.split()
    if name == "to_dataset":
        return fork(lambda: read_dataset(*arguments), folder)
    main = importlib.import_module(f"{name}.cli").main

    def call() -> None:
        sys.argv = [name, *arguments]
        main()

    return fork(call, folder)


def read_dataset(path: str, policy: str = "apply") -> None:
    """`open_build` and `to_dataset`: an error of ours, or a dataset that can be read."""
    import chatdata
    from chatdata.errors import ChatdataError

    try:
        for split in chatdata.open_build(path).splits.values():
            dataset = split.to_dataset(policy)  # type: ignore[arg-type]
            assert all(len(row["input_ids"]) == len(row["labels"]) for row in dataset)
            split.index  # noqa: B018
    except (ChatdataError, OSError) as error:
        sys.stderr.write(f"Error: {' '.join(ascii(str(error)).split())}\n")
        sys.exit(1)


# ---- the world


def make_world(folder: Path) -> None:
    """One of everything that commands read, small."""
    folder.mkdir(parents=True)
    ended = fork(lambda: write_sources(folder), folder)
    commands = [
        "chatdata build --stage mid --demo --limit 20 --workers 1 --out o",
        "chatdata build --stage mid --demo --limit 25 --workers 1 --out q",
        OWN.replace(" x", " p") + " --tokenizer o",
        RESUME.replace("steps 3", "steps 3 --stop-at 2"),
        "chattrain export r --out e",
        f"{SCORE} --checkpoint r --out s",
        f"{SCORE} --checkpoint r --out t --seed 42 --batch-size 2",
    ]
    for command in [None, *commands]:
        if command is not None:
            ended = run(command, folder)
        if ended.code or ended.signal:
            raise SystemExit(f"the world cannot be made: {command}: exit {ended.code}\n{ended.out}\n{ended.err}")
    ended = fork(lambda: write_more(folder), folder)
    if ended.code:
        raise SystemExit(f"the world cannot be made:\n{ended.err}")


def write_sources(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = [
        [
            {"role": "user", "content": f"How much is {i} + {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}, größer als {i}."},
        ]
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats))
    pq.write_table(pa.table({"messages": chats}), folder / "chats.parquet")
    (folder / "conversation.json").write_text(json.dumps({"messages": chats[3]}))
    (folder / "words.txt").write_text(
        "".join(f"{word}\n" for word in ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot"])
    )
    (folder / "own.toml").write_text(RECIPE)
    (folder / "me.toml").write_text(PERSONA)
    (folder / "hub/openai/gsm8k/main").mkdir(parents=True)
    rows = {"question": [f"What is {i}+1?" for i in range(20)], "answer": [f"It is\n#### {i + 1}" for i in range(20)]}
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), folder / f"hub/openai/gsm8k/main/{split}-00000-of-00001.parquet")


def write_more(folder: Path) -> None:
    """The demo's tokenizer in the other forms, and the run's model as a checkpoint of nanochat."""
    import base64

    import torch
    from safetensors.torch import load_file

    import chatdata

    tokenizer = chatdata.load_tokenizer(folder / "o")
    ranks = sorted(tokenizer.ranks.items(), key=lambda pair: pair[1])
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)
    (folder / "tokenizer.tiktoken").write_text(lines)
    (folder / "tokenizer.pattern").write_text(tokenizer.pattern)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
    checkpoint = folder / "r/checkpoints/step-00000002"
    (folder / "nanochat").mkdir()
    torch.save(load_file(checkpoint / "model.safetensors"), folder / "nanochat/model_000002.pt")
    config = json.loads((checkpoint / "state.json").read_text())["config"]
    meta = {"step": 2, "model_config": {key: value for key, value in config.items() if key != "rope_dtype"}}
    (folder / "nanochat/meta_000002.json").write_text(json.dumps(meta))


# ---- damage


@dataclass
class Damager:
    """Damages one file. `done` says how, for the report."""

    draw: random.Random
    world: Path
    done: list[str] = field(default_factory=list)

    def damage(self, path: Path) -> None:
        kinds = {
            ".json": self.json, ".jsonl": self.json_lines, ".toml": self.toml, ".npy": self.npy,
            ".parquet": self.parquet, ".safetensors": self.safetensors, ".pkl": self.pickled,
        }  # fmt: skip
        special = kinds.get(path.suffix)
        if special is None or self.draw.random() < 0.3:
            self.raw(path)
            return
        try:
            special(path)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:  # this cannot be written
            self.done.append(f"({type(error).__name__})")
            self.raw(path)

    def raw(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        at = self.draw.randrange(len(data)) if data else 0
        if self.draw.random() < 0.3:  # headers and footers decide more than what is between
            at = self.draw.choice([at % 64, max(0, len(data) - 1 - at % 64)])
        kind = self.draw.choice(
            [
                "bit",
                "bit",
                "byte",
                "bytes",
                "cut",
                "empty",
                "grow",
                "other",
                "utf-16",
                "latin",
                "zero",
                "folder",
                "gone",
            ]
        )
        self.done.append(f"{kind} at {at:,}")
        if kind == "bit" and data:
            data[at] ^= 1 << self.draw.randrange(8)
        elif kind == "byte" and data:
            data[at] = self.draw.choice([0, 1, 10, 34, 123, 127, 128, 255])
        elif kind == "bytes":
            data[at : at + 16] = self.draw.randbytes(16)
        elif kind == "cut":
            del data[at:]
        elif kind == "empty":
            data.clear()
        elif kind == "grow":
            data += self.draw.randbytes(self.draw.choice([1, 100, 5_000]))
        elif kind == "other":
            other = self.draw.choice(sorted(p for p in self.world.rglob("*") if p.is_file() and p != path))
            self.done.append(f"= {other.relative_to(self.world)}")
            data = bytearray(other.read_bytes())
        elif kind == "utf-16":
            data = bytearray(bytes(data).decode("utf-8", "replace").encode("utf-16"))
        elif kind == "latin":
            data[at:at] = "\xe9\x85\u202e".encode("latin-1", "replace")
        elif kind == "zero":
            data[at : at + 4096] = bytes(min(4096, len(data) - at))
        elif kind in ("folder", "gone"):
            path.unlink()
            if kind == "folder":
                path.mkdir()
            return
        path.write_bytes(data)

    # JSON

    def json(self, path: Path) -> None:
        path.write_bytes(self.json_text(path.read_text(encoding="utf-8"), indent=1).encode("utf-8", "surrogatepass"))

    def json_lines(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").split("\n")
        at = self.draw.randrange(max(1, len(lines) - 1))
        kind = self.draw.random()
        if kind < 0.1:
            lines.insert(at, lines[self.draw.randrange(len(lines))])
            self.done.append("a line twice")
        elif kind < 0.2:
            lines[at] = lines[at][: self.draw.randrange(len(lines[at]) + 1)]
            self.done.append(f"line {at + 1} cut")
        else:
            lines[at] = self.json_text(lines[at])
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))

    def json_text(self, text: str, **options: Any) -> str:
        value = json.loads(text)
        places = [*places_in(value)]
        for _ in range(self.draw.choice([1, 1, 1, 2])):
            holder, key = self.draw.choice(places)
            kind = self.draw.choice(["value", "value", "value", "value", "value", "gone", "added", "name", "many"])
            self.done.append(f"{kind} {key!r}"[:60])
            if kind == "value" or holder is None:
                new = self.value(None if holder is None else holder.get(key) if isinstance(holder, dict) else None)
                self.done.append(repr(new)[:40])
                if holder is None:
                    value = new
                    break
                if isinstance(holder, dict) or key < len(holder):
                    holder[key] = new
            elif kind == "gone":
                with contextlib.suppress(KeyError, IndexError):
                    del holder[key]
            elif kind == "many":
                old = holder[key] if isinstance(holder, dict) and key in holder else 0
                new = [old] * self.draw.choice([2, 1000, 100_000 if len(repr(old)) < 20 else 50])
                if isinstance(holder, list):
                    holder += new
                else:
                    holder[key] = new
            elif isinstance(holder, dict):
                name = self.draw.choice(["\x1b]0;x\x07\n", "", "x" * 100_000, "step", "\x85\u202e", "__class__"])
                holder[name] = holder.pop(key, None) if kind == "name" else self.value(None)
        written = json.dumps(value, ensure_ascii=self.draw.random() < 0.5, **options)
        if DEEP in written:
            depth = self.draw.choice([200, 2_000, 100_000])
            written = written.replace(json.dumps(DEEP), "[" * depth + "]" * depth)
        if HUGE in written:
            written = written.replace(json.dumps(HUGE), "9" * self.draw.choice([30, 400, 5_000]))
        if self.draw.random() < 0.08 and written.startswith("{"):  # the first key twice
            key = next(iter(value), "x") if isinstance(value, dict) else "x"
            written = "{" + json.dumps(key) + ": " + json.dumps(self.value(None)) + "," + written[1:]
            self.done.append("a key twice")
        return written

    def value(self, old: Any) -> Any:
        edges = [0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
        others = [None, True, False, "", "x", "\x1b]0;x\x07\r\n", "\ud800", "\u202e\x9b31m", "a" * 100_000, "../x", "/"]
        others += [[], {}, [None], [[]], {"": {}}, [1.5], DEEP, HUGE, "http://127.0.0.1:9/x", "file:///etc/passwd"]
        if isinstance(old, int) and self.draw.random() < 0.4:
            return self.draw.choice([old + 1, old - 1, -old, old * 1000, float(old), str(old)])
        if isinstance(old, str) and self.draw.random() < 0.3:
            return self.draw.choice([old[:-1], old + "x", old.upper(), old + "\n", "\x1b[31m" + old, "é" + old])
        return self.draw.choice(edges if self.draw.random() < 0.4 else others)

    def toml(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        at = self.draw.randrange(len(lines))
        key, _, value = lines[at].partition(" = ")
        values = [
            "[]",
            "{}",
            '""',
            "-1",
            "0",
            "9" * 30,
            "9" * 5_000,
            "nan",
            "inf",
            "true",
            "1979-05-27",
            "0x10",
            "'''x",
        ]
        values += [
            "[" * 500 + "]" * 500,
            "{a=" * 300 + "1" + "}" * 300,
            '"\\u001b]0;x"',
            '"' + "a" * 100_000 + '"',
            value,
        ]
        values += ['"../../x"', '"http://127.0.0.1:9/x"', '"file:///etc/passwd"', '"/etc/passwd"', "[1, 'a']", '"*"']
        kind = self.draw.choice(["value", "value", "value", "dotted", "twice", "gone", "added", "header"])
        self.done.append(f"{kind} line {at + 1}")
        if kind == "value" and value:
            lines[at] = f"{key} = {self.draw.choice(values)}"
        elif kind == "dotted":
            lines.insert(at, ".".join(["a"] * self.draw.choice([10, 3_000, 50_000])) + " = 1")
        elif kind == "twice":
            lines.insert(at, lines[at])
        elif kind == "gone":
            del lines[at]
        elif kind == "added":
            keys = [
                "epochs",
                "rows",
                "seed",
                "start",
                "stop",
                "max_tokens",
                "overflow",
                "split",
                "subset",
                "repo",
                "x\x1b",
            ]
            lines.insert(at, f"{self.draw.choice(keys)} = {self.draw.choice(values)}")
        else:
            lines.insert(at, self.draw.choice(["[[train]]", "[train]", "[shuffle]", "[" + "a." * 5_000 + "a]", "[["]))
        self.done.append(lines[min(at, len(lines) - 1)][:40] if lines else "")
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n")

    # arrays

    def npy(self, path: Path) -> None:
        import numpy as np

        data = path.read_bytes()
        values = np.load(path).copy()
        kind = self.draw.choice(["values", "values", "values", "values", "shape", "type", "length", "header"])
        if kind == "values":
            info = np.iinfo(values.dtype)
            edges = [info.min, info.max, 0, 1, 2, len(values), 255, -1]
            for _ in range(self.draw.choice([1, 1, 3, len(values)])):
                at, new = self.draw.randrange(len(values)), self.draw.choice(edges)
                values[at] = min(max(new, info.min), info.max)
                self.done.append(f"[{at}] = {new}")
            del self.done[4:]
            path.write_bytes(data[:128] + values.tobytes())
        elif kind == "type":
            name = self.draw.choice(["<f8", ">u2", "|u1", "<i8", "<U4", "|b1", "<c16", "<M8[s]"])
            self.done.append(name)
            np.save(path, values.astype(name))
        elif kind == "length":
            self.done.append("another length")
            np.save(
                path, values[: self.draw.randrange(len(values))] if self.draw.random() < 0.5 else np.tile(values, 3)
            )
        else:
            shapes = [b"(-1,)", b"(99999999999999,)", b"()", b"(2, 3)", b"(1,)" * 9, b"('x',)", b"(None,)", b"[" * 40]
            self.done.append("header")
            start = data.index(b"(")
            changed = data[:start] + self.draw.choice(shapes) + data[data.index(b")") + 1 :]
            if kind == "header":
                types = [b"'|O'", b"[('a','<i4')]", b"'<u2, <u2'", b"None", b"'x'", b"1" * 30]
                first = data.index(b"'descr': ") + 9
                changed = data[:first] + self.draw.choice(types) + data[data.index(b",", first) :]
            path.write_bytes(changed[:128].ljust(128) + changed[128:])

    def parquet(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.ParquetFile(path).read()
        at = self.draw.randrange(table.num_columns)
        name, column = table.column_names[at], table.column(at).combine_chunks()
        kind = self.draw.choice(["values", "values", "values", "nulls", "type", "gone", "rows", "bomb", "order"])
        self.done.append(f"{kind} {name}")
        if kind == "values":
            listed = column.to_pylist()
            for _ in range(self.draw.choice([1, 3, len(listed)])):
                i = self.draw.randrange(len(listed))
                listed[i] = self.like(listed[i])
                self.done.append(f"[{i}] = {listed[i]!r}"[:60])
            del self.done[4:]
            with contextlib.suppress(pa.ArrowException, OverflowError):
                column = pa.array(listed, column.type)
        elif kind == "nulls":
            column = pa.array([None if self.draw.random() < 0.3 else v for v in column.to_pylist()], column.type)
        elif kind == "type":
            types = [
                pa.string(),
                pa.int8(),
                pa.float64(),
                pa.large_string(),
                pa.binary(),
                pa.uint64(),
                pa.list_(pa.int8()),
            ]
            column = pa.nulls(len(column), self.draw.choice(types))
            if self.draw.random() < 0.5:
                column = pa.array([f"v{i}" for i in range(len(column))])
        elif kind == "gone":
            table = table.remove_column(at)
        elif kind == "order":
            table = table.take(pa.array(self.draw.sample(range(table.num_rows), table.num_rows)))
        elif kind == "rows":
            table = table.slice(self.draw.randrange(table.num_rows), self.draw.randrange(table.num_rows))
        else:  # the same rows again: they hardly take space on disk
            times = self.draw.choice([100, 3_000, 100_000])
            table = table.take(pa.array([0]).take(pa.repeat(0, times)))
        if kind in ("values", "nulls", "type"):
            table = table.set_column(at, pa.field(name, column.type), column)
        pq.write_table(table, path, compression=self.draw.choice(["zstd", "none"]))

    def like(self, value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.draw.choice([0, -1, value + 1, 2**15 - 1, 2**31 - 1, 2**62, -(2**31)])
        if isinstance(value, str):
            return self.draw.choice(["", "\x1b]0;x\x07\n", value + "x", "a" * 100_000, "demo_math", "\x85"])
        if isinstance(value, bytes):
            return bytes(len(value))
        if isinstance(value, list):
            return self.draw.choice([[], value[1:], value * 2, value[::-1], [self.like(v) for v in value], value * 300])
        if isinstance(value, dict):
            return {key: self.like(inner) if self.draw.random() < 0.5 else inner for key, inner in value.items()}
        return None

    def safetensors(self, path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + length], bytearray(data[8 + length :])
        kind = self.draw.choice(["header", "header", "length", "values"])
        self.done.append(kind)
        if kind == "length":
            new = self.draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
            path.write_bytes(new.to_bytes(8, "little") + header + rest)
            return
        if kind == "header":
            header = self.json_text(header.decode()).encode("utf-8", "surrogatepass")
        else:
            at = self.draw.randrange(len(rest) // 4) * 4
            rest[at : at + 4] = self.draw.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"])
        path.write_bytes(len(header).to_bytes(8, "little") + header + rest)

    def pickled(self, path: Path) -> None:
        bombs = [
            b"\x80\x04r\xff\xff\xff\x7f.",
            b"\x80\x04]" + b"\x94" * 3 + b"2" * 30 + b"e.",
            b"\x80\x04\x8d" + (2**40).to_bytes(8, "little"),
            b"\x80\x04cos\nsystem\nX\x01\x00\x00\x00xR.",
            b"\x80\x04" + b"(" * 100_000 + b".",
            b"\x80\x04}]\x85\x85\x85\x85.",
            b"\x80\x04N.", b"\x80\x04K\x01.", b"(lp0\n.", b"\x80\x04ctiktoken.core\nEncoding\n)\x81}b.",
        ]  # fmt: skip
        at = self.draw.randrange(len(bombs))
        self.done.append(f"pickle {at}")
        path.write_bytes(bombs[at])


DEEP, HUGE = "nested deeply", "a huge number"


def places_in(value: Any, holder: Any = None, key: Any = None) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value, the whole of it as (None, None). Of long containers the first and last."""
    found = [(holder, key)]
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for inner in keys if len(keys) < 60 else keys[:30] + keys[-30:]:
        found += places_in(value[inner], value, inner)
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_id_of(manifest: dict[str, Any]) -> str:
    """As docs/format.md says."""
    content = {key: value for key, value in manifest.items() if key != "build_id"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def correct_hashes(build: Path) -> bool:
    """Write sizes, hashes and build_id of the files as they are now into the manifest, as far as it has a place."""
    path = build / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name, split in manifest["splits"].items():
            for shard in split["shards"]:
                for record in shard["files"].values():
                    file = build / name / record["file"]
                    record["bytes"], record["sha256"] = file.stat().st_size, sha256(file)
        for name in manifest["tokenizer"]["files"]:
            manifest["tokenizer"]["files"][name] = sha256(build / "tokenizer" / name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    try:
        manifest["build_id"] = build_id_of(manifest)
        path.write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    except (OSError, ValueError, TypeError, NameError, RecursionError):
        return False
    return True


def correct_checkpoint(folder: Path) -> None:
    """Write the hashes of a checkpoint's files as they are now into its state.json, as far as it has a place."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        path = folder / "state.json"
        state = json.loads(path.read_text())
        for key, value in state.items():
            if key.endswith("sha256") and isinstance(value, dict):
                state[key] = {name: sha256(folder / name) for name in value}
        path.write_text(json.dumps(state))


# ---- tries


@dataclass
class Try:
    number: int
    file: str
    damage: str
    command: str
    ended: Ended
    bad: list[str]
    unnamed: bool

    @property
    def kind(self) -> str:
        """The file without numbers and names that only this world has."""
        return self.pattern

    pattern: str = ""


def judge(command: str, ended: Ended, limit_bytes: int) -> list[str]:
    bad = []
    if ended.signal in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM) or ended.cpu_s > CPU_S:
        bad.append("hang")
    elif ended.signal:
        bad.append("killed")
    if "Traceback (most recent call last)" in ended.err:
        bad.append("traceback")
    if ended.memory_bytes > limit_bytes or "MemoryError" in ended.err or "out of memory" in ended.err:
        bad.append("memory")
    printed = ended.out + ended.err
    if any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\n\t" for c in printed):
        bad.append("escape")
    errors = [line for line in ended.err.splitlines() if line.startswith("Error:")]
    wrong = ended.code in (1, 2) and (len(errors) != 1 or ended.err.splitlines()[-1:] != errors)
    wrong = wrong and not ("diff" in command and ended.code == 1 and not ended.err)  # a difference was found
    if (not bad and wrong) or (ended.code not in (0, 1, 2, 3) and not ended.signal):
        bad.append("form")
    if "--json" in command and ended.code == 0 and "inspect" not in command:
        try:
            json.loads(ended.out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            bad.append("form")
    return bad


class Fuzzer:
    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.world, self.place = work / "world", work / "try"
        self.files: dict[str, list[Path]] = {}
        self.usual: dict[str, int] = {}  # command → memory on the whole world

    def prepare(self) -> None:
        if not self.world.exists():
            make_world(self.world)
        files = sorted(p.relative_to(self.world) for p in self.world.rglob("*") if p.is_file())
        self.files = {pattern: [p for p in files if fnmatch.fnmatch(str(p), pattern)] for pattern in TARGETS}
        absent = [pattern for pattern, found in self.files.items() if not found]
        assert not absent, absent

    def fresh(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.world, self.place)

    def usual_memory(self, command: str) -> int:
        if command not in self.usual:
            self.fresh()
            ended = run(command, self.place)
            assert ended.code in (0, 1) and not judge(command, ended, ended.memory_bytes), (command, ended)
            self.usual[command] = ended.memory_bytes
        return self.usual[command]

    def attempt(self, number: int) -> Try:
        draw = random.Random(f"{self.seed}/{number}")
        pattern = draw.choice(list(TARGETS))
        file = draw.choice(self.files[pattern])
        command = draw.choice(TARGETS[pattern])
        usual = self.usual_memory(command)
        self.fresh()
        damager = Damager(draw, self.place)

        def damage() -> None:
            damager.damage(self.place / file)
            if draw.random() < 0.5:
                build, checkpoint = self.place / file.parts[0], self.place / "r/checkpoints/step-00000002"
                if (build / "manifest.json").is_file():
                    damager.done.append("hashes corrected" if correct_hashes(build) else "")
                if file.parts[0] == "r":
                    correct_checkpoint(checkpoint)
            print(" · ".join(part for part in damager.done if part))

        damaged = fork(damage, self.place)
        if damaged.code:  # a damage that takes 10 s to write
            self.fresh()
            damaged = fork(lambda: (damager.raw(self.place / file), print(damager.done[0]))[0], self.place)
        size = (self.place / file).stat().st_size if (self.place / file).is_file() else 0
        ended = run(command, self.place)
        bad = judge(command, ended, usual + MEMORY_BYTES + MEMORY_TIMES * size)
        what = damaged.out.strip().encode("unicode_escape").decode()[:160]
        return Try(number, str(file), what, command, ended, bad, LAST_RESORT in ended.err, pattern)


def report(tries: list[Try], duration_s: float) -> str:
    """A line per file kind: how tries ended."""
    columns = ("tries", "done", "refused", "found", "unnamed", "bad")
    lines = [f"{'file':42}" + "".join(f"{name:>9}" for name in columns)]
    total: Counter[str] = Counter()
    for pattern in TARGETS:
        counts: Counter[str] = Counter()
        for one in tries:
            if one.pattern == pattern:
                ending = "bad" if one.bad else {0: "done", 3: "found"}.get(one.ended.code, "refused")
                counts.update(["tries", ending, *(["unnamed"] if one.unnamed and not one.bad else [])])
        lines.append(f"{pattern:42}" + "".join(f"{counts[name]:>9,}" for name in columns))
        total += counts
    lines.append(f"{'all':42}" + "".join(f"{total[name]:>9,}" for name in columns))
    kinds = Counter(kind for one in tries for kind in one.bad)
    names = ("traceback", "killed", "hang", "memory", "escape", "form")
    slowest = max(tries, key=lambda one: one.ended.cpu_s)
    lines.append(", ".join(f"{name} {kinds[name]}" for name in names))
    lines.append(f"slowest {slowest.ended.cpu_s:.1f} s CPU (try {slowest.number}); {duration_s:.0f} s in all")
    return "\n".join(lines)


def described(one: Try) -> str:
    last = (one.ended.err.strip().splitlines() or [f"exit {one.ended.code}, signal {one.ended.signal}"])[-1]
    last = last.encode("unicode_escape").decode()[:220]
    return f"{one.number} {'+'.join(one.bad) or 'unnamed'} · {one.file}: {one.damage} · {one.command}\n      {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop starting tries after this many")
    parser.add_argument("--only", type=int, help="repeat this try of the seed")
    parser.add_argument("--show", action="store_true", help="also print what the bad ones printed")
    parser.add_argument("--work", type=Path, help="folder for the world, kept if given")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ |= {"HF_HOME": str(work / "hf")}
    import_everything()
    fuzzer = Fuzzer(work.resolve(), arguments.seed)
    try:
        fuzzer.prepare()
        tries: list[Try] = []
        started = time.monotonic()
        for number in [arguments.only] if arguments.only is not None else range(arguments.tries):
            if time.monotonic() - started > arguments.seconds:
                break
            tries.append(fuzzer.attempt(number))
            if tries[-1].bad or tries[-1].unnamed or arguments.only is not None:
                print(described(tries[-1]), flush=True)
                if arguments.show:
                    print(tries[-1].ended.out[-2000:], tries[-1].ended.err[-6000:], flush=True)
        print(report(tries, time.monotonic() - started))
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 1 if any(one.bad for one in tries) else 0


if __name__ == "__main__":
    sys.exit(main())
