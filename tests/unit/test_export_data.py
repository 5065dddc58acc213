"""Scenes as tars: the same bytes each time, resumable, and the same job when trained on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from rgbench.benchtop.scenes import Scenes, captions, sample_scenes, scene_batch
from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_file, sha256_tree
from rgbench.data.batches import batch_indices
from rgbench.data.config import ScenesData, WebDatasetData
from rgbench.data.sources import open_source
from rgbench.data.tars import INDEX_NAME, export_scenes, shard_bytes


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_shards_hold_images_captions_and_attributes(tmp_path: Path) -> None:
    tars = export_scenes(tmp_path / "out", 10, "heldout", shard_size=4)
    assert [path.name for path in tars] == [f"heldout-00000{i}.tar" for i in range(3)]
    images, scenes = scene_batch("heldout", range(10))
    seen = 0
    for path in tars:
        with tarfile.open(path) as tar:
            for name in [name for name in tar.getnames() if name.endswith(".jpg")]:
                members = {s: tar.extractfile(name[:-3] + s).read() for s in ("jpg", "txt", "json")}  # type: ignore[union-attr]
                attributes = json.loads(members["json"])
                index = attributes["index"]
                assert name == f"{index:09d}.jpg" and attributes["split"] == "heldout"
                assert members["txt"].decode() == captions(scenes[[index]], "heldout", [index])[0]
                assert Scenes.from_dicts([attributes]).to_dict(0) == scenes.to_dict(index)
                pixels = np.array(Image.open(io.BytesIO(members["jpg"]))) / 255
                error = np.abs(pixels - images[index].permute(1, 2, 0).numpy()).mean()
                assert error < 0.02
                seen += 1
    assert seen == 10


def test_exports_are_byte_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_scenes(tmp_path / name, 7, "train", shard_size=3, quality=90)
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_the_index_lists_every_shard(tmp_path: Path) -> None:
    tars = export_scenes(tmp_path, 5, "test", shard_size=2, quality=80)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert {k: v for k, v in index.items() if k != "shards"} == {
        "schema_version": 1, "split": "test", "num": 5, "shard_size": 2, "quality": 80,
    }  # fmt: skip
    assert index["shards"] == [
        {"file": path.name, "num": num, "sha256": sha256_file(path)} for path, num in zip(tars, (2, 2, 1), strict=True)
    ]


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    """Finished shards are not written again; a missing, damaged or unlisted one is."""
    tars = export_scenes(tmp_path / "out", 8, shard_size=2)
    whole = sha256_tree(tmp_path / "out")
    tars[1].write_bytes(tars[1].read_bytes()[:-1])
    tars[3].unlink()
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    index["shards"] = index["shards"][:2]
    (tmp_path / "out" / INDEX_NAME).write_text(json.dumps(index))
    before = tars[0].stat()
    assert export_scenes(tmp_path / "out", 8, shard_size=2) == tars
    assert sha256_tree(tmp_path / "out") == whole
    assert (tars[0].stat().st_ino, tars[0].stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_export_is_never_overwritten(tmp_path: Path) -> None:
    export_scenes(tmp_path / "out", 4, shard_size=2)
    before = sha256_tree(tmp_path / "out")
    with pytest.raises(UsageError, match=r"another export lies there: num 4, not 6"):
        export_scenes(tmp_path / "out", 6, shard_size=2)
    assert sha256_tree(tmp_path / "out") == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").touch()
    with pytest.raises(UsageError, match="holds tars and no index.json"):
        export_scenes(tmp_path / "foreign", 4)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        export_scenes(tmp_path / "file", 4)


@pytest.mark.parametrize("keys", [{"split": "val"}, {"num": 0}, {"shard_size": 0}, {"quality": 0}, {"quality": 101}])
def test_wrong_arguments_write_nothing(tmp_path: Path, keys: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        export_scenes(tmp_path / "out", **{"num": 2, **keys})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_shards_do_not_depend_on_the_render_batch() -> None:
    """A shard across several render batches equals the one made scene by scene."""
    with tarfile.open(fileobj=io.BytesIO(shard_bytes("train", 60, 70, 95))) as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
        last = tar.extractfile(names[-1]).read()  # type: ignore[union-attr]
    assert names[0] == "000000060.jpg" and len(names) == 70
    with tarfile.open(fileobj=io.BytesIO(shard_bytes("train", 129, 1, 95))) as tar:
        assert tar.extractfile("000000129.jpg").read() == last  # type: ignore[union-attr]


def test_training_from_tars_is_the_same_job(tmp_path: Path) -> None:
    """The batches of a seed: same scenes and captions in the same order, epochs included; images up to JPEG."""
    num = 24
    export_scenes(tmp_path / "tars", num, "train", shard_size=10)
    tars = open_source(WebDatasetData(path=str(tmp_path / "tars"), resolution=64))
    scenes = open_source(ScenesData(num=num))
    for step in range(4):
        indices = batch_indices(5, step, 8, num).tolist()
        a, b = tars.load(indices), scenes.load(indices)
        assert a.prompts == b.prompts
        assert [int(x.rsplit("/")[-1]) for x in a.ids] == [int(x.rsplit("/")[-1]) for x in b.ids]
        assert (a.images_BCHW - b.images_BCHW).abs().mean() < 0.015
        assert a.images_BCHW.shape == b.images_BCHW.shape and a.images_BCHW.dtype == torch.float32
    assert tars.length == scenes.length == num and sample_scenes("train", range(num)).heldout().sum() == 0


def test_the_webdataset_library_reads_the_same_samples(tmp_path: Path) -> None:
    tars = export_scenes(tmp_path / "tars", 5, "train", shard_size=3)
    ours = open_source(WebDatasetData(path=str(tmp_path / "tars"), resolution=64))
    rows = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False).decode("torchrgb")
    for index, row in enumerate(rows):
        batch = ours.load([index])
        assert batch.prompts[0] == row["txt"] and batch.ids[0].endswith(f"/{row['__key__']}")
        assert torch.allclose(batch.images_BCHW[0], row["jpg"], atol=1e-6)
    assert index == 4 and ours.length == 5
