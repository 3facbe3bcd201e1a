"""`chatdata inspect`: documents in the terminal, supervised text in colour; or one conversation, token by token."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.text import Text

from chatdata.document import IGNORED, Document
from chatdata.errors import ChatdataError, SourceError, UsageError, printable
from chatdata.look.console import console, grid
from chatdata.progress import say_json
from chatdata.render.specification import render_conversation
from chatdata.shards.read import Split, open_build
from chatdata.tokenizer.bpe import Tokenizer

SHOWN_DOCUMENTS = 3
FACTS = ("name", "task", "entry", "row", "task_position", "num_tokens", "num_supervised", "num_turns", "num_tool_calls")
SUPERVISED_STYLE = "bold green"


def document_of_file(path: Path, tokenizer: Tokenizer) -> Document:
    """Render the JSON conversation in a file, or on stdin for `-`. Raises SourceError naming the file."""
    name = "stdin" if str(path) == "-" else str(path)
    try:
        text = sys.stdin.read() if name == "stdin" else path.read_text(encoding="utf-8-sig")
        return render_conversation(tokenizer, json.loads(text))
    except FileNotFoundError:
        raise SourceError(f"{name}: no such file") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{name}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise SourceError(f"{name}: nested too deeply for a conversation") from None
    except json.JSONDecodeError as error:
        raise SourceError(f"{name} line {error.lineno}: not one JSON conversation: {error.msg}") from None
    except ChatdataError as error:
        raise error.at(name) from None


def token_rows(document: Document, stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per token: idx, token, id, mask, and for each stage the input and its target.

    In stage mid, documents follow each other in a stream, so the target of the last token is the first of the next.
    In stage sft the last token is never an input. A target of -100 has no loss.
    """
    ids, mask = document.tokens.tolist(), document.mask.tolist()
    tokens = map(document.tokenizer.decode_token, ids)
    columns: dict[str, Iterable[Any]] = {"idx": range(len(ids)), "token": tokens, "id": ids, "mask": mask}
    if "mid" in stages:
        columns |= {"mid_input": ids, "mid_target": [*ids[1:], *ids[:1]]}
    if "sft" in stages:
        targets = [next_id if supervised else IGNORED for next_id, supervised in zip(ids[1:], mask[1:], strict=True)]
        columns |= {"sft_input": [*ids[:-1], None], "sft_target": [*targets, None]}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def show_tokens(document: Document, stages: tuple[str, ...], as_json: bool) -> None:
    rows = token_rows(document, stages)
    if as_json:
        for row in rows:
            say_json(row)
        return
    idx, token, *others = rows[0]
    lines = grid(idx, token, *others, right=[idx, *others], folded=token)  # a very long token is not cut
    for row in rows:
        cells = ("·" if v is None else repr(v) if key == "token" else str(v) for key, v in row.items())
        lines.add_row(*map(escape, cells), style=SUPERVISED_STYLE if row["mask"] else "")
    out = console()
    out.print(lines)
    if "mid" in stages:
        out.print("mid: the last target is the first token of the next document in the stream", style="dim")
    out.print(f"{len(document)} tokens, {document.num_supervised} supervised", style="dim")


def show_documents(path: Path, split: str, stages: tuple[str, ...], as_json: bool, **chosen: Any) -> None:
    """Print document `doc`, or the first ones of `task`, or the first ones of the split; `chosen` has both keys."""
    build = open_build(path)
    if split not in build.splits:
        raise UsageError(f'{path} has no split "{split}"; it has {", ".join(build.splits)}')
    for i in _chosen(build[split], **chosen):
        document = build[split][i]
        row = build[split].named_index.row(i, named=True)
        if stages:
            show_tokens(document, stages, as_json)
        elif as_json:
            say_json(_facts(row) | {"text": document.text(), "mask": document.mask.tolist()})
        else:
            facts = ((key, value) for key, value in _facts(row).items() if key != "name" or value != row["task"])
            line = " · ".join(f"{key} {value}" for key, value in facts)
            console().print(f"[bold]{split} document {i}[/bold] · {escape(line)}")
            console().print(coloured(document), end="\n\n")


def coloured(document: Document) -> Text:
    """The document for a terminal: supervised text in bold green, the rest dim. Without colour, ⟦ ⟧ mark it."""
    if not console().is_terminal:
        return Text(printable(document.conversation_markup()))
    runs = ((printable(run), SUPERVISED_STYLE if supervised else "dim") for supervised, run in document.runs())
    return Text.assemble(*runs)


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in FACTS} | ({"cut_from": row["original_tokens"]} if row["truncated"] else {})


def _chosen(split: Split, doc: int | None, task: str | None) -> list[int]:
    if doc is not None:
        if not 0 <= doc < len(split):
            raise UsageError(f"--doc {doc}: {split.name} has documents 0 … {len(split) - 1}")
        return [doc]
    if task is None:
        return list(range(min(SHOWN_DOCUMENTS, len(split))))
    tasks, names = (split.named_index[column].cast(str).to_numpy() for column in ("task", "name"))
    found = np.flatnonzero((tasks == task) | (names == task))[:SHOWN_DOCUMENTS].tolist()
    if not found:
        raise UsageError(f"--task {task}: {split.name} has {', '.join(sorted({*tasks, *names}))}")
    return found
