"""Image folders: what is found, how it is fitted, and what is said when it cannot be used."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.data.config import ImageFolderData
from rgbench.data.samples import fit_image, to_batch
from rgbench.data.sources import open_source


def picture(size: tuple[int, int] = (20, 16), level: int = 128) -> Image.Image:
    return Image.new("RGB", size, (level, 255 - level, 40))


def folder_of(path: Path, num: int, suffix: str = ".png") -> Path:
    """A folder of ``num`` flat images whose red level and caption are their number."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        picture(level=i % 256).save(path / f"{i:04d}{suffix}")
        (path / f"{i:04d}.txt").write_text(f"picture {i}\n")
    return path


def section(path: Path, **keys: object) -> ImageFolderData:
    return ImageFolderData.model_validate({"kind": "image_folder", "path": str(path), "resolution": 16, **keys})


def test_images_and_captions_by_index(tmp_path: Path) -> None:
    source = open_source(section(folder_of(tmp_path, 5)))
    batch = source.load([3, 0, 3])
    assert source.length == 5 and source.name == "image_folder"
    assert batch.images_BCHW.shape == (3, 3, 16, 16) and batch.images_BCHW.dtype == torch.float32
    assert batch.prompts == ["picture 3", "picture 0", "picture 3"]
    assert batch.ids == ["0003.png", "0000.png", "0003.png"]
    assert batch.images_BCHW[:, 0, 8, 8].mul(255).round().tolist() == [3, 0, 3]


def test_subfolders_are_searched_in_sorted_order_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("b/x", "a/y", "z"):
        folder_of((tmp_path / name).parent, 0)
        picture().save(tmp_path / f"{name}.PNG")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "._z.png").write_bytes(b"resource fork")
    source = open_source(section(tmp_path))
    assert source.load([0, 1, 2]).ids == ["a/y.PNG", "b/x.PNG", "z.PNG"]


@pytest.mark.parametrize("table", ["metadata.jsonl", "captions.csv"])
def test_captions_from_a_table_in_its_order(tmp_path: Path, table: str) -> None:
    for i in range(3):
        picture(level=i).save(tmp_path / f"{i}.webp", lossless=True)
    rows = [{"file_name": f"{i}.webp", "text": f'a "red", wet\nball {i}'} for i in (2, 0, 1)]
    with open(tmp_path / table, "w", newline="") as file:
        if table == "captions.csv":
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
    batch = open_source(section(tmp_path, captions=table)).load([0, 1, 2])
    assert batch.ids == ["2.webp", "0.webp", "1.webp"]
    assert batch.prompts == [row["text"] for row in rows]


def test_fit_leaves_an_image_of_the_right_size_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(fit_image(Image.fromarray(pixels), 16), pixels)


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (16, 33), (100, 31), (7, 5), (5, 200)])
def test_fit_gives_the_asked_size_and_keeps_the_middle(size: tuple[int, int]) -> None:
    image = picture(size, 0)
    image.paste((255, 0, 0), (size[0] // 2 - 1, size[1] // 2 - 1, size[0] // 2 + 2, size[1] // 2 + 2))
    fitted = fit_image(image, 16)
    assert fitted.shape == (16, 16, 3) and fitted.dtype == np.uint8
    assert fitted[8, 8, 0] > fitted[0, 0, 0]


def test_fit_is_antialiased() -> None:
    """A checkerboard at the Nyquist limit, reduced fourfold, is grey; without the filter it would keep its contrast."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    assert np.abs(fit_image(image, 16)[2:-2, 2:-2].astype(float) - 127.5).max() < 5


def test_a_batch_holds_each_value_as_torch_divides_it() -> None:
    images = np.random.default_rng(0).permutation(np.arange(768, dtype=np.uint16) % 256).astype(np.uint8)
    images = images.reshape(2, 8, 16, 3)
    batch = to_batch(list(images))
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    assert torch.equal(batch, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


def test_fingerprint_follows_the_data_and_not_the_place(tmp_path: Path) -> None:
    first, second = (open_source(section(folder_of(tmp_path / name, 3))).fingerprint() for name in ("a", "b"))
    assert first == second and first["num"] == 3
    picture(level=99).save(tmp_path / "other.png")
    file, other = tmp_path / "b" / "0001.png", (tmp_path / "other.png").read_bytes()
    assert len(file.read_bytes()) == len(other)
    file.write_bytes(other)
    second = open_source(section(tmp_path / "b")).fingerprint()
    assert second != first, "another image of the same size"
    (tmp_path / "b" / "0001.txt").write_text("another caption")
    assert open_source(section(tmp_path / "b")).fingerprint() != second


def test_a_broken_image_stops_a_small_folder_when_it_is_opened(tmp_path: Path) -> None:
    folder_of(tmp_path, 20)
    whole = (tmp_path / "0007.png").read_bytes()
    (tmp_path / "0007.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"(?s)1 of 20 samples cannot be used.*limit of 0\.1%.*0007\.png"):
        open_source(section(tmp_path))


@pytest.mark.parametrize(
    "content, reason", [(None, "no caption file"), (b" \n", "is empty"), (b"\xff\xfe", "not UTF-8")]
)
def test_missing_empty_and_broken_captions_are_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    folder_of(tmp_path, 3)
    if content is None:
        (tmp_path / "0001.txt").unlink()
    else:
        (tmp_path / "0001.txt").write_bytes(content)
    with pytest.raises(UsageError, match=f"(?s)1 of 3 samples.*0001.*{reason}"):
        open_source(section(tmp_path))


def test_one_unreadable_in_a_thousand_gives_way_to_its_neighbour(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At 0.1 % the run goes on: the next sample in file order stands in, the same in every process."""
    folder_of(tmp_path, 1000)
    (tmp_path / "0500.png").write_bytes(b"\x89PNG no more")
    source = open_source(section(tmp_path))
    assert source.load([499, 500, 501]).ids == ["0499.png", "0501.png", "0501.png"]
    assert open_source(section(tmp_path)).load([500]).ids == ["0501.png"]
    assert "0500.png" in caplog.text
    (tmp_path / "0600.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"(?s)2 of 1000 samples.*0500\.png.*0600\.png"):
        open_source(section(tmp_path)).load([500, 600])


def test_a_folder_of_something_else_stops_at_once(tmp_path: Path) -> None:
    """Files that only look like images: a handful of reads, not 0.1 % of the folder, and the list of reasons."""
    folder_of(tmp_path, 0)
    for i in range(8000):
        (tmp_path / f"{i:05d}.jpg").touch()
        (tmp_path / f"{i:05d}.txt").write_text("x")
    with pytest.raises(UsageError, match=r"6 of 8000 samples cannot be used \(6 read so far\)"):
        open_source(section(tmp_path))


def test_long_lists_of_reasons_are_cut(tmp_path: Path) -> None:
    folder_of(tmp_path, 30)
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    with pytest.raises(UsageError, match=r"30 of 30 .*\n(  .*\n){10}  … and 20 more"):
        open_source(section(tmp_path))


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no images")
    with pytest.raises(UsageError, match=r"no image found \(looked for \.jpg, .*\.png"):
        open_source(section(tmp_path))
    with pytest.raises(UsageError, match="no such folder; data.path"):
        open_source(section(tmp_path / "absent"))


def test_tars_are_sent_to_the_right_kind(tmp_path: Path) -> None:
    (tmp_path / "000.tar").write_bytes(bytes(10240))
    for path in (tmp_path, tmp_path / "000.tar"):
        with pytest.raises(UsageError, match="kind: webdataset"):
            open_source(section(path))
