"""Scenes as a data source, and the recipe sections of all sources."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rgbench.benchtop.scenes import captions, sample_scenes, scene_batch
from rgbench.data.config import DataConfig, ImageFolderData, ScenesData, WebDatasetData
from rgbench.data.sources import open_source


def test_a_batch_is_the_scenes_of_its_indices() -> None:
    batch = open_source(ScenesData()).load([5, 2**40, 5])
    images, scenes = scene_batch("train", [5, 2**40, 5])
    assert torch.equal(batch.images_BCHW, images)
    assert batch.prompts == captions(scenes, "train", [5, 2**40, 5])
    assert batch.ids == ["train/5", f"train/{2**40}", "train/5"]


def test_loads_do_not_depend_on_their_cut() -> None:
    source = open_source(ScenesData(split="test"))
    whole = source.load([0, 1, 2, 3])
    parts = [source.load([0, 1, 2]), source.load([3])]
    assert torch.equal(whole.images_BCHW, torch.cat([part.images_BCHW for part in parts]))


def test_scenes_end_where_the_recipe_says() -> None:
    assert open_source(ScenesData()).length is None
    assert open_source(ScenesData(num=500)).length == 500


def test_fingerprint_tells_splits_and_lengths_apart() -> None:
    prints = [
        open_source(section).fingerprint() for section in (ScenesData(), ScenesData(num=9), ScenesData(split="test"))
    ]
    assert len({str(p) for p in prints}) == 3
    assert prints[0]["sha256"] == prints[1]["sha256"] != prints[2]["sha256"]


def test_training_scenes_hold_no_held_out_combination() -> None:
    assert not sample_scenes(ScenesData().split, range(4096)).heldout().any()


def test_kind_picks_the_section() -> None:
    adapter = TypeAdapter(DataConfig)
    assert isinstance(adapter.validate_python({"kind": "scenes"}), ScenesData)
    folder = {"kind": "image_folder", "path": "x", "resolution": 64}
    assert isinstance(adapter.validate_python(folder), ImageFolderData)
    tars = {"kind": "webdataset", "path": ["x", "y"], "resolution": 512}
    assert isinstance(adapter.validate_python(tars), WebDatasetData)


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "scenes", "split": "val"},
        {"kind": "scenes", "num": 0},
        {"kind": "scenes", "path": "x"},
        {"kind": "image_folder", "path": "x"},
        {"kind": "image_folder", "path": "x", "resolution": 60},
        {"kind": "image_folder", "path": "x", "resolution": 64, "captions": "json"},
        {"kind": "webdataset", "path": 3, "resolution": 64},
        {"kind": "parquet", "path": "x"},
        {},
    ],
)
def test_wrong_sections_are_refused(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python(section)
