"""Plots as SVG inside the page: one drawing for light and dark, its letters as text.

As files, matplotlib's drawings repeat every glyph's outline and would have to be there
once per theme; as data URIs they were a third of the page. Inside it the colours of the
light theme become CSS variables, letters stay letters (found by a search, copied, set in
the reader's font), and ids that nothing refers to are left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import matplotlib as mpl
from markupsafe import escape
from matplotlib.figure import Figure as Canvas

from rgbench.reporting.plots import DARK, LIGHT, Theme

HEAD = re.compile(r"^.*?(?=<svg )", re.DOTALL)
METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
SIZE = re.compile(r' width="[\d.]+pt" height="[\d.]+pt"')
IDLE = re.compile(r""" transform="rotate\(-0 [^"]*"|(?<=[ "])font-family: 'DejaVu Sans'; """)
REFERENCE = re.compile(r'(url\(#|xlink:href="#)([\w-]+)')
ID = re.compile(r' id="([^"]+)"')
COLOUR = re.compile(r"(?<=(?:fill|roke): )#[0-9a-f]{6}\b")
TAG = re.compile(r"<[^>]*>")
NUMBER = re.compile(r"-?\d+\.\d{3,}")


def inline_svg(canvas: Canvas, name: str, alt: str) -> str:
    """A figure that was drawn in the light theme, as an element of the page.

    Args:
        canvas: the figure.
        name: begins the ids inside it; each figure of the page needs its own.
        alt: says in words what it shows.
    """
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rgbench", "svg.fonttype": "none"}):
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = METADATA.sub("", HEAD.sub("", out.getvalue().decode(), count=1))
    text = IDLE.sub("", SIZE.sub("", text, count=1))
    used = {found for _, found in REFERENCE.findall(text)}  # of which matplotlib defines some more than once
    text = ID.sub(lambda match: f' id="{name}-{match[1]}"' if _first(match[1], used) else "", text)
    text = REFERENCE.sub(rf"\1{name}-\2", text)
    text = TAG.sub(_lighter, text)
    text = " ".join(re.sub(r">\s+<", "><", text).split())
    return text.replace("<svg ", f'<svg class="drawn" role="img" aria-label="{escape(alt)}" ', 1)


def _first(name: str, used: set[str]) -> bool:
    """Whether this is the first definition of something used, which is the one that counts."""
    wanted = name in used
    used.discard(name)
    return wanted


def _lighter(tag: re.Match[str]) -> str:
    """A tag with variables for colours and a hundredth of a point for places; what is written is not touched."""
    themed = COLOUR.sub(lambda match: VARIABLES.get(match[0], match[0]), tag[0])
    return NUMBER.sub(lambda match: f"{float(match[0]):.2f}", themed)


def theme_css() -> str:
    """The variables that the colours of a drawing became, in light and in dark."""
    light, dark = (" ".join(f"{name}: {colour};" for name, colour in _named(theme)) for theme in (LIGHT, DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def _named(theme: Theme) -> Iterator[tuple[str, str]]:
    plain = {"paper": theme.paper, "ink": theme.ink, "faint": theme.faint}
    for name, colour in {**plain, **theme.methods}.items():
        yield f"--plot-{name}", colour.lower()


VARIABLES = {colour: f"var({name})" for name, colour in _named(LIGHT)}
