"""A real browser without a window, for pages that the project writes."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support import wait_until

_PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome")
_ANSWER_S: Final = 60.0
_STEP_S: Final = 0.02
_READ_BYTES: Final = 1 << 16
_FIRST_FD: Final = 10  # a shell moves what it inherits to 3 and 4


def browser_program() -> str | None:
    return next(filter(None, map(shutil.which, _PROGRAMS)), None)


class Browser:
    """Chromium, spoken to through pipes in the DevTools protocol, with one page."""

    def __init__(self, program: str, home: Path) -> None:
        near, self._to = os.pipe()
        self._from, far = os.pipe()
        its = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD) for fd in (near, far)]
        # The protocol's descriptors are 3 and 4. A root without user namespaces has no sandbox.
        options = (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-extensions",
            "--remote-debugging-pipe", f"--user-data-dir={home}", "--window-size=1200,900",
            "about:blank",
        )  # fmt: skip
        shell = 'exec "$@" 3<&{} 4>&{} {}<&- {}>&-'.format(*its, *its)
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *options],
            pass_fds=its, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "HOME": str(home)},
        )  # fmt: skip
        for fd in (near, far, *its):
            os.close(fd)
        self._number = 0
        self._session = ""
        self._heard = b""
        self.events: list[dict[str, Any]] = []
        page: Any = wait_until(self._page, _ANSWER_S)
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def _page(self) -> dict[str, Any] | None:
        targets = self.ask("Target.getTargets")["targetInfos"]
        return next((it for it in targets if it["type"] == "page"), None)

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        os.killpg(self._process.pid, signal.SIGKILL)  # with the processes of its pages
        self._process.wait()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_S
        while b"\0" not in self._heard:
            ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
            more = os.read(self._from, _READ_BYTES) if ready else b""
            assert more, "the browser does not answer"
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    @contextmanager
    def screen(self, width: int, height: int) -> Iterator[None]:
        """In the block, pages have a phone's screen of the given size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        try:
            yield
        finally:
            self.ask("Emulation.clearDeviceMetricsOverride")

    def open(self, path: Path) -> None:
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        self.until(f"document.readyState === 'complete' && location.href === '{path.as_uri()}'")

    def value(self, script: str) -> Any:
        """What a script evaluates to."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Waits until a script evaluates to true."""
        deadline = time.monotonic() + _ANSWER_S
        while not self.value(script):
            assert time.monotonic() < deadline, script
            time.sleep(_STEP_S)

    def click(self, element: str) -> None:
        """A click of the mouse on the middle of what the script ELEMENT evaluates to."""
        x, y = self.middle(element)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, element: str) -> None:
        """Moves the mouse there."""
        x, y = self.middle(element)
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def middle(self, element: str) -> tuple[float, float]:
        script = (
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}});"
            "const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        x, y = self.value(script)
        return x, y

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.ask("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for since the page was opened."""
        return [
            it["params"]["request"]["url"]
            for it in self.events
            if it.get("method") == "Network.requestWillBeSent"
        ]

    @property
    def complaints(self) -> list[Any]:
        """Exceptions of scripts, and what the browser logs, such as what a policy forbids."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [it["params"] for it in self.events if it.get("method") in names]


@contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """A browser for the duration of the block."""
    program = browser_program()
    assert program, "Debian's package is chromium"
    running = Browser(program, home)
    try:
        yield running
    finally:
        running.close()
