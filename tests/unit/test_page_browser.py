"""The page in a real browser: sorts, moves the slider, filters, zooms; no error, no request, at any width."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from rgbench.judge.models import load_result_sets
from rgbench.report.formats import section
from rgbench.report.page import page
from tests.conftest import needs
from tests.history.plausible import write_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FEW = ("hps", "oracle_mean", "fd_efflite0", "band_db")
PROMPTS = [f"a large red circle, number {i}" for i in range(14)]
PROMPTS[3] = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> & 🙂 " + "long " * 380
PHONE = {"width": 390, "height": 844}

pytestmark = needs(*BROWSERS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as found:
        yield launch(found)


def launch(found: Playwright) -> Browser:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, "no chromium, and RGBENCH_SKIP_NOTHING is set"
    return found.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"], timeout=120_000)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    write_model(root, "teacher", None, metrics=FEW, num=16, images=14, prompts=PROMPTS)
    for method in ("lcd", "lrm"):
        for step in (10, 20, 30):
            write_model(root, method, 0, metrics=FEW, num=16, images=14, prompts=PROMPTS, training=(step, 30))
    text = page([section(results, []) for results in load_result_sets(root)])
    file = root / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Page]:
    """The page in a window of its own; afterwards no error and no request but for the file itself."""
    complaints: list[str] = []
    requests: list[str] = []
    window = browser.new_page(viewport={"width": 1280, "height": 900})
    window.set_default_timeout(60_000)
    window.on("console", lambda message: complaints.append(message.text))
    window.on("pageerror", lambda error: complaints.append(str(error)))
    window.on("request", lambda request: requests.append(request.url))
    window.goto(file.as_uri())
    yield window
    title = window.title()
    window.close()
    assert complaints == [] and title == "rgbench: benchtop"
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}


def test_a_table_sorts_by_any_column_and_back_missing_last(opened):
    table = opened.locator("table.sortable").first
    values = "(table) => [...table.tBodies[0].rows].map((row) => row.cells[1].dataset.n).map(Number)"
    table.locator("thead button").nth(1).click()
    down = table.evaluate(values)
    assert down == sorted(down, reverse=True) and len(down) == 3, "of the oracle the highest first"
    assert table.locator("th[aria-sort=descending]").count() == 1
    table.locator("thead button").nth(1).press("Enter")
    assert table.evaluate(values) == down[::-1]
    assert table.locator("th[aria-sort=ascending]").count() == 1


def test_the_first_press_puts_the_best_first_whatever_its_direction(opened):
    table = opened.locator("table.sortable").first
    heads = table.locator("thead th").all_inner_texts()
    for label, goodness in (("FD-EffLite0", lambda v: v), ("Energy > .25 gap", abs)):
        at = next(i for i, head in enumerate(heads) if label in head)
        table.locator("thead button").nth(at).click()
        found = table.evaluate(f"(table) => [...table.tBodies[0].rows].map((row) => Number(row.cells[{at}].dataset.n))")
        assert found == sorted(found, key=goodness) and len(set(found)) == 3, label


def test_the_slider_moves_values_spectrum_and_images_together(opened):
    box = opened.locator(".training")
    slider = box.locator("input[type=range]")
    assert box.locator("output").inner_text() == "step 30 of 30"

    def shown() -> tuple[str, str, str, list[str]]:
        spectrum = box.locator(".chart").last.locator("polyline").first.get_attribute("points")
        cursor = box.locator(".cursor").first.get_attribute("x1")
        images = box.locator("li img").evaluate_all("(images) => images.map((image) => image.src)")
        return box.locator("tbody").inner_text(), spectrum or "", cursor or "", images

    late = shown()
    slider.focus()
    slider.press("ArrowLeft")
    assert box.locator("output").inner_text() == "step 20 of 30"
    early = shown()
    assert all(one != two for one, two in zip(early, late, strict=True))
    assert len(early[3]) == 4 * 2 and all(src.startswith("data:image/webp") for src in early[3])
    box.locator(".later").click()
    assert shown() == late


def test_the_sliders_values_are_those_of_the_table(opened):
    row = opened.locator(".training tbody tr").last.inner_text()
    cell = opened.locator("table.sortable").first.locator("tbody tr").last.locator("td").nth(1).inner_text()
    assert re.search(r"[\d.]+ ± [\d.]+", row)[0] == re.search(r"[\d.]+ ± [\d.]+", cell)[0]


def unfold(window: Page, *names: str) -> None:
    for name in names:
        window.locator(f"#{name}-benchtop > summary").click()


def unfold_all(window: Page) -> None:
    window.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")


def test_prompts_are_filtered_ordered_and_shown_as_text(opened):
    unfold(opened, "prompts")
    box = opened.locator(".browse")
    assert box.locator(".count").inner_text() == "12 of 14 prompts shown"
    box.locator(".more").click()
    assert box.locator("figure.line").count() == 14 and box.locator(".more").is_hidden()
    box.get_by_label("Order").select_option("")
    box.get_by_label("Words").fill("number 1 CIRCLE")
    texts = box.locator(".prompt").all_inner_texts()
    assert texts == [text for text in PROMPTS if "number 1" in text]
    box.get_by_label("Words").fill("owned")
    assert box.locator(".prompt").inner_text().startswith("<script>document.title = 'owned'</script><img src=x")
    box.get_by_label("Words").fill("")
    box.get_by_label("Order").select_option("worst")
    texts = box.locator("li:nth-child(3) .score").all_inner_texts()
    scores = [float(text.removesuffix("%").split()[-1]) for text in texts]
    assert scores == sorted(scores) and len(scores) == 12
    box.get_by_label("Words").fill("nothing like it")
    assert box.locator(".count").inner_text() == "No prompt matches."


def test_zoom_opens_by_keyboard_goes_through_the_models_and_closes(opened):
    unfold(opened, "prompts")
    line = opened.locator(".browse figure.line").first
    line.locator("img").first.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    zoom = opened.locator("#zoom")
    assert zoom.is_visible() and "2 of 3" in zoom.inner_text()
    assert zoom.locator("#zoom-image").get_attribute("src") == line.locator("img").nth(1).get_attribute("src")
    assert "HPS" in zoom.inner_text() and "LCD" in zoom.locator("#zoom-model").inner_text()
    opened.keyboard.press("ArrowRight")
    assert "3 of 3" in zoom.inner_text()
    zoom.locator("#zoom-next").click()
    assert "1 of 3" in zoom.inner_text()
    opened.keyboard.press("Escape")
    assert zoom.is_hidden()


def test_views_of_the_grid_change_without_script(browser, file):
    context = browser.new_context(java_script_enabled=False)
    window = context.new_page()
    window.goto(file.as_uri())
    unfold(window, "images")
    assert window.locator(".view.v1").is_visible() and not window.locator(".view.v3").is_visible()
    window.get_by_text("Log power spectrum", exact=True).click()
    assert window.locator(".view.v3").is_visible() and not window.locator(".view.v1").is_visible()
    assert window.locator("table.sortable").first.is_visible() and window.locator("noscript").count() == 2
    assert not window.locator(".training").is_visible() and not window.locator(".browse").is_visible()
    context.close()


def test_a_link_opens_what_is_folded_away(opened):
    opened.locator("table.sortable").first.locator("tbody td a").first.click()
    assert opened.locator("#evidence-benchtop").get_attribute("open") is not None
    assert opened.locator("tr:target").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_tables_scroll_and_the_page_does_not(opened, scheme):
    opened.set_viewport_size(PHONE)
    opened.emulate_media(color_scheme=scheme)
    head = opened.locator("table.sortable thead th").nth(1)
    assert "Oracle" in head.inner_text() and head.bounding_box()["x"] < PHONE["width"], "gold is seen first"
    unfold_all(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    small = opened.locator(".slide button, .browse button, .browse select, .browse input")
    heights = small.evaluate_all("(all) => all.filter((one) => one.offsetParent).map((one) => one.offsetHeight)")
    assert heights and min(heights) >= 36, "large enough for a thumb"
    opened.locator(".browse figure.line img").first.click()
    assert opened.locator("#zoom").bounding_box()["width"] <= PHONE["width"]


CONTRASTS = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const found = getComputedStyle(one).backgroundColor;
      if (!found.startsWith("rgba(0, 0, 0, 0")) return found;
    }
  };
  const ratio = (node, ink) => {
    const [high, low] = [light(ink), light(behind(node))].sort((a, b) => b - a);
    return [(high + 0.05) / (low + 0.05), node.textContent.trim().slice(0, 40)];
  };
  const written = [...document.querySelectorAll("p, a, li, td, th, h1, h2, h3, h4, span, button, label, summary, figcaption, dt, dd")];
  const plain = written.filter((node) => node.offsetParent && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  const drawn = [...document.querySelectorAll(".drawn text")].filter((node) => node.style.fill.includes("--plot"));
  return [plain.map((node) => ratio(node, getComputedStyle(node).color)), drawn.map((node) => ratio(node.closest("div"), getComputedStyle(node).fill))];
}"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_written_stands_out_from_what_is_behind_it(opened, scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    opened.emulate_media(color_scheme=scheme)
    unfold_all(opened)
    plain, drawn = opened.evaluate(CONTRASTS)
    assert len(plain) > 200 and len(drawn) > 100
    assert min(plain)[0] >= 4.5 and min(drawn)[0] >= 4.5, (min(plain), min(drawn))
    paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 382) == (scheme == "light"), paper


def test_the_keyboard_alone_skips_to_the_results_and_changes_the_view(opened):
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    assert opened.locator(".skip").bounding_box()["x"] >= 0, "seen while it has the focus"
    opened.keyboard.press("Enter")
    assert opened.url.endswith("#main")
    opened.locator("#images-benchtop > summary").press("Enter")
    opened.locator(".views > input").first.focus()
    opened.keyboard.press("ArrowRight")
    assert opened.locator(".view.v2").is_visible() and not opened.locator(".view.v1").is_visible()


def test_a_point_of_the_first_plot_shows_its_models_name_values_and_images(opened):
    tip = opened.locator(".tip")
    assert tip.is_hidden()
    opened.locator("#benchtop-answer-point-2").hover()
    assert "LRM" in tip.inner_text() and "HPS" in tip.inner_text() and "Oracle, mean" in tip.inner_text()
    assert tip.locator("img").count() == 3
    opened.mouse.move(0, 0)
    assert tip.is_hidden()
    opened.locator("#benchtop-answer-point-0").focus()
    assert "Teacher" in tip.inner_text(), "by keyboard too"
    opened.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_link_keeps_columns_order_step_words_and_what_is_open(opened, browser):
    table = opened.locator("table.sortable").first
    opened.locator(".columns summary").first.click()
    opened.locator(".columns").first.get_by_label("HPS").uncheck()
    assert not table.locator("thead th").nth(2).is_visible() and not table.locator("td:nth-child(3)").first.is_visible()
    table.locator("thead button").nth(1).click()
    opened.locator(".earlier").click()
    unfold(opened, "prompts", "glossary")
    opened.locator(".browse").get_by_label("Words").fill("number 1")
    link = browser.new_page(viewport={"width": 1280, "height": 900})
    link.goto(opened.url)
    again = link.locator("table.sortable").first
    assert not again.locator("thead th").nth(2).is_visible() and again.locator("thead th").nth(3).is_visible()
    assert again.locator("th[aria-sort=descending]").inner_text() == table.locator("th[aria-sort]").inner_text()
    assert link.locator(".training output").inner_text() == "step 20 of 30"
    assert (
        link.locator("#glossary-benchtop dl").is_visible()
        and not link.locator("#plots-benchtop .plot").first.is_visible()
    )
    assert link.locator(".browse .count").inner_text() == opened.locator(".browse .count").inner_text() != ""
    link.close()


@pytest.mark.parametrize("width", [1440, 390])
def test_grids_fit_the_width(opened, width):
    opened.set_viewport_size({"width": width, "height": 900})
    unfold(opened, "images")
    boxes = opened.locator(".scroll:has(> .grid):visible")
    assert boxes.count() >= 3
    assert boxes.evaluate_all("(all) => all.every((box) => box.scrollWidth <= box.clientWidth)")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_no_serious_fault(opened, scheme, width):
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": width, "height": 844})
    for found in (Axe().run(opened), unfold_all(opened) or Axe().run(opened)):
        serious = [each for each in found.response["violations"] if each["impact"] in ("serious", "critical")]
        assert not serious, [(each["id"], [node["html"][:200] for node in each["nodes"]][:3]) for each in serious]
