"""Headless Chromium, driven through its debugging pipe: a page, its files, and all that it asks the network for."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_WAIT_S = 90.0
"""For one answer: far beyond any that comes."""

_WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


class Page:
    """One tab. `requests` are the addresses that it has asked for so far, `messages` what its console said."""

    def __init__(self, *, write_fd: int, read_fd: int) -> None:
        self._write_fd, self._read_fd = write_fd, read_fd
        self._number, self._buffer, self._session = 0, b"", ""
        self.requests: list[str] = []
        self.messages: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go there and wait until the page's script has loaded its model, or has said why it cannot."""
        self._call("Page.navigate", url=url)
        self.settle()

    def settle(self) -> str:
        """Wait until the page does nothing: its state then, "ready" or "failed"."""
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            state = self.run("document.body?.dataset.state ?? ''")
            if state in ("ready", "failed"):
                return str(state)
            time.sleep(0.02)
        raise TimeoutError(f"the page is still busy; its console: {self.messages}")

    def choose(self, path: Path) -> str:
        """Pick a file as a user does in the file dialogue, and wait for the page."""
        self.run("document.body.dataset.state = 'asked'")
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self._call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)
        return self.settle()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def screenshot(self) -> str:
        """PNG, in base64."""
        return str(self._call("Page.captureScreenshot", format="png")["data"])

    def prefer(self, scheme: str) -> None:
        """As a user who has chosen "dark" or "light"."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width: int, height: int) -> None:
        """The window, in CSS pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read_fd], [], [], _WAIT_S)
            part = os.read(self._read_fd, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("Chromium does not answer")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def open_page(profile: Path, *, webgpu: bool = False) -> Iterator[Page]:
    """A fresh browser that reaches no host but 127.0.0.1.

    Args:
        webgpu: offer it, by software where there is no graphics card.
    """
    assert CHROMIUM is not None, "no Chromium: apt-get install chromium"
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # Chromium reads commands on descriptor 3 and answers on 4.
    command = (
        f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}',
        CHROMIUM, "--headless", "--no-sandbox", *(_WEBGPU if webgpu else ["--disable-gpu"]),
        "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe",
        f"--user-data-dir={profile}", "about:blank",
    )  # fmt: skip
    log = (profile.parent / f"{profile.name}.log").open("wb")
    with log, subprocess.Popen(
        ["/bin/bash", "-c", *command], pass_fds=(to_read, from_write), stdout=log, stderr=log, stdin=subprocess.DEVNULL
    ) as browser:  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        try:
            yield Page(write_fd=to_write, read_fd=from_read)
        finally:
            os.close(to_write)
            os.close(from_read)  # it ends when its pipe does
            browser.terminate()
