"""From rendered documents to the shards of a split: which documents stay, the ledger, the files of each shard."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from chatdata.disk import file_sha256, sync
from chatdata.document import blocks_of
from chatdata.errors import BuildError
from chatdata.progress import Progress
from chatdata.render.batch import check_ids
from chatdata.render.documents import DROP_REASONS, RenderedDocuments
from chatdata.shards.index import index_schema
from chatdata.shards.manifest import FILE_NAMES, HEADER_BYTES, npy_header
from chatdata.sources.find import PlannedEntry
from chatdata.tokenizer.bpe import Tokenizer

MAX_SHARD_TOKENS = 2**27  # 256 MiB of uint16 tokens: few files, and a shard still copies in seconds
MAX_LISTED_CALLS = 1_000  # mismatches listed in report.json, 100 bytes each; all of them are counted
Chunks = Iterator[tuple[np.ndarray, np.ndarray]]  # ids, mask
Columns = dict[str, np.ndarray]  # as plan.rows_in_order gives them
INDEX_ROWS = 1 << 17  # in a row group of the index: its spans take about 30 MB while they are gathered


def write_split(
    folder: Path,
    entries: list[PlannedEntry],
    rows: Columns,
    documents: RenderedDocuments,
    contaminated: np.ndarray,
    tokenizer: Tokenizer,
    progress: Progress,
    threads: Executor | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a split into the new `folder`; return its part of the manifest, and of the report's `tool_calls`.

    contaminated: int64 [n], numbers of documents to leave out.
    threads: the files of a shard are written side by side.
    Raises BuildError if the policies leave no document.
    """
    reasons = documents.drop_reason[rows["document"]]
    reasons[np.isin(rows["document"], contaminated)] = DROP_REASONS.index("contaminated")
    ledger = _ledger(entries, rows, documents, reasons)
    # after the shuffle: what is dropped does not change the order of the others
    rows = {key: values[reasons == 0] for key, values in rows.items()}
    if not len(rows["document"]):
        why = next((f"the first, {documents.where(i)}: {why}" for i, why in documents.invalid.items()), "")
        why = why or "nothing to write"
        raise BuildError(f"{folder.name}: the recipe's policies drop all {len(reasons):,} documents; {why}")
    tool_calls = _tool_calls(entries, rows, documents)
    folder.mkdir()
    lengths, shards = documents.num_tokens[rows["document"]].astype(np.int64), []
    for number, (first, last) in enumerate(blocks_of(lengths, MAX_SHARD_TOKENS)):
        chosen = rows["document"][first:last]
        done, total = int(lengths[:first].sum()), int(lengths.sum())
        chunks = _shown(documents.chunks(chosen), progress, f"write {folder.name}", done, total)
        columns = {key: values[first:last] for key, values in rows.items()}
        index = documents.index_tables(chosen, first, columns, [planned.entry.task for planned in entries], INDEX_ROWS)
        dtype, vocab_size = tokenizer.dtype, tokenizer.vocab_size
        shards.append(write_shard(folder, number, chunks, lengths[first:last], index, dtype, vocab_size, threads))
    totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "supervised")}
    return {"documents": len(rows["document"]), "entries": ledger, "shards": shards, **totals}, tool_calls


def _shown(chunks: Chunks, progress: Progress, name: str, done: int, total: int) -> Chunks:
    for tokens, mask in chunks:
        yield tokens, mask
        done += len(tokens)
        progress(name, done, total, "tokens")


def _tool_calls(entries: list[PlannedEntry], rows: Columns, documents: RenderedDocuments) -> dict[str, Any]:
    """How the recorded outputs of tool calls compare with the calculator's: counts per entry with any, and a list.

    `calls` leaves out those of other tools, which the ledger counts.
    """
    places = np.flatnonzero(np.isin(rows["document"], np.array(list(documents.mismatches), dtype=np.int64)))
    mismatches = [(i, found) for i in places.tolist() for found in documents.mismatches[int(rows["document"][i])]]
    counts = {}
    for number, planned in enumerate(entries):
        of_entry = rows["document"][rows["entry"] == number]
        num_calls = int(documents.num_tool_calls[of_entry].sum(dtype=np.int64))
        num_calls -= documents.tallied(of_entry).get("other_tools", 0)
        if num_calls:
            kinds = Counter(found.kind for i, found in mismatches if rows["entry"][i] == number)
            entry = planned.entry
            counts[str(number)] = {"task": entry.task, "name": entry.name, "calls": num_calls, **kinds}
    listed = [
        {"entry": int(rows["entry"][i]), "row": int(rows["row"][i]), **found._asdict()}
        for i, found in mismatches[:MAX_LISTED_CALLS]
    ]
    return {"entries": counts, "mismatches": len(mismatches), "listed": listed}


def _ledger(
    entries: list[PlannedEntry], rows: Columns, documents: RenderedDocuments, drop_reasons: np.ndarray
) -> list[dict[str, Any]]:
    """Per entry: rows read, documents, tokens, supervised, truncated, tokens lost, dropped by reason, tallies."""
    ledger = []
    for number, planned in enumerate(entries):
        of_entry = rows["entry"] == number
        reasons = drop_reasons[of_entry]
        kept = rows["document"][of_entry][reasons == 0]
        tokens = int(documents.num_tokens[kept].sum(dtype=np.int64))
        dropped = {reason: int((reasons == i).sum()) for i, reason in enumerate(DROP_REASONS) if i}
        if not dropped["contaminated"]:  # builds that drop none have no such line, as before there was a firewall
            del dropped["contaminated"]
        line = {
            "entry": number,
            **{key: getattr(planned.entry, key) for key in ("task", "name", "subset", "split")},
            "source": planned.source.name,
            "rows": len(reasons),
            "documents": len(kept),
            "tokens": tokens,
            "supervised": int(documents.num_supervised[kept].sum(dtype=np.int64)),
            "truncated": int(documents.truncated[kept].sum()),
            "tokens_lost": int(documents.original_tokens[kept].sum(dtype=np.int64)) - tokens,
            "dropped": dropped,
            "merged": 0,
        }
        ledger.append(line | documents.tallied(kept))
    return ledger


def write_shard(
    folder: Path,
    number: int,
    chunks: Chunks,
    lengths: np.ndarray,
    index: Iterable[pa.Table],
    dtype: np.dtype,
    vocab_size: int,
    threads: Executor | None = None,
) -> dict[str, Any]:
    """Write one shard from (ids, mask) chunks in document order and tables of the index; return its manifest record.

    With `threads` the index is written alongside the other files: 0.3 of the 0.5 s that 14 M tokens take.
    ids may have any integer dtype: they are range-checked before the cast, because numpy silently wraps 65,536 to 0.
    Files are written, not memory-mapped: a full disk is then an OSError and not a SIGBUS.
    """
    paths = {kind: folder / name.format(number) for kind, name in FILE_NAMES.items()}
    writing = threads.submit(_write_index, paths["index"], index) if threads else None
    num_tokens, num_supervised = int(lengths.sum()), 0
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8")
    with paths["tokens"].open("wb") as tokens_file, paths["mask"].open("wb") as mask_file:
        if not writing:
            _write_index(paths["index"], index)
        tokens_file.write(npy_header(dtype.str, num_tokens))
        mask_file.write(npy_header("|u1", num_tokens))
        for ids, mask in chunks:
            check_ids(ids, min(vocab_size, np.iinfo(dtype).max + 1))
            tokens_file.write(ids.astype(dtype, copy=False).data)
            mask_file.write(mask.data)
            num_supervised += int(np.count_nonzero(mask))
        assert mask_file.tell() == HEADER_BYTES + num_tokens, f"{folder.name}: not the tokens that lengths add up to"
    paths["offsets"].write_bytes(npy_header("<i8", len(offsets)) + offsets.tobytes())
    if writing:
        writing.result()
    files = {}
    for kind, path in paths.items():
        sync(path)
        files[kind] = {"file": path.name, "sha256": file_sha256(path), "bytes": path.stat().st_size}
    return {"documents": len(lengths), "tokens": num_tokens, "supervised": num_supervised, "files": files}


def _write_index(path: Path, index: Iterable[pa.Table]) -> None:
    import pyarrow.parquet as pq

    schema = index_schema()
    with pq.ParquetWriter(path, schema, compression="zstd", version="2.6") as writer:
        for table in index:
            writer.write_table(table.cast(schema), row_group_size=INDEX_ROWS)
