"""The page: offline, escaped, complete without JavaScript, small; opened in a browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rgbench.reporting.gather import gather
from rgbench.reporting.page import page
from rgbench.reporting.sections import section
from tests.history.plausible import write_model

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"
HOSTILE = [
    "<script>alert('prompt')</script> \"quoted\" & $\\alpha$ 🙂 " + "long " * 380,
    "</figcaption><img src=x onerror=1>",
]
CHROMIUM = shutil.which("chromium")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Tags(HTMLParser):
    """Every start tag with its attributes, and the ids and links among them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.found if attrs.get(attribute) is not None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("page")
    few = ("hps_aa1", "oracle_all", "fd_efflite0", "hfer_gap_db")
    write_model(root, "teacher", None, metrics=few, num=8, images=2, prompts=HOSTILE)
    write_model(root, "lcd", 0, metrics=few, num=8, images=2, prompts=HOSTILE)
    write_model(root, "lrm", 0, model="lrm<b onclick=1>-s0", metrics=few, num=8, images=2, prompts=HOSTILE)
    return page([section(comparison, root) for comparison in gather(root)])


@pytest.fixture(scope="module")
def tags(text: str) -> Tags:
    return Tags(text)


def test_nothing_is_loaded_from_anywhere(text, tags):
    loads = [attrs.get(name) for _, attrs in tags.found for name in ("src", "srcset", "action", "data", "poster")]
    assert all(value.startswith("data:") for value in loads if value)
    assert all(value.startswith("#") for value in tags.values("href"))
    assert not {tag for tag, _ in tags.found} & {"link", "iframe", "object", "embed", "base"}
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text


def test_texts_from_files_are_escaped(text, tags):
    assert [tag for tag, _ in tags.found].count("script") == 1, "the page's own"
    assert "&lt;script&gt;alert(&#39;prompt&#39;)" in text and "<script>alert" not in text
    assert not any(name.startswith("on") for _, attrs in tags.found for name in attrs)
    assert "lrm&lt;b onclick=1&gt;-s0" in text


def test_every_link_has_its_target(tags):
    ids = tags.values("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in tags.values("href")} <= set(ids)


def test_every_figure_names_its_file_and_command(text, tags):
    titles = tags.values("title")
    assert any(title.startswith("benchtop/lcd-s0/") and title.endswith(".json") for title in titles)
    assert "rgbench eval runs/lcd-s0 --metric fid,hps,oracle,spectrum" in text
    assert text.count('<tr id="e-benchtop-') == 12


def test_it_is_readable_without_script_and_by_keyboard_and_screen_reader(tags):
    assert not tags.values("hidden")
    images = [attrs for tag, attrs in tags.found if tag == "img"]
    assert len(images) == 2 + 6 and all(attrs.get("alt") for attrs in images)
    regions = [attrs for _, attrs in tags.found if attrs.get("class") == "scroll"]
    assert regions and all(attrs.get("tabindex") == "0" and attrs.get("aria-label") for attrs in regions)
    assert {attrs.get("scope") for tag, attrs in tags.found if tag == "th"} == {"col", "row"}


def test_benchtop_is_labelled(text):
    assert text.count(", benchtop</figcaption>") >= 6 and '<span class="badge">benchtop</span>' in text


def test_same_results_same_page():
    one, two = (page([section(comparison, HISTORY) for comparison in gather(HISTORY)]) for _ in range(2))
    assert one == two and "—" in one and len(one) < 1_000_000


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; `apt-get install chromium` to open the page in a browser"
)
def test_a_browser_opens_and_sorts_it_without_an_error(tmp_path, text):
    """Sorts the first table by its last column, and reports through the document's title."""
    probe = """
    const errors = []; addEventListener("error", (e) => errors.push(e.message));
    addEventListener("securitypolicyviolation", (e) => errors.push("blocked " + e.blockedURI));
    addEventListener("load", () => {
      const table = document.querySelector("table.sortable");
      const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.n));
      table.tHead.rows[0].cells[1].querySelector("button").click(); const up = values();
      table.tHead.rows[0].cells[1].querySelector("button").click(); const down = values();
      const loads = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:"));
      const wide = document.documentElement.scrollWidth;
      document.title = JSON.stringify({ up, down, errors, loads: loads.length, wide });
    });"""
    file = tmp_path / "page.html"
    file.write_text(text.replace("<script>", f"<script>{probe}</script>\n<script>", 1), encoding="utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--dump-dom"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=240, check=True)
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert seen["errors"] == [] and seen["loads"] == 0
    assert seen["up"] == sorted(seen["up"]) and seen["down"] == seen["up"][::-1] and len(seen["up"]) == 3
    assert seen["wide"] <= 500, "tables scroll, the page does not"
