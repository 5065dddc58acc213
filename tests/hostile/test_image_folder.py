"""Image folders made to harm: bombs, wrong contents, tables that lead outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.data.config import ImageFolderData
from rgbench.data.sources import open_source
from tests.hostile.test_files import png_claiming


def opened(path: Path, captions: str = "txt") -> None:
    keys = {"kind": "image_folder", "path": str(path), "resolution": 16, "captions": captions}
    open_source(ImageFolderData.model_validate(keys))


@pytest.mark.parametrize(
    "content",
    [
        png_claiming(60_000, 60_000),
        b"",
        b"\xff\xd8\xff\xe0 cut",
        b"<svg onload='x'/>",
        b"%!PS-Adobe\n(%pipe%touch owned) (w) file",
        b"GIF89a" + bytes(40),
    ],
    ids=["bomb", "empty", "jpeg", "svg", "postscript", "gif"],
)
def test_hostile_images_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(UsageError, match=r"(?s)1 of 1 samples.*a\.png"):
        opened(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.txt"]


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "sub/../../outside.png", "", "a\0.png", "x" * 300])
def test_a_table_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "outside.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(UsageError, match=r"metadata\.jsonl:1: .*leads out of the folder"):
        opened(folder, "metadata.jsonl")


@pytest.mark.parametrize(
    "table, content, message",
    [
        ("metadata.jsonl", b"{", r":1: not valid JSON"),
        ("metadata.jsonl", b"\n" + b"[" * 100_000, r":2: not valid JSON"),
        ("metadata.jsonl", b"[1]", r":1: expected 'file_name' and 'text'"),
        ("metadata.jsonl", b'{"file_name": 3, "text": "x"}', r":1: expected 'file_name' and 'text'"),
        ("metadata.jsonl", b'{"file": "a.png", "text": "x"}', r":1: expected .*got \['file', 'text'\]"),
        ("metadata.jsonl", b"\xff", r"not UTF-8 at byte 0"),
        ("metadata.jsonl", b"", r"no image found"),
        ("captions.csv", b"name,caption\na.png,x\n", r":2: expected"),
        ("captions.csv", b'file_name,text\na.png,"x\n', r"not valid CSV"),
        ("captions.csv", b"file_name,text\na.png\n", r":2: expected"),
    ],
)
def test_broken_tables_are_named_with_their_line(tmp_path: Path, table: str, content: bytes, message: str) -> None:
    (tmp_path / table).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        opened(tmp_path, table)


def test_missing_table_and_missing_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"captions\.csv: cannot read"):
        opened(tmp_path, "captions.csv")
    (tmp_path / "captions.csv").write_text("file_name,text\ngone.png,x\n")
    with pytest.raises(UsageError, match=r"captions\.csv:2: the image gone\.png does not exist"):
        opened(tmp_path, "captions.csv")
