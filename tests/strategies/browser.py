"""Headless Chromium, driven by its DevTools protocol over a pipe: no port, no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 30
# said by the browser itself, at its start, to its maker: not by a page
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a fresh profile folder, ended with the block."""
    # the browser reads commands on descriptor 3 and answers on 4; ours are kept clear of both
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (*os.pipe(), *os.pipe())]

    def connect() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[3], 4)

    command = [find_chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", *QUIET]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=connect,
    )
    os.close(ends[0])
    os.close(ends[3])
    try:
        yield Browser(ends[2], ends[1])
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)
        os.close(ends[1])
        os.close(ends[2])


class Browser:
    """One tab: `open` a page, `run` JavaScript in it; `events` are what it reported since it was opened."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming, self.outgoing, self.buffer = incoming, outgoing, b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        self.last_id = 0
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a DevTools command; events that come before it are kept."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.last_id:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.incoming, 1 << 20)
            assert data, "the browser has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int = 1400, height: int = 1000, dark: bool = False) -> float:
        """Open a page in a window of this size; the seconds until its load event."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        started = time.monotonic()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        return time.monotonic() - started

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for_charts(self) -> None:
        """Until every chart of a report has been drawn."""
        self.wait(
            "[...document.querySelectorAll('.chart')].every("
            "c => c.matches('.vega-embed') && c.querySelector('.role-mark path, .role-mark rect'))"
        )

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + TIMEOUT_S
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def axe(self) -> list[str]:
        """What axe-core finds wrong with the page as it is now: a line per rule, with the first element."""
        spec = importlib.util.find_spec("axe_core_python")
        assert spec and spec.origin, "uv sync installs axe-core-python"
        self.run(f"{Path(spec.origin).with_name('axe.min.js').read_text()}; 0")
        found = self.run("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
        return [f"{rule['id']}, {len(rule['nodes'])} times: {rule['nodes'][0]['html']}" for rule in found]

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        """A key as a person's hand presses it."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def type(self, text: str) -> None:
        """Text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def said(self, *methods: str, where: Callable[[dict], bool] = lambda _: True) -> list[dict[str, Any]]:
        """Parameters of the events of these kinds since the page was opened."""
        self.call("Runtime.evaluate", expression="0")  # what is under way has been read then
        return [e["params"] for e in self.events if e.get("method") in methods and where(e["params"])]
