"""The page of a report: where it goes, and what it does in a browser."""

from __future__ import annotations

import json
import os
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
    assert result.stdout == f"{small}-report.html: 0.9 MB, 4 of 4 documents in it\n"
    page = Path(f"{small}-report.html").read_bytes()
    again = CliRunner().invoke(cli, ["report", str(small), "--json", "--out", str(small.parent / "again.html")])
    facts = json.loads(again.stdout)
    assert facts["splits"]["train"]["tasks"][0]["tokens"] == 39 and facts["bytes"] == len(page)
    assert (small.parent / "again.html").read_bytes() == page
    assert verify_full(small) == []
    assert sorted(os.listdir(small.parent)) == ["again.html", "c.jsonl", "out", "out-report.html", "r.toml", "v.jsonl"]


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
