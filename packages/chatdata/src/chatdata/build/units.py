"""Work units: runs of rows of one source, each rendered into an Arrow file of the cache.

They are files `units/<key>-<hash of the content>.arrow` below the cache folder. The second hash shows a damaged file
when it is read, and makes two builds that render the same unit write the same file; the key is also inside the file, so
that a renamed one is noticed. Next to `units`, the folder `urls` holds files downloaded by URL (sources/hub.py).

A unit grows as `<key>.<machine>-<random>.tmp`, locked from before its first byte until it is renamed.

A unit's key is a hash of what decides its content (source bytes, rows, task, tokenizer, the code that renders), never
of a path, a worker or an encoder. So any process on any machine can render it, and nothing is rendered twice.
Its documents are whole: a build applies its length and supervision policies when it reads them (render/documents.py).
"""

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from chatdata.arrow import map_batches
from chatdata.disk import file_sha256
from chatdata.errors import ChatdataError, TokenizerError
from chatdata.recipe import NATIVE
from chatdata.render.batch import RenderedBatch, arrow_schema, from_record_batch, render_batch, to_record_batch
from chatdata.render.contract import Rules, check_documents, raise_defect
from chatdata.render.model_batch import render_rows
from chatdata.render.model_format import load_format
from chatdata.render.pieces import UNTRAINED, Pieces, invalid_row, joined, pieces_of_rows
from chatdata.render.spans import untrained_index
from chatdata.sources.jsonl import SEGMENT_BYTES
from chatdata.sources.source import Rows, Source
from chatdata.tokenizer import encoders
from chatdata.tokenizer.bpe import Tokenizer

# Less text than this in all missing units is encoded by tiktoken: loading and testing gigatoken takes 0.13 CPU-seconds,
# as much as it saves on 2 MB (smoltalk, 400,000 tokens)
FAST_ENCODER_BYTES = 2 << 20
MAX_CHARS = 4 << 20  # encoded at a time: bounds memory where documents are long

# What decides a unit's bytes, below the package: a change in any of these files renders everything again, a change
# anywhere else nothing. tests/chatdata/build/test_units.py holds the list to what this module imports.
RENDERING_CODE = (
    *("arrow.py", "build/units.py", "calculator.py", "conversation.py", "document.py"),
    *("messages.py", "records.py", "tool_calls.py"),
    *("render", "sources/file.py", "sources/jsonl.py", "sources/source.py", "tasks", "tokenizer"),
)
UNIT_FORMAT = 3
UNIT_SUFFIX, PARTIAL_SUFFIX = ".arrow", ".tmp"
DAY_S = 86_400
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of the running kernel; only Linux has it
MACHINE = _BOOT_ID.read_text()[:8] if _BOOT_ID.is_file() else secrets.token_hex(4)


class Unit(NamedTuple):
    """Rows of one source to render: those from `first` on that are `wanted` (bool)."""

    source: int  # place in Renderer.sources
    first: int
    wanted: np.ndarray
    num_rows: int  # wanted ones
    num_bytes: int  # of their text, about
    key: str


class Rendered(NamedTuple):
    """A unit on disk; how many texts were encoded for it, and how many of them were compared with tiktoken's ids."""

    key: str
    path: Path
    num_texts: int
    num_checked: int


class Renderer(NamedTuple):
    """Everything a worker needs; can be pickled."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    encoder_name: str
    folder: Path  # of the cache, where units are kept
    chat_format: str = NATIVE  # of the recipe


def cut_units(
    number: int, source: Source, tokenizer: Tokenizer, wanted: np.ndarray, chat_format: str = NATIVE
) -> list[Unit]:
    """The wanted rows (bool [rows]) of a source, the build's `number`th, as units of about SEGMENT_BYTES of text.

    chat_format: as in the manifest.
    """
    same = {"format": UNIT_FORMAT, "code": code_sha256(Path(__file__).parents[1]), "chat_format": chat_format}
    same |= {"task": source.task.name, "task_code": source.task.code_sha256, "tokenizer": tokenizer.sha256}
    units, first, row, num_bytes = [], 0, 0, 0.0
    for num_rows, segment_bytes in source.segments(len(wanted)):
        num_bytes += segment_bytes * float(wanted[row : row + num_rows].mean()) if num_rows else 0.0
        row += num_rows
        if num_bytes >= SEGMENT_BYTES / 2 or row >= len(wanted):
            part = wanted[first:row]
            if part.any():
                rows = hashlib.sha256(np.packbits(part).data).hexdigest()
                content = json.dumps({**same, "source": source.content(first, len(part)), "wanted": rows})
                key = hashlib.sha256(content.encode()).hexdigest()[:32]
                units.append(Unit(number, first, part, int(part.sum()), int(num_bytes), key))
            first, num_bytes = row, 0.0
    return units


@cache
def code_sha256(package: Path) -> str:
    """SHA-256 over RENDERING_CODE, and the texts that tasks are made of, in the folder `package`."""
    paths = [path for name in RENDERING_CODE for path in (package / name, *(package / name).rglob("*"))]
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".txt", ".jsonl")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


load_encoder = lru_cache(maxsize=1)(encoders.find_encoder)  # a process has one


def render_unit(renderer: Renderer, unit: Unit, progress: Callable[[int], None] | None = None) -> Rendered:
    """Render one unit into the cache, by a temporary name and a rename. `progress` is called with rows rendered.

    Errors that a row causes name its file and row (or line).
    """
    source, tokenizer = renderer.sources[unit.source], renderer.tokenizer
    stage, model_format = "base" if source.task.kind == "text" else "chat", load_format(renderer.chat_format, tokenizer)
    rules = Rules(tokenizer.special_ids, tokenizer.vocab_size, stage, chat_format=renderer.chat_format)
    schema = arrow_schema(tokenizer.dtype).with_metadata({"key": unit.key})
    checked = Counter[str]()
    partial = renderer.folder / f"{unit.key}.{MACHINE}-{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        with partial.open("xb") as file:
            with suppress(OSError):  # a file system without locks: the file's age decides
                fcntl.flock(file, fcntl.LOCK_EX)
            with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
                for rows, raw in source.read_batches(unit.first, unit.wanted):
                    if model_format:
                        batches = iter([(render_rows(model_format, source, rows, raw), True)])
                    else:
                        batches = _render_native(renderer, source, rows, raw, checked)
                    done = 0
                    for batch, has_untrained in batches:
                        part = rows[done : done + len(batch.num_tokens)]
                        done += len(part)
                        offsets = np.concatenate([[0], np.cumsum(batch.num_tokens)])
                        # counts and spans are computed from the arrays that give tokens and mask: no need to check them
                        whole = {"truncated": np.zeros(len(part), dtype=bool)}
                        if has_untrained:
                            whole |= untrained_index(batch.spans, batch.num_spans, batch.untrained_turns)
                        found = check_documents(batch.tokens, batch.mask, offsets, whole, rules)
                        raise_defect(found, part, source.where)
                        writer.write_batch(to_record_batch(batch))
                    if progress:
                        progress(len(rows))
            file.flush()
            path = renderer.folder / f"{unit.key}-{file_sha256(partial)[:32]}{UNIT_SUFFIX}"
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return Rendered(unit.key, path, checked["texts"], checked["checked"])


def _render_native(
    renderer: Renderer, source: Source, rows: np.ndarray, raw: Rows, checked: Counter[str]
) -> Iterator[tuple[RenderedBatch, bool]]:
    """Raw rows in nanochat's chat format, MAX_CHARS at a time, and whether some of it is not trained.

    checked: counts texts encoded and texts compared.
    """
    tokenizer = renderer.tokenizer
    encoder = load_encoder(renderer.encoder_name, tokenizer)

    def render(pieces: Pieces) -> RenderedBatch:
        ids, counts = encoder.encode_batch(pieces.texts)
        if encoder.name != "tiktoken":
            checked["checked"] += encoders.check_some(encoder, tokenizer, pieces.texts, (ids, counts), source.name)
        return render_batch(pieces, ids, counts, tokenizer.special_ids, tokenizer.dtype, tokenizer.vocab_size)

    done = 0
    for pieces in pieces_of_rows(source, rows, raw).split(MAX_CHARS):
        try:
            batch = render(pieces)
        except ChatdataError:
            pieces = _kept(encoder, tokenizer, source, rows[done : done + len(pieces)], pieces)
            batch = render(pieces)
        checked["texts"] += len(pieces.texts)
        yield batch, bool(batch.untrained_turns.any() or (pieces.codes & UNTRAINED).any())
        done += len(pieces)


def _kept(encoder: encoders.Encoder, tokenizer: Tokenizer, source: Source, rows: np.ndarray, pieces: Pieces) -> Pieces:
    """The pieces with the rows dropped whose texts the tokenizer gives up on.

    Raises the error of the first row whose texts cannot be encoded on their own, with its place, if it is another error
    or the recipe does not want such rows dropped.
    """
    parts = [pieces.part(i, i + 1) for i in range(len(pieces))]
    for i, row in enumerate(rows.tolist()):
        texts = parts[i].texts
        try:
            encoders.check_some(encoder, tokenizer, texts, encoder.encode_batch(texts), source.name)
        except ChatdataError as own:
            if source.reading.invalid == "error" or not isinstance(own, TokenizerError):
                raise own.at(source.where(row)) from None
            parts[i] = invalid_row(source, own)
    return joined(parts)


def read_unit(path: Path, dtype: np.dtype) -> list[RenderedBatch]:
    """A unit's documents as views of the mapped file, one RenderedBatch per record batch."""
    return [from_record_batch(batch, dtype) for batch in map_batches(path)]


class CachedUnit(NamedTuple):
    """A unit on disk, or a half-written one."""

    path: Path
    num_bytes: int
    last_used: float  # seconds since 1970


def cached_units(folder: Path) -> list[CachedUnit]:
    """All units of the cache, half-written ones included, least recently used first."""
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name.endswith((UNIT_SUFFIX, PARTIAL_SUFFIX)):
            with suppress(FileNotFoundError):  # another build renamed or pruned it a moment ago
                stat = entry.stat()
                found.append(CachedUnit(Path(entry.path), stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda unit: (unit.last_used, unit.path))


def find_units(folder: Path, keys: set[str]) -> tuple[dict[str, Path], int]:
    """key → path of the units with these keys that are in the cache and whole; how many were damaged.

    Abandoned half-written units are removed.
    """
    found = {}
    for unit in cached_units(folder):
        if unit.path.suffix == UNIT_SUFFIX:
            found[unit.path.stem.partition("-")[0]] = unit.path
        elif _is_abandoned(unit):
            unit.path.unlink(missing_ok=True)
    there = found.keys() & keys
    paths = {key: found[key] for key in there if take_unit(found[key])}
    return paths, len(there) - len(paths)


def take_unit(path: Path) -> bool:
    """Whether the unit is whole and the one it is called. If so, it is marked as used now; if not, it is removed."""
    key, _, content = path.stem.partition("-")
    whole = False
    try:
        if file_sha256(path)[:32] == content:
            with pa.OSFile(str(path)) as file:
                whole = (pa.ipc.open_file(file).schema.metadata or {}).get(b"key") == key.encode()
        os.utime(path) if whole else path.unlink()
    except (OSError, pa.ArrowException):  # pruned a moment ago, in a read-only cache, not readable for us, not Arrow
        return path.is_file() and whole
    return whole


def _is_abandoned(unit: CachedUnit) -> bool:
    """Whether nobody will finish a half-written unit: its lock is free, and it is this machine's or a day old.

    All processes of a kernel see each other's locks, in whatever container; on other machines they may not.
    """
    is_old = time.time() - unit.last_used >= DAY_S
    if not is_old and not (unit.num_bytes and f".{MACHINE}-" in unit.path.name):
        return False
    try:
        with unit.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return is_old and not isinstance(error, BlockingIOError)
    return True


def prune(folder: Path, unused_days: float) -> list[CachedUnit]:
    """Remove units that no build has used for `unused_days`, and abandoned half-written ones. Returns those removed."""
    last_day, removed = time.time() - unused_days * DAY_S, []
    for unit in cached_units(folder):
        if _is_abandoned(unit) if unit.path.suffix == PARTIAL_SUFFIX else unit.last_used <= last_day:
            unit.path.unlink(missing_ok=True)
            removed.append(unit)
    return removed
