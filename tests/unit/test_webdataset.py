"""Webdataset tars: grouping, order, random access, the index and its cache."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.core.io import TarMember, open_tar
from rgbench.data import tars as tar_index
from rgbench.data.config import WebDatasetData
from rgbench.data.sources import open_source, prepare_source
from rgbench.data.tars import index_shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rgbench" / "tars"


def image_bytes(level: int = 0, kind: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, level: int = 0) -> dict[str, bytes]:
    return {f"{key}.png": image_bytes(level), f"{key}.txt": f"caption {level}".encode()}


def section(path: Path | list[Path]) -> WebDatasetData:
    value = [str(p) for p in path] if isinstance(path, list) else str(path)
    return WebDatasetData.model_validate({"kind": "webdataset", "path": value, "resolution": 16})


def test_samples_of_all_shards_are_numbered_through(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "01.tar", sample("x", 3) | sample("y", 4))
    write_tar(tmp_path / "d" / "00.tar", sample("b", 1) | sample("a", 2))
    write_tar(tmp_path / "d" / "02.tar", {"readme.json": b"{}"} | sample("readme", 5))
    source = open_source(section(tmp_path / "d"))
    batch = source.load([4, 0, 1, 2, 3])
    assert source.length == 5
    assert batch.ids == ["02/readme", "00/b", "00/a", "01/x", "01/y"]
    assert batch.prompts == [f"caption {level}" for level in (5, 1, 2, 3, 4)]
    assert batch.images_BCHW[:, 0, 0, 0].mul(255).round().tolist() == [5, 1, 2, 3, 4]


def test_a_single_tar_and_a_list_are_taken_too(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{i}.tar", sample(f"k{i}", i)) for i in (2, 0, 1)]
    assert open_source(section(tars[0])).load([0]).ids == ["2/k2"]
    assert open_source(section(tars)).load([0, 1, 2]).ids == ["0/k0", "1/k1", "2/k2"]
    assert open_source(section(tars)).fingerprint() == open_source(section(tmp_path)).fingerprint()


@pytest.mark.parametrize("kind, suffix", [("JPEG", "jpg"), ("JPEG", "JPEG"), ("PNG", "png"), ("WEBP", "webp")])
def test_image_kinds(tmp_path: Path, kind: str, suffix: str) -> None:
    write_tar(tmp_path / "0.tar", {f"a.{suffix}": image_bytes(200, kind), "a.txt": b"x"})
    assert abs(open_source(section(tmp_path)).load([0]).images_BCHW[0, 0].mean() * 255 - 200) < 3


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(tmp_path: Path, format: int) -> None:
    key = "folder/" + "n" * 90 if format == tarfile.USTAR_FORMAT else "ordner-ü/" + "n" * 180
    members = sample(key, 9) | {f"{key}.cls": b"3", f"{key}.seg.png": b"not the image"} | sample("./b", 7)
    write_tar(tmp_path / "0.tar", members, format)
    batch = open_source(section(tmp_path)).load([0, 1])
    assert batch.ids == [f"0/{key}", "0/b"] and batch.prompts == ["caption 9", "caption 7"]


def test_the_index_reads_what_tarfile_reads(tmp_path: Path) -> None:
    members = {name: data for i in range(20) for name, data in sample(f"{i:03d}", i).items()}
    path = write_tar(tmp_path / "0.tar", members)
    index = index_shard(path)
    raw = path.read_bytes()
    for key, (io_, is_, to, ts) in zip(index.keys.tolist(), index.spans.tolist(), strict=True):
        assert raw[io_ : io_ + is_] == members[f"{key.decode()}.png"]
        assert raw[to : to + ts] == members[f"{key.decode()}.txt"]


def test_the_index_is_kept_and_made_again_when_the_tar_changes(tmp_path: Path, own_cache: Path) -> None:
    path = write_tar(tmp_path / "0.tar", sample("a", 1))
    first = index_shard(path)
    (kept,) = own_cache.iterdir()
    again = index_shard(path)
    assert again.keys.tolist() == first.keys.tolist() and again.spans.tolist() == first.spans.tolist()
    write_tar(path, sample("a", 1) | sample("b", 2))
    os.utime(path, ns=(1, 1))  # of the same size, perhaps within one tick of the clock that stamps files
    assert index_shard(path).keys.tolist() == [b"a", b"b"]
    kept.write_bytes(b"broken")
    os.utime(path, ns=(0, 0))
    assert index_shard(path).keys.tolist() == [b"a", b"b"]


def test_a_damaged_index_is_made_again(tmp_path: Path, own_cache: Path) -> None:
    path = write_tar(tmp_path / "0.tar", sample("a", 1))
    index_shard(path)
    (kept,) = own_cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    assert index_shard(path).keys.tolist() == [b"a"]


def test_one_flipped_bit_of_the_index_is_found(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "0.tar", {**sample("a", 1), **sample("b", 2), "alone.txt": b"x"})
    first = index_shard(path)
    (cached,) = own_cache.iterdir()
    whole = cached.read_bytes()
    flips = random.Random(0).choices(range(8 * len(whole)), k=150)
    for bit in flips:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        cached.write_bytes(data)
        again = index_shard(path)
        assert again.keys.tolist() == first.keys.tolist() and again.dropped == first.dropped, bit
        assert again.spans.tolist() == first.spans.tolist(), bit
    assert "the index is made again" in caplog.text


def test_hidden_members_are_left_out(tmp_path: Path) -> None:
    hidden = {".hidden/a.png": b"", "__MACOSX/a.png": b"", "._a.png": b"", "x/.ipynb_checkpoints/a.txt": b""}
    write_tar(tmp_path / "0.tar", hidden | sample("x/a", 1))
    assert open_source(section(tmp_path)).load([0]).ids == ["0/x/a"]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert index_shard(write_tar(tmp_path / "0.tar", sample("a", 1))).keys.tolist() == [b"a"]


def test_fingerprint_follows_the_data_and_not_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / name / "0.tar", sample("k", 1))
    prints = [open_source(section(tmp_path / name)).fingerprint() for name in ("a", "b")]
    assert prints[0] == prints[1]
    members = sample("k", 1)
    other = next(data for data in map(image_bytes, range(2, 99)) if len(data) == len(members["k.png"]))
    for name, data in (("k.txt", b"caption 2"), ("k.png", other)):
        write_tar(tmp_path / "b" / "0.tar", members | {name: data})
        assert open_source(section(tmp_path / "b")).fingerprint() != prints[0], "other contents of the same size"
    write_tar(tmp_path / "b" / "0.tar", sample("k2", 1))
    assert open_source(section(tmp_path / "b")).fingerprint() != prints[0]


@pytest.mark.parametrize(
    "members, held",
    [
        ({"a.png": image_bytes()}, r"\.png"),
        ({"a.txt": b"x", "a.npy": b"latents"}, r"\.npy, \.txt"),
        ({"a.txt": b"x", "a.png": b"", "a.jpg": b""}, r"\.jpg, \.png, \.txt"),
    ],
    ids=["no caption", "latents", "two images"],
)
def test_incomplete_samples_are_counted_and_named(tmp_path: Path, members: dict[str, bytes], held: str) -> None:
    write_tar(tmp_path / "0.tar", members | sample("b"))
    with pytest.raises(UsageError, match=rf"(?s)1 of 2 samples.*0\.tar: sample 'a' needs one image and .*{held}"):
        open_source(section(tmp_path))


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"a.png": image_bytes()[:40], "a.txt": b"x"}, "not a readable"),
        ({"a.png": image_bytes(), "a.txt": b"\xff"}, "not UTF-8"),
        ({"a.png": image_bytes(), "a.txt": b"\n"}, "is empty"),
    ],
)
def test_unreadable_content_is_named(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    write_tar(tmp_path / "0.tar", members | sample("b"))
    with pytest.raises(UsageError, match=rf"(?s)1 of 2 samples.*0\.tar: a: .*{reason}"):
        open_source(section(tmp_path))


def test_one_incomplete_in_a_thousand_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    png = image_bytes()
    members = {f"{i:04d}.{kind}": data for i in range(999) for kind, data in (("png", png), ("txt", b"x"))}
    write_tar(tmp_path / "0.tar", members | {"lonely.png": png})
    assert open_source(section(tmp_path)).length == 999
    assert "'lonely'" in caplog.text


def test_wrong_places_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tar found \(looked for \*\.tar in this folder\)"):
        open_source(section(tmp_path))
    with pytest.raises(UsageError, match="no such file"):
        open_source(section(tmp_path / "absent.tar"))
    with pytest.raises(UsageError, match="an empty list"):
        open_source(section([]))
    (tmp_path / "0.tar.gz").touch()
    with pytest.raises(UsageError, match=r"0\.tar\.gz is compressed"):
        open_source(section(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").touch()
    with pytest.raises(UsageError, match="kind: image_folder"):
        open_source(section(tmp_path))
    write_tar(tmp_path / "0.tar", {})
    with pytest.raises(UsageError, match="hold no sample"):
        open_source(section(tmp_path))


def test_ranks_share_the_indexing(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each indexes its own tars; opening then lists none again, and finds what one process finds."""
    for number in range(5):
        write_tar(tmp_path / "d" / f"{number}.tar", sample(f"s{number}", number))
    listed: list[list[str]] = []

    def counting(path: Path) -> list[TarMember]:
        listed[-1].append(path.name)
        return open_tar(path)

    monkeypatch.setattr(tar_index, "open_tar", counting)
    for rank in range(2):
        listed.append([])
        prepare_source(section(tmp_path / "d"), rank, 2)
    listed.append([])
    source = open_source(section(tmp_path / "d"))
    assert listed == [["0.tar", "2.tar", "4.tar"], ["1.tar", "3.tar"], []]
    assert source.load([0, 1, 2, 3, 4]).prompts == [f"caption {level}" for level in range(5)]
