"""Captions name everything that is in their scene, in words from a closed vocabulary."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgbench.benchtop import scenes as text
from rgbench.benchtop.scenes import LAYOUTS, SPLITS, sample_scenes

splits = pytest.mark.parametrize("split", SPLITS)


OBJECT = re.compile(
    r"(?:a|one) (small|little|tiny|large|big|huge) "
    r"(?:(\w+) in (red|orange|yellow|green|cyan|blue|purple|white)|(\w+) (\w+))"
)


def read_back(caption: str) -> dict[str, str]:
    """Attributes that a caption states, by templates written out again: the inverse of the caption."""
    size_of = {word: size for size, words in text.SIZE_WORDS.items() for word in words}
    found = []
    for size, named_first, colour_after, colour, shape in OBJECT.findall(caption):
        found.append((size_of[size], colour_after or colour, named_first or shape))
    layout, swapped = _layout(caption)
    if swapped:
        found.reverse()
    out = {"layout": layout}
    for slot, (size, colour, shape) in enumerate(found):
        out |= {f"shape{slot}": shape, f"colour{slot}": colour, f"size{slot}": size}
    return out


def _layout(caption: str) -> tuple[str, bool]:
    for phrase, layout, swapped in (
        ("up and to the left of", "diagonal", False),
        ("down and to the right of", "diagonal", True),
        ("diagonally above", "diagonal", False),
        ("diagonally below", "diagonal", True),
        ("to the left of", "left of", False),
        ("to the right of", "left of", True),
        ("left of", "left of", False),
        ("right of", "left of", True),
        ("above", "above", False),
        ("below", "above", True),
        ("over", "above", False),
        ("under", "above", True),
        ("in the centre", "centre", False),
        ("in the middle", "centre", False),
        ("on the left", "left", False),
        ("at the left side", "left", False),
        ("on the right", "right", False),
        ("at the right side", "right", False),
        ("at the top", "top", False),
        ("in the upper part", "top", False),
        ("at the bottom", "bottom", False),
        ("in the lower part", "bottom", False),
    ):
        if phrase in caption:
            return layout, swapped
    raise AssertionError(f"no layout in {caption!r}")


@splits
def test_the_caption_states_every_attribute(split: str) -> None:
    scenes = sample_scenes(split, range(2048))
    for row, caption in enumerate(text.captions(scenes, split, range(2048))):
        assert read_back(caption) == scenes.to_dict(row), caption


@settings(max_examples=25, deadline=None)
@given(split=st.sampled_from(SPLITS), indices=st.lists(st.integers(0, 2**62), min_size=2, max_size=6))
def test_wording_depends_on_the_index_alone(split: str, indices: list[int]) -> None:
    together = text.captions(sample_scenes(split, indices), split, indices)
    alone = [text.captions(sample_scenes(split, [index]), split, [index])[0] for index in indices]
    assert together == alone


@splits
def test_vocabulary_covers_all_words_and_nothing_else(split: str) -> None:
    captions = text.captions(sample_scenes(split, range(8192)), split, range(8192))
    used = {word for caption in captions for word in re.findall(r"\w+", caption)}
    assert used == set(text.vocabulary())


def test_every_template_is_used() -> None:
    """Each layout is said in every way that it can be, and wording is not tied to the split."""
    scenes = sample_scenes("train", range(8192))
    captions = text.captions(scenes, "train", range(8192))
    for layout, name in enumerate(LAYOUTS):
        rows = [captions[i] for i in (scenes.layout == layout).nonzero()[:, 0].tolist()]
        forms = {OBJECT.sub("X", row) for row in rows}
        templates = text.RELATION_TEMPLATES.get(name, text.SINGLE_TEMPLATES)
        wordings = len(templates) * len(text.POSITION_WORDS.get(name, ("",)))
        assert len(forms) == wordings, forms


def test_captions_vary() -> None:
    captions = text.captions(sample_scenes("train", range(1000)), "train", range(1000))
    assert len(set(captions)) > 950
