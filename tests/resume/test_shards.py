"""``train.shard``: what two processes with shards train is what one whole process trains, and so are their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import families
from tests.fork_server import ForkServer
from tests.resume.test_ranks import on_two_ranks


@pytest.mark.timeout(900)
@pytest.mark.enable_socket
def test_two_ranks_with_shards(tmp_path: Path, fork_server: ForkServer) -> None:
    on_two_ranks(fork_server.folder / "python", tmp_path, "quick", module="on_shards")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.enable_socket
def test_two_ranks_with_shards_in_every_cell(tmp_path: Path, fork_server: ForkServer) -> None:
    for name in ("sdxl", "sd3", "flux"):
        families.save(name, tmp_path / name)
    on_two_ranks(fork_server.folder / "python", tmp_path, "matrix", module="on_shards")
