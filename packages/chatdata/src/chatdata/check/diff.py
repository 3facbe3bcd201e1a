"""`chatdata diff A B`: what differs between two builds, the causes first (recipe, sources), then the effects.

Documents are compared by digest, so a build of a million documents is compared without reading a token. Equal digests
are paired first (of several copies, the one of the same row and entry). A (task, row, entry) that is then left on both
sides is the same row with other tokens or another mask; every other document is only in a or only in b.
"""

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

import numpy as np
import polars as pl

from chatdata.check.verify import hash_problems
from chatdata.document import INDEX_COUNTS, Document
from chatdata.errors import FormatError, printable
from chatdata.progress import no_progress
from chatdata.shards.read import Build, Split

SHOWN_DOCUMENTS = 3
CONTEXT_TOKENS = 6  # before and after the first token that differs
ABSENT = "absent"
MAX_ALIGNED = 500  # items of a list; aligning takes quadratic time, and `epochs = 30_000` makes that many
TOTALS = ("documents", "tokens", "supervised")
_KEY = ["task", "row", "entry"]
_SHOWN = ["name", *_KEY]
_COMPARED = (*_KEY, "task_position", *INDEX_COUNTS, "truncated", "spans")


def diff_builds(a: Build, b: Build) -> dict[str, Any]:
    """Everything that differs, as plain data for JSON; `identical` is true if nothing does.

    Raises FormatError if the manifests are equal but a file is not what they say: the builds may differ there.

    recipe, sources, tokenizer, other: [{"key", "a", "b"}]. splits: name → totals and entries of that form, and
    `documents` (see `_diff_documents`), None where only one build has the split or where all files are equal.
    """
    one, two = a.manifest, b.manifest
    found: dict[str, Any] = {"a": str(a.path), "b": str(b.path), "build_id": [one["build_id"], two["build_id"]]}
    found["identical"] = one["build_id"] == two["build_id"]
    if found["identical"]:
        for problem in (problem for build in (a, b) for problem in hash_problems(build, no_progress)):
            raise FormatError(problem)
    parts_a, parts_b = _parts(one), _parts(two)
    found |= {name: _listed(parts_a[name], parts_b[name]) for name in parts_a}
    names = dict.fromkeys([*one["splits"], *two["splits"]])
    differing = [name for name in names if one["splits"].get(name) != two["splits"].get(name)]
    found["splits"] = {name: _diff_split(a, b, name) for name in differing}
    return found


def _listed(a: Any, b: Any) -> list[dict[str, Any]]:
    return [{"key": key, "a": one, "b": two} for key, one, two in differences(a, b)]


def _parts(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without its splits, as the sections of the result."""
    other = {k: v for k, v in manifest.items() if k not in ("recipe", "sources", "tokenizer", "splits", "build_id")}
    sources = _by_name(manifest["sources"])
    return {"recipe": manifest["recipe"], "sources": sources, "tokenizer": manifest["tokenizer"], "other": other}


def _by_name(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Sources by name, their files by name, so that an added source or file does not shift the others."""
    table: dict[str, Any] = {}
    for source in sources:
        name, copy = source["name"], 1
        while name in table:
            copy += 1
            name = f"{source['name']} ({copy})"
        table[name] = source | {"files": {file["name"]: file for file in source["files"]}}
    return table


def _diff_split(a: Build, b: Build, name: str) -> dict[str, Any]:
    one, two = (build.manifest["splits"].get(name) for build in (a, b))
    if one is None or two is None:
        return {"only_in": "b" if one is None else "a", "totals": [], "entries": [], "documents": None}
    files = [[shard["files"] for shard in split["shards"]] for split in (one, two)]
    entries = [{f"entry {e['entry']} ({e['name']})": e for e in split["entries"]} for split in (one, two)]
    return {
        "only_in": None,
        "totals": _listed(*({key: split[key] for key in TOTALS} for split in (one, two))),
        "entries": _listed(*entries),
        "documents": None if files[0] == files[1] else _diff_documents(a[name], b[name]),
    }


def _diff_documents(a: Split, b: Split) -> dict[str, Any]:
    """Counts of documents, and the first ones: `only_a`, `only_b`, `changed` (same row, other tokens or mask), `order`.

    equal: pairs of equal digest. columns: in how many of these pairs each column of the index differs. order: the
    first place where the equal documents come in another order, or None. changed: `same_length` of them have as many
    tokens in both (all of them, if only the mask changed).
    """
    columns = ["doc", "name", *_COMPARED, "digest"]
    one, two = (split.named_index.select(columns).with_columns(pl.col("task").cast(pl.String)) for split in (a, b))
    pairs, rest_a, rest_b = _pair_equal(one, two)
    changed = rest_a.join(rest_b, on=_KEY, how="inner", suffix="_b").unique("doc", keep="first", maintain_order=True)
    changed = changed.unique("doc_b", keep="first", maintain_order=True).sort("doc")
    only_a = rest_a.join(changed, on="doc", how="anti").sort("doc")
    only_b = rest_b.join(changed, left_on="doc", right_on="doc_b", how="anti").sort("doc")
    same_length = int((changed["num_tokens"] == changed["num_tokens_b"]).sum())
    rows = changed.head(SHOWN_DOCUMENTS).to_dicts()
    first = [_parting(a, b, row["doc"], row["doc_b"]) | {key: row[key] for key in _SHOWN} for row in rows]
    return {
        "equal": len(pairs),
        "columns": _column_differences(one, two, pairs),
        "order": _order_difference(one, two, pairs),
        "changed": _counted(changed) | {"same_length": same_length, "first": first},
        "only_a": _counted(only_a),
        "only_b": _counted(only_b),
    }


def _pair_equal(one: pl.DataFrame, two: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """doc_a, doc_b (UInt32) of equal digest: first those of the same row and entry, then the copies that are left; and
    what is left of both."""
    pairs = []
    for key in (["digest", *_KEY], ["digest"]):
        copy = pl.col("doc").cum_count().over(key).alias("copy")
        left, right = (index.select("doc", *key, copy) for index in (one, two))
        pairs.append(left.join(right, on=[*key, "copy"], suffix="_b").select("doc_b", doc_a="doc"))
        one = one.join(pairs[-1], left_on="doc", right_on="doc_a", how="anti")
        two = two.join(pairs[-1], left_on="doc", right_on="doc_b", how="anti")
    return pl.concat(pairs).sort("doc_a").cast(pl.UInt32), one, two


def _column_differences(one: pl.DataFrame, two: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, int]:
    one, two = one[pairs["doc_a"]], two[pairs["doc_b"]]
    counts = {name: int((one[name] != two[name]).sum()) for name in _COMPARED}
    return {name: count for name, count in counts.items() if count}


def _order_difference(one: pl.DataFrame, two: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, Any] | None:
    """By digest, not by pair: two copies of one document that changed places do not change the stream."""
    one, two = one[pairs["doc_a"]], two[pairs["doc_b"].sort()]
    differs = np.flatnonzero((one["digest"] != two["digest"]).to_numpy())
    if not len(differs):
        return None
    rows = (index.select(["doc", *_SHOWN]).row(int(differs[0]), named=True) for index in (one, two))
    return {"documents": len(differs), **dict(zip("ab", rows, strict=True))}


def _counted(index: pl.DataFrame) -> dict[str, Any]:
    first = index.select(["doc", *_SHOWN]).head(SHOWN_DOCUMENTS).to_dicts()
    return {"count": len(index), "tasks": dict(index["name"].value_counts(sort=True).rows()), "first": first}


def _parting(a: Split, b: Split, doc_a: int, doc_b: int) -> dict[str, Any]:
    """Where two documents first differ: the position, what differs there, and a few tokens around it on both sides."""
    one, two = a[doc_a], b[doc_b]
    length = min(len(one), len(two))
    tokens, mask = one.tokens[:length] != two.tokens[:length], one.mask[:length] != two.mask[:length]
    position = int(np.argmax(tokens | mask)) if (tokens | mask).any() else length
    what = "length" if position == length else "tokens" if tokens[position] else "mask"
    only = "mask" if len(one) == len(two) and not tokens.any() else "tokens"
    sides = {side: _around(document, position) for side, document in (("a", one), ("b", two))}
    return {"doc_a": doc_a, "doc_b": doc_b, "differs": only, "position": position, "first": what, **sides}


def _around(document: Document, position: int) -> dict[str, Any]:
    part = slice(max(0, position - CONTEXT_TOKENS), position + CONTEXT_TOKENS + 1)
    piece = Document(document.tokens[part], document.mask[part], tokenizer=document.tokenizer)
    text = "".join(f"⟦{run}⟧" if supervised else run for supervised, run in piece.runs())
    return {"num_tokens": len(document), "ids": piece.tokens.tolist(), "mask": piece.mask.tolist(), "text": text}


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for everything that differs: `("train[3].rows", 2000, 3000)`.

    Items of lists are numbered as in `a` (new ones as in `b`); an item that only one list has is paired with ABSENT
    and does not shift the others: `("train[2]", ABSENT, {…})`.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{where}.{key}" if where else str(key)
            yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), inner)
    elif isinstance(a, list) and isinstance(b, list):
        for i, j in _aligned(a, b):
            one, two = ABSENT if i is None else a[i], ABSENT if j is None else b[j]
            yield from differences(one, two, f"{where}[{j if i is None else i}]")
    elif a != b or type(a) is not type(b):
        yield where, a, b


def _aligned(a: list[Any], b: list[Any]) -> Iterator[tuple[int | None, int | None]]:
    """Pairs of places: equal items with each other, changed ones between them in order, None for items left over."""
    blocks: Sequence[tuple[str, int, int, int, int]] = [("replace", 0, len(a), 0, len(b))]
    if max(len(a), len(b)) <= MAX_ALIGNED:
        blocks = SequenceMatcher(None, [repr(x) for x in a], [repr(x) for x in b], autojunk=False).get_opcodes()
    for _, first_a, last_a, first_b, last_b in blocks:
        yield from zip_longest(range(first_a, last_a), range(first_b, last_b))


def lines_of(found: dict[str, Any]) -> list[str]:
    """The result of `diff_builds` for people, a line each."""
    if found["identical"]:
        return [f"identical: build {found['build_id'][0][:12]}"]
    ids = zip("ab", found["build_id"], strict=True)
    lines = [f"{side}: {found[side]} (build {build_id[:12]})" for side, build_id in ids]
    for name in ("recipe", "sources", "tokenizer", "other"):
        lines += _section(name if name != "other" else "manifest", found[name])
    for name, split in found["splits"].items():
        if split["only_in"]:
            lines += ["", f"{name}: only in {split['only_in']}"]
        lines += _section(name, split["totals"] + split["entries"])
        lines += _document_lines(name, split["documents"]) if split["documents"] else []
    return lines


def _section(title: str, listed: list[dict[str, Any]]) -> list[str]:
    if not listed:
        return []
    return ["", title, *(f"  {line['key']}: {_value(line['a'])} → {_value(line['b'])}" for line in listed)]


def _value(value: Any) -> str:
    if value is None or value == ABSENT:
        return "none" if value is None else "–"
    text = f"{value:,}" if type(value) is int else printable(_toml(value)).replace("\n", "\\n")
    return text if len(text) <= 100 else text[:97] + "..."


def _toml(value: Any) -> str:
    """A table or a list as a recipe would have it, without unset keys; anything else as str."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items() if inner is not None) + "}"
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else str(value)


def _document_lines(name: str, found: dict[str, Any]) -> list[str]:
    changed, order = found["changed"], found["order"]
    lines = ["", f"{name} documents", f"  equal: {found['equal']:,}"]
    if order:
        there = "; ".join(f"{side}: {_place(order[side])}" for side in "ab")
        lines.append(f"  in another order: {order['documents']:,} of the equal ones; first {there}")
    if changed["count"]:
        same_length = f"{changed['same_length']:,} of them of the same length"
        lines.append(f"  same row, other tokens or mask: {changed['count']:,}{_tasks(changed)}, {same_length}")
    for row in changed["first"]:
        only = ", only the mask" if row["differs"] == "mask" else ""
        where = f"{row['name']} row {row['row']} (a document {row['doc_a']}, b document {row['doc_b']})"
        lines.append(f"    {where}{only}: {row['first']} from position {row['position']:,} on")
        for side in "ab":
            text = printable(row[side]["text"], keep="")
            lines.append(f"      {side}: {row[side]['num_tokens']:,} tokens, … {text} …")
    for side in "ab":
        only = found[f"only_{side}"]
        if only["count"]:
            first = "; ".join(_place(row) for row in only["first"])
            lines.append(f"  only in {side}: {only['count']:,}{_tasks(only)}; first {first}")
    for column, count in found["columns"].items():
        lines.append(f"  equal, but other {column} in the index: {count:,}")
    if len(lines) == 3:
        lines.append("  all equal: only the files' encoding differs (another pyarrow wrote the index)")
    return lines


def _place(row: dict[str, Any]) -> str:
    return f"document {row['doc']} ({row['name']} row {row['row']}, entry {row['entry']})"


def _tasks(found: dict[str, Any]) -> str:
    return f" ({', '.join(f'{task} {count:,}' for task, count in found['tasks'].items())})"
