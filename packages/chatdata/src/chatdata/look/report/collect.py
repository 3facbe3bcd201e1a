"""The numbers of a report: plain values that JSON can hold, all exact, none sampled.

Shards are read in blocks of whole documents, so memory use does not grow with the build.
"""

from typing import Any

import numpy as np

from chatdata.document import SPAN_ROLES, blocks_of
from chatdata.errors import FormatError
from chatdata.look.stats import build_stats
from chatdata.shards.index import index_arrays, read_index
from chatdata.shards.read import Build, Split
from chatdata.tokenizer.bpe import Tokenizer

BLOCK_TOKENS = 1 << 22  # tokens in memory at once: the running sum of their mask takes 32 MiB
MAX_BINS = 40  # of a histogram: bars of 4 pixels or more on a phone
CURVE_POINTS = 200
UNUSED_LISTED = 200
RARE = 10  # a token seen fewer times than this has hardly been trained
# bos, assistant_start and assistant_end are in no span; only the last is supervised
ROLES = (*SPAN_ROLES, "markers")


def report_numbers(build: Build) -> dict[str, Any]:
    """Everything a report counts.

    build_id, stage, `splits` (per split: documents, tokens, supervised, the manifest's ledger as `entries`, and per
    task what `chatdata stats` says with `histogram` and `roles`) and `vocabulary` (see `vocabulary_numbers`).
    Raises FormatError if tokens, mask and index contradict each other or the manifest: `open_build` reads no tokens.
    """
    stats, splits, counts = build_stats(build), {}, {}
    for name, split in build.splits.items():
        contents = build.manifest["splits"][name]
        try:
            counts[name], roles = count_split(split)
        except (IndexError, ValueError) as error:  # ids, entries or spans out of range, or sums that differ
            damage = f"{build.path / name}: damaged: {error}; `chatdata verify --level full` lists the damage"
            raise FormatError(damage) from None
        lengths, entry = np.diff(split.offsets), split.index["entry"].to_numpy()
        tasks = stats["splits"][name]
        for row in tasks:
            entries = [e["entry"] for e in contents["entries"] if all(e[key] == row[key] for key in ("name", "task"))]
            tokens, supervised = roles[:, entries].sum(axis=1).tolist()
            row["roles"] = {
                role: {"tokens": tokens[i], "supervised": supervised[i]} for i, role in enumerate(ROLES) if tokens[i]
            }
            row["histogram"] = histogram(lengths[np.isin(entry, entries)])
        totals = {key: contents[key] for key in ("documents", "tokens", "supervised")}
        splits[name] = {**totals, "entries": contents["entries"], "tasks": tasks}
    vocabulary = vocabulary_numbers(build.tokenizer, counts)
    return {"build_id": stats["build_id"], "stage": stats["stage"], "splits": splits, "vocabulary": vocabulary}


def count_split(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Occurrences of each id, int64 [vocab_size], and tokens and supervised tokens by entry and role,
    int64 [2, entries, roles]: roles as in ROLES.

    Raises IndexError or ValueError if an id, a span or an entry is out of range, or sums differ from the manifest's.
    """
    contents = split.build.manifest["splits"][split.name]
    vocab_size, num_entries = split.build.manifest["tokenizer"]["vocab_size"], len(contents["entries"])
    occurrences = np.zeros(vocab_size, dtype=np.int64)
    by_role = np.zeros((2, num_entries, len(ROLES)), dtype=np.int64)
    for number in range(len(split.shards)):
        index = index_arrays(read_index(split.path("index", number)))
        offsets, entry = split.map("offsets", number), index["entry"].astype(np.int64)
        role_of_span = (np.repeat(entry, index["num_spans"]), index["span_role"])
        np.add.at(by_role[0], role_of_span, index["span_length"])
        np.add.at(by_role[1], role_of_span, index["span_length"] * index["span_trained"])
        for first, last in blocks_of(np.diff(offsets), BLOCK_TOKENS):
            part, bounds = slice(offsets[first], offsets[last]), offsets[first : last + 1] - offsets[first]
            occurrences += np.bincount(split.map("tokens", number)[part], minlength=vocab_size)
            supervised = np.concatenate([[0], np.cumsum(split.map("mask", number)[part] != 0)])  # before each token
            np.add.at(by_role[0, :, -1], entry[first:last], np.diff(bounds))
            np.add.at(by_role[1, :, -1], entry[first:last], np.diff(supervised[bounds]))
    by_role[:, :, -1] -= by_role[:, :, :-1].sum(axis=2)  # tokens of a document that are in no span
    for key, found in zip(("tokens", "supervised"), by_role.sum(axis=2).tolist(), strict=True):
        if found != [line[key] for line in contents["entries"]]:
            raise ValueError(f"{key} per entry differ from the manifest")
    return occurrences, by_role


def histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Documents by length: `bins` of one round `width`, each `from`, `to` (both inclusive) and `documents`; at most
    MAX_BINS.

    One document may be a hundred times as long as all others, so bins end at twice the 99 % quantile and the last one
    takes everything longer.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    end = min(longest, 2 * int(np.quantile(lengths, 0.99, method="inverted_cdf")))
    widths = (step * 10**power for power in range(19) for step in (1, 2, 5))
    width = next(w for w in widths if end // w - shortest // w < MAX_BINS)
    first = shortest // width
    counts = np.bincount(np.minimum(lengths, end) // width - first).tolist()
    starts = range(first * width, end + 1, width)
    bins = [{"from": b, "to": b + width - 1, "documents": n} for b, n in zip(starts, counts, strict=True)]
    bins[-1]["to"] = max(bins[-1]["to"], longest)
    return {"width": width, "bins": bins}


def vocabulary_numbers(tokenizer: Tokenizer, counts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Which tokens of the vocabulary the first split (train) uses, and how often. counts: int64 [vocab_size] per split.

    entries (size of the vocabulary), used, unused, rare (used fewer than RARE times), unused_bytes (how many of the 256
    single bytes), unused_ids (the lowest UNUSED_LISTED of the others: merges are numbered by how common they were in
    the tokenizer's corpus), elsewhere (per other split, tokens that it uses and the first does not), `curve` (rank from
    1, id, count; at most CURVE_POINTS ranks, evenly spaced on a log scale) and `coverage` (rank → occurrences of all
    tokens up to this rank).
    """
    split, *others = counts
    ids = np.array(sorted([*tokenizer.token_bytes, *tokenizer.special_ids.values()]))
    occurrences = counts[split][ids]
    order = np.argsort(-occurrences, kind="stable")
    used = int(np.count_nonzero(occurrences))
    ranks = np.unique(np.geomspace(1, max(used, 1), CURVE_POINTS).round().astype(np.int64))[:used] - 1
    sums = np.cumsum(occurrences[order])
    points = np.stack([ranks + 1, ids[order[ranks]], occurrences[order[ranks]]], axis=1)
    unused = ids[occurrences == 0].tolist()
    unused_bytes = [token_id for token_id in unused if len(tokenizer.token_bytes.get(token_id, b"")) == 1]
    return {
        "split": split,
        "entries": len(ids),
        "used": used,
        "unused": len(unused),
        "rare": int(np.count_nonzero((occurrences > 0) & (occurrences < RARE))),
        "unused_bytes": len(unused_bytes),
        "unused_ids": [token_id for token_id in unused if token_id not in unused_bytes][:UNUSED_LISTED],
        "elsewhere": {name: int(np.count_nonzero(counts[name][ids][occurrences == 0])) for name in others},
        "curve": [dict(zip(("rank", "id", "count"), point, strict=True)) for point in points.tolist()],
        "coverage": {top: int(sums[top - 1]) for top in (10, 100, 1_000, 10_000) if top <= used},
    }
