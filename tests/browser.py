"""A real Chromium without a window, told what to do over its own protocol (CDP)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser here; `apt-get install chromium` brings one"
)

_PATIENCE_S = 60.0
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Browser:
    """One page of a browser.

    Attributes:
        complaints: Errors in the console, exceptions, and violations of the content security
            policy, since the last `go`.
        asked: Addresses of all requests, since the last `go`.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Do something, and look at what happened until it was done."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._socket.send(json.dumps(message))
        while True:
            told = json.loads(self._socket.recv(timeout=_PATIENCE_S))
            if told.get("id") == self._number:
                assert "error" not in told, told
                result: dict[str, Any] = told["result"]
                return result
            if "method" in told:
                self._note(told["method"], told["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["entry"]))
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])

    def show(self, width: int, height: int, *, scheme: str = "light") -> None:
        """Set the window's size and whether it is dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def go(self, url: str) -> None:
        """Open a page, and wait until all of it is there."""
        self.complaints, self.asked = [], []
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """What an expression comes to in the page."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until an expression is true in the page; what it comes to then."""
        ends = time.monotonic() + _PATIENCE_S
        while time.monotonic() < ends:
            value = self.evaluate(
                f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
            )
            if value or value == {}:  # an element comes as nothing but that it is there
                return value
            time.sleep(0.02)
        raise AssertionError(f"never true: {script}; the page says {self.text()!r}")

    def text(self, selector: str = "body") -> str:
        """What an element says."""
        found: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a person does."""
        place = self.wait_for(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return r.width && [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    def type(self, selector: str, text: str) -> None:
        """Put a text in the place of what a field has."""
        self.wait_for(f"document.querySelector({json.dumps(selector)}).select() ?? true")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **text,
            )

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            f" e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with its files in a folder."""
    assert CHROMIUM is not None
    profile = folder / "chromium"
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(_page_of(profile, process), max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(20)


def _page_of(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Address of the browser's one page, once it listens."""
    ends = time.monotonic() + _PATIENCE_S
    while time.monotonic() < ends:
        assert process.poll() is None, "chromium ended"
        try:
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            pages = httpx2.get(f"http://127.0.0.1:{port}/json/list").json()
            found: str = next(
                page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"
            )
        except (OSError, IndexError, StopIteration, httpx2.TransportError):
            time.sleep(0.05)
        else:
            return found
    raise AssertionError("chromium does not listen")
