"""The arena's page in a real browser: by keyboard alone, on a phone, in the dark, from a file, without any request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from rgbench.arena.contest import Contest
from rgbench.arena.page import export_page
from rgbench.arena.server import build_app, listen
from tests.arena_maker import make_models, opened
from tests.conftest import needs
from tests.unit.test_page_browser import BROWSERS, CONTRASTS, PHONE, launch

MARKUP = "<img src=x onerror=alert(1)> & <b>bold</b>"

pytestmark = [needs(*BROWSERS), pytest.mark.enable_socket]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as found:
        yield launch(found)


@pytest.fixture
def contest(tmp_path: Path) -> Iterator[Contest]:
    with opened(tmp_path, make_models(tmp_path, num=2, texts=[MARKUP, "two"])) as found:
        yield found


@pytest.fixture
def url(contest: Contest) -> Iterator[str]:
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(contest), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def window(browser: Browser) -> Iterator[Page]:
    """A window that must neither complain nor ask anybody but this machine."""
    complaints: list[str] = []
    requests: list[str] = []
    found = browser.new_page()
    found.set_default_timeout(60_000)
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda request: requests.append(request.url))
    yield found
    found.close()
    assert complaints == []
    assert [one for one in requests if not one.startswith(("data:", "file:", "blob:", "http://127.0.0.1:"))] == []


def stored(contest: Contest, name: str) -> list[str]:
    rater = next(rater for rater in contest.votes.raters.values() if rater.name == name)
    return [vote.answer for vote in rater.votes.values()]


def wait_for(page: Page, answered: str) -> None:
    page.locator("#count", has_text=answered).wait_for()
    page.locator("#left:not([aria-disabled])").wait_for()


def test_a_rater_joins_votes_and_ends_by_keyboard_alone(window, url, contest):
    window.goto(f"{url}/#join={contest.token}")
    window.get_by_label("Your name").wait_for()
    window.keyboard.type("anna 012")
    window.keyboard.press("Enter")
    wait_for(window, "anna 012: 0 of 9")
    assert window.locator("#prompt").inner_text() in (MARKUP, "two") and window.locator("main b").count() == 0
    assert window.evaluate("document.activeElement.id") == "question", "a screen reader reads it"
    for number, key in enumerate(["1", "2", "0"], 1):
        window.keyboard.press(key)
        wait_for(window, f"{number} of 9")
    window.keyboard.press("Tab")
    window.keyboard.press("Tab")
    assert window.evaluate("document.activeElement.id") == "right"
    window.keyboard.press("Enter")
    wait_for(window, "4 of 9")
    assert stored(contest, "anna 012") == ["left", "right", "tie", "right"]
    window.reload()
    wait_for(window, "anna 012: 4 of 9")
    for number in range(5, 9):
        window.keyboard.press("1")
        wait_for(window, f"{number} of 9")
    window.keyboard.press("1")
    window.get_by_role("heading", name="Done. Thank you!").wait_for()
    assert len(stored(contest, "anna 012")) == 9
    assert contest.token not in window.url, "the address is the rater's own link now"


def test_a_link_without_token_and_one_that_is_wrong_say_so(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.get_by_text("This link lacks its token").wait_for()
    page.goto(f"{url}/#me=anna.{'0' * 32}")
    page.reload()
    page.get_by_text("This link is not valid").wait_for()
    page.close()


def test_a_vote_that_found_no_server_is_sent_again(browser, url, contest):
    page = browser.new_page()
    page.goto(f"{url}/#me={contest.key(contest.votes.join('anna'))}")
    wait_for(page, "0 of 9")
    page.route("**/vote", lambda route: route.abort())
    page.keyboard.press("2")
    page.get_by_text("not saved yet").wait_for()
    page.unroute("**/vote")
    page.get_by_role("button", name="Try again").click()
    wait_for(page, "1 of 9")
    assert stored(contest, "anna") == ["right"] and page.locator("#error").is_hidden()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_both_images_fit_and_everything_is_readable(window, url, contest, scheme):
    window.emulate_media(color_scheme=scheme)
    window.set_viewport_size(PHONE)
    window.goto(f"{url}/#me={contest.key(contest.votes.join('anna'))}")
    wait_for(window, "0 of 9")
    assert window.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    boxes = [window.locator(f"#{side}").bounding_box() for side in ("left", "right", "tie")]
    assert all(box["y"] + box["height"] <= PHONE["height"] and box["height"] >= 44 for box in boxes)
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    written, _ = window.evaluate(CONTRASTS)
    assert len(written) > 5 and min(written)[0] >= 4.5, min(written)


def test_a_page_in_a_file_asks_keeps_and_downloads(window, contest, tmp_path):
    file = tmp_path / "anna.html"
    file.write_text(export_page(contest, contest.votes.join("anna")), encoding="utf-8")
    window.goto(file.as_uri())
    wait_for(window, "anna: 0 of 9")
    for number in range(1, 6):
        window.keyboard.press("2")
        wait_for(window, f"{number} of 9")
    window.reload()
    wait_for(window, "anna: 5 of 9")
    with window.expect_download() as waiting:
        window.get_by_role("button", name="Download my answers").click()
    answers = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(answers)
    assert answers.name == "votes-anna.json" and json.loads(answers.read_text())["rater"] == "anna"
    assert contest.merge(answers).new == 5 and stored(contest, "anna") == ["right"] * 5
