"""All rendered documents of a build, in source and row order: views of the work units, after the recipe's policies."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from chatdata.arrow import list_to_arrow, strings_to_arrow, to_arrow
from chatdata.document import INDEX_COUNTS, Span, blocks_of
from chatdata.errors import BuildError, ConversationError
from chatdata.recipe import Recipe
from chatdata.render.batch import SPAN_DTYPE, Mismatch, RenderedBatch, digests_of
from chatdata.render.contract import Rules, check_documents, raise_defect
from chatdata.render.pieces import INVALID, TALLIES
from chatdata.render.spans import untrained_index
from chatdata.tokenizer.bpe import Tokenizer

GATHER_TOKENS = 1 << 22  # copied out of the units at a time: 8 MB of tokens, 4 MB of mask
# drop_reason counts in this tuple; 0: kept
DROP_REASONS = ("", "overflow", "zero_supervised", "invalid", "contaminated")


class RowMap(NamedTuple):
    """Where the rows of one source are in a build.

    row_at: int32 [rows], task position → row. document_of: int32 [rows], row → document of the build, -1 for none.
    """

    row_at: np.ndarray
    document_of: np.ndarray


class RenderedDocuments:
    """Columns over all documents, [num_documents] each.

    num_tokens, num_supervised and digests are those after any cut; original_tokens is the length before.
    A document takes 50 bytes of memory, 54 if any is cut, and 8 in its RowMap; tokens, mask and spans stay on disk.
    mismatches, invalid: by document; few have any. tally_document (int32), tally_kind (uint8, place in TALLIES) and
    tally_number (uint32) are columns over all tallies.
    """

    def __init__(self, blocks: Sequence[RenderedBatch], recipe: Recipe, where: Callable[[int], str]) -> None:
        """`where(document)` names a document's source and row in errors.

        Raises BuildError or ConversationError where a policy of the recipe is "error".
        """
        self._blocks = blocks
        self._first = np.cumsum([0, *(len(block.num_tokens) for block in blocks)])  # document where a block starts
        self.original_tokens = np.concatenate([block.num_tokens for block in blocks])
        self.num_supervised = np.concatenate([block.num_supervised for block in blocks])
        self.num_turns = np.concatenate([block.num_turns for block in blocks])
        self.num_tool_calls = np.concatenate([block.num_tool_calls for block in blocks])
        self.untrained_turns = np.concatenate([block.untrained_turns for block in blocks])
        self.digests = np.concatenate([block.digests for block in blocks])
        num_tallies = np.concatenate([block.num_tallies for block in blocks])
        self.tally_document = np.repeat(np.arange(len(num_tallies), dtype=np.int32), num_tallies)
        tallies = [block.tallies for block in blocks]
        self.tally_kind, self.tally_number = (np.concatenate([of[key] for of in tallies]) for key in ("kind", "number"))
        self._num_spans = np.concatenate([block.num_spans for block in blocks])
        self._token_starts = np.concatenate([_starts(block.num_tokens) for block in blocks])  # within the block
        self._span_starts = np.concatenate([_starts(block.num_spans) for block in blocks])
        self.num_tokens = self.original_tokens
        self.drop_reason = np.zeros(len(self.num_tokens), dtype=np.uint8)
        self.truncated = np.zeros(len(self.num_tokens), dtype=bool)
        self.where = where
        self.mismatches: dict[int, list[Mismatch]] = {}
        self.invalid: dict[int, str] = {}  # why the row cannot be used
        for block, first in zip(blocks, self._first.tolist(), strict=False):
            starts = _starts(block.num_notes)
            for i in np.flatnonzero(block.num_notes).tolist():
                texts = block.notes[int(starts[i]) : int(starts[i] + block.num_notes[i])]
                for kind, *note in (json.loads(str(text)) for text in texts):
                    if kind == INVALID:
                        self.invalid[first + i] = note[0]
                    else:
                        self.mismatches.setdefault(first + i, []).append(Mismatch(kind, *note))
        self._apply_policies(recipe)

    def _apply_policies(self, recipe: Recipe) -> None:
        self.drop_reason[list(self.invalid)] = DROP_REASONS.index("invalid")
        limit = recipe.max_tokens
        if limit is not None and recipe.overflow != "keep":
            over = np.flatnonzero(self.original_tokens > limit)
            if recipe.overflow == "error" and len(over):
                where, length = self.where(int(over[0])), int(self.original_tokens[over[0]])
                raise BuildError(f'{where}: {length:,} tokens, over max_tokens = {limit:,} (overflow = "error")')
            if recipe.overflow == "drop":
                self.drop_reason[over] = DROP_REASONS.index("overflow")
            else:
                self._truncate(over, limit)
        if recipe.zero_supervised != "keep":
            unsupervised = np.flatnonzero((self.num_supervised == 0) & (self.drop_reason == 0))
            if recipe.zero_supervised == "error" and len(unsupervised):
                where = self.where(int(unsupervised[0]))
                raise ConversationError(f'{where}: no supervised token is left (zero_supervised = "error")')
            self.drop_reason[unsupervised] = DROP_REASONS.index("zero_supervised")

    def _truncate(self, documents: np.ndarray, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; no end token is added."""
        self.num_tokens = np.minimum(self.original_tokens, num_tokens)
        self.truncated[documents] = True
        for document in documents.tolist():
            tokens, mask = self.gather(np.array([document]))
            self.num_supervised[document] = np.count_nonzero(mask)
            self.digests[document] = digests_of(tokens, mask, np.array([num_tokens]))[0]

    def tallied(self, documents: np.ndarray) -> dict[str, int]:
        """Sums of the tallies of these documents, which may repeat: those that are not 0, by name."""
        times = np.bincount(documents, minlength=len(self.num_tokens))[self.tally_document]
        sums = np.bincount(self.tally_kind, weights=self.tally_number * times, minlength=len(TALLIES))
        return {name: int(total) for name, total in zip(TALLIES, sums, strict=True) if total}

    def blocks(self) -> Iterator[tuple[int, RenderedBatch]]:
        """(number of the first document, documents) of every record batch, before any cut."""
        return zip(self._first.tolist(), self._blocks, strict=False)

    def chunks(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, mask) of the chosen documents back to back, about GATHER_TOKENS at a time."""
        for first, last in blocks_of(self.num_tokens[chosen], GATHER_TOKENS):
            yield self.gather(chosen[first:last])

    def gather(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask) of the chosen documents back to back."""
        places = self._places(chosen, self._token_starts, self.num_tokens)
        columns = [block.tokens for block in self._blocks], [block.mask for block in self._blocks]
        tokens, mask = (np.concatenate([of[block][start:stop] for block, start, stop in places]) for of in columns)
        return tokens, mask

    def _places(self, chosen: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> list[tuple[int, int, int]]:
        block = np.searchsorted(self._first, chosen, side="right") - 1
        start = starts[chosen]
        return list(zip(block.tolist(), start.tolist(), (start + counts[chosen]).tolist(), strict=True))

    def index_tables(
        self, chosen: np.ndarray, first: int, columns: dict[str, np.ndarray], task_names: list[str], num_rows: int
    ) -> Iterator[pa.Table]:
        """The index of the `chosen` documents, `num_rows` at a time, numbered from `first` on within their split.

        columns: `row`, `task_position` and `entry` of each. task_names: the task of each entry.
        """
        names = list(dict.fromkeys(task_names))
        task_of_entry = np.array([names.index(name) for name in task_names], dtype=np.int32)
        for start in range(0, len(chosen), num_rows):
            part = slice(start, start + num_rows)
            documents, entries = chosen[part], columns["entry"][part]
            spans, num_spans = self.spans(documents)
            fields = [to_arrow(spans[name]) for name in Span._fields]
            structs = pa.StructArray.from_arrays([*fields[:-1], fields[-1].cast(pa.bool_())], Span._fields)
            table = {
                "doc": to_arrow(np.arange(first + start, first + start + len(documents))),
                **{name: to_arrow(columns[name][part]) for name in ("row", "task_position")},
                "task": pa.DictionaryArray.from_arrays(to_arrow(task_of_entry[entries]), strings_to_arrow(names)),
                "entry": to_arrow(entries.astype(np.int16)),
                **{name: to_arrow(getattr(self, name)[documents].astype(np.int32)) for name in INDEX_COUNTS},
                "truncated": to_arrow(self.truncated[documents].view(np.uint8)).cast(pa.bool_()),
                "digest": to_arrow(self.digests[documents]),
                "spans": list_to_arrow(structs, num_spans),
            }
            yield pa.table(table)

    def spans(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spans of the chosen documents (SPAN_DTYPE), clipped where a document is cut, and how many each has."""
        places = self._places(chosen, self._span_starts, self._num_spans)
        # as bytes: structures are joined field by field, slowly
        parts = [block.spans.view(f"V{SPAN_DTYPE.itemsize}") for block in self._blocks]
        spans = np.concatenate([parts[block][start:stop] for block, start, stop in places]).view(SPAN_DTYPE)
        document = np.repeat(np.arange(len(chosen)), self._num_spans[chosen])
        left = self.num_tokens[chosen][document] - spans["start"].astype(np.int64)  # tokens from the span's start on
        kept = left > 0
        spans["length"] = np.minimum(spans["length"], np.maximum(left, 0))
        return spans[kept], np.bincount(document[kept], minlength=len(chosen))


def check_cut(documents: RenderedDocuments, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Hold truncated documents to the contract; whole ones were held to it when they were rendered."""
    words = {"overflow": "truncate", "chat_format": recipe.chat_format}
    rules = Rules(tokenizer.special_ids, tokenizer.vocab_size, recipe.stage, recipe.max_tokens, **words)
    cut = np.flatnonzero(documents.truncated)
    for first, last in blocks_of(documents.num_tokens[cut], GATHER_TOKENS):
        part = cut[first:last]
        offsets = np.concatenate([[0], np.cumsum(documents.num_tokens[part], dtype=np.int64)])
        untrained = untrained_index(*documents.spans(part), documents.untrained_turns[part])
        index = {"truncated": documents.truncated[part], **untrained}
        raise_defect(check_documents(*documents.gather(part), offsets, index, rules), part, documents.where)


def _starts(counts: np.ndarray) -> np.ndarray:
    return (np.cumsum(counts, dtype=np.int64) - counts).astype(np.int32)  # a block is an Arrow batch: below 2^31
