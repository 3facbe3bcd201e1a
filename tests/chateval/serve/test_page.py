"""The chat page in Chromium, in front of the model that answers sums with a tool call."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

ENTER = ("Enter", 13, "\r")
IDLE = "document.getElementById('stop').hidden && document.querySelectorAll('article').length > 0"


@pytest.fixture
def page(browser, served_sums):
    browser.open(served_sums.url, width=1280, height=900)
    browser.wait("document.querySelector('h1').textContent === 'sums'")
    return browser


def say(page, text) -> None:
    page.type(text)
    page.press(*ENTER)
    page.wait(IDLE)


def shown(page) -> list[str]:
    """What is in the conversation: role and text of each block."""
    return page.run(
        "[...document.querySelectorAll('article p, article pre')]"
        ".map(e => `${e.closest('article').className} ${e.closest('figure')?.className ?? 'text'}: ${e.textContent}`)"
    )


def text_of(page, selector) -> str:
    return page.run(f"document.querySelector({selector!r}).textContent")


def test_a_chat(page) -> None:
    say(page, "2 3")
    first = ["user text: 2 3", "assistant python: 2+3", "assistant output: 5", "assistant text: #### 5"]
    assert shown(page) == first
    assert page.run("[...document.querySelectorAll('figcaption')].map(e => e.textContent)") == ["Tool call", "Result"]
    assert "#### 5" in text_of(page, "#status"), "a screen reader says the answer once, whole"
    page.type("4")
    page.press("Enter", 13)  # Shift is down: no text comes with it, and the page must not send
    page.wait(IDLE)
    page.run("document.getElementById('text').value = ''; document.getElementById('text').focus()")
    before = shown(page)
    page.type("<b>10</b>\n&20")
    page.press(*ENTER)
    page.wait(IDLE)
    found = shown(page)[len(before) :]
    assert found[:2] == ["user text: <b>10</b>\n&20", "assistant python: <b>10</b>+&20"], "text is never HTML"
    assert page.run("document.activeElement.id") == "text"
    assert page.run("document.querySelector('#log').getAttribute('aria-live')") == "off"
    assert page.axe() == []
    page.run("document.getElementById('new').click()")
    assert shown(page) == [] and page.run("messages.length") == 0
    say(page, "7 8")
    assert shown(page)[-1] == "assistant text: #### 15"
    assert page.said("Log.entryAdded", "Runtime.exceptionThrown") == [], "the policy blocked or the script failed"


def test_stop(browser, sums, serve) -> None:
    """With the button and with Escape; what was said stays, and the row of the batch is free."""
    with serve(replace(sums, num_positions=20_000)) as served:
        browser.open(served.url, width=1280, height=900)
        for stop in ("document.getElementById('stop').click()", None):
            browser.type("one 2")
            browser.press(*ENTER)
            browser.wait("document.querySelector('article:last-child pre') !== null")
            assert browser.axe() == []
            browser.run(stop) if stop else browser.press("Escape", 27)
            browser.wait(IDLE)
            assert text_of(browser, "article:last-child .note") == "Stopped."
        assert browser.run("messages.map(m => m.role).join()") == "user,assistant,user,assistant"
        browser.wait("fetch('/v1/models').then(r => r.ok)")
        browser.type("one 2")
        browser.press(*ENTER)
        browser.run("startNew()")  # in the middle of an answer
        say(browser, "1 2")
        assert shown(browser)[-1] == "assistant text: #### 3" and browser.run("messages.length") == 2


def test_errors_are_shown_and_the_question_is_kept(browser, sums, serve) -> None:
    with serve(sums, token="s3cret") as served:
        browser.open(served.url, width=500, height=800)
        browser.wait("!document.getElementById('key').hidden")
        assert text_of(browser, "#problem") == "This server needs its token." and browser.axe() == []
        for token, is_right in (("wrong", False), ("s3cret", True)):
            browser.run("document.getElementById('token').value = ''")
            assert browser.run("document.activeElement.id") == "token"
            browser.type(token)
            browser.press(*ENTER)
            browser.wait(f"document.getElementById('key').hidden === {json.dumps(is_right)}")
        browser.wait("document.activeElement.id === 'text'")
        say_long = "9 " * 200
        browser.type(say_long)
        browser.press(*ENTER)
        browser.wait("problem.textContent.includes('context of 256: ask something shorter')")
        assert browser.run("document.getElementById('text').value") == say_long and shown(browser) == []
        browser.run("document.getElementById('text').value = ''")
        say(browser, "2 2")
        assert shown(browser)[-1] == "assistant text: #### 4" and text_of(browser, "#problem") == ""
    browser.type("2 2")
    browser.press(*ENTER)
    browser.wait("document.getElementById('problem').textContent === 'The server cannot be reached.'")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (500, False), (500, True), (320, False)])
def test_sizes_and_schemes(browser, served_sums, width, dark) -> None:
    browser.open(served_sums.url, width=width, height=700, dark=dark)
    say(browser, "123456789123456789 987654321987654321987654321")
    assert browser.axe() == []
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("document.getElementById('send').getBoundingClientRect().bottom <= innerHeight")
