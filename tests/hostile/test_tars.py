"""Tars made to harm, or damaged: refused whole, with the member or the place named, and nothing written."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.data.config import WebDatasetData
from rgbench.data.sources import open_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    tar.addfile(info, io.BytesIO(data))


def good_tar(num: int = 4) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(num):
            add(tar, f"{i}.png", png())
            add(tar, f"{i}.txt", b"a caption")
    return buffer.getvalue()


def load_all(path: Path | str) -> list[str]:
    source = open_source(WebDatasetData.model_validate({"kind": "webdataset", "path": str(path), "resolution": 16}))
    assert source.length is not None
    return source.load(list(range(source.length))).prompts


@pytest.mark.parametrize("name", ["../escape.png", "a/../../escape.png", "/abs.png", "C:/x.png", "a\\..\\b.png"])
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, name, png())
        add(tar, "a.txt", b"x")
    with pytest.raises(UsageError, match=r"0\.tar: refused: member"):
        load_all(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
    ids=["symlink", "hardlink", "character device", "block device", "fifo"],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", kind=kind, target="/etc/passwd")
        add(tar, "a.txt", b"x")
    with pytest.raises(UsageError, match=r"refused: member 'a\.png' is a link"):
        load_all(tmp_path)


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for _ in range(2):
            add(tar, "a.png", png())
        add(tar, "a.txt", b"x")
    with pytest.raises(UsageError, match="occurs twice"):
        load_all(tmp_path)


def test_compressed_and_foreign_files_are_refused(tmp_path: Path) -> None:
    for content in (gzip.compress(good_tar()), b"not a tar at all" * 100, b"PK\x03\x04" + bytes(2000), b"x"):
        (tmp_path / "0.tar").write_bytes(content)
        with pytest.raises(UsageError, match=r"0\.tar: "):
            load_all(tmp_path)


@pytest.mark.parametrize(
    "url", ["pipe:touch owned", "http://localhost/a.tar", "pipe:cat 0.tar |", "{0..3}.tar", "*.tar"]
)
def test_urls_pipes_and_patterns_are_only_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.tar").write_bytes(good_tar())
    with pytest.raises(UsageError, match="no such file; data.path takes local tars"):
        load_all(url)
    assert not (tmp_path / "owned").exists()


def test_every_truncation_is_found(tmp_path: Path) -> None:
    """Cut anywhere, at block edges above all, a tar is never read as a shorter one."""
    whole = good_tar(3)
    end = whole.rstrip(b"\0")
    for size in [*range(0, len(end), 512), *range(1, len(end), 997)]:
        (tmp_path / "0.tar").write_bytes(whole[:size])
        with pytest.raises(UsageError):
            load_all(tmp_path)


def test_a_broken_header_in_the_middle_is_found(tmp_path: Path) -> None:
    """Python's tarfile stops at it in silence: half the samples would be gone."""
    raw = bytearray(good_tar(4))
    header = raw.index(b"2.png")
    raw[header : header + 8] = b"\xff" * 8
    (tmp_path / "0.tar").write_bytes(raw)
    with pytest.raises(UsageError, match="no end mark after byte"):
        load_all(tmp_path)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), length=st.sampled_from([1, 12, 600]))
def test_damage_anywhere_ends_in_a_clear_error_or_in_whole_samples(
    tmp_path: Path, position: float, byte: int, length: int
) -> None:
    raw = bytearray(good_tar(3))
    start = int(position * len(raw))
    raw[start : start + length] = bytes([byte]) * len(raw[start : start + length])
    (tmp_path / "0.tar").write_bytes(raw)
    os.utime(tmp_path / "0.tar", ns=(start * 256 + byte, (start * 256 + byte) * 1000 + length))
    try:
        prompts = load_all(tmp_path)
    except UsageError as error:
        assert "0.tar" in str(error) or str(tmp_path) in str(error)
    else:
        assert len(prompts) == 3


def test_a_shard_that_shrinks_under_the_run_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(good_tar())
    source = open_source(WebDatasetData.model_validate({"kind": "webdataset", "path": str(path), "resolution": 16}))
    path.write_bytes(good_tar()[:2048])
    with pytest.raises(UsageError):
        source.load([3])


def test_bombs_inside_are_refused(tmp_path: Path) -> None:
    """A sparse member claims a terabyte in a few blocks; a size field claims more than the file holds."""
    raw = bytearray(good_tar(1))
    raw[124:136] = b"77777777777\0"
    checksum = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
    raw[148:156] = f"{checksum:06o}\0 ".encode()
    (tmp_path / "0.tar").write_bytes(raw)
    with pytest.raises(UsageError, match=r"0\.tar"):
        load_all(tmp_path)
