"""What must hold when bytes rot, disks fill and processes are killed: a checkpoint that loads is always there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rgbench.core.checkpoint import CorruptCheckpoint, commit, latest, load, verify
from tests.conftest import ROOT
from tests.faults.disk import FailingDisk


def state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "student": {"w": torch.randn(40, 25, generator=generator)},
        "optimiser": {"0.m": torch.full((99,), float(step))},
    }


def holds(path: Path, step: int) -> bool:
    tensors, meta = load(path)
    wanted = state(step)
    same = all(torch.equal(tensors[p][k], v) for p, values in wanted.items() for k, v in values.items())
    return same and meta == {"step": step}


FILES = ("student.safetensors", "optimiser.safetensors", "meta.json", "manifest.json")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for step in (1, 2):
        commit(tmp_path, step, state(step), {"step": step})
    return tmp_path


def assert_found(folder: Path, name: str) -> None:
    damaged = folder / "step-00000002"
    for check in (verify, load):
        with pytest.raises(CorruptCheckpoint, match=re.escape(str(damaged / name))):
            check(damaged)
    assert latest(folder) == folder / "step-00000001"


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(two: Path, name: str) -> None:
    file = two / "step-00000002" / name
    good = file.read_bytes()
    offsets = sorted({round(i * (len(good) - 1) / 99) for i in range(100)})
    for number, offset in enumerate(offsets):
        bad = bytearray(good)
        bad[offset] ^= 1 << number % 8
        file.write_bytes(bad)
        assert_found(two, name)
    file.write_bytes(good)
    assert latest(two) == two / "step-00000002"


@pytest.mark.parametrize("name", FILES)
def test_truncated_extended_and_deleted_files_are_found(two: Path, name: str) -> None:
    file = two / "step-00000002" / name
    good = file.read_bytes()
    for length in {0, 1, 7, 8, len(good) // 2, len(good) - 1}:
        file.write_bytes(good[:length])
        assert_found(two, name)
    file.write_bytes(good + b"\n")
    assert_found(two, name)
    file.unlink()
    assert_found(two, name)
    file.mkdir()
    assert_found(two, name)


def test_a_manifest_that_lists_less_is_found(two: Path) -> None:
    """Even one whose JSON is sound: it carries the hash of itself."""
    manifest = two / "step-00000002" / "manifest.json"
    text = manifest.read_text()
    for old, new in (('"step": 2', '"step": 3'), ('"schema_version": 1', '"schema_version": 2'), ("\n", "\n ")):
        manifest.write_text(text.replace(old, new, 1))
        assert_found(two, "manifest.json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_the_nth_operation(tmp_path: Path, code: int) -> None:
    """For every n: either the error comes out and the old one loads, or the new one is there whole."""
    n, survived = 0, False
    while not survived:
        n += 1
        folder = tmp_path / str(n)
        commit(folder, 1, state(1), {"step": 1}, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, n, code)
            try:
                commit(folder, 2, state(2), {"step": 2}, keep=1)
            except OSError as error:
                assert error.errno == code
            survived = disk.count < n
        path = latest(folder)
        assert path is not None
        assert holds(path, int(path.name[-1])), f"operation {n}"
        assert holds(commit(folder, 2, state(2), {"step": 2}, keep=1), 2)
        assert [p for p in os.listdir(folder) if not p.startswith("step-")] == []
        shutil.rmtree(folder)
    assert n > 20  # opens, writes and syncs of four files, three folders, two renames


def test_a_failed_save_leaves_nothing_that_fills_the_disk_further(tmp_path: Path) -> None:
    commit(tmp_path, 1, state(1), {"step": 1})
    for n in range(2, 12):  # the first makes a folder that is there already
        with pytest.MonkeyPatch.context() as patch:
            FailingDisk(patch, n)
            with pytest.raises(OSError, match="No space left"):
                commit(tmp_path, 2, state(2), {"step": 2})
        assert os.listdir(tmp_path) == ["step-00000001"]


LIMITED = """
import resource, sys
from pathlib import Path
from rgbench.core.checkpoint import commit, latest
from tests.faults.test_checkpoint_faults import holds, state
folder = Path(sys.argv[1])
commit(folder, 1, state(1), {"step": 1})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (0, 1, 100, 400, 1000, 4000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        commit(folder, 2, state(2), {"step": 2})
        raise SystemExit(f"a limit of {limit} bytes did not bite")
    except OSError as error:
        assert "too large" in str(error), error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert latest(folder).name == "step-00000001" and holds(latest(folder), 1)
assert holds(commit(folder, 2, state(2), {"step": 2}), 2)
print("held")
"""


def test_a_limit_set_by_the_kernel(tmp_path: Path) -> None:
    assert in_process(LIMITED, tmp_path / "run").splitlines()[-1] == "held"


# A worker that saves without pause is killed at a random instant, again and again.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from rgbench.core.checkpoint import commit, latest
from tests.faults.test_checkpoint_faults import holds, state
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
done = commit(folder, 1, state(1), {"step": 1})
torn = 0
for kill in range(kills):
    reader, writer = os.pipe()
    start = int(latest(folder).name[5:])
    child = os.fork()
    if child == 0:
        for step in range(start + 1, start + 100_000):
            commit(folder, step, state(step), {"step": step})
            os.write(writer, b"%d\\n" % step)
    os.close(writer)
    time.sleep(random.uniform(0.001, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = [int(line) for line in os.fdopen(reader, "rb").read().split()]
    torn += any(name.startswith(".tmp-") for name in os.listdir(folder))
    path = latest(folder)
    step = int(path.name[5:])
    assert holds(path, step), path
    assert step >= max(said, default=start), (step, said)
print("torn", torn)
"""


def in_process(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_while_saving(tmp_path: Path) -> None:
    in_process(KILLED, tmp_path / "run", 12)


@pytest.mark.long
def test_killed_while_saving_long(tmp_path: Path) -> None:
    torn = int(in_process(KILLED, tmp_path / "run", 200).split()[-1])
    assert torn > 20  # the kills did land inside saves
