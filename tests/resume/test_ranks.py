"""Two processes against one: the same gradients, bit-equal ranks, one rank's trouble stops both."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fork_server import ForkServer
from tests.parity import tiny


def on_two_ranks(python: Path, folder: Path, *checks: str, module: str = "on_ranks") -> None:
    """Run checks of a module of this folder; the output of a rank that failed is the message."""
    tiny.save_pipeline(folder / "teacher")
    port = str(free_port())
    shared = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [python, "-m", f"tests.resume.{module}", str(folder), *checks]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text


def free_port() -> int:
    """One below those that the kernel gives to outgoing connections, so that nobody is given it meanwhile."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@pytest.mark.timeout(900)
@pytest.mark.enable_socket
def test_two_ranks(tmp_path: Path, fork_server: ForkServer) -> None:
    on_two_ranks(fork_server.folder / "python", tmp_path, "quick")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.enable_socket
def test_two_ranks_in_every_cell(tmp_path: Path, fork_server: ForkServer) -> None:
    on_two_ranks(fork_server.folder / "python", tmp_path, "matrix")
