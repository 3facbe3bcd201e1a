"""From rendered documents to the shards of each split: mixture order, policies' ledger, what the tool calls gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatdata.build.mixture import mixture_order
from chatdata.document import shard_bounds
from chatdata.errors import BuildError
from chatdata.progress import Progress
from chatdata.render.documents import DROP_REASONS, RenderedDocuments, RowMap
from chatdata.render.replay import OUTCOMES
from chatdata.shards.write import INDEX_ROWS, MAX_SHARD_TOKENS, write_shard
from chatdata.sources.source import Source

if TYPE_CHECKING:
    from chatdata.build.plan import BuildPlan
    from chatdata.sources.source import PlannedEntry

GATHER_TOKENS = 1 << 22  # gathered at a time: 8 MB of tokens, 4 MB of mask
MAX_LISTED_CALLS = 1_000  # mismatches listed in report.json, 100 bytes each; all of them are counted


def write_splits(
    plan: BuildPlan,
    store: RenderedDocuments,
    row_maps: Mapping[Source, RowMap],
    contaminated: np.ndarray,
    partial: Path,
    report: dict[str, Any],
    progress: Progress | None,
    threads: Executor | None = None,
) -> dict[str, Any]:
    """Write every split below `partial`; return for the manifest, by name, its shards, ledger and totals.

    contaminated: int64 [n], numbers of documents that are left out of train. report: gets `tool_calls` by split.
    threads: files are written side by side. Raises BuildError for a split of which the policies leave nothing.
    """
    splits = {}
    for split, entries in plan.splits.items():
        ranges = [planned.task_positions for planned in entries]
        maps = [row_maps[planned.source] for planned in entries]
        order = mixture_order([len(r) for r in ranges], plan.recipe.seed, plan.recipe.shuffle[split])
        # a column at a time: together they are what a large build needs most memory for
        rows = [row_map.row_at[r.start : r.stop] for row_map, r in zip(maps, ranges, strict=True)]
        chosen = _in_order([row_map.document_of[part] for row_map, part in zip(maps, rows, strict=True)], order)
        table = {
            "row": _in_order(rows, order),
            "position": _in_order([np.arange(r.start, r.stop, dtype=np.int32) for r in ranges], order),
            "entry": _in_order([np.full(len(r), i, dtype=np.int16) for i, r in enumerate(ranges)], order),
        }
        reasons = store.drop_reason[chosen]
        if split == "train":
            reasons[np.isin(chosen, contaminated)] = DROP_REASONS.index("contaminated")
        ledger = _ledger(entries, store, table["entry"], chosen, reasons)
        kept = reasons == 0  # documents removed by a policy are removed after the shuffle
        if not kept.any():
            raise BuildError(f"{split}: the recipe's policies drop all {len(kept):,} documents; nothing to write")
        table = {key: values[kept] for key, values in table.items()}
        (partial / split).mkdir()
        written = _write_shards(plan, store, chosen[kept], table, entries, partial / split, progress, threads)
        splits[split] = {"documents": int(kept.sum()), "entries": ledger, "shards": written}
        splits[split] |= {key: sum(shard[key] for shard in written) for key in ("tokens", "supervised")}
        report["tool_calls"][split] = _tool_calls(entries, store, table, chosen[kept])
    return splits


def _in_order(parts: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)[order]


def _tool_calls(
    entries: list[PlannedEntry], store: RenderedDocuments, table: dict[str, np.ndarray], chosen: np.ndarray
) -> dict[str, Any]:
    """What the tool calls of a split gave when they were worked out again: counts per entry with any, and a list."""
    mismatches = store.mismatches(chosen)
    counts = {}
    for number, planned in enumerate(entries):
        num_calls = int(store.num_tool_calls[chosen[table["entry"] == number]].sum(dtype=np.int64))
        if num_calls:
            kinds = Counter(found.kind for i, found in mismatches if table["entry"][i] == number)
            by_kind = {kind: kinds[kind] for kind in OUTCOMES if kinds[kind]}
            counts[str(number)] = {"task": planned.entry.task, "calls": num_calls, **by_kind}
    listed = [
        {"entry": int(table["entry"][i]), "row": int(table["row"][i]), **found._asdict()}
        for i, found in mismatches[:MAX_LISTED_CALLS]
    ]
    return {"entries": counts, "mismatches": len(mismatches), "listed": listed}


def _write_shards(
    plan: BuildPlan,
    store: RenderedDocuments,
    chosen: np.ndarray,
    table: dict[str, np.ndarray],
    entries: list[PlannedEntry],
    folder: Path,
    progress: Progress | None,
    threads: Executor | None,
) -> list[dict[str, Any]]:
    lengths = store.num_tokens[chosen].astype(np.int64)
    total, records = int(lengths.sum()), []
    names = [planned.entry.task for planned in entries]
    for number, (first, last) in enumerate(shard_bounds(lengths, MAX_SHARD_TOKENS)):
        part = slice(first, last)
        index = (
            store.index_table(chosen[rows], rows.start, {key: values[rows] for key, values in table.items()}, names)
            for start in range(first, last, INDEX_ROWS)
            for rows in [slice(start, min(start + INDEX_ROWS, last))]
        )
        chunks = _gather(store, chosen[part], progress, folder.name, int(lengths[:first].sum()), total)
        dtype, vocab_size = plan.tokenizer.dtype, plan.tokenizer.vocab_size
        records.append(write_shard(folder, number, chunks, lengths[part], index, dtype, vocab_size, threads))
    return records


def _gather(
    store: RenderedDocuments, chosen: np.ndarray, progress: Progress | None, split: str, done: int, total: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, mask) of the chosen documents back to back, about GATHER_TOKENS at a time."""
    for first, last in shard_bounds(store.num_tokens[chosen], GATHER_TOKENS):
        tokens, mask = store.gather(chosen[first:last])
        yield tokens, mask
        done += len(tokens)
        if progress:
            progress(f"write {split}", done, total, "tokens")


def _ledger(
    entries: list[PlannedEntry],
    store: RenderedDocuments,
    numbers: np.ndarray,
    chosen: np.ndarray,
    drop_reasons: np.ndarray,
) -> list[dict[str, Any]]:
    """Per entry: rows read, documents, tokens, supervised, truncated, tokens lost, dropped by reason."""
    ledger = []
    for number, planned in enumerate(entries):
        documents, reasons = chosen[numbers == number], drop_reasons[numbers == number]
        kept = documents[reasons == 0]
        tokens, original = (values[kept].sum(dtype=np.int64) for values in (store.num_tokens, store.original_tokens))
        ledger.append(
            {
                "entry": number,
                "task": planned.entry.task,
                "subset": planned.entry.subset,
                "split": planned.entry.split,
                "source": planned.source.name,
                "rows": len(documents),
                "documents": len(kept),
                "tokens": int(tokens),
                "supervised": int(store.num_supervised[kept].sum(dtype=np.int64)),
                "truncated": int(store.truncated[kept].sum()),
                "tokens_lost": int(original - tokens),
                "dropped": {
                    reason: num_dropped
                    for i, reason in enumerate(DROP_REASONS)
                    # builds that do not drop contaminated documents have no such line, as before there was a firewall
                    if i and ((num_dropped := int((reasons == i).sum())) or reason != "contaminated")
                },
            }
        )
    return ledger
