"""A headless Chromium that a test drives by the DevTools protocol, through pipes: no port, no package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

CHROMIUM = shutil.which("chromium")


class Browser:
    """One page of a browser; a context manager."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        (read, theirs), (ours, write) = os.pipe(), os.pipe()  # what we read and they write, and the other way round
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
                   f"--user-data-dir={profile}"]  # fmt: skip
        # The protocol is spoken on file descriptors 3 and 4.
        shell = f'exec "$@" 3<&{ours} 4>&{theirs}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", CHROMIUM, *options], pass_fds=(ours, theirs), stderr=subprocess.DEVNULL
        )
        os.close(ours)
        os.close(theirs)
        self._in, self._out = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._number, self._rest, self._session = 0, b"", None
        self.said: list[str] = []  # errors and console lines of the page
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def open(self, url: str) -> None:
        """Go to a page, and wait until its script has run."""
        self._call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script: str) -> object:
        """The value of an expression; a promise is awaited."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"{condition} has not come true; the page says {self.said}"
            time.sleep(0.02)

    def screenshot(self, width: int, top: str = "body", bottom: str = "body") -> bytes:
        """A WebP image of the page at a width in pixels, from an element's upper edge to another one's lower edge."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        # Plotly draws its panels again for the new width, in its own time.
        self.run("new Promise((done) => setTimeout(done, 500))")
        first, last = (
            f"document.querySelector({json.dumps(place)}).getBoundingClientRect()" for place in (top, bottom)
        )
        edges = self.run(f"[{first}.top + scrollY, {last}.bottom + scrollY]")
        assert isinstance(edges, list) and edges[1] > edges[0], edges
        clip = {"x": 0, "y": edges[0], "width": width, "height": edges[1] - edges[0], "scale": 1}
        found = self._call(
            "Page.captureScreenshot", format="webp", quality=70, clip=clip, captureBeyondViewport=True
        )  # fmt: skip
        return base64.b64decode(found["data"])

    def _call(self, method: str, **params: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            if reply.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.said.append(json.dumps(reply["params"]))

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            piece = os.read(self._in.fileno(), 2**16)
            assert piece, "the browser has ended"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)
