"""The firewall's findings at the top of a report: counts, the first items with their documents, and what is missing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.errors import FormatError
from chatdata.firewall.listing import read_listing
from chatdata.look.report.documents import first_flagged
from chatdata.look.report.page import write_report
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

KEYS = "How many keys does the caretaker carry on the ring at her belt?"
ROLLS = "Mira bakes 24 rolls on Monday, sells 15 of them at the market and freezes the rest. How many does she freeze?"
ONE, TWO = ["Hello!", f"Tell me: {KEYS}"], [f"Hi <b>there</b>. {ROLLS}", "Bye.", "Thanks."]
EXAM = [{"question": "Is <i>this</i> anywhere?"}, {"question": KEYS}, {"question": ROLLS}]


@pytest.fixture
def make(tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """make(**options): a build of two files, in order and twice over."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))
    for name, texts in (("c-1.jsonl", ONE), ("c-2.jsonl", TWO)):
        chats = [[{"role": "user", "content": t}, {"role": "assistant", "content": "Well."}] for t in texts]
        (tmp_path / name).write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAM))
    recipe = tmp_path / "r.toml"
    entry = '[[train]]\ntask = "conversations"\npath = "c-*.jsonl"\nepochs = 2\n'
    recipe.write_text(f'stage = "sft"\n[shuffle]\ntrain = false\n{entry}')

    def make(**options: Any) -> Path:
        tasks = load_tasks()
        plan = make_build_plan(load_recipe(str(recipe), tasks), tasks, byte_tokenizer, Locations(tmp_path))
        build(plan, tmp_path / "out", force=True, **options)
        return tmp_path / "out"

    return make


def top_of(page: Path) -> str:
    """The text of the page's section about scored items."""
    section = page.read_text().split('<section id="firewall"')[1].split("</section>")[0].partition(">")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", section)).split())


def test_findings_are_documents_of_the_build(make: Any, tmp_path: Path) -> None:
    out = make(against=[str(tmp_path / "exam.jsonl")])
    listed = read_listing(out, open_build(out).manifest["build_id"])
    assert listed and listed.flagged_rows == 2 and listed.not_checked["mmlu"] == "dataset not found locally"
    assert {name: (c.items, c.flagged, c.rows) for name, c in listed.checked.items()} == {"exam.jsonl": (3, 2, 2)}
    found = first_flagged(open_build(out), listed.items)
    assert [(item.item, doc) for item, doc in found] == [("exam.jsonl line 2", 1), ("exam.jsonl line 3", 2)]
    facts = write_report(out)
    page = Path(facts["out"])
    text = top_of(page)
    assert "2 training rows hold items that are scored. Their documents are in the build; --decontaminate drop" in text
    assert "exam.jsonl 3 2 2" in text and "Not searched (dataset not found locally): arc_challenge, " in text
    assert "exam.jsonl line 2, exact, in document 1 (c-1.jsonl row 1) Tell me:" in text
    assert f"exam.jsonl line 3, exact, in document 2 (c-2.jsonl row 0) Hi <b>there</b>. {ROLLS}" in text
    for doc in (1, 2):  # shown once each, and linked
        assert page.read_text().count(f'href="#train-{doc}"') == page.read_text().count(f'id="train-{doc}"') == 1


def test_what_was_dropped_or_not_searched_is_said(make: Any, tmp_path: Path) -> None:
    out = make(against=[str(tmp_path / "exam.jsonl")], decontaminate="drop")
    text = top_of(Path(write_report(out)["out"]))
    assert "2 training rows hold items that are scored. Their 4 documents were left out of the build." in text
    assert "exam.jsonl line 2, exact, in a document left out (c-1.jsonl row 1)" in text
    (out / "firewall.json").unlink()
    text = top_of(Path(write_report(out)["out"]))
    assert text.endswith(
        "4 training documents held them and were left out; the list, firewall.json, is not in the build."
    )
    text = top_of(Path(write_report(make())["out"]))
    assert text.startswith("Scored items: not searched for: no scored set was found, and no --against FILE given.")
    assert "Not searched (dataset not found locally): arc_" in text
    text = top_of(Path(write_report(make(decontaminate="off"))["out"]))
    assert text == "Scored items: not searched for (no firewall.json in the build: --decontaminate off)."
    (tmp_path / "exam.jsonl").write_text(json.dumps(EXAM[0]))
    text = top_of(Path(write_report(make(against=[str(tmp_path / "exam.jsonl")]))["out"]))
    assert "Scored items: no training row holds any of the 1 searched for." in text


def test_a_listing_of_another_build_or_damaged_is_refused(make: Any) -> None:
    path = make() / "firewall.json"
    listed = json.loads(path.read_text())
    for changed, message in (
        ({"build_id": "00"}, "firewall.json: of another build; remove it, or build again"),
        ({"items": [{"set": "a", "item": "b", "rows": []}]}, 'firewall.json, key "items[0].rows"'),
    ):
        path.write_text(json.dumps(listed | changed))
        with pytest.raises(FormatError, match=re.escape(message)):
            write_report(path.parent)
