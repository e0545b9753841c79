"""The chat page in a real browser: what people do there, by mouse, keyboard, phone and screen reader."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from langmill.serve import page as module
from langmill.serve.history import Message
from langmill.serve.keys import add_key
from langmill.serve.state import State

LOOK = (Path(__file__).parent / "look.js").read_text(encoding="utf-8")
SHORT = {"temperature": 0, "max_tokens": 16, "likely": True}  # no chance: an answer may not end early
ROLES = set("button textbox searchbox combobox spinbutton link checkbox dialog complementary log".split())
Open = Callable[..., Page]
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser(_running: Any) -> Iterator[Browser]:
    """The distribution's Chromium, or the one that Playwright has installed; it is gone before the server is."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--disable-gpu", *root])
        yield made
        made.close()


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Open]:
    """`opened()` gives the page, ready. Afterwards: no errors in it, and nothing was asked of another host."""
    faults: list[str] = []
    contexts = []

    def open_page(address: str = url, how: dict[str, Any] = SHORT, faulty: str = "", **more: Any) -> Page:
        context = browser.new_context(
            **{"locale": "en-GB", "viewport": {"width": 1200, "height": 800}} | more
        )
        contexts.append(context)
        context.add_init_script(f"localStorage['langmill.how'] ??= {json.dumps(json.dumps(how))}")
        made = context.new_page()
        fine = re.compile(faulty or "(?!)").search
        made.on("request", lambda r: None if r.url.startswith((address, "blob:")) else faults.append(r.url))
        made.on("pageerror", lambda error: faults.append(str(error)))
        made.on(
            "console", lambda m: faults.append(m.text) if m.type == "error" and not fine(m.text) else None
        )
        made.goto(address)
        made.wait_for_selector("html[data-ready]")
        return made

    yield open_page
    assert [context.close() for context in contexts] and faults == []


def reload(page: Page) -> None:
    page.reload()
    page.wait_for_selector("html[data-ready]")


def send(page: Page, text: str) -> None:
    page.locator("#say").fill(text)
    page.keyboard.press("Enter")


def say(page: Page, text: str) -> None:
    """Send a message, and wait for the end of its answer."""
    before = page.locator(".turn.user").count()
    send(page, text)
    expect(page.locator(".turn.user")).to_have_count(before + 1)
    done(page)


def done(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible(timeout=60_000)


def last(page: Page) -> str:
    return page.locator(".turn.assistant").last.locator(".body").inner_text()


def answered(page: Page, state: State, text: str) -> None:
    """Put a branch with this message and answer into the open conversation."""
    assert state.history is not None
    id = page.evaluate("location.hash.slice(1)")
    asked = state.history.add("", id, Message("user", text))
    state.history.add("", id, Message("assistant", text, asked.number, "tiny", finish="error"))
    reload(page)


def menu(page: Page, name: str) -> None:
    page.locator("#menu summary").click()
    page.get_by_role("button", name=name, exact=True).click()


def button(page: Page, name: str, of: str = ".turn.assistant") -> Any:
    return page.locator(of).last.get_by_role("button", name=name, exact=True)


def test_what_is_said_is_answered_and_there_after_a_reload(opened: Open) -> None:
    page = opened()
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    page.get_by_role("button", name="Give me five names for a small bakery").click()
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.press("Enter")
    done(page)
    expect(page.locator("#say")).to_have_value("")
    facts = re.compile(r"tiny · \d+ tokens · [\d.,]+ tokens/s · longest answer")
    expect(page.locator(".facts")).to_contain_text(facts)
    expect(page.locator("#context")).to_contain_text("of 512 tokens of context")
    expect(page.locator("#status")).to_have_text(re.compile(r"The answer is complete: \d+ tokens?\."))
    expect(page.locator("#title")).to_have_text("Give me five names for a small bakery")
    say(page, "fox <b>dog</b>")
    texts = page.locator(".turn .body").all_inner_texts()
    assert len(texts) == 4 and texts[2] == "fox <b>dog</b>"
    reload(page)
    assert page.locator(".turn .body").all_inner_texts() == texts
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("#list a").first.click()
    expect(page.locator(".turn")).to_have_count(4)


def test_answers_stream_and_stop(opened: Open, running: Any) -> None:
    page = opened(how={"temperature": 0, "likely": False})
    page.select_option("#model", "long")
    send(page, "fox")
    expect(page.locator(".live .facts")).to_contain_text(re.compile(r"\d\d+ tokens"))
    streamed = page.locator(".live .body").inner_text()
    assert streamed and page.locator("#stop").is_visible() and page.locator(".live[aria-busy=true]").count()
    page.keyboard.press("Escape")
    done(page)
    expect(page.locator(".facts")).to_contain_text("stopped")
    running.until(lambda: running.busy() == 0)
    assert len(last(page)) >= len(streamed) // 2
    reload(page)
    expect(page.locator(".facts")).to_contain_text("stopped")
    expect(page.locator("#model")).to_have_value("long")
    button(page, "Answer again").click()
    expect(page.locator(".live .facts")).to_contain_text("tokens/s")
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.locator("#list a", has_text="fox").first.click()
    expect(page.locator(".live .facts")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    done(page)
    expect(page.locator(".versions")).to_contain_text("2 of 2")


def test_another_answer_and_an_edit_are_branches(opened: Open) -> None:
    page = opened(how={**SHORT, "temperature": 2.0})
    say(page, "fox")
    first = last(page)
    button(page, "Answer again").click()
    expect(page.locator(".versions")).to_contain_text("2 of 2")
    done(page)
    second = last(page)
    say(page, "dog")
    assert page.locator(".turn").count() == 4
    button(page, "Previous version", ".turn:nth-child(2)").click()
    assert page.locator(".turn").count() == 2 and last(page) == first
    button(page, "Next version").click()
    assert page.locator(".turn").count() == 4
    assert page.locator(".turn.assistant .body").first.inner_text() == second
    button(page, "Edit", ".turn.user >> nth=0").click()
    field = page.get_by_label("Edit your message")
    expect(field).to_be_focused()
    field.press("Escape")
    assert page.locator(".turn.user .body").first.inner_text() == "fox"
    button(page, "Edit", ".turn.user >> nth=0").click()
    page.get_by_label("Edit your message").fill("night")
    page.get_by_role("button", name="Send as a new branch").click()
    expect(page.locator(".turn.user .versions")).to_contain_text("2 of 2")
    done(page)
    assert page.locator(".turn.user .body").all_inner_texts() == ["night"]
    button(page, "Previous version", ".turn.user").click()
    assert page.locator(".turn.user .body").all_inner_texts() == ["fox", "dog"]


def test_the_probabilities_of_an_answer(opened: Open) -> None:
    page = opened()
    say(page, "fox")
    text = last(page)
    button(page, "Token probabilities").click()
    expect(page.locator(".token").first).to_be_visible()
    shares = page.locator(".token .share").all_inner_texts()
    assert all(re.fullmatch(r"<0\.1|[\d.]+", share) for share in shares)
    page.locator(".token").first.click()
    expect(page.locator(".others tbody tr")).to_have_count(5)
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(1)).to_be_focused()
    button(page, "Back to the text").click()
    assert last(page) == text


def test_names_for_screen_readers_and_contrast(opened: Open, state: State) -> None:
    page = opened()
    say(page, "fox")
    shown = "# Head\n\n> quote\n\n[link](https://e.org) `code`\n\n```py\nx = 1\n```\n\n| a |\n|---|\n| 1 |\n"
    answered(page, state, shown)
    for theme in ("light", "dark"):
        page.select_option("#theme", theme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (theme == "light")
        assert_readable(page)
        page.locator("#controls-open").click()
        page.locator("#how-top_p").fill("7")
        assert_readable(page)
        page.locator("#how-top_p").fill("")
        button(page, "Edit", ".turn.user").click()
        page.locator("#menu summary").click()
        assert_readable(page)
        page.get_by_role("button", name="Delete", exact=True).click()
        assert_readable(page)
        page.keyboard.press("Escape")
        page.get_by_label("Edit your message").press("Escape")
        page.locator("#controls-close").click()
        page.get_by_role("button", name="Previous version").click()
        button(page, "Token probabilities").click()
        page.locator(".token").first.click()
        assert_readable(page)
        page.get_by_role("button", name="Next version").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    system = opened(color_scheme="dark")
    assert system.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 25)"


def assert_readable(page: Page) -> None:
    looked = page.evaluate(LOOK)
    assert looked["found"] == [] and looked["seen"] > 20
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"] and node["role"]["value"] in ROLES and not node.get("name", {}).get("value")
    ]
    assert nameless == [] and len(tree) > 40


def test_a_phone_of_360_pixels(opened: Open) -> None:
    page = opened(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    say(page, "x" * 300)
    page.get_by_role("button", name="Token probabilities").tap()
    page.locator(".token").first.tap()
    for name in ("", "side", "controls"):
        if name:
            page.locator(f"#{name}-open").tap()
            page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for id in ("say", "send"):
            box = page.locator(f"#{id}").bounding_box()
            assert box and box["x"] >= 0
            assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
        assert page.evaluate(LOOK)["small"] == []
        if name:
            page.locator(f"#{name}-close").tap()
    assert page.locator("#side").evaluate("n => n.inert")


def test_by_keyboard_alone(opened: Open) -> None:
    page = opened()
    page.keyboard.press("/")
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.type("one/")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator("#say").input_value() == "one/\ntwo"
    page.keyboard.press("Enter")
    done(page)
    assert page.locator(".turn.user .body").inner_text() == "one/\ntwo"
    page.locator("#search").focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('#list') !== null")
    assert page.evaluate("getComputedStyle(document.activeElement).outline").endswith("solid 2px")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#search")).to_be_focused()
    page.locator("#controls-open").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#how-system")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#controls-open")).to_be_focused()


def test_in_chinese_and_english(opened: Open) -> None:
    page = opened(locale="zh-CN")
    expect(page.locator("html")).to_have_attribute("lang", "zh")
    expect(page.get_by_role("heading", name="想了解什么？")).to_be_visible()
    say(page, "春眠不觉晓")
    expect(page.locator(".facts")).to_contain_text(re.compile(r"\d+ 个词元"))
    page.select_option("#language", "en")
    page.wait_for_selector("html[lang=en][data-ready]")
    expect(page.locator(".facts")).to_contain_text(re.compile(r"\d+ tokens"))
    strings = page.evaluate("import('/page/strings.js').then(m => m.STRINGS)")
    holes = {
        language: {name: sorted(re.findall(r"\{\w+\}", text)) for name, text in words.items()}
        for language, words in strings.items()
    }
    assert holes["en"] == holes["zh"]
    everything = "".join(map(bytes.decode, module.files().values()))
    used = re.findall(r'(?:\bt\(|data-t(?:-\w+)?=)"(\w+)"', everything)
    assert set(used) <= set(strings["en"])


def test_how_to_answer_is_checked_sent_and_remembered(opened: Open) -> None:
    page = opened()
    page.locator("#controls-open").click()
    page.get_by_label("Temperature").fill("9")
    expect(page.get_by_text("Temperature must be from 0 to 2.")).to_be_visible()
    send(page, "fox")
    expect(page.get_by_label("Temperature")).to_be_focused()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("System prompt").fill("Be brief.")
    with page.expect_request("**/messages") as sent:
        say(page, "fox")
    told = sent.value.post_data_json
    assert (told["temperature"], told["system"], told["max_tokens"]) == (0, "Be brief.", 16)
    page.get_by_role("button", name="Back to the defaults").click()
    reload(page)
    assert page.locator("#how-system").input_value() == "Be brief."  # as this conversation was last asked


def test_what_goes_wrong_is_said_and_nothing_is_lost(opened: Open) -> None:
    page = opened(faulty="400|ERR_FAILED")
    send(page, "word " * 600)
    expect(page.get_by_role("alert")).to_contain_text("This model's context is 512 tokens")
    assert page.locator("#say").input_value() == "word " * 600
    page.route("**/messages", lambda route: route.abort())
    send(page, "fox")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    assert page.locator("#say").input_value() == "fox"
    page.unroute("**/messages")
    page.keyboard.press("Enter")
    done(page)
    expect(page.locator(".turn")).to_have_count(2)


def test_renaming_searching_exporting_deleting(opened: Open) -> None:
    page = opened()
    say(page, "fox")
    menu(page, "Rename")
    page.get_by_label("A name for this conversation").fill("Über Mühlen")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#title")).to_have_text("Über Mühlen")
    page.locator("#search").fill("über mü")
    expect(page.locator("#list a")).to_have_text(["Über Mühlen"])
    page.locator("#search").fill("zzzz")
    expect(page.locator("#none")).to_have_text("Nothing found.")
    page.locator("#search").fill("")
    for name, ending in (("Export as Markdown", ".md"), ("Export as JSON", ".json")):
        page.locator("#menu summary").click()
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        assert download.value.suggested_filename.endswith(ending)
        assert "Über Mühlen" in download.value.path().read_text(encoding="utf-8")
    menu(page, "Delete")
    expect(page.get_by_role("dialog")).to_contain_text("“Über Mühlen” and all its messages")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#title")).to_have_text("New conversation")
    expect(page.locator("#list a", has_text="Über Mühlen")).to_have_count(0)


def test_an_attack_in_an_answer_stays_text(opened: Open, state: State) -> None:
    page = opened()
    say(page, "<img src=x onerror=alert(1)>")
    attack = "<script>document.title='gone'</script> [a](javascript:alert(1)) ![p](https://e.org/spy.png)\n"
    answered(page, state, attack)
    assert page.locator("#thread img, #thread script").count() == 0 and page.title() != "gone"
    assert page.locator("#thread a").get_attribute("href") == "https://e.org/spy.png"
    policy = page.request.get(page.url.partition("#")[0]).headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy


def test_a_key_is_asked_for_and_kept_for_the_tab(
    opened: Open, serving: Callable[..., Any], folder: str, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys", "ann")
    page = opened(serving(folder, api_keys=str(tmp_path / "keys")).url, faulty="401")
    dialog = page.get_by_role("dialog", name="This server asks for an API key")
    page.get_by_label("API key").last.fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_label("API key")).to_have_value("")
    page.get_by_label("API key").last.fill(key)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    say(page, "fox")
    reload(page)
    expect(page.locator(".turn")).to_have_count(2)
    assert key not in page.evaluate("JSON.stringify(localStorage)")
