"""A headless Chromium driven through chromedriver's own protocol (W3C WebDriver), for tests of pages."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for a reference to an element
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1000,700"]


class Browser:
    """One window. Methods raise AssertionError with what the browser says."""

    def __init__(self, driver: str, chromium: str) -> None:
        self._http = httpx.Client(base_url=driver, timeout=60)
        options = {"binary": chromium, "args": ARGUMENTS}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._path = ""
        self._path = f"/session/{self._do('POST', '/session', capabilities={'alwaysMatch': capabilities})['sessionId']}"

    def _do(self, method: str, path: str, **body: Any) -> Any:
        answer = self._http.request(method, self._path + path, json=body if method == "POST" else None)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def open(self, url: str) -> None:
        self._do("POST", "/url", url="about:blank")
        self.complaints()  # of the page before, whose server may be gone
        self._do("POST", "/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script's `return` gives."""
        return self._do("POST", "/execute/sync", script=script, args=list(arguments))

    def _element(self, selector: str) -> str:
        return str(self._do("POST", "/element", using="css selector", value=selector)[ELEMENT])

    def type(self, selector: str, text: str) -> None:
        """Keys as a person presses them; U+E007 is Enter."""
        self._do("POST", f"/element/{self._element(selector)}/value", text=text)

    def click(self, selector: str) -> None:
        self._do("POST", f"/element/{self._element(selector)}/click")

    def text(self, selector: str) -> str:
        """Of the last element that a selector finds; "" where there is none."""
        return str(self.run("return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", selector))

    def complaints(self) -> list[str]:
        """What the console has said since the last call, errors and violations of the page's policy."""
        return [entry["message"] for entry in self._do("POST", "/se/log", type="browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._do("GET", "/screenshot")))

    def close(self) -> None:
        self._do("DELETE", "")


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser; the test is skipped where chromium or chromedriver is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = next(m for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        browser = Browser(f"http://127.0.0.1:{found.group(1)}", chromium)
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait()
