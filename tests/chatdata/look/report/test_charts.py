"""The charts of a report, drawn in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_charts_have_marks_and_nothing_is_requested(browser: Any, hostile: dict[str, Any], hostile_page: Path) -> None:
    browser.open(hostile_page.as_uri())
    browser.wait_for_charts()
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
