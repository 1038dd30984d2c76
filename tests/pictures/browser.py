"""A headless Chromium that tests click and type in, by its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here")

_SECONDS = 60  # for an answer, on a busy machine
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38}


class Browser:
    """One page. Answers come as JSON behind a NUL, on the descriptors that Chromium knows as 3 and 4.

    Args:
        folder: folder for its profile and for what it saves.
    """

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self.saved = folder / "saved"
        self.saved.mkdir(parents=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"]
        options += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "--hide-scrollbars"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_read, to_write)]
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_DUP2, end, known) for end, known in zip(ends, (3, 4), strict=True)
        ]
        actions += [(os.POSIX_SPAWN_OPEN, output, os.devnull, os.O_WRONLY, 0) for output in (1, 2)]
        command = [CHROMIUM, *options, "about:blank"]
        self._process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions)
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._session: str | None = None
        targets: list[dict[str, Any]] = []
        while not targets:
            targets = [one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=targets[0]["targetId"], flatten=True)
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.saved))
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        try:
            self.send("Browser.close")
        except BaseException:
            os.kill(self._process, signal.SIGKILL)
            raise
        finally:
            os.waitpid(self._process, 0)
            os.close(self._read)
            os.close(self._write)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command answers."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            readable, _, _ = select.select([self._read], [], [], _SECONDS)
            assert readable, "the browser doesn't answer"
            part = os.read(self._read, 2**20)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def open(self, page: Path) -> None:
        """A page from the disk, all of it loaded."""
        self.events.clear()
        self.send("Page.navigate", url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Until an expression is true."""
        until = time.monotonic() + _SECONDS
        while not self.run(script):
            assert time.monotonic() < until, script
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        """What is read in each of some elements."""
        found: list[str] = self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent.trim())"
        )
        return found

    def click(self, selector: str, number: int = 0) -> None:
        """A press of the mouse in the middle of an element, the ``number``-th of those."""
        place = self.run(
            f"(() => {{ const one = document.querySelectorAll({json.dumps(selector)})[{number}];"
            "one.scrollIntoView({block: 'center'}); const box = one.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def press(self, *keys: str) -> None:
        """Keys, one after the other."""
        for key in keys:
            code = {"windowsVirtualKeyCode": _KEYS[key]} if key in _KEYS else {"text": key}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **code)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def choose(self, selector: str, text: str) -> None:
        """The entry of a list that begins with a text."""
        self.run(
            f"(() => {{ const list = document.querySelector({json.dumps(selector)});"
            f"list.value = [...list.options].find((one) => one.text.startsWith({json.dumps(text)})).value;"
            "list.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def complaints(self) -> list[str]:
        """What the page or its policy put on the console since it was opened, and what wasn't found."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Network.loadingFailed")
        return [json.dumps(event) for event in self.events if event.get("method") in kinds]

    def screenshot(self, file: Path, width: int, height: int, scheme: str = "light") -> None:
        """A PNG of the window, in a light or dark colour scheme."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        time.sleep(0.5)
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
