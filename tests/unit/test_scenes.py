"""The scenes: pure functions of (split, index), true to their attributes, natural in spectrum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgbench.benchtop import scenes as world
from rgbench.benchtop.scenes import Scenes, is_heldout, render, sample_scenes, scene_batch, signed_distance

splits = pytest.mark.parametrize("split", world.SPLITS)


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("layout", "shape", "colour", "size"))


@settings(max_examples=12, deadline=None)
@given(
    split=st.sampled_from(world.SPLITS),
    indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
    data=st.data(),
)
def test_a_scene_depends_on_its_index_alone(split: str, indices: list[int], data: st.DataObject) -> None:
    """Any order and any cut of a batch gives the same attributes and, bit for bit, the same images."""
    images, scenes = scene_batch(split, indices)
    order = data.draw(st.permutations(range(len(indices))))
    for rows in (order[:2], order[2:]):
        if rows:
            part_images, part = scene_batch(split, [indices[row] for row in rows])
            assert same(part, scenes[rows])
            assert torch.equal(part_images, images[rows])


@splits
def test_attributes_are_in_range_and_every_value_occurs(split: str) -> None:
    scenes = sample_scenes(split, range(4096))
    two = scenes.count == 2
    assert scenes.layout.unique().tolist() == list(range(len(world.LAYOUTS)))
    for attribute, table in ((scenes.shape, world.SHAPES), (scenes.colour, world.COLOURS), (scenes.size, world.SIZES)):
        assert attribute[:, 0].unique().tolist() == list(range(len(table)))
        assert attribute[two, 1].unique().tolist() == list(range(len(table)))
        assert (attribute[~two, 1] == -1).all()


def test_the_world_is_as_large_as_designed() -> None:
    assert len(world.SHAPES) >= 6 and len(world.COLOURS) >= 8 and len(world.SIZES) >= 2
    assert len(world.POSITIONS) >= 5 and len(world.RELATIONS) >= 3
    assert len(world.PALETTE) == len(world.COLOURS) and set(world.CENTRES) == set(world.LAYOUTS)


@splits
def test_one_and_two_objects_are_about_equally_frequent(split: str) -> None:
    share = (sample_scenes(split, range(4096)).count == 2).float().mean().item()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / 4096)


def test_held_out_combinations_are_disjoint() -> None:
    """Training and testing never show one, every held-out scene does, and judges see both."""
    assert not sample_scenes("train", range(8192)).heldout().any()
    assert not sample_scenes("test", range(8192)).heldout().any()
    assert sample_scenes("heldout", range(8192)).heldout().all()
    seen = sample_scenes("all", range(8192)).heldout().float().mean()
    assert 0.05 < seen < 0.95


def test_each_shape_has_one_colour_held_out_and_sees_all_others() -> None:
    pairs = [(s, c) for s in range(len(world.SHAPES)) for c in range(len(world.COLOURS))]
    held = {p for p in pairs if is_heldout(torch.tensor(p[0]), torch.tensor(p[1]))}
    assert sorted(s for s, _ in held) == list(range(len(world.SHAPES)))
    train = sample_scenes("train", range(8192))
    shown = set(zip(train.shape[:, 0].tolist(), train.colour[:, 0].tolist(), strict=True))
    assert shown == set(pairs) - held


def test_heldout_holds_out_either_slot() -> None:
    scenes = sample_scenes("heldout", range(2048))
    both = scenes[scenes.count == 2]
    in_slot = is_heldout(both.shape, both.colour)
    assert in_slot[:, 0].any() and in_slot[:, 1].any()


def test_an_empty_slot_holds_no_held_out_combination() -> None:
    """The -1 of an empty slot never counts as a held-out combination."""
    assert not is_heldout(torch.tensor(-1), torch.tensor(-1))


def test_splits_show_different_scenes() -> None:
    train, test = (sample_scenes(split, range(64)) for split in ("train", "test"))
    assert not torch.equal(train.layout, test.layout)
    assert not torch.equal(render(train, "train", range(64)), render(train, "test", range(64)))


@splits
def test_dicts_round_trip(split: str) -> None:
    scenes = sample_scenes(split, range(64))
    assert same(Scenes.from_dicts([scenes.to_dict(i) for i in range(64)]), scenes)


@pytest.mark.parametrize(
    "row", [{}, {"layout": "nowhere"}, {"layout": "centre", "shape0": "blob", "colour0": "red", "size0": "small"}]
)
def test_unknown_attributes_are_named(row: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="scene attribute .*known:"):
        Scenes.from_dicts([row])


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'val'; known: train"):
        sample_scenes("val", range(2))


@splits
def test_images_are_unit_range_float32(split: str) -> None:
    images, _ = scene_batch(split, range(32))
    assert images.shape == (32, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.std() > 0.05


def test_the_object_has_its_colour_where_it_stands() -> None:
    """Solid shapes in the middle: the pixel there is the palette's colour, within jitter and texture."""
    layout = torch.zeros(len(world.COLOURS), dtype=torch.long)
    square = torch.full((len(world.COLOURS), 2), -1)
    square[:, 0] = world.SHAPES.index("square")
    colour = torch.full_like(square, -1)
    colour[:, 0] = torch.arange(len(world.COLOURS))
    size = torch.where(square < 0, -1, 1)
    images = render(Scenes(layout, square, colour, size), "all", range(len(layout)))
    centre = images[:, :, 29:35, 29:35].mean((2, 3))
    assert (centre - torch.tensor(world.PALETTE)).abs().max() < 0.15


@settings(max_examples=20, deadline=None)
@given(layout=st.sampled_from(world.LAYOUTS), shape=st.sampled_from(range(6)), index=st.integers(0, 10**6))
def test_objects_lie_inside_the_image_and_apart(layout: str, shape: int, index: int) -> None:
    """Large objects against the same background without them: the difference touches no border and no neighbour."""
    slots = len(world.CENTRES[layout])
    rows = []
    for present in ((0,), (1,)) if slots == 2 else ((0,),):
        row = torch.full((1, 2), -1)
        row[0, list(present)] = shape
        rows.append(row)
    empty = _render_only(layout, torch.full((1, 2), -1), index)
    masks = [(_render_only(layout, row, index) - empty).abs().sum(1)[0] > 0 for row in rows]
    for mask in masks:
        assert not mask[0].any() and not mask[-1].any() and not mask[:, 0].any() and not mask[:, -1].any()
        assert mask.sum() > 60
    if slots == 2:
        assert not (masks[0] & masks[1]).any()


def _render_only(layout: str, shape: Tensor, index: int) -> Tensor:
    large = torch.where(shape < 0, -1, 1)
    white = torch.where(shape < 0, -1, world.COLOURS.index("white"))
    return render(Scenes(torch.tensor([world.LAYOUTS.index(layout)]), shape, white, large), "all", [index])


def test_large_is_larger_than_small_whatever_the_jitter() -> None:
    small, large = world.RADII
    assert large * 0.94 > 1.15 * small * 1.06


@pytest.mark.parametrize("shape", world.SHAPES)
def test_signed_distance_is_negative_inside_and_one_lipschitz(shape: str) -> None:
    axis = torch.linspace(-1.6, 1.6, 321)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = signed_distance(shape, x, y)
    assert distance.min() < -0.2 and distance[0].min() > 0
    step = axis[1] - axis[0]
    for dim in (0, 1):
        assert (distance.diff(dim=dim).abs().max() / step) < 1.05


def test_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="unknown shape 'hexagon'"):
        signed_distance("hexagon", torch.zeros(1), torch.zeros(1))


def test_the_spectrum_falls_as_in_natural_images() -> None:
    """Slope of ln P on ln f over [.02, .35] cycles/pixel: Hann window, rings one bin wide at k/64, 512 test scenes.

    Scenes of flat objects are steeper than photographs. The estimate depends on the rings: their mean radius
    in place of k/64 moves it by -0.05.
    """
    images, _ = scene_batch("test", range(512))
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]).sum(1).double()
    luma = luma - luma.mean((1, 2), keepdim=True)
    hann = torch.hann_window(64, dtype=torch.float64)
    power = torch.fft.fft2(luma * hann[:, None] * hann).abs().square().mean(0)
    frequency = torch.fft.fftfreq(64, dtype=torch.float64)
    radius = torch.hypot(frequency[:, None], frequency[None])
    bins = (radius * 64).round().long()
    p = torch.bincount(bins.flatten(), power.flatten()) / torch.bincount(bins.flatten())
    f = torch.arange(len(p), dtype=torch.float64) / 64
    used = (f >= 0.02) & (f <= 0.35)
    slope = np.polyfit(f[used].log().numpy(), p[used].log().numpy(), 1)[0]
    assert -2.6 <= slope <= -1.8
