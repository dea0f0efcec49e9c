"""Chromium without a window, driven through its DevTools pipe: enough to read a page and to photograph it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Above 9 first: either pipe may happen to have the number that the other is to get.
_LAUNCH = """
import fcntl, os, sys
given = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]
for place, descriptor in zip((3, 4), given):
    os.dup2(descriptor, place)
os.execv(sys.argv[3], sys.argv[3:])
"""

# Pages built of web components keep what they show in shadow trees, which neither the DOM's text nor --dump-dom has.
_EVERYTHING = """(() => {
  const found = [];
  const visit = node => {
    if (node.nodeType === Node.TEXT_NODE) { found.push(node.data); return; }
    if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName)) return;
    if (node.nodeName === 'IMG' && node.naturalWidth) found.push(`image ${node.naturalWidth}x${node.naturalHeight}`);
    if (node.nodeName === 'path' && (node.getAttribute('d') || '').length > 40) found.push('curve');
    if (node.shadowRoot) visit(node.shadowRoot);
    node.childNodes.forEach(visit);
  };
  visit(document);
  return found.join('\\n');
})()"""


class Page:
    """One tab."""

    def __init__(self, send: Callable[..., dict[str, Any]]) -> None:
        self._send = send

    def open(self, url: str) -> None:
        """Starts loading; what the page shows comes later."""
        self._send("Page.navigate", url="about:blank")  # else a change behind the # alone would not load anything
        self._send("Page.navigate", url=url)

    def text(self) -> str:
        """All text of the page, with a line `curve` for every drawn path and `image WxH` for every loaded image."""
        text: str = self._send("Runtime.evaluate", expression=_EVERYTHING)["result"]["value"]
        return text

    def missing(self, words: list[str], timeout_s: float = 40.0) -> list[str]:
        """Those of the words that the page does not show in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            text = "".join(self.text().split())  # a tag may be spread over several elements
            missing = [word for word in words if "".join(word.split()) not in text]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.2)

    def photograph(self, path: Path) -> None:
        """Writes a PNG of what the window would show."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def page(folder: Path, width: int = 1600, height: int = 1200) -> Iterator[Page]:
    """A tab of a fresh browser whose profile lives in `folder`."""
    if BROWSER is None:
        raise FileNotFoundError("no chromium on the PATH")
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", f"--window-size={width},{height}"]
    # Chromium expects the pipes at descriptors 3 and 4, and a child can put them there.
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(to_read), str(from_write), BROWSER, *options, "about:blank"],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    with os.fdopen(to_write, "wb", buffering=0) as commands, os.fdopen(from_read, "rb") as replies:
        number = 0

        def send(method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            command = {"id": number, "method": method, "params": params}
            commands.write(json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0")
            while True:
                reply = json.loads(_until_zero(replies))
                if reply.get("id") == number:
                    if "error" in reply:
                        raise RuntimeError(f"{method}: {reply['error']}")
                    result: dict[str, Any] = reply["result"]
                    return result

        try:
            target = send("Target.createTarget", url="about:blank")["targetId"]
            session = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            yield Page(lambda method, **params: send(method, session, **params))
            send("Browser.close")
        finally:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until_zero(stream: Any) -> bytes:
    message = bytearray()
    while (byte := stream.read(1)) != b"\0":
        if not byte:
            raise RuntimeError("the browser has gone")
        message += byte
    return bytes(message)
