"""The page at /, in a headless Chromium: it streams, stops, shows what it should, and text stays text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browsing
from gguf_files import write_model
from server_process import eventually, serving
from test_process import SLOW

from smallthinker_edge.files.pack import pack

ENTER = "\ue007"
ANSWER = '{"action":"on","device":"light","area":"kitchen"}'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


def say(browser: Browser, text: str) -> None:
    browser.type("#text", text + ENTER)


def test_an_answer_and_what_is_measured(browser: Browser, demo_model: Path, tmp_path: Path) -> None:
    pack(demo_model, tmp_path / "demo.stpk")
    with serving(tmp_path / "demo.stpk", "--memory", "1GiB") as server:
        browser.open(server.url)
        eventually(lambda: browser.text("#name") == "demo")
        say(browser, "turn on the kitchen light")
        eventually(lambda: browser.text(".assistant") == ANSWER)
        eventually(lambda: browser.text("#speed").endswith(" tokens/s"))
        eventually(lambda: " of 1,024" in browser.text("#memory"))
        eventually(lambda: browser.text("#hits") not in ("", "experts in memory 0 %"))
        assert browser.run("return document.querySelector('meter').value / document.querySelector('meter').max") < 1
        say(browser, "and <img src=x onerror='document.title=1'><script>document.title=2</script>&amp;")
        eventually(lambda: browser.run("return document.querySelectorAll('.assistant').length") == 2)
        eventually(lambda: not browser.run("return running"))
        assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
        assert browser.text(".user").startswith("and <img src=x")
        assert browser.run("return messages.length") == 4
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            browser.screenshot(Path(folder) / "page.png")
        browser.click("#fresh")
        assert browser.run("return [messages.length, document.querySelectorAll('main > div').length]") == [0, 0]
        assert browser.complaints() == []


def test_what_a_model_writes_stays_text(browser: Browser, demo_model: Path) -> None:
    with serving(demo_model) as server:
        browser.open(server.url)
        html = "<img src=x onerror='document.title=1'><b>bold</b>"
        # The page's own function that shows a chunk, fed with one that holds HTML.
        browser.run(
            "const event = 'data: ' + JSON.stringify({choices: [{delta: {content: arguments[0]}}]}) + '\\n\\n';"
            "window.fetch = async () => new Response(event); ask('x');",
            html,
        )
        eventually(lambda: browser.text(".assistant") == html)
        assert browser.run("return document.querySelectorAll('main b, main img').length") == 0


def test_stop_ends_the_answer_there_and_in_the_server(browser: Browser, tmp_path: Path) -> None:
    path = write_model(tmp_path / "slow.gguf", **SLOW)
    with serving(path, "--context", "16384", "--logit-bias", "272=-100", "--logit-bias", "274=-100") as server:
        browser.open(server.url)
        say(browser, "hello")
        eventually(lambda: len(browser.text(".assistant")) > 3)
        assert server.pending() == 1
        browser.click("#stop")
        eventually(lambda: browser.text(".note") == "Stopped.")
        eventually(lambda: server.pending() == 0)
        assert browser.run("return messages.length") == 2
        assert browser.complaints() == []


def test_a_key_is_asked_for(browser: Browser, demo_model: Path) -> None:
    with serving(demo_model, env={**os.environ, "SMALLTHINKER_API_KEY": "sesame"}) as server:
        browser.open(server.url)
        eventually(lambda: not browser.run("return document.querySelector('#key').hidden"))
        say(browser, "turn on the kitchen light")
        eventually(lambda: "key" in browser.text(".error"))
        browser.type("#key", "sesame")
        say(browser, "turn on the kitchen light")
        eventually(lambda: browser.text(".assistant") == ANSWER)
