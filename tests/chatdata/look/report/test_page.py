"""The page of a report: where it goes, and what it does in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chatdata.check.verify import verify_full
from chatdata.cli.app import cli
from chatdata.errors import FormatError, UsageError
from chatdata.look.report import page as report


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
    with pytest.raises(UsageError, match=r"^a report needs Altair, .*: `uv sync --extra report` installs them$"):
        report.write_report(small)


def test_where_the_page_goes(small: Path, chatdata: Callable) -> None:
    assert report.default_out(small) == small.parent / "out-report.html"
    for out, error in ((small / "r.html", "is inside the build, where every"), (small.parent, "is a folder; name a")):
        with pytest.raises(UsageError, match=f"^--out {out} {error} file"):
            report.write_report(small, out)
    result = chatdata("report", ".", cwd=small)
    assert result.stdout == f"{small}-report.html: 1.0 MB, 4 of 4 documents in it\n"
    page = Path(f"{small}-report.html").read_bytes()
    again = CliRunner().invoke(cli, ["report", str(small), "--json", "--out", str(small.parent / "again.html")])
    facts = json.loads(again.stdout)
    assert facts["splits"]["train"]["tasks"][0]["tokens"] == 39 and facts["bytes"] == len(page)
    assert (small.parent / "again.html").read_bytes() == page
    assert verify_full(small) == []
    assert sorted(os.listdir(small.parent)) == ["again.html", "c.jsonl", "out", "out-report.html", "r.toml", "v.jsonl"]


def test_how_it_was_made_and_from_which_files(
    build_small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    pages = [Path(report.write_report(build_small(out))["out"]).read_text() for out in ("out", "again")]
    made = [page.partition("<dt>made</dt><dd>")[2].partition("</dd>")[0].partition(" s with ")[2] for page in pages]
    assert re.fullmatch(r"\d+ workers?: 2 of 2 work units rendered, [\d,]+ tokens/s", made[0])
    assert re.fullmatch(r"\d+ workers?: 0 of 2 work units rendered, 2 taken from the cache", made[1])  # no speed
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", pages[0])).split())
    assert "entry rows read documents truncated tokens lost dropped: nothing supervised train 4 3 1 10 1" in text
    assert "1 conversations c.jsonl 4 3 1 10 1 val 1 1 0 0 0 train: 1 document dropped: nothing supervised" in text
    assert "task user text python output markers all train 9 0.0% 14 100.0% 5 100.0% 3 0.0% 8 25.0% 39 53.8%" in text
    assert "conversations · val document 0, row 0 of v.jsonl · 7 tokens, 2 supervised · longest" in text
    origins = [report._origin({"name": "c-*.jsonl", "files": [{"name": name} for name in names]}) for names in FILES]
    assert origins == ["", "c-1.jsonl", "c-*.jsonl, 2 files"]


FILES = ([], ["c-1.jsonl"], ["c-1.jsonl", "c-2.jsonl"])


# In a browser
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
def test_text_of_the_data_stays_text(
    browser: Any, hostile_page: Path, tmp_path: Path, hostile_texts: list[str], policy: bool
) -> None:
    page = hostile_page
    if not policy:  # escaping alone has to do
        page = tmp_path / "open.html"
        page.write_text(hostile_page.read_text().replace("Content-Security-Policy", "None"))
    browser.open(page.as_uri())
    browser.wait_for_charts()
    assert browser.run("document.title") == "<i>out&lt;: report of a chatdata build"
    assert browser.run("document.querySelector('h1').textContent") == "<i>out&lt;"
    plain = browser.run("[...document.querySelectorAll('article .plain')].map(e => e.textContent)")
    supervised = browser.run("[...document.querySelectorAll('article .supervised:not(.chip)')].map(e => e.textContent)")
    for text in hostile_texts:
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
    assert everything == {"train/conversations": 4, "train/identity": 30, "val/conversations": 30}
    note = "64 of the 64 documents of this build: for each task the longest, the shortest, truncated ones, and others"
    assert browser.run("document.querySelector('#look p').textContent").startswith(note)
    browser.run("document.getElementById('search').focus()")
    browser.type("NEEDLE")
    assert browser.run(SHOWN) == ["train/conversations"]
    assert browser.run("document.getElementById('found').textContent") == "1 of 64 shown"
    browser.run("document.getElementById('search').select()")
    browser.type("who")
    assert Counter(browser.run(SHOWN)) == {"train/identity": 30, "val/conversations": 30}
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "task"
    browser.press("v", 86, "v")
    assert Counter(browser.run(SHOWN)) == {"val/conversations": 30}
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "tokens"


def test_phone_and_dark_mode(browser: Any, hostile_page: Path) -> None:
    colours = {}
    for dark in (False, True):
        browser.open(hostile_page.as_uri(), width=390, height=844, dark=dark)
        browser.wait_for_charts()
        assert browser.run("document.documentElement.scrollWidth") == 390
        widths = browser.run("[...document.querySelectorAll('.chart svg')].map(e => e.getBoundingClientRect().right)")
        assert max(widths) <= 390
        colours[dark] = browser.run(
            "[getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(document.querySelector('#frequency .role-mark path')).stroke]"
        )
    assert colours[False][0] == "rgb(255, 255, 255)"
    assert all(light != dark for light, dark in zip(*colours.values(), strict=True))


def test_axe_finds_nothing(browser: Any, small: Path) -> None:
    page = Path(report.write_report(small)["out"])
    for width, dark in ((1280, False), (500, True)):
        browser.open(page.as_uri(), width=width, dark=dark)
        browser.wait_for_charts()
        browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
        assert browser.axe() == []


def test_wide_tables_show_that_they_scroll(browser: Any, hostile_page: Path) -> None:
    browser.open(hostile_page.as_uri(), width=500)
    wide = browser.run(
        "[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth)"
        ".map(e => [e.ariaLabel, e.tabIndex, getComputedStyle(e).backgroundAttachment])"
    )
    assert wide == [[name, 0, "local, local, scroll, scroll"] for name in ("Mixture", "Supervision")]
    browser.run("document.querySelector('#roles .scroll').scrollLeft = 100")
    left = "e.getBoundingClientRect().left"
    assert browser.run(f"[...document.querySelectorAll('#roles tbody th')].map(e => {left})") == [16] * 5


def test_in_print_the_mask_and_the_keys_keep_their_colours(browser: Any, hostile_page: Path) -> None:
    browser.open(hostile_page.as_uri(), dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        adjusted = "e => getComputedStyle(e).printColorAdjust"
        for colored in (".supervised", ".chip", ".key i"):
            values = browser.run(f"[...document.querySelectorAll('{colored}')].map({adjusted})")
            assert values and set(values) == {"exact"}
        assert browser.run("getComputedStyle(document.querySelector('.supervised')).backgroundColor") == (
            "rgb(205, 238, 212)"  # the light one
        )
        assert Counter(browser.run(SHOWN)) == {"train/conversations": 4, "train/identity": 4, "val/conversations": 4}
        note = browser.run("document.querySelector('.printed').innerText")
        assert note.startswith("12 of them are printed: truncated ones, the longest and the shortest. To print others,")
        browser.run("document.getElementById('search').focus()")
        browser.run("search.value = 'me 7'; filter()")
        assert Counter(browser.run(SHOWN)) == {"train/identity": 1, "val/conversations": 1}
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_without_javascript(browser: Any, hostile: dict[str, Any], hostile_page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(hostile_page.as_uri(), width=500)
        pictures = browser.run("[...document.querySelectorAll('.chart > svg')].map(e => e.checkVisibility())")
        assert pictures == [True] * browser.run("document.querySelectorAll('.chart').length")
        assert browser.run("document.querySelectorAll('.vega-embed, img, .chart :is(b, i, script)').length") == 0
        assert browser.run("document.querySelector('noscript').textContent") == "Search needs JavaScript."
        assert browser.run("document.querySelector('.controls').checkVisibility()") is False
        assert len(browser.run(SHOWN)) == hostile["documents_shown"] == 64
        assert browser.run("document.documentElement.scrollWidth") == 500
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
