"""The page in headless Chromium: python use_page.py GIVEN, where GIVEN is JSON: addresses, and what the models say."""

import json
import re
import sys
import time
import urllib.request
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, expect, sync_playwright

given = json.loads(sys.argv[1])
PROMPT = "import os\nimport sys\n\n\ndef main():\n"
COLOURS = ("accepted", "copied", "correction", "bonus")
QUESTION = "Hello? Please greet me, and tell me in a few words what you think of the weather in Zürich."
SLOW = 60_000  # milliseconds


@contextmanager
def opened(browser: Browser, url: str, **how: object):
    """A page that has no errors in its console and asks nobody but its server."""
    context = browser.new_context(**how)
    page, told, asked = context.new_page(), [], []
    page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(SLOW)
    page.goto(url)
    expect(page.locator("#model")).not_to_have_text("connecting")
    yield page, told
    elsewhere = [
        each for each in asked if urlsplit(each).netloc != urlsplit(url).netloc and not each.startswith("data:")
    ]
    assert not elsewhere, elsewhere
    assert not told, told
    context.close()


def ask(page: Page, text: str) -> None:
    page.locator("#say").fill(text)
    page.locator("#say").press("Enter")


def answered(page: Page) -> None:
    expect(page.locator("#stop")).to_be_disabled(timeout=SLOW)


def picture(page: Page, name: str) -> None:
    page.screenshot(path=f"{given['pictures']}/{name}.png")


def fits(page: Page) -> None:
    wide = "element => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1"
    told = page.evaluate(f"[...document.querySelectorAll('body *')].filter({wide}).map(element => element.outerHTML)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), [each[:200] for each in told]


def rests(url: str) -> None:
    until = time.monotonic() + 15
    while json.load(urllib.request.urlopen(url + "/health"))["live"]:
        assert time.monotonic() < until, "the server goes on writing"
        time.sleep(0.05)


def chat(browser: Browser) -> None:
    """Two turns, with thoughts; then one that is stopped; then a new chat."""
    with opened(browser, given["chat"]) as (page, _):
        for turn in range(2):
            with page.expect_request("**/chat/completions") as asked:
                ask(page, QUESTION)
            answered(page)
            told = asked.value.post_data_json["messages"]
            assert [message["role"] for message in told] == ["user", "assistant"] * turn + ["user"]
            assert all(message["content"] in (QUESTION, given["text"]) for message in told)
            assert all(message["reasoning_content"].strip() == given["thought"] for message in told[1::2])
            last = page.locator(".lane").nth(turn)
            assert last.locator("> .text").text_content() == given["text"], last.inner_html()
            assert last.locator("details .text").text_content().strip() == given["thought"]
            assert "tokens/s" in last.locator(".figures").text_content()
        assert "from the cache" in page.locator(".lane").nth(1).locator(".figures").text_content()
        picture(page, "chat")
        ask(page, "Go on for ever")
        expect(page.locator(".lane").nth(2).locator("> .text")).to_contain_text(given["endless"])
        assert page.locator("#send").is_disabled()
        page.locator("#stop").click()
        answered(page)
        rests(given["chat"])
        ask(page, QUESTION)
        answered(page)
        assert page.locator(".fault").count() == 0, page.locator(".fault").all_text_contents()
        page.locator("#fresh").click()
        assert page.locator(".turn").count() == 0
        with page.expect_request("**/chat/completions") as asked:
            ask(page, QUESTION)
        answered(page)
        assert len(asked.value.post_data_json["messages"]) == 1
        assert page.locator(".lane > .text").text_content() == given["text"]


def raw(browser: Browser) -> None:
    """The demo: its text comes piece by piece, coloured; then a race."""
    with opened(browser, given["raw"]) as (page, told):
        expect(page.locator("#model")).to_contain_text("has no chat template")
        expect(page.locator("#keyed")).to_be_hidden()
        page.locator("#tokens").fill("60")
        ask(page, PROMPT)
        expect(page.locator(".lane > .text")).to_contain_text(re.compile(r"\w"))
        assert page.locator("#stop").is_enabled(), "the text came in one piece"
        answered(page)
        seen = {name: page.locator(f".lane > .text span.{name}").count() for name in COLOURS}
        assert seen["accepted"] and (seen["correction"] or seen["bonus"]), seen
        paint = "element => getComputedStyle(element).color"
        painted = {name: page.locator(f".text span.{name}").first.evaluate(paint) for name in COLOURS if seen[name]}
        assert len(set(painted.values())) == len(painted), painted
        figures = page.locator(".lane .figures").text_content()
        assert re.search(r"60 tokens · [\d.]+ tokens per round · \d+ of \d+ drafts accepted", figures), figures
        page.locator("#colours").uncheck()
        plain = page.locator(".text span.accepted").first.evaluate(paint)
        assert plain == page.locator("body").evaluate(paint)
        page.locator("#colours").check()
        page.locator("#race").check()
        ask(page, PROMPT)
        answered(page)
        lanes = page.locator(".lanes.race .lane > .text")
        assert lanes.count() == 2 and lanes.nth(0).text_content() == lanes.nth(1).text_content()
        verdict = page.locator(".verdict").text_content()
        assert re.fullmatch(r"[\d.]+ times as fast as plain decoding, the same text", verdict), verdict
        expect(page.locator(".verdict")).to_be_in_viewport(ratio=1)
        picture(page, "race")
        page.locator("#temperature").fill("2")
        page.locator("#temperature").evaluate("element => element.value = '-1'")
        ask(page, PROMPT)
        expect(page.locator(".turn .fault")).to_contain_text("temperature")
        expect(page.locator(".turn .fault")).to_be_in_viewport(ratio=1)
        answered(page)
        picture(page, "refused")
        assert any("400" in text for text in told)
        told.clear()  # Chromium writes down every answer that is no success


def keyed(browser: Browser) -> None:
    with opened(browser, given["keyed"]) as (page, told):
        expect(page.locator("#keyed")).to_be_visible()
        picture(page, "keyed")
        page.locator("#key").fill("wrong")
        page.locator("#key").press("Enter")
        expect(page.locator("#model")).to_contain_text("key")
        page.locator("#key").fill(given["key"])
        page.locator("#key").press("Enter")
        expect(page.locator("#model")).to_contain_text("chat template")
        page.locator("#tokens").fill("5")
        ask(page, PROMPT)
        answered(page)
        assert page.locator(".lane > .text").text_content()
        told.clear()


def looks(browser: Browser) -> None:
    """Dark, light and narrow; long words do not widen it."""
    dark = {"color_scheme": "dark", "viewport": {"width": 360, "height": 640}}
    colours = []
    for name, how in (("narrow dark", dark), ("light", {"color_scheme": "light"})):
        with opened(browser, given["raw"], **how) as (page, _):
            colours.append(page.locator("body").evaluate("element => getComputedStyle(element).backgroundColor"))
            fits(page)
            page.locator("#tokens").fill("30")
            page.locator("#race").check()
            ask(page, "x = '" + "a" * 400 + "'\nprint(")
            answered(page)
            picture(page, name)
            fits(page)
    assert len(set(colours)) == 2, colours


with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=given["browser"], args=["--no-sandbox"])
    for check in (chat, raw, keyed, looks):
        check(chromium)
    version = chromium.version
    chromium.close()
remarks = "colours, figures, race, thoughts, errors, key, dark and narrow; asks no other host"
print(
    json.dumps(
        {"version": version, "streams": "yes", "stops": "yes", "calls": "-", "continues": "-", "remarks": remarks}
    )
)
