"""From rendered documents to the shards of a split: which documents stay, the ledger, the results of tool calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.document import blocks_of
from chatdata.errors import BuildError
from chatdata.progress import Progress
from chatdata.render.batch import OUTCOMES
from chatdata.render.documents import DROP_REASONS, RenderedDocuments
from chatdata.shards.write import INDEX_ROWS, MAX_SHARD_TOKENS, write_shard
from chatdata.sources.find import PlannedEntry
from chatdata.tokenizer.bpe import Tokenizer

MAX_LISTED_CALLS = 1_000  # mismatches listed in report.json, 100 bytes each; all of them are counted


def write_split(
    folder: Path,
    entries: list[PlannedEntry],
    rows: dict[str, np.ndarray],
    documents: RenderedDocuments,
    contaminated: np.ndarray,
    tokenizer: Tokenizer,
    progress: Progress | None,
    threads: Executor | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a split into the new `folder`; return its part of the manifest, and of the report's `tool_calls`.

    rows: columns as plan.rows_in_order gives them. contaminated: int64 [n], numbers of documents to leave out.
    threads: the files of a shard are written side by side.
    Raises BuildError if the policies leave no document.
    """
    reasons = documents.drop_reason[rows["document"]]
    reasons[np.isin(rows["document"], contaminated)] = DROP_REASONS.index("contaminated")
    ledger = _ledger(entries, rows, documents, reasons)
    # after the shuffle: what is dropped does not change the order of the others
    rows = {key: values[reasons == 0] for key, values in rows.items()}
    if not len(rows["document"]):
        raise BuildError(f"{folder.name}: the recipe's policies drop all {len(reasons):,} documents; nothing to write")
    tool_calls = _tool_calls(entries, rows, documents)
    folder.mkdir()
    names = [planned.entry.task for planned in entries]
    lengths, shards = documents.num_tokens[rows["document"]].astype(np.int64), []
    for number, (first, last) in enumerate(blocks_of(lengths, MAX_SHARD_TOKENS)):
        chosen = rows["document"][first:last]
        chunks = documents.chunks(chosen)
        if progress:
            done, total = int(lengths[:first].sum()), int(lengths.sum())
            chunks = _shown(chunks, progress, f"write {folder.name}", done, total)
        columns = {key: values[first:last] for key, values in rows.items()}
        index = documents.index_tables(chosen, first, columns, names, INDEX_ROWS)
        dtype, vocab_size = tokenizer.dtype, tokenizer.vocab_size
        shards.append(write_shard(folder, number, chunks, lengths[first:last], index, dtype, vocab_size, threads))
    totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "supervised")}
    return {"documents": len(rows["document"]), "entries": ledger, "shards": shards, **totals}, tool_calls


def _shown(
    chunks: Iterator[tuple[np.ndarray, np.ndarray]], progress: Progress, name: str, done: int, total: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for tokens, mask in chunks:
        yield tokens, mask
        done += len(tokens)
        progress(name, done, total, "tokens")


def _tool_calls(
    entries: list[PlannedEntry], rows: dict[str, np.ndarray], documents: RenderedDocuments
) -> dict[str, Any]:
    """How the recorded outputs of tool calls compare with the calculator's: counts per entry with any, and a list."""
    mismatches = documents.mismatches(rows["document"])
    counts = {}
    for number, planned in enumerate(entries):
        num_calls = int(documents.num_tool_calls[rows["document"][rows["entry"] == number]].sum(dtype=np.int64))
        if num_calls:
            kinds = Counter(found.kind for i, found in mismatches if rows["entry"][i] == number)
            by_kind = {kind: kinds[kind] for kind in OUTCOMES if kinds[kind]}
            counts[str(number)] = {"task": planned.entry.task, "calls": num_calls, **by_kind}
    listed = [
        {"entry": int(rows["entry"][i]), "row": int(rows["row"][i]), **found._asdict()}
        for i, found in mismatches[:MAX_LISTED_CALLS]
    ]
    return {"entries": counts, "mismatches": len(mismatches), "listed": listed}


def _ledger(
    entries: list[PlannedEntry], rows: dict[str, np.ndarray], documents: RenderedDocuments, drop_reasons: np.ndarray
) -> list[dict[str, Any]]:
    """Per entry: rows read, documents, tokens, supervised, truncated, tokens lost, dropped by reason."""
    ledger = []
    for number, planned in enumerate(entries):
        of_entry = rows["entry"] == number
        reasons = drop_reasons[of_entry]
        kept = rows["document"][of_entry][reasons == 0]
        tokens = int(documents.num_tokens[kept].sum(dtype=np.int64))
        dropped = {reason: int((reasons == i).sum()) for i, reason in enumerate(DROP_REASONS) if i}
        if not dropped["contaminated"]:  # builds that drop none have no such line, as before there was a firewall
            del dropped["contaminated"]
        ledger.append(
            {
                "entry": number,
                "task": planned.entry.task,
                "subset": planned.entry.subset,
                "split": planned.entry.split,
                "source": planned.source.name,
                "rows": len(reasons),
                "documents": len(kept),
                "tokens": tokens,
                "supervised": int(documents.num_supervised[kept].sum(dtype=np.int64)),
                "truncated": int(documents.truncated[kept].sum()),
                "tokens_lost": int(documents.original_tokens[kept].sum(dtype=np.int64)) - tokens,
                "dropped": dropped,
            }
        )
    return ledger
