"""Data sets of the Hugging Face library: from disk and from parquet, decoded here, with clear errors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.data.config import HFDatasetData
from rgbench.data.sources import open_source

datasets = pytest.importorskip("datasets")


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(num: int = 5, **columns: list[Any]) -> Any:
    values = {
        "image": [{"bytes": png(10 * number), "path": None} for number in range(num)],
        "text": [f"caption {number}" for number in range(num)],
        **columns,
    }
    return datasets.Dataset.from_dict(values).cast_column("image", datasets.Image())


def section(path: Path | str, **fields: Any) -> HFDatasetData:
    return HFDatasetData.model_validate({"path": str(path), "resolution": 16, **fields})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_saved_one_and_parquet_files_are_the_same_data(tmp_path: Path) -> None:
    made = rows()
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "val": made.select([4])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    made.to_parquet(tmp_path / "files" / "0.parquet")
    sources = [open_source(section(tmp_path / name)) for name in ("saved", "splits", "files", "files/0.parquet")]
    for source in sources:
        batch = source.load([3, 0])
        assert (source.length, batch.prompts, batch.ids) == (5, ["caption 3", "caption 0"], ["row 3", "row 0"])
        assert batch.images_BCHW is not None and batch.images_BCHW.shape == (2, 3, 16, 16)
        assert batch.images_BCHW[:, 0, 0, 0].mul(255).round().tolist() == [30, 0]
        assert source.fingerprint() == sources[0].fingerprint()
    other = open_source(section(tmp_path / "splits", split="val"))
    assert other.load([0]).prompts == ["caption 4"] and other.fingerprint() != sources[0].fingerprint()


def test_of_several_captions_the_first(tmp_path: Path) -> None:
    rows(2, captions=[["a", "b"], ["c"]]).save_to_disk(tmp_path / "d")
    assert open_source(section(tmp_path / "d", caption_column="captions")).load([0, 1]).prompts == ["a", "c"]


def test_what_cannot_be_read_stops_the_run_with_the_reasons(tmp_path: Path) -> None:
    broken = [{"bytes": png(1)[:50], "path": None}, {"bytes": png(1), "path": None}]
    made = datasets.Dataset.from_dict({"image": broken, "text": ["a", " "]})
    made.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match=r"samples cannot be used .*\n  row 0: "):
        open_source(section(tmp_path / "d"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "test"}, "cannot be opened as a data set"),
        ({"image_column": "picture"}, r"no column 'picture' \(data\.image_column\); it has image, text"),
        ({"caption_column": "caption"}, r"no column 'caption' \(data\.caption_column\)"),
    ],
)
def test_wrong_names_are_said(tmp_path: Path, fields: dict[str, str], said: str) -> None:
    datasets.DatasetDict({"train": rows(1)}).save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match=said):
        open_source(section(tmp_path / "d", **fields))


def parquet_naming(folder: Path, path: str) -> Path:
    """A parquet file of one image without bytes."""
    folder.mkdir()
    table = pyarrow.table({"image": [{"bytes": None, "path": path}], "text": ["x"]})
    pyarrow.parquet.write_table(table, folder / "0.parquet")
    return folder


def test_images_lie_in_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(png(200))
    for number, name in enumerate((str(tmp_path / "private.png"), "../private.png", "absent.png", "")):
        folder = parquet_naming(tmp_path / str(number), name)
        with pytest.raises(UsageError, match=rf"row 0: image '{name}' is no file of the data set"):
            open_source(section(folder))
    folder = parquet_naming(tmp_path / "good", "sub/a.png")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.png").write_bytes(png(200))
    image = open_source(section(folder)).load([0]).images_BCHW
    assert image is not None and round(float(image[0, 0].max() * 255)) == 200


def test_nothing_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    command = "hf download someone/set --repo-type dataset --revision abc"
    with pytest.raises(UsageError, match=f"someone/set: no such file or folder; .*{command}"):
        open_source(section("someone/set", revision="abc"))
    with pytest.raises(UsageError, match="no such file or folder"):
        open_source(section("./my data/mistyped"))


def test_a_data_set_of_the_hub_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "datasets--someone--set" / "snapshots" / ("a" * 40)
    (folder / "data").mkdir(parents=True)
    rows(3).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    rows(2).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert open_source(section("someone/set", revision="a" * 40)).length == 3
    assert open_source(section("someone/set", revision="a" * 40, split="test")).length == 2


def test_a_folder_of_something_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(UsageError, match="neither a folder that save_to_disk wrote nor one with parquet"):
        open_source(section(tmp_path / "d"))
