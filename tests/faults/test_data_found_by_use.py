"""Data that would be read in part, twice, stale or under another's caption: refused by name, or read right."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

from rgbench.core.errors import UsageError
from rgbench.core.io import open_image, parse_json
from rgbench.data.config import HFDatasetData, ImageFolderData, WebDatasetData
from rgbench.data.prompts import Prompt, PromptSet, load_prompts
from rgbench.data.samples import fit_image
from rgbench.data.sources import open_source
from rgbench.evaluate.images import match_images, own_prompts
from rgbench.metrics.reference import ReferenceFolder


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def encoded(seed: int = 0, kind: str = "BMP") -> bytes:
    """A 16 px image of noise; BMPs have one size."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def tar(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write(name: str, data: bytes | str) -> Path:
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return Path(name)


def from_tar() -> tuple[list[str], list[str]]:
    source = open_source(WebDatasetData(kind="webdataset", path="x.tar", resolution=16))
    batch = source.load(list(range(source.length or 0)))
    return batch.prompts, batch.ids


def from_folder(captions: Any = "txt") -> list[str]:
    source = open_source(ImageFolderData(kind="image_folder", path=".", resolution=16, captions=captions))
    return source.load(list(range(source.length or 0))).prompts


def from_parquet() -> tuple[list[str], torch.Tensor]:
    source = open_source(HFDatasetData(kind="hf_dataset", path="x.parquet", resolution=16))
    batch = source.load(list(range(source.length or 0)))
    assert batch.images_BCHW is not None
    return batch.prompts, batch.images_BCHW


def replace_in_place(path: Path, change: Callable[[], object]) -> None:
    """Other contents of the same size, under the same time of change, as archives of equal times leave them."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


SAMPLE = (("a.bmp", encoded()), ("a.txt", b"one"))
TARS = {
    "several tars in one file": tar(*SAMPLE) + tar(("b.bmp", encoded(1)), ("b.txt", b"two")),
    "more after its end mark": tar(*SAMPLE) + b"rest" * 200,
    "holds .bmp, .txt, .txt": tar(*SAMPLE, ("a.TXT", b"two")),
    "holds .jpg, .jpg, .txt": tar(("a.jpg", encoded()), ("a.JPG", encoded(1)), ("a.txt", b"one")),
    "a name that is not UTF-8": tar(("a\udcff.bmp", encoded()), ("a\udcff.txt", b"one")),
}


@pytest.mark.parametrize("says", TARS)
def test_tars_that_would_be_read_in_part_are_refused(says: str) -> None:
    write("x.tar", TARS[says])
    with pytest.raises(UsageError, match=rf"x\.tar: .*{says}"):
        from_tar()


def test_a_tar_may_end_in_a_folder() -> None:
    with tarfile.open("x.tar", "w") as file:
        for name, data in SAMPLE:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        folder = tarfile.TarInfo("empty")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
    assert from_tar() == (["one"], ["x/a"])


def test_what_replaces_data_under_its_old_time_is_seen(tmp_path: Path) -> None:
    file = write("x.tar", tar(*SAMPLE))
    assert from_tar() == (["one"], ["x/a"])
    replace_in_place(file, lambda: write("x.tar", tar(("b.bmp", encoded()), ("b.txt", b"two"))))
    assert from_tar() == (["two"], ["x/b"])

    def table(caption: str) -> None:
        pq.write_table(pa.table({"image": [{"bytes": encoded(), "path": None}], "text": [caption]}), "x.parquet")

    table("one")
    assert from_parquet()[0] == ["one"]
    replace_in_place(Path("x.parquet"), lambda: table("two"))
    assert from_parquet()[0] == ["two"]
    write("a.bmp", encoded())
    before = ReferenceFolder(Path("."), tmp_path / "cache").content
    assert ReferenceFolder(Path("."), tmp_path / "cache").content == before
    replace_in_place(Path("a.bmp"), lambda: write("a.bmp", encoded(1)))
    assert ReferenceFolder(Path("."), tmp_path / "cache").content != before


TABLES: dict[str, tuple[str, str]] = {
    "two columns": ("captions.csv", "file_name,text,text\na.bmp,one,two\n"),
    "quoting": ("captions.csv", "file_name,text\na.bmp,a red circle, on the left\n"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_would_be_read_in_part_is_refused(case: str) -> None:
    write("a.bmp", encoded())
    write(*TABLES[case])
    with pytest.raises(UsageError, match=r"captions\.csv:(1: two columns are called 'text'|2: more cells)"):
        from_folder("captions.csv")
    write("captions.csv", 'file_name,text,,\na.bmp,"a red circle, on the left",,\n')
    assert from_folder("captions.csv") == ["a red circle, on the left"]


def test_one_caption_file_of_two_images_is_nobodys() -> None:
    for name in ("a.bmp", "a.jpg", "b.bmp"):
        write(name, encoded(kind="JPEG" if name.endswith("jpg") else "BMP"))
    for name in ("a.txt", "b.txt"):
        write(name, name)
    with pytest.raises(UsageError, match=r"2 of 3 samples.*\n.*a\.bmp: another image has its caption file a\.txt"):
        from_folder()
    Path("a.jpg").unlink()
    assert from_folder() == ["a.txt", "b.txt"]


def test_an_image_too_narrow_to_enlarge_is_refused_before_it_is() -> None:
    Image.new("RGB", (1, 16_383)).save("a.png")
    write("a.txt", "a line")
    with pytest.raises(UsageError, match=r"a\.png: 1×16383 pixels are too long and narrow"):
        open_source(ImageFolderData(kind="image_folder", path=".", resolution=512))
    assert fit_image(Image.new("RGB", (100, 1000)), 512).shape == (512, 512, 3)


def test_half_an_image_is_refused_whatever_the_process_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(kind="JPEG")
    with pytest.raises(UsageError, match="not a readable"):
        open_image(data[: len(data) // 2])
    assert open_image(data).size == (16, 16) and ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_parquet_error_says_why_and_no_library_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    columns = [pa.array([{"bytes": encoded(), "path": None}]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "text", "text"]), "x.parquet")
    with pytest.raises(UsageError, match=r"x\.parquet: cannot be opened as a data set: .*text"):
        from_parquet()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mark", ["\r", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_other_line_ends_make_no_single_prompt(mark: str) -> None:
    write("p.txt", f"a cat{mark}a dog\na fox\n")
    with pytest.raises(UsageError, match=r"p\.txt:1: a line end that is no line feed"):
        load_prompts("p.txt")
    write("p.txt", f"a cat\r\na dog{mark}\n")
    assert [prompt.text for prompt in load_prompts("p.txt").prompts] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Prompt\tPrompt\tCategory\na\tb\tc\n", "1: two columns are called 'Prompt'"),
        ("Prompt\tCategory\na red\tcircle\tShapes\n", "2: more cells than columns"),
    ],
)
def test_a_parti_list_that_would_be_read_in_part_is_refused(text: str, says: str) -> None:
    write("p.tsv", text)
    with pytest.raises(UsageError, match=rf"p\.tsv:{says}"):
        load_prompts("p.tsv")


@pytest.mark.parametrize("identity", ['""', '"\\u200b"', "1" * 400])
def test_ids_are_texts_or_numbers(identity: str) -> None:
    write("p.jsonl", f'{{"text": "a cat", "id": {identity}}}\n')
    with pytest.raises(UsageError, match=r"p\.jsonl:1: ('id' must be|not valid JSON: 1+… is too large)"):
        load_prompts("p.jsonl")


def test_whole_numbers_are_those_that_can_be_computed_with() -> None:
    assert parse_json("[1000000000000000019884624838656, -9223372036854775808]") == [int(1e30), -(2**63)]
    for sign in ("", "-"):
        with pytest.raises(ValueError, match="9… is too large for a number"):
            parse_json(f"[{sign}{'9' * 400}]")


@pytest.mark.parametrize(
    ("ids", "image"), [(("a/b", "a_b"), "a_b"), (("x", "x-0"), "x-0"), (("café", "cafe\u0301"), "café")]
)
def test_one_image_is_that_of_one_prompt(ids: tuple[str, str], image: str) -> None:
    write(f"{image}.bmp", encoded())
    prompts = PromptSet("mine", tuple(Prompt(each, f"a {each}") for each in ids))
    with pytest.raises(UsageError, match="would be that of two prompts"):
        match_images(Path("."), prompts, prompts, 0)


def test_a_table_gives_each_prompt_its_own_image() -> None:
    write("a.bmp", encoded())
    rows = [{"file": "a.bmp", "prompt_id": name, "prompt": name, "seed": 0} for name in ("p", "q")]
    write("index.json", json.dumps(rows))
    prompts = own_prompts(Path("."), 0)
    with pytest.raises(UsageError, match="the image 'a' would be that of two prompts, 'p' and 'q'"):
        match_images(Path("."), prompts, prompts, 0)
    write("index.json", json.dumps([rows[0] | {"prompt_id": "\ud800"}]))
    with pytest.raises(UsageError, match=r"index\.json: entry 0: the text holds U\+D800"):
        own_prompts(Path("."), 0)
