"""Benchtop scenes: rendered images whose every attribute is known, and their captions.

A scene holds one or two flat-shaded objects (shape, colour, size, position or relation) on a textured background whose
power falls as 1/f^a, so that spectra mean something. Captions come from templates in varied wording and name every
attribute. Scene ``i`` of a split is a pure function of (split, i): all random numbers come from a counter-based hash,
never from a stateful generator.

Slots: slot 0 is the only object, or the left or upper one; slot 1 is the right or lower one and holds -1 where there is
a single object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from rgbench.core.run import splitmix64

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
POSITIONS = ("centre", "left", "right", "top", "bottom")
RELATIONS = ("left of", "above", "diagonal")
LAYOUTS = POSITIONS + RELATIONS
PALETTE = (
    (0.86, 0.12, 0.12),
    (0.96, 0.52, 0.06),
    (0.96, 0.90, 0.18),
    (0.10, 0.60, 0.18),
    (0.20, 0.82, 0.86),
    (0.12, 0.22, 0.86),
    (0.66, 0.16, 0.74),
    (0.96, 0.96, 0.96),
)
RADII = (7.5, 11.5)  # pixels, by size
# Centre of each slot relative to the image centre, in pixels (x, y), by layout.
CENTRES = {
    "centre": ((0, 0),),
    "left": ((-15, 0),),
    "right": ((15, 0),),
    "top": ((0, -15),),
    "bottom": ((0, 15),),
    "left of": ((-14.5, 0), (14.5, 0)),
    "above": ((0, -14.5), (0, 14.5)),
    "diagonal": ((-14.5, -14.5), (14.5, 14.5)),
}
JITTER = (3.0, 1.5)  # pixels, one and two objects
MAX_ROTATION = 0.2  # radians
SPLITS = ("train", "test", "heldout", "all", "web")
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
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Scenes:
    """A batch of scene attributes, each an int64 tensor.

    Attributes:
        layout: (B,) index into ``LAYOUTS``.
        shape: (B, 2) index into ``SHAPES``; -1 in slot 1 of one-object scenes.
        colour: (B, 2) index into ``COLOURS``, likewise.
        size: (B, 2) index into ``SIZES``, likewise.
    """

    layout: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def count(self) -> Tensor:
        """(B,) number of objects, 1 or 2."""
        return 1 + (self.layout >= len(POSITIONS)).long()

    def __getitem__(self, item) -> Scenes:
        return Scenes(*(getattr(self, f.name)[item] for f in fields(self)))

    def heldout(self) -> Tensor:
        """(B,) bool: whether a scene holds a combination kept from training."""
        return is_heldout(self.shape, self.colour).any(1)

    def to_dict(self, i: int) -> dict[str, str]:
        """Attributes of scene ``i`` by name, as a prompt holds them."""
        out = {"layout": LAYOUTS[int(self.layout[i])]}
        for slot in range(int(self.count[i])):
            out[f"shape{slot}"] = SHAPES[int(self.shape[i, slot])]
            out[f"colour{slot}"] = COLOURS[int(self.colour[i, slot])]
            out[f"size{slot}"] = SIZES[int(self.size[i, slot])]
        return out

    @staticmethod
    def from_dicts(rows: list[dict[str, str]]) -> Scenes:
        """Build scenes from their attributes by name, the inverse of :meth:`to_dict`.

        Raises:
            ValueError: an attribute is missing or its value unknown.
        """

        def slot_values(name: str, table: tuple[str, ...]) -> Tensor:
            try:
                return torch.tensor(
                    [[table.index(r[f"{name}{s}"]) if f"{name}{s}" in r else -1 for s in (0, 1)] for r in rows]
                )
            except ValueError as error:
                raise ValueError(f"scene attribute {name!r}: {error}; known: {', '.join(table)}") from None

        try:
            layout = torch.tensor([LAYOUTS.index(r["layout"]) for r in rows])
        except (KeyError, ValueError) as error:
            raise ValueError(f"scene attribute 'layout': {error}; known: {', '.join(LAYOUTS)}") from None
        return Scenes(
            layout,
            slot_values("shape", SHAPES),
            slot_values("colour", COLOURS),
            slot_values("size", SIZES),
        )


def scene_batch(split: str, indices: np.ndarray | list[int] | range) -> tuple[Tensor, Scenes]:
    """Images and attributes of the scenes at ``indices``: ``((B, 3, 64, 64), Scenes)``."""
    scenes = sample_scenes(split, indices)
    return render(scenes, split, indices), scenes


def sample_scenes(split: str, indices: np.ndarray | list[int] | range) -> Scenes:
    """Attributes of the scenes at ``indices`` of a split.

    ``train``, ``test`` and ``web`` never hold a held-out combination, ``heldout`` always holds at least one, ``all`` is
    unrestricted (for the attribute classifiers).
    """
    index = np.asarray(indices)
    u = hash_uniform(_stream(split, 0), index, 12)

    def pick(column: int, n: int) -> Tensor:
        return torch.from_numpy(np.minimum((u[:, column] * n).astype(np.int64), n - 1))

    two = torch.from_numpy(u[:, 0] < 0.5)
    layout = torch.where(two, len(POSITIONS) + pick(1, len(RELATIONS)), pick(1, len(POSITIONS)))
    shape = torch.stack([pick(2, len(SHAPES)), pick(3, len(SHAPES))], 1)
    size = torch.stack([pick(4, len(SIZES)), pick(5, len(SIZES))], 1)
    if split == "all":
        colour = torch.stack([pick(6, len(COLOURS)), pick(7, len(COLOURS))], 1)
    else:  # one of the seven allowed colours of each shape
        step = torch.stack([pick(6, len(COLOURS) - 1), pick(7, len(COLOURS) - 1)], 1)
        colour = (3 * shape + 2 + step) % len(COLOURS)
    if split == "heldout":
        chosen = torch.where(two, pick(8, 2), 0)
        rows = torch.arange(len(index))
        colour[rows, chosen] = (3 * shape[rows, chosen] + 1) % len(COLOURS)
    for slot in (shape, colour, size):
        slot[~two, 1] = -1
    return Scenes(layout, shape, colour, size)


def render(scenes: Scenes, split: str, indices: np.ndarray | list[int] | range) -> Tensor:
    """Render scenes, supersampled by the analytic coverage of each edge.

    Args:
        scenes: attributes of B scenes.
        split: names the stream of jitter, rotation and texture.
        indices: (B,) positions in that stream.

    Returns:
        (B, 3, 64, 64) float32 in [0, 1].
    """
    index = np.asarray(indices)
    n, s = len(scenes), IMAGE_SIZE
    u = torch.from_numpy(hash_uniform(_stream(split, 1), index, 24)).float()
    image = _background(split, index, u)
    texture = _pink_noise(hash_uniform(_stream(split, 3), index, s * s), torch.full((n, 1, 1, 1), 1.6))
    grid = torch.arange(s, dtype=torch.float32) + 0.5 - s / 2
    yy, xx = torch.meshgrid(grid, grid, indexing="ij")
    centres = torch.zeros(len(LAYOUTS), 2, 2)
    for k, name in enumerate(LAYOUTS):
        centres[k, : len(CENTRES[name])] = torch.tensor(CENTRES[name], dtype=torch.float32)
    jitter = torch.tensor(JITTER)[scenes.count - 1]
    palette = torch.tensor(PALETTE)
    radii = torch.tensor(RADII)
    for slot in (0, 1):
        present = scenes.shape[:, slot] >= 0
        c = 8 + 7 * slot
        centre = centres[scenes.layout, slot] + (2 * u[:, c : c + 2] - 1) * jitter[:, None]
        angle = (2 * u[:, c + 2] - 1) * MAX_ROTATION
        radius = radii[scenes.size[:, slot].clamp(min=0)] * (0.94 + 0.12 * u[:, c + 3])
        x, y = xx - centre[:, 0, None, None], yy - centre[:, 1, None, None]
        alpha = coverage(scenes.shape[:, slot], x, y, angle, radius)
        alpha = alpha * present[:, None, None].float()
        colour = palette[scenes.colour[:, slot].clamp(min=0)] + 0.05 * (2 * u[:, c + 4 : c + 7] - 1)
        shade = 1 + 0.06 * texture[:, 0]
        fill = colour[:, :, None, None] * shade[:, None]
        image = image + alpha[:, None] * (fill - image)
    return image.clamp(0, 1)


def captions(scenes: Scenes, split: str, indices: np.ndarray | list[int] | range) -> list[str]:
    """One caption per scene, its wording a pure function of (split, index)."""
    u = hash_uniform(5000 + SPLITS.index(split), np.asarray(indices), 8)
    return [_caption(scenes, i, u[i]) for i in range(len(scenes))]


def vocabulary() -> list[str]:
    """All words of captions, sorted."""
    texts = [*OBJECT_TEMPLATES, *SINGLE_TEMPLATES, *(t for ts in RELATION_TEMPLATES.values() for t in ts)]
    texts += [w for ws in (*SIZE_WORDS.values(), *POSITION_WORDS.values()) for w in ws]
    words = {w.strip(",") for text in texts for w in text.split() if "{" not in w}
    return sorted(words | set(COLOURS) | set(SHAPES))


def is_heldout(shape: Tensor, colour: Tensor) -> Tensor:
    """Whether a (shape, colour) pair is one of the 6 of 48 kept from training."""
    return colour == (3 * shape + 1) % len(COLOURS)


def hash_uniform(stream: int, index: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in (0, 1), a pure function of (stream, index, position).

    Args:
        stream: number of the stream.
        index: (B,) non-negative integers.
        count: numbers per index.

    Returns:
        (B, count) float64.
    """
    with np.errstate(over="ignore"):
        state = splitmix64(index.astype(np.uint64) + _GOLDEN * np.uint64(stream + 1))
        x = splitmix64(state[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)[None])
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _stream(split: str, part: int) -> int:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    number = 9 if split == "web" else SPLITS.index(split) + 1  # 5000 and on are the captions' streams
    return 1000 * number + part


def _background(split: str, index: np.ndarray, u: Tensor) -> Tensor:
    n, s = len(index), IMAGE_SIZE
    exponent = (1.5 + 0.5 * u[:, 0])[:, None, None, None]
    uniform = hash_uniform(_stream(split, 2), index, 3 * s * s).reshape(n * 3, s * s)
    noise = _pink_noise(uniform, exponent.repeat_interleave(3, 0)).reshape(n, 3, s, s)
    luma, chroma = noise[:, :1], noise - noise.mean(1, keepdim=True)
    base = (0.28 + 0.24 * u[:, 1])[:, None] + 0.05 * (2 * u[:, 2:5] - 1)
    strength = (0.04 + 0.05 * u[:, 5])[:, None, None, None]
    return base[:, :, None, None] + strength * (luma + 0.35 * chroma)


def _pink_noise(uniform: np.ndarray, exponent: Tensor) -> Tensor:
    """(B, 1, s, s) noise of unit variance, its power falling as f^-exponent.

    NumPy transforms each image alone; torch's threaded inverse of a single image differs in the last bits from that of
    a batch, and a scene must not.
    """
    s = IMAGE_SIZE
    white = uniform.reshape(-1, 1, s, s) - 0.5
    f = np.hypot(np.fft.fftfreq(s)[:, None], np.fft.rfftfreq(s)[None])
    f[0, 0] = 1.0
    gain = f ** (-exponent.double().numpy() / 2)
    gain[..., 0, 0] = 0.0
    noise = np.fft.irfft2(np.fft.rfft2(white) * gain, s=(s, s))
    return torch.from_numpy(noise / noise.std(axis=(-2, -1), ddof=1, keepdims=True)).float()


def coverage(shape: Tensor, x: Tensor, y: Tensor, angle: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel that a shape covers, (B, s, s), from its signed distance."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = (cos * x + sin * y) / radius[:, None, None], (cos * y - sin * x) / radius[:, None, None]
    distance = torch.zeros_like(x)
    for k, name in enumerate(SHAPES):
        rows = shape == k
        if rows.any():
            distance[rows] = signed_distance(name, x[rows], y[rows])
    return (0.5 - distance * radius[:, None, None]).clamp(0, 1)


def signed_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of unit-radius shapes, negative inside (y grows downwards)."""
    if name == "circle":
        return torch.hypot(x, y) - 0.95
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.82
    if name == "triangle":
        return torch.maximum(0.866 * x.abs() - 0.5 * (y - 0.15), y - 0.15) - 0.55
    if name == "cross":
        bar = torch.maximum(x.abs() - 0.32, y.abs() - 1.0)
        return torch.minimum(bar, torch.maximum(x.abs() - 1.0, y.abs() - 0.32))
    if name == "ring":
        return (torch.hypot(x, y) - 0.72).abs() - 0.26
    if name == "star":
        return _star(x, y)
    raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")


def _star(x: Tensor, y: Tensor, outer: float = 1.12, inner: float = 0.5) -> Tensor:
    """Signed distance of a five-pointed star, one point up: to the edge of the folded sector."""
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    r = torch.hypot(x, y)
    px, py = r * folded.cos(), r * folded.sin()
    ex, ey = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    t = (((px - outer) * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    dx, dy = px - outer - t * ex, py - t * ey
    inside = (px - outer) * ey - py * ex > 0
    distance = torch.hypot(dx, dy)
    return torch.where(inside, distance, -distance)


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
