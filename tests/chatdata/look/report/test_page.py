"""The report: its numbers against counts by hand, and the page in a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from chatdata import open_build, render_conversation
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.verify import verify_full
from chatdata.cli.app import cli
from chatdata.document import SPAN_ROLES
from chatdata.errors import FormatError, UsageError
from chatdata.look.report import collect
from chatdata.look.report import page as report
from chatdata.look.report.collect import histogram, report_numbers
from chatdata.look.report.documents import Segment, choose, lines_of, spelled
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens


def _load_browser() -> ModuleType:
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


browser_module = _load_browser()


def chat(user: str, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


TOOL = [{"type": "text", "text": "b"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
# bos us a ue as b c ae · bos us a ue as b ps 1 + 1 pe os 2 oe ae · 16 tokens of user: dropped · bos us a ue as y × 11
TRAIN = [chat("a", "bc"), chat("a", TOOL), chat("u" * 20, "x"), chat("a", "y" * 20)]
VAL = [chat("z", "b")]  # bos us z ue as b ae
RECIPE = """
stage = "sft"
max_tokens = 16
overflow = "truncate"
zero_supervised = "drop"
[[train]]
task = "conversations"
path = "c.jsonl"
[[val]]
task = "conversations"
path = "v.jsonl"
"""


def build_of(folder: Path, tokenizer: Tokenizer, sources: dict[str, Any], recipe: str, out: str = "out") -> Path:
    for name, conversations in sources.items():
        (folder / name).write_text("".join(json.dumps(messages) + "\n" for messages in conversations))
    (folder / "r.toml").write_text(recipe)
    tasks = load_tasks()
    build(
        make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, tokenizer, Locations(folder)), folder / out
    )
    return folder / out


@pytest.fixture
def small(tmp_path: Path, byte_tokenizer: Tokenizer) -> Path:
    return build_of(tmp_path, byte_tokenizer, {"c.jsonl": TRAIN, "v.jsonl": VAL}, RECIPE)


def test_numbers_by_hand(small: Path) -> None:
    numbers = report_numbers(open_build(small))
    assert list(numbers["splits"]) == ["train", "val"]
    train = numbers["splits"]["train"]
    assert (train["documents"], train["tokens"], train["supervised"]) == (3, 8 + 15 + 16, 3 + 7 + 11)
    [entry] = train["entries"]
    assert (entry["rows"], entry["truncated"], entry["tokens_lost"]) == (4, 1, 10)
    assert entry["dropped"] == {"overflow": 0, "zero_supervised": 1}
    [task] = train["tasks"]
    assert task["roles"] == {
        "user": {"tokens": 3 * 3, "supervised": 0},
        "text": {"tokens": 2 + 1 + 11, "supervised": 2 + 1 + 11},
        "python": {"tokens": 5, "supervised": 5},
        "output": {"tokens": 3, "supervised": 0},
        "markers": {"tokens": 3 + 3 + 2, "supervised": 1 + 1},
    }
    assert task["length"] == {"min": 8, "median": 15, "p99": 16, "max": 16}
    assert [(part["from"], part["documents"]) for part in task["histogram"]["bins"] if part["documents"]] == [
        (8, 1),
        (15, 1),
        (16, 1),
    ]
    assert numbers["splits"]["val"]["tasks"][0]["roles"] == {
        "user": {"tokens": 3, "supervised": 0},
        "text": {"tokens": 1, "supervised": 1},
        "markers": {"tokens": 3, "supervised": 1},
    }
    vocabulary = numbers["vocabulary"]
    # a b c y 1 2 + and the nine special tokens; z occurs in val alone
    assert (vocabulary["entries"], vocabulary["used"], vocabulary["unused"]) == (265, 16, 249)
    assert (vocabulary["unused_bytes"], vocabulary["unused_ids"], vocabulary["elsewhere"]) == (249, [], {"val": 1})
    assert vocabulary["rare"] == 15  # all but y
    assert vocabulary["curve"][:2] == [
        {"rank": 1, "id": ord("y"), "count": 11},
        {"rank": 2, "id": ord("a"), "count": 3},
    ]
    assert [point["rank"] for point in vocabulary["curve"]] == list(range(1, 17))
    # y 11; a bos us ue as 3 each; b 1 ae 2 each; one of those that occur once
    assert vocabulary["coverage"] == {10: 11 + 5 * 3 + 3 * 2 + 1}


def test_numbers_do_not_depend_on_shards(
    tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, numbers = {"c.jsonl": TRAIN, "v.jsonl": VAL}, []
    for max_tokens, num_shards in ((1_000, 1), (20, 3)):
        monkeypatch.setattr("chatdata.build.splits.MAX_SHARD_TOKENS", max_tokens)
        opened = open_build(build_of(tmp_path, byte_tokenizer, sources, RECIPE, f"out{max_tokens}"))
        assert len(opened["train"].shards) == num_shards
        numbers.append(report_numbers(opened) | {"build_id": ""})
    assert numbers[0] == numbers[1]


def test_numbers_of_a_build_counted_document_by_document(demo_mid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "BLOCK_TOKENS", 1_000)  # documents on every side of the blocks' bounds
    opened = open_build(demo_mid)
    numbers = report_numbers(opened)
    for name, split in opened.splits.items():
        contents, found = opened.manifest["splits"][name], numbers["splits"][name]
        roles: Counter = Counter()
        ids: Counter = Counter()
        for row, document in zip(split.index.iter_rows(named=True), split, strict=True):
            in_span = np.zeros(len(document), dtype=bool)
            for span in row["spans"]:
                part = slice(span["start"], span["start"] + span["length"])
                in_span[part] = True
                role = SPAN_ROLES[span["role"]]
                roles[row["task"], role, "tokens"] += span["length"]
                roles[row["task"], role, "supervised"] += int(document.mask[part].sum())
            roles[row["task"], "markers", "tokens"] += int((~in_span).sum())
            roles[row["task"], "markers", "supervised"] += int(document.mask[~in_span].sum())
            ids.update(document.tokens.tolist())
        assert {
            (task["task"], role, key): count
            for task in found["tasks"]
            for role, counts in task["roles"].items()
            for key, count in counts.items()
            if count
        } == {key: count for key, count in roles.items() if count}
        for key in ("documents", "tokens", "supervised"):
            assert sum(task[key] for task in found["tasks"]) == contents[key] == found[key]
        for task in found["tasks"]:
            assert sum(part["documents"] for part in task["histogram"]["bins"]) == task["documents"]
        if name == "train":
            vocabulary = numbers["vocabulary"]
            assert vocabulary["used"] == len(ids)
            assert vocabulary["rare"] == sum(count < 10 for count in ids.values())
            assert all(ids[point["id"]] == point["count"] for point in vocabulary["curve"])
            ranked = sorted(ids.values(), reverse=True)
            assert all(ranked[point["rank"] - 1] == point["count"] for point in vocabulary["curve"])
            assert vocabulary["coverage"] == {top: sum(ranked[:top]) for top in vocabulary["coverage"]}
            assert not set(vocabulary["unused_ids"]) & set(ids)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60))
def test_histogram_counts_every_document_once(lengths: list[int]) -> None:
    found = histogram(np.array(lengths))
    bins, width = found["bins"], found["width"]
    assert len(bins) <= 40
    assert bins[0]["from"] <= min(lengths) and max(lengths) <= bins[-1]["to"]
    assert all(after["from"] == before["to"] + 1 == before["from"] + width for before, after in pairwise(bins))
    assert [part["documents"] for part in bins] == [
        sum(part["from"] <= length <= part["to"] for length in lengths) for part in bins
    ]


def test_histogram_of_one_very_long_document() -> None:
    found = histogram(np.array([*range(100, 300), 100_000]))
    assert (found["width"], found["bins"][0]["from"]) == (20, 100)
    assert found["bins"][-1] == {"from": 580, "to": 100_000, "documents": 1}


def test_documents_chosen() -> None:
    lengths = list(range(10, 110))
    index = pl.DataFrame(
        {
            "num_tokens": lengths,
            "truncated": [n in (50, 60) for n in lengths],
            "digest": [bytes([255 - n]) * 16 for n in lengths],  # the longer, the lower
        }
    )
    expected = [(60, "truncated"), (50, "truncated"), (109, "longest"), (108, "longest"), (10, "shortest")]
    expected += [(11, "shortest"), (107, ""), (106, ""), (105, ""), (104, "")]
    # a second epoch shows nothing twice, and the order of the documents does not matter
    for frame in (index, pl.concat([index, index]), index.reverse()):
        assert [(row["num_tokens"], why) for row, why in choose(frame, 10)] == expected
    assert len(choose(index.head(3), 10)) == 3
    assert [row["num_tokens"] for row, _ in choose(index, 1)] == [60]


def test_document_as_lines(byte_tokenizer: Tokenizer) -> None:
    document = render_conversation(byte_tokenizer, chat("é<b>", [{"type": "text", "text": "x\r\0"}, *TOOL[1:]]))
    lines, left = lines_of(document.tokens, document.mask, byte_tokenizer)
    chip, supervised = "chip", "supervised chip"
    assert left == 0 and lines == [
        [Segment(chip, "<|bos|>")],
        [Segment(chip, "<|user_start|>"), Segment("plain", "é<b>"), Segment(chip, "<|user_end|>")],
        [
            Segment(chip, "<|assistant_start|>"),
            Segment("supervised", "x␍␀"),
            Segment(supervised, "<|python_start|>"),
            Segment("supervised", "1+1"),
            Segment(supervised, "<|python_end|>"),
            Segment(chip, "<|output_start|>"),
            Segment("plain", "2"),
            Segment(chip, "<|output_end|>"),
            Segment(supervised, "<|assistant_end|>"),
        ],
    ]
    # bos is 7 bytes, user_start 14, é two tokens of a byte each: 23 bytes are 4 tokens, 20 bytes one
    for max_bytes, shown in ((23, 4), (22, 3), (20, 1), (7, 1), (6, 0)):
        lines, left = lines_of(document.tokens, document.mask, byte_tokenizer, max_bytes)
        assert left == len(document) - shown, max_bytes


def test_entries_of_the_vocabulary_spelled(byte_tokenizer: Tokenizer) -> None:
    assert [spelled(byte_tokenizer, i) for i in (97, 32, 10, 0, 255, 256)] == ["a", "␣", "␤", "␀", "\\xff", "<|bos|>"]


def test_damage_is_one_line(small: Path, tmp_path: Path) -> None:
    file = small / "train" / "mask-00000.npy"
    data = bytearray(file.read_bytes())
    data[-1] = 0
    file.write_bytes(data)
    with pytest.raises(FormatError, match="damaged: supervised per entry differ from the manifest; `chatdata verify"):
        report.write_report(small)
    file.write_bytes(data[:-1])
    with pytest.raises(FormatError, match=r"mask-00000.npy: 166 bytes, but the manifest says 167"):
        report.write_report(small)
    assert not report.default_out(small).exists()


def test_the_extra_is_missing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UsageError, match=r'^a report needs Altair, .*: pip install "chatdata\[report\]"$'):
        report.write_report(small)


def test_where_the_page_goes(small: Path, chatdata: Callable) -> None:
    assert report.default_out(small) == small.parent / "out-report.html"
    for out, error in ((small / "r.html", "is inside the build, where every"), (small.parent, "is a folder; name a")):
        with pytest.raises(UsageError, match=f"^--out {out} {error} file"):
            report.write_report(small, out)
    result = chatdata("report", ".", cwd=small)
    assert result.stdout == f"{small}-report.html: 0.9 MB, 4 of 4 documents in it\n"
    page = Path(f"{small}-report.html").read_bytes()
    again = CliRunner().invoke(cli, ["report", str(small), "--json", "--out", str(small.parent / "again.html")])
    facts = json.loads(again.stdout)
    assert facts["splits"]["train"]["tasks"][0]["tokens"] == 39 and facts["bytes"] == len(page)
    assert (small.parent / "again.html").read_bytes() == page
    assert verify_full(small) == []
    assert sorted(os.listdir(small.parent)) == [
        "again.html",
        "c.jsonl",
        "out",
        "out-firewall.json",
        "out-report.html",
        "r.toml",
        "v.jsonl",
    ]


# In a browser

HOSTILE = [
    "<img src=x onerror=\"document.title='ran'\">",
    "</script><script>document.title = 'ran'</script>",
    "</style><b>&lt;i&gt; &amp; <!-- <script> -->",
    "{{ 7 * 7 }} http://127.0.0.1:9/ needle",
]
HOSTILE_RECIPE = """
stage = "mid"
[[train]]
task = "conversations"
path = "<b>&amp;.jsonl"
[[train]]
task = "identity"
path = "i.jsonl"
[[val]]
task = "conversations"
path = "i.jsonl"
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report whose documents, source names, folder and vocabulary all try to be markup."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for i, entry in enumerate((b"</", b"</s", b"</sc", b"</scr", b"</scri", b"</scrip", b"</script", b"</script>")):
        ranks[entry] = 256 + i
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "hostile")
    sources = {
        "<b>&amp;.jsonl": [chat(text, [{"type": "text", "text": f"re: {text}"}, *TOOL[1:]]) for text in HOSTILE],
        "i.jsonl": [chat(f"who {i}?", "long " * 2_000 if i == 5 else f"me {i}") for i in range(30)],
    }
    out = build_of(tmp_path_factory.mktemp("hostile"), tokenizer, sources, HOSTILE_RECIPE, "<i>out&lt;")
    return report.write_report(out)


@pytest.fixture
def hostile_page(hostile: dict[str, Any]) -> Path:
    return Path(hostile["out"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if browser_module.find_chromium() is None:
        reason = "no Chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("CHATDATA_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        browser_module.open_browser(Path(folder)) as opened,
    ):
        yield opened


DRAWN = "[...document.querySelectorAll('.chart')].every(c => c.querySelector('.role-mark path, .role-mark rect'))"


def test_charts_have_marks_and_nothing_is_requested(browser: Any, hostile: dict[str, Any], hostile_page: Path) -> None:
    browser.open(hostile_page.as_uri())
    browser.wait(DRAWN)
    marks = browser.run(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map("
        "c => [c.id, c.querySelectorAll('.role-mark path, .role-mark rect').length]))"
    )
    # tasks × measures; parts of a task (user, text, python, output, and markers of both kinds); bins; points and a line
    bins = [[len(task["histogram"]["bins"]) for task in split["tasks"]] for split in hostile["splits"].values()]
    assert marks == {
        "mixture-0": 2 * 3,
        "mixture-1": 3,
        "roles-0": 6 + 4,
        "roles-1": 4,
        "lengths-0-0": bins[0][0],
        "lengths-0-1": bins[0][1],
        "lengths-1-0": bins[1][0],
        "frequency": len(hostile["vocabulary"]["curve"]) + 1,
    }
    requests = [said["request"]["url"] for said in browser.said("Network.requestWillBeSent")]
    assert requests == [hostile_page.as_uri()]
    assert browser.said("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []


def test_a_request_would_be_seen(browser: Any, hostile_page: Path, tmp_path: Path) -> None:
    sabotaged = tmp_path / "sabotaged.html"
    image = '<img src="http://127.0.0.1:9/x.png">'
    sabotaged.write_text(hostile_page.read_text().replace("<main>", f"<main>{image}"))
    browser.open(sabotaged.as_uri())
    assert [said.get("blockedReason") for said in browser.said("Network.loadingFailed")] == ["csp"]
    sabotaged.write_text(sabotaged.read_text().replace("Content-Security-Policy", "None"))
    browser.open(sabotaged.as_uri())
    requests = [said["request"]["url"] for said in browser.said("Network.requestWillBeSent")]
    assert requests == [sabotaged.as_uri(), "http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("policy", [True, False])
def test_text_of_the_data_stays_text(browser: Any, hostile_page: Path, tmp_path: Path, policy: bool) -> None:
    page = hostile_page
    if not policy:  # escaping alone has to do
        page = tmp_path / "open.html"
        page.write_text(hostile_page.read_text().replace("Content-Security-Policy", "None"))
    browser.open(page.as_uri())
    browser.wait(DRAWN)
    assert browser.run("document.title") == "<i>out&lt;: report of a chatdata build"
    assert browser.run("document.querySelector('h1').textContent") == "<i>out&lt;"
    plain = browser.run("[...document.querySelectorAll('article .plain')].map(e => e.textContent)")
    supervised = browser.run("[...document.querySelectorAll('article .supervised:not(.chip)')].map(e => e.textContent)")
    for text in HOSTILE:
        assert text in plain and f"re: {text}" in supervised
    assert (
        browser.run("document.querySelectorAll('img, iframe, link, h1 *, article b b, .tokens b, .tokens i').length")
        == 0
    )
    assert browser.run("document.scripts.length") == 3
    assert "<b>&amp;.jsonl" in browser.run("document.querySelector('#made').textContent")
    assert "</script>" in browser.run("[...document.querySelectorAll('.unused span')].map(e => e.textContent)")
    assert browser.run("[...document.querySelectorAll('.more')].map(e => e.textContent)") != []


SHOWN = "[...document.querySelectorAll('article')].filter(e => e.checkVisibility()).map(e => e.dataset.group)"


def test_search_and_filter(browser: Any, hostile_page: Path) -> None:
    browser.open(hostile_page.as_uri())
    everything = Counter(browser.run(SHOWN))
    assert everything == {"train/conversations": 4, "train/identity": 20, "val/conversations": 20}
    browser.run("document.getElementById('search').focus()")
    browser.type("NEEDLE")
    assert browser.run(SHOWN) == ["train/conversations"]
    assert browser.run("document.getElementById('found').textContent") == "1 of 44 shown"
    browser.run("document.getElementById('search').select()")
    browser.type("who")
    assert Counter(browser.run(SHOWN)) == {"train/identity": 20, "val/conversations": 20}
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "task"
    browser.press("v", 86, "v")
    assert Counter(browser.run(SHOWN)) == {"val/conversations": 20}
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "tokens"


def test_phone_and_dark_mode(browser: Any, hostile_page: Path) -> None:
    colours = {}
    for dark in (False, True):
        browser.open(hostile_page.as_uri(), width=390, height=844, dark=dark)
        browser.wait(DRAWN)
        assert browser.run("document.documentElement.scrollWidth") == 390
        widths = browser.run("[...document.querySelectorAll('.chart svg')].map(e => e.getBoundingClientRect().right)")
        assert max(widths) <= 390
        colours[dark] = browser.run(
            "[getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(document.querySelector('#frequency .role-mark path')).stroke]"
        )
    assert colours[False][0] == "rgb(255, 255, 255)"
    assert all(light != dark for light, dark in zip(*colours.values(), strict=True))
