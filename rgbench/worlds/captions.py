"""Template captions in varied wording; every caption names every attribute of its scene."""

from __future__ import annotations

import numpy as np

from rgbench.worlds.scenes import COLOURS, LAYOUTS, SHAPES, SIZES, SPLITS, Scenes, hash_uniform

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
POSITION_WORDS = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
}
OBJECT_TEMPLATES = ("a {size} {colour} {shape}", "a {size} {shape} in {colour}", "one {size} {colour} {shape}")
SINGLE_TEMPLATES = ("{a} {position}", "{position} there is {a}", "a picture of {a} {position}", "{a}, {position}")
RELATION_TEMPLATES = {
    "left of": ("{a} to the left of {b}", "{b} to the right of {a}", "{a} left of {b}", "{b} right of {a}"),
    "above": ("{a} above {b}", "{b} below {a}", "{a} over {b}", "{b} under {a}"),
    "diagonal": (
        "{a} up and to the left of {b}",
        "{b} down and to the right of {a}",
        "{a} diagonally above {b}",
        "{b} diagonally below {a}",
    ),
}


def captions(scenes: Scenes, split: str, indices: np.ndarray | list[int] | range) -> list[str]:
    """One caption per scene, its wording a pure function of (split, index)."""
    u = hash_uniform(5000 + SPLITS.index(split), np.asarray(indices), 8)
    return [_caption(scenes, i, u[i]) for i in range(len(scenes))]


def _caption(scenes: Scenes, i: int, u: np.ndarray) -> str:
    objects = [_object(scenes, i, slot, u[3 * slot : 3 * slot + 2]) for slot in range(int(scenes.count[i]))]
    layout = LAYOUTS[int(scenes.layout[i])]
    if len(objects) == 1:
        return _choose(SINGLE_TEMPLATES, u[6]).format(a=objects[0], position=_choose(POSITION_WORDS[layout], u[7]))
    return _choose(RELATION_TEMPLATES[layout], u[6]).format(a=objects[0], b=objects[1])


def _object(scenes: Scenes, i: int, slot: int, u: np.ndarray) -> str:
    return _choose(OBJECT_TEMPLATES, u[0]).format(
        size=_choose(SIZE_WORDS[SIZES[int(scenes.size[i, slot])]], u[1]),
        colour=COLOURS[int(scenes.colour[i, slot])],
        shape=SHAPES[int(scenes.shape[i, slot])],
    )


def _choose(options: tuple[str, ...], u: float) -> str:
    return options[int(u * len(options))]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [*OBJECT_TEMPLATES, *SINGLE_TEMPLATES, *(t for ts in RELATION_TEMPLATES.values() for t in ts)]
    texts += [w for ws in (*SIZE_WORDS.values(), *POSITION_WORDS.values()) for w in ws]
    words = {w.strip(",") for text in texts for w in text.split() if "{" not in w}
    return sorted(words | set(COLOURS) | set(SHAPES))
