"""A real browser without a window, driven over a pipe with Chromium's own protocol: no package, no port, no network."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell", "chrome")


def find_browser():
    """Path of a Chromium: ARDTRAIN_BROWSER, or the first on PATH; None where there is none."""
    named = os.environ.get("ARDTRAIN_BROWSER")
    return named or next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One page: what it logged, what a script gives, pictures of it."""

    def __init__(self, send, receive):
        self._send_bytes, self._receive, self._number, self._session = send, receive, 0, None
        self.problems = []  # console errors and warnings, exceptions, requests for anything but the file
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """One command's result; what the browser tells in between is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._send_bytes(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._receive())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event):
        what, details = event.get("method"), event.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.problems.append(details["exceptionDetails"].get("exception", {}).get("description", str(details)))
        elif what == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.problems.append(str([a.get("value", a.get("description")) for a in details["args"]]))
        elif what == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.problems.append(details["entry"]["text"])
        elif what == "Network.requestWillBeSent" and not details["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(f"asks for {details['request']['url']}")

    def open(self, path, width, *, dark=False, height=900):
        """Shows a file; returns the seconds until its script has drawn everything."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        start = time.monotonic()
        self.call("Page.navigate", url=f"file://{path}")
        while self.script("document.documentElement?.dataset.ready") != "yes":
            assert time.monotonic() - start < 60, "the page never said that it is ready"
            time.sleep(0.02)
        self.settle()
        return time.monotonic() - start

    def script(self, text):
        """Value of an expression in the page."""
        out = self.call("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out
        return out["result"].get("value")

    def settle(self):
        """Two frames: what was asked for is drawn."""
        self.script("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def click(self, x, y):
        """The left button at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def picture(self, path=None, *, whole=True):
        """The page as PNG bytes, also written to `path`."""
        out = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        content = base64.b64decode(out["data"])
        if path:
            path.write_bytes(content)
        return content


@contextmanager
def browser_page(browser, profile):
    """A page of a browser that ends with the block. profile: an empty folder for its files."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--hide-scrollbars", "--disable-background-networking", f"--user-data-dir={profile}",
               "--remote-debugging-pipe"]  # fmt: skip

    wanted = f'exec {json.dumps(browser)} "$@" 3<&{to_read} 4>&{from_write}'
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(
            ["bash", "-c", wanted, *command], pass_fds=(to_read, from_write), stdout=nothing, stderr=nothing
        )
    os.close(to_read)
    os.close(from_write)
    held = bytearray()

    def receive():
        while b"\0" not in held:
            chunk = os.read(from_read, 1 << 16)
            assert chunk, "the browser has ended"
            held.extend(chunk)
        message, _, rest = bytes(held).partition(b"\0")
        held[:] = rest
        return message

    def send(content):
        while content:
            content = content[os.write(to_write, content) :]

    try:
        yield Page(send, receive)
    finally:
        os.close(to_write)  # a browser without its pipe ends
        os.close(from_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
