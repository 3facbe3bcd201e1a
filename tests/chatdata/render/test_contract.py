"""A build replays its tool calls, and holds every document to the contract before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from common_form import conversations
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.errors import BuildError
from chatdata.recipe import load_recipe
from chatdata.render import batch
from chatdata.render.contract import Rules, check_documents
from chatdata.render.format import NANOCHAT
from chatdata.render.specification import render_conversation
from chatdata.shards.index import index_arrays, index_schema
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


def tool(call: str, *outputs: str) -> list[dict[str, str]]:
    return [{"type": "python", "text": call}, *({"type": "python_output", "text": text} for text in outputs)]


RECIPE = "stage = 'mid'\nmax_tokens = 40\noverflow = 'truncate'\n[[train]]\ntask = 'conversations'\npath = 'c.jsonl'\n"


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: Tokenizer) -> Callable[[str], dict]:
    """Builds conversations of one answer each; gives report.json."""
    answers = [
        [*tool("1+1", "2"), *tool("2+2", "4.0")],  # one mismatch
        "no tools",
        [*tool("3*3")],  # no output, though the next conversation begins with one in its own answer
        [{"type": "python_output", "text": "9"}, {"type": "text", "text": "x" * 60}, *tool("5*5", "26")],
    ]
    lines = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in answers]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.toml").write_text(RECIPE)

    def run(name: str) -> dict:
        tasks = load_tasks()
        recipe = load_recipe(str(tmp_path / "r.toml"), tasks)
        build(make_build_plan(recipe, tasks, byte_tokenizer, Locations(recipe.folder)), tmp_path / name)
        return json.loads((tmp_path / name / "report.json").read_text())

    return run


def test_a_build_counts_and_lists_them(run: Callable[[str], dict]) -> None:
    for name, cached in (("cold", 0), ("warm", 1)):  # a unit in the cache keeps what its calls gave
        report = run(name)
        assert report["units"]["cached"] == cached
        found = report["tool_calls"]["train"]
        counts = {
            "task": "conversations",
            "name": "conversations",
            "calls": 4,
            "point_zero": 1,
            "different": 1,
            "no_output": 1,
        }
        assert found["entries"] == {"0": counts}
        assert found["mismatches"] == 3
        listed = {
            (line["row"], line["kind"], line["call"], line["recorded"], line["computed"]) for line in found["listed"]
        }
        assert listed == {
            (0, "point_zero", "2+2", "4.0", "4"),
            (2, "no_output", "3*3", "", ""),
            (3, "different", "5*5", "26", "25"),
        }


def test_gsm8k(golden_mid: Path) -> None:
    """7,473 rows: of 23,716 calls, as `shared/` says, none but those written in another way."""
    found = json.loads((golden_mid / "report.json").read_text())["tool_calls"]["train"]
    assert found["entries"] == {"2": {"task": "gsm8k", "name": "gsm8k", "calls": 23_716, "format": 667}}
    assert (found["mismatches"], len(found["listed"])) == (667, 667)


@pytest.mark.parametrize(
    ("role", "problem"),  # whose mask the batch renderer turns round
    [
        ("output", "output_start supervised, position"),
        ("user", "user_start supervised, position 1"),
        ("text", "unsupervised token inside assistant text, position"),
    ],
)
def test_a_renderer_that_breaks_the_contract_writes_nothing(
    run: Callable[[str], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, problem: str
) -> None:
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    span = getattr(NANOCHAT, role)
    broken = replace(NANOCHAT, **{role: replace(span, supervised=not span.supervised)})
    monkeypatch.setattr(batch, "NANOCHAT", broken)
    with pytest.raises(BuildError, match=rf"^c.jsonl line \d: {problem}.*: a defect of chatdata, please report it$"):
        run("broken")
    assert not (tmp_path / "broken").exists()


@given(st.lists(st.tuples(conversations(), st.integers(2, 60)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_what_the_renderer_makes_keeps_the_contract(byte_tokenizer: Tokenizer, chats: list) -> None:
    """Any conversation, whole or cut anywhere, is sound; with any one mask flipped it is not."""
    documents, rows = [], []
    end = byte_tokenizer.special_ids["<|assistant_end|>"]
    for conversation, limit in chats:
        whole = render_conversation(byte_tokenizer, conversation)
        cut = min(limit, len(whole))
        documents.append((whole.tokens[:cut], whole.mask[:cut]))
        spans = [s._replace(length=min(s.length, cut - s.start)) for s in whole.spans if s.start < cut]
        row = {"num_tokens": cut, "num_supervised": int(whole.mask[:cut].sum()), "original_tokens": len(whole)}
        row["num_turns"] = int(np.isin(whole.tokens, [257, 259]).sum())
        row["untrained_turns"] = int((whole.mask[whole.tokens == end] == 0).sum())
        row |= {"num_tool_calls": sum(s.role == 2 for s in whole.spans), "truncated": cut < len(whole)}
        row["digest"] = xxhash.xxh3_128_digest(whole.tokens[:cut].tobytes() + whole.mask[:cut].tobytes())
        row["spans"] = [span._asdict() for span in spans]
        rows.append(row | {"doc": 0, "row": 0, "task_position": 0, "entry": 0, "task": "t"})
    tokens, mask = (np.concatenate([document[i] for document in documents]) for i in (0, 1))
    offsets = np.cumsum([0, *(len(ids) for ids, _ in documents)])
    index = index_arrays(pa.Table.from_pylist(rows, schema=index_schema()))
    rules = Rules(byte_tokenizer.special_ids, 265, "mid")
    cuts = {'length against the recipe\'s overflow = "keep"'}  # every document has a limit of its own here
    assert {finding.kind for finding in check_documents(tokens, mask, offsets, index, rules)} <= cuts
    for place in range(0, len(mask), max(1, len(mask) // 12)):
        flipped = mask.copy()
        flipped[place] ^= 1
        found = [
            finding for finding in check_documents(tokens, flipped, offsets, index, rules) if finding.file == "mask"
        ]
        document = int(np.searchsorted(offsets, place, side="right")) - 1
        if tokens[place] == end and rows[document]["untrained_turns"]:  # only their number is known
            counted = [
                f for f in check_documents(tokens, flipped, offsets, index, rules) if "untrained_turns" in f.kind
            ]
            is_cut = rows[document]["truncated"]  # more may have been cut off
            assert not found and (is_cut or [f.documents.tolist() for f in counted] == [[document]])
            continue
        assert [(f.documents.tolist(), f.positions.tolist()) for f in found] == [
            ([document], [place - offsets[document]])
        ]


def test_pieces_make_no_difference(demo_mid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_build(demo_mid)["train"]
    arrays = [np.array(split.map(kind, 0)) for kind in ("tokens", "mask", "offsets")]
    arrays[1][::97] ^= 1
    index = index_arrays(split.index_table())
    rules = Rules(split.build.tokenizer.special_ids, 400, "mid")
    found = []
    for tokens in (1 << 22, 1000, 100):
        monkeypatch.setattr("chatdata.render.contract.BLOCK_TOKENS", tokens)
        findings = check_documents(*arrays, index, rules)
        found.append({f.kind: list(zip(f.documents.tolist(), f.positions.tolist(), strict=True)) for f in findings})
    assert found[0] == found[1] == found[2] and len(found[0]) > 5
