"""The page: offline, escaped, complete without JavaScript, small. What its script does: test_page_browser.py."""

import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from matplotlib.text import Text
from PIL import Image

from rgbench.core.io import open_image
from rgbench.judge.models import load_result_sets
from rgbench.judge.verdict import judge_set
from rgbench.metrics.values import metric_info
from rgbench.report.formats import section
from rgbench.report.page import LEVELS, Album, inline_svg, page, without_pictures
from rgbench.report.plots import LIGHT, draw
from rgbench.report.report import report
from tests.history.plausible import write_model

HISTORY = Path(__file__).parents[1] / "history" / "report_v1"
HOSTILE = [
    "<script>alert('prompt')</script> \"quoted\" & $\\alpha$ 🙂 " + "long " * 380,
    "</figcaption><img src=x onerror=1>",
]


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


def page_of(root: Path) -> str:
    return page([section(results, judge_set(results)) for results in load_result_sets(root)])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("page")
    few = ("hps", "oracle_all", "fd_efflite0", "hfer_db")
    write_model(root, "teacher", None, metrics=few, num=8, images=2, prompts=HOSTILE)
    write_model(root, "lcd", 0, metrics=few, num=8, images=2, prompts=HOSTILE)
    for step in (1, 2, 3):
        write_model(
            root, "lrm", 0, model="lrm<b onclick=1>-s0", metrics=few, num=8, images=2, prompts=HOSTILE,
            training=(step, 3),
        )  # fmt: skip
    return page_of(root)


@pytest.fixture(scope="module")
def tags(text: str) -> Tags:
    return Tags(text)


def test_nothing_is_loaded_from_anywhere(text, tags):
    loads = [attrs.get(name) for _, attrs in tags.found for name in ("src", "srcset", "action", "data", "poster")]
    assert all(value.startswith("data:") for value in loads if value)
    assert all(value.startswith("#") for value in tags.values("href"))
    assert all(value.startswith(("#", "data:")) for value in tags.values("xlink:href"))
    assert not {tag for tag, _ in tags.found} & {"link", "iframe", "object", "embed", "base"}
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text


def test_texts_from_files_are_escaped(text, tags):
    assert [attrs.get("id") for tag, attrs in tags.found if tag == "script"] == ["data", None], "the page's own"
    assert "&lt;script&gt;alert(&#39;prompt&#39;)" in text and "<script>alert" not in text
    assert not any(name.startswith("on") for _, attrs in tags.found for name in attrs)
    assert "lrm&lt;b onclick=1&gt;-s0" in text


def test_every_link_has_its_target(tags):
    ids = tags.values("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in [*tags.values("href"), *tags.values("xlink:href")] if href[0] == "#"} <= set(ids)


def test_every_value_explains_itself_on_hover(tags):
    cells = [attrs.get("title", "") for tag, attrs in tags.found if tag == "td" and "data-n" in attrs]
    (value, *_) = [cell for cell in cells if cell.startswith("HPS: 2") and "→" not in cell]
    assert re.fullmatch(r"HPS: [\d.]+; 95 % interval [\d.]+ to [\d.]+ \(.*\); 2048 images; 2048 prompts of .*", value)
    (change, *_) = [cell for cell in cells if cell.startswith("HPS") and "→" in cell]
    assert re.fullmatch(r"HPS: [\d.]+ → [\d.]+; 95 % interval of the change \+.* \(paired over 8 prompts\);.*", change)
    assert not any("lcm4-" in title for title in tags.values("title"))


def test_every_value_names_its_result_and_the_commands_that_measured(text):
    assert "<code>benchtop/lcd-s0/lcm4-" in text
    assert "rgbench eval runs/lcd-s0 --metric fid,hps,oracle,spectrum" in text
    assert text.count('<tr id="e-benchtop-') == 3 + 2, "those of checkpoints too"
    assert re.search(r"<td>lrm&lt;b onclick=1&gt;-s0, step 1</td>", text)


def test_it_is_readable_without_script_and_by_keyboard_and_screen_reader(tags):
    assert not tags.values("hidden")
    images = [attrs for tag, attrs in tags.found if tag == "img" and attrs.get("id") != "zoom-image"]
    num_grids = 1 + 3 + 2
    assert len(images) == num_grids * 2 * 3 and all(attrs.get("alt") for attrs in images)
    drawings = [attrs for _, attrs in tags.found if attrs.get("class") == "drawn"]
    assert len(drawings) == 7 and all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in drawings)
    assert [attrs.get("type") for tag, attrs in tags.found if tag == "input"].count("radio") == 3, "views by CSS alone"
    regions = [attrs for _, attrs in tags.found if attrs.get("class") == "scroll"]
    assert regions and all(attrs.get("tabindex") == "0" and attrs.get("aria-label") for attrs in regions)
    assert {attrs.get("scope") for tag, attrs in tags.found if tag == "th"} == {"col", "row"}


def test_the_first_screen_answers_and_the_rest_is_folded(text, tags):
    main = text[text.index("<main") :]
    order = ['class="chip"', 'class="strip"', "-answer-point-", 'class="sortable']
    places = [main.index(part) for part in order]
    assert places == sorted(places)
    points = [name for name in tags.values("id") if "-answer-point-" in name]
    assert points == [f"benchtop-answer-point-{i}" for i in range(3)], "every model"
    parts = [attrs for tag, attrs in tags.found if tag == "details" and attrs.get("class") == "part"]
    assert [attrs["id"].split("-")[0] for attrs in parts] == [
        *("words", "metrics", "probes", "plots", "images", "prompts", "glossary", "protocols", "evidence")
    ]
    assert not any("open" in attrs for attrs in parts)


def test_every_metric_is_explained_on_hover_and_in_the_glossary(text, tags):
    for info in (metric_info(name) for name in ("hps", "oracle_all", "fd_efflite0", "hfer_db")):
        assert info.about in tags.values("title") and f"<dd>{escape(info.about)} " in text


def test_rewards_that_were_trained_on_are_grey_and_stand_behind_gold(tags):
    heads = [attrs["class"] for tag, attrs in tags.found if tag == "th" and attrs.get("title")][:3]
    assert heads == ["num", "num trained", "num"], "oracle, HPS, distance"


def test_benchtop_is_labelled(text):
    assert '<span class="badge">benchtop</span>' in text
    assert text.count("World: benchtop</text>") == text.count('<svg class="drawn"') > 5


def test_same_results_same_page():
    one, two = (page_of(HISTORY) for _ in range(2))
    assert one == two and "—" in one and len(one) < 1_000_000


def data(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_scripts_data_are_the_results_values(text):
    found = data(text)["worlds"]["benchtop"]
    prompts = found["prompts"]
    assert [prompt["text"] for prompt in prompts["prompts"]] == [prompt[:2000] for prompt in HOSTILE]
    assert [prompt["id"] for prompt in prompts["prompts"]] == ["test/0", "test/1"], "as evaluated"
    assert {prompt["group"] for prompt in prompts["prompts"]} == {"test"} and prompts["base"] == 1
    assert all(len(prompt["scores"]) == len(prompts["metrics"]) == 2 for prompt in prompts["prompts"])
    training = found["training"]
    assert training["steps"] == [1, 2, 3] and len(training["prompts"]) == 2
    (run,) = training["runs"]
    assert all(len(run[key]) == 3 and None not in run[key] for key in ("gaps", "images"))
    assert run["hack"] is None or run["hack"]["step"] in (1, 2)
    reward = [metric["name"] for metric in training["metrics"]].index("hps")
    assert all(
        low < value < high and text.startswith(f"{value:.2f} ± ") for value, low, high, text in run["values"][reward]
    )


def test_an_image_is_on_the_page_once_and_not_again_in_the_data(text, tags):
    images = data(text)["images"]
    shown = {int(attrs["data-i"]) for _, attrs in tags.found if "data-i" in attrs}
    assert shown and all((image is None) == (i in shown) for i, image in enumerate(images))
    assert sum(image is not None for image in images) == 2 * 2, "the checkpoints' alone"


def test_pictures_are_left_out_of_the_comparison_and_nothing_else(text):
    bare = without_pictures(text)
    assert ";base64," not in bare and len(bare) < len(text) / 3
    drawn = re.compile(r'<svg class="drawn".*?</svg>|<svg></svg>', re.DOTALL)
    one, two = (re.sub(r"data:image[^\"')]*", "", drawn.sub("", page)) for page in (bare, text))
    assert one == two and "<svg></svg>" in bare


def test_plots_are_drawn_once_for_light_and_dark_with_letters_as_text(text):
    drawings = re.findall(r'<svg class="drawn".*?</svg>', text, re.DOTALL)
    assert len(drawings) == 7 and max(map(len, drawings)) < 60_000
    for drawing in drawings:
        colours = {colour.lower() for colour in re.findall(r"#[0-9A-Fa-f]{6}", drawing)}
        assert not colours & {colour.lower() for colour in LIGHT.values()}
        assert set(re.findall(r"var\((--plot-\w+)\)", drawing)) <= set(re.findall(r"(--plot-\w+):", text))


def test_what_is_written_in_a_plot_stays_as_it_was_drawn():
    (results,) = load_result_sets(HISTORY)
    for plot, figure in draw(results)[0].items():
        figure.axes[0].set_title("0.1234567")
        written = re.findall(r"<text [^>]*>([^<]*)</text>", inline_svg(figure, "one", plot.alt))
        drawn = [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert "0.1234567" in written and len(written) > 10
        assert {html.unescape(text) for text in written} <= {line for text in drawn for line in text.split("\n")}


@pytest.mark.parametrize(("budget", "level"), [(10**9, 0), (40_000, None), (1, len(LEVELS) - 1)])
def test_the_album_takes_the_best_level_that_fits(budget, level):
    rng = np.random.default_rng(0)
    album = Album(budget)
    images = [Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)) for _ in range(4)]
    for i, image in enumerate(images):
        assert album.add(image) == album.add(image) == i
    uris = album.encode()
    pixels = open_image(base64.b64decode(uris[0].partition(",")[2]))
    same = np.array_equal(np.asarray(pixels), np.asarray(images[0]))
    assert same == (level == 0), "small images are exact as long as they fit"
    assert level == len(LEVELS) - 1 or sum(map(len, uris)) <= budget


def test_worlds_of_other_alphabets_share_nothing(tmp_path):
    """Their names have no letter of a file name in common with them."""
    for world, method in (("模型一", "lcd"), ("模型二", "lrm"), ("sd-v1.5", "lcd"), ("sd_v1_5", "lrm")):
        write_model(tmp_path, method, 0, world=world, metrics=("hps",), num=4, images=1)
    text = page_of(tmp_path)
    worlds = data(text)["worlds"]
    assert len(worlds) == 4 and all(re.fullmatch(r"[a-z0-9-]+", slug) for slug in worlds)
    methods = sorted(found["prompts"]["models"][0]["method"] for found in worlds.values())
    assert methods == ["lcd", "lcd", "lrm", "lrm"]
    ids = Tags(text).values("id")
    assert len(ids) == len(set(ids))
    written = [file.name for file in report(tmp_path, tmp_path / "out", ["md"])]
    assert len(written) == len(set(written)) > 4


def test_snapshot_of_everything_but_pictures_style_and_script(snapshot):
    text = without_pictures(page_of(HISTORY))
    assert re.search(r"<main.*</main>", text, re.DOTALL)[0] == snapshot
