"""A file is the old one or the new one: under a failing disk, and for whoever reads meanwhile."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rgbench.core.io import save_safetensors_atomic, sha256_file, write_bytes_atomic, write_json_atomic, write_synced
from tests.conftest import Cli
from tests.faults.disk import FailingDisk

WRITERS: list[Callable[[Path, int], object]] = [
    lambda path, n: write_bytes_atomic(path, bytes([n]) * 3_000_000),
    lambda path, n: write_json_atomic(path, {"value": n}),
    lambda path, n: save_safetensors_atomic({"a": torch.full((9,), float(n)), "b": torch.tensor(n)}, path),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_the_nth_operation(
    tmp_path: Path, write: Callable[[Path, int], object], code: int
) -> None:
    file = tmp_path / "file"
    write(file, 2)
    new = sha256_file(file)
    write(file, 1)
    old = sha256_file(file)
    n, survived, named = 1, False, 0
    while not survived:
        n += 1  # the first makes a folder that is there already
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, n, code)
            try:
                write(file, 2)
            except OSError as error:
                assert error.errno == code
                named += error.filename == str(file)
            survived = disk.count < n
        assert sha256_file(file) in (old, new)
        assert os.listdir(tmp_path) == ["file"]
        if not survived and sha256_file(file) == new:
            write(file, 1)  # only the folder's sync, the last operation, failed
    assert sha256_file(file) == new
    assert named >= 3, "opening, writing and syncing the file say which"
    assert n >= 7  # folder, open, write, sync, rename, and opening and syncing the folder


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    size = 200_000
    write_bytes_atomic(file, b"\0" * size)
    enough = threading.Event()

    def keep_writing() -> None:
        for n in itertools.cycle(range(256)):
            write_bytes_atomic(file, bytes([n]) * size)
            if enough.is_set():
                return

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        seen: set[bytes] = set()
        reads = 0
        while len(seen) < 30 or reads < 300:  # however the machine shares its time between the two
            data = file.read_bytes()
            reads += 1
            seen.add(data[:1])
            assert len(data) == size and data == data[:1] * size
    finally:
        enough.set()
        writer.join()


def test_a_new_file_that_the_disk_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FailingDisk(monkeypatch, fail_at=2)  # after it is opened
    with pytest.raises(OSError, match="No space left") as error:
        write_synced(tmp_path / "new", [b"abc"])
    assert error.value.filename == str(tmp_path / "new")


def test_a_command_says_which_file_the_disk_refused(tmp_path: Path, cli: Cli) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        done = cli("cp", "lcd", tmp_path / "mine.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 1 and f"{tmp_path / 'mine.yaml'}: File too large" in done.stderr
    (tmp_path / "file").write_text("not a folder")
    done = cli("cp", "lcd", tmp_path / "file" / "mine.yaml")
    assert done.returncode == 1 and str(tmp_path / "file") in done.stderr
    assert os.listdir(tmp_path) == ["file"]
