"""The documents that a report shows, each as lines of segments that a page can style."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from chatdata.document import LINE_ENDS
from chatdata.firewall.listing import FlaggedItem
from chatdata.look.report.html import CONTROLS
from chatdata.shards.read import Build
from chatdata.tokenizer.bpe import Tokenizer

# 400 documents of 6,000 bytes are 2.4 MB of text, at most 12 MB of page: below 15 MB for any build
MAX_SHOWN = 400
MAX_BYTES = 6_000
MAX_FLAGGED, FLAGGED_OF_SET = 12, 4  # scored items shown with a document
FLAGGED = "holds a scored item"
EXTREMES = {FLAGGED: MAX_FLAGGED, "truncated": 4, "longest": 2, "shortest": 2}  # of a task; the rest is by digest


class Segment(NamedTuple):
    """A run of tokens of one style. kind: "supervised" or "plain"; for a special token "supervised chip" or "chip"."""

    kind: str
    text: str


@dataclass(frozen=True)
class ShownDocument:
    """A document of a report: its row of the index, why it was chosen, and its first tokens as lines of segments."""

    split: str
    index: dict[str, Any]
    why: str
    lines: list[list[Segment]]
    tokens_left: int


def first_flagged(build: Build, items: Sequence[FlaggedItem]) -> list[tuple[FlaggedItem, int | None]]:
    """The first FLAGGED_OF_SET `items` of each scored set, at most MAX_FLAGGED, and in which document of train each is
    (None: it was dropped)."""
    sources = [entry["source"] for entry in build.manifest["splits"]["train"]["entries"]]
    index, found = build["train"].index.select("doc", "row", "entry"), []
    by_set = groupby(items, key=lambda item: item.set)  # a listing has them in order
    for item in [item for _, of_set in by_set for item in islice(of_set, FLAGGED_OF_SET)][:MAX_FLAGGED]:
        entries = [i for i, source in enumerate(sources) if source == item.rows[0].source]
        here = index.filter(pl.col("entry").is_in(entries), row=item.rows[0].source_row)
        found.append((item, here["doc"][0] if len(here) else None))
    return found


def shown_documents(build: Build, flagged: Sequence[int] = ()) -> list[ShownDocument]:
    """Documents of every split and task, at most MAX_SHOWN, the task with most tokens first. Deterministic.

    flagged: documents of train to be shown first of their task.
    """
    groups = []
    for name, split in build.splits.items():
        frame = split.named_index.drop("spans").with_columns(pl.col("task").cast(str))
        parts = frame.partition_by("name", "task", maintain_order=True)
        groups += [(name, part) for part in sorted(parts, key=lambda part: -part["num_tokens"].sum())]
    shown = []
    for (name, part), number in zip(groups, quotas([part["digest"].n_unique() for _, part in groups]), strict=True):
        for row, why in choose(part, number, flagged if name == "train" else ()):
            document = build[name][row["doc"]]
            lines, left = lines_of(document.tokens, document.mask, build.tokenizer)
            shown.append(ShownDocument(name, row, why, lines, left))
    return shown


def quotas(sizes: Sequence[int], left: int = MAX_SHOWN) -> list[int]:
    """How many documents to show of tasks with `sizes` documents: small ones whole, the others as evenly as can be."""
    numbers = [0] * len(sizes)
    for rank, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        numbers[i] = min(sizes[i], left // (len(sizes) - rank))
        left -= numbers[i]
    return numbers


def choose(frame: pl.DataFrame, number: int, flagged: Sequence[int] = ()) -> list[tuple[dict[str, Any], str]]:
    """`number` rows of one task's index, no two with equal tokens and mask, and why each was chosen: flagged ones,
    truncated ones, the longest, the shortest, then by digest, which is as good as chance and the same everywhere."""
    rest = frame.unique("digest", keep="first", maintain_order=True).sort("digest")
    picks = {
        FLAGGED: frame.filter(pl.col("doc").is_in(flagged)) if flagged else frame.head(0),
        "truncated": rest.filter("truncated"),
        "longest": rest.sort("num_tokens", descending=True, maintain_order=True),
        "shortest": rest.sort("num_tokens", maintain_order=True),
        "": rest,
    }
    chosen: dict[bytes, tuple[dict[str, Any], str]] = {}
    for why, rows in picks.items():
        wanted = min(number, len(chosen) + EXTREMES.get(why, number))
        for row in rows.head(number).iter_rows(named=True):
            if len(chosen) < wanted:
                chosen.setdefault(row["digest"], (row, why))
    return list(chosen.values())


def lines_of(
    tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, max_bytes: int = MAX_BYTES
) -> tuple[list[list[Segment]], int]:
    """The first tokens as lines (one per message, bos alone), and how many tokens are left.

    tokens and mask are [num_tokens]; the tokens taken decode to at most `max_bytes` bytes.
    """
    names = {token_id: name for name, token_id in tokenizer.special_ids.items()}
    ids = tokens[:max_bytes].tolist()  # every token is a byte or more
    sizes = [len(tokenizer.token_bytes.get(token_id) or names.get(token_id, "")) for token_id in ids]
    num_shown = int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right"))
    lines: list[list[Segment]] = [[]]
    ids, mask = ids[:num_shown], mask[:num_shown]
    special = np.isin(ids, list(names))
    cuts = np.flatnonzero((np.diff(mask) != 0) | special[1:] | special[:-1]) + 1
    # runs of text with equal mask; each special token is a separate run
    for start, stop in pairwise(np.unique([0, *cuts, num_shown]).tolist()):
        supervised, name = bool(mask[start]), names.get(ids[start])
        text = (name or tokenizer.decode(ids[start:stop])).translate(CONTROLS)
        kind = "supervised chip" if name and supervised else "chip" if name else "supervised" if supervised else "plain"
        lines[-1].append(Segment(kind, text))
        if name in LINE_ENDS:
            lines.append([])
    return [line for line in lines if line], len(tokens) - num_shown
