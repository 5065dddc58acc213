"""A run's directory, its provenance, and the seeds of everything random.

Randomness is a pure function of (seed, named stream, optimiser step, position in the
global batch), never of rank, micro-batch or of what was drawn before. So resuming needs
no saved generator state, and LCD, RG-LCD and LRM with one seed see the same noise.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgbench import __version__
from rgbench.core.config import dump_yaml
from rgbench.core.errors import UsageError
from rgbench.core.io import parse_json, read_json, write_bytes_atomic, write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    import torch


SCHEMA_VERSION = 1
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")


def stream_seed(seed: int, stream: str, step: int, position: int = 0) -> int:
    """Seed of one draw.

    Args:
        seed: the run's, ≥ 0.
        stream: what is drawn, like ``"noise"``; streams never shift one another.
        step: optimiser step, ≥ 0.
        position: in the global batch, ≥ 0.

    Returns:
        63 bits, the same on every machine and in every process.
    """
    import numpy as np

    entropy = [seed, zlib.crc32(stream.encode()), step, position]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream_generator(seed: int, stream: str, step: int, position: int = 0) -> torch.Generator:
    """A CPU generator seeded by :func:`stream_seed`."""
    import torch

    return torch.Generator("cpu").manual_seed(stream_seed(seed, stream, step, position))


def provenance(device_type: str = "cpu") -> dict[str, Any]:
    """Where and with what this process runs.

    Args:
        device_type: ``cuda`` names the GPU, all else the CPU; asking a GPU its name takes memory there.

    Returns:
        ``git`` (revision and whether the tree has changes; null outside a checkout), ``packages``,
        ``python``, ``platform``, ``device``, ``threads``, ``time`` (UTC, ISO 8601).
    """
    import torch

    return {
        "git": _git_state(Path(__file__).parent.parent.parent),
        "packages": {"rgbench": __version__, **{name: _version(name) for name in PACKAGES}},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device_type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git_state(root: Path) -> dict[str, Any] | None:
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        return {"revision": revision, "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


class RunDirectory:
    """One training run on disk.

    ``config.yaml`` (resolved), ``run.json`` (what :meth:`read` returns), ``environment.json``,
    ``log.jsonl``, ``tensorboard/``, ``samples/``, ``checkpoints/``, ``pipeline/``.

    Args:
        path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.run_file = self.path / "run.json"
        self.log_file = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.pipeline = self.path / "pipeline"
        self._lock: int | None = None

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run.

        Raises:
            UsageError: there is no run at ``path``.
        """
        run = cls(path)
        if not run.run_file.is_file():
            raise UsageError(f"{path}: not a run (no run.json); see: rgbench ls runs")
        return run

    def create(self, config: Mapping[str, Any], meta: Mapping[str, Any], device_type: str = "cpu") -> RunDirectory:
        """Begin a run, or open the one that exists; the directory is then this process's alone.

        Args:
            config: the resolved recipe, plain data.
            meta: the first contents of ``run.json``.
            device_type: ``cpu`` or ``cuda``, for ``environment.json``.

        Raises:
            UsageError: the directory holds something that is no run, or a run that another process is training now.
                Nothing is overwritten.
        """
        if self.run_file.is_file():
            self._lock_for_writing()
            return self
        if self.path.exists() and not self._only_begun():
            raise UsageError(f"{self.path}: exists and is not a run; choose another place with --out")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_for_writing()
        for folder in (self.tensorboard, self.samples, self.checkpoints):
            folder.mkdir(exist_ok=True)
        write_json_atomic(self.path / "environment.json", provenance(device_type))
        write_text_atomic(self.config_file, dump_yaml(dict(config)))
        write_json_atomic(self.run_file, {"schema_version": SCHEMA_VERSION, **meta})  # last: now it is a run
        return self

    def _only_begun(self) -> bool:
        """Whether this is an empty folder, or one in which a run was killed before its run.json."""
        own = {".lock", "environment.json", "config.yaml", "tensorboard", "samples", "checkpoints"}
        return (
            self.path.is_dir()
            and all(entry.name in own or entry.name.endswith(".tmp") for entry in os.scandir(self.path))
            and not any(self.checkpoints.glob("step-*"))
        )

    def _lock_for_writing(self) -> None:
        if self._lock is not None:
            return
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise UsageError(f"{self.path}: another process is training this run; wait for it or use --out") from error
        self._lock = descriptor  # held until the process ends, by whatever means

    def read(self) -> dict[str, Any]:
        """Contents of ``run.json``.

        Raises:
            UsageError: damaged, or written by another version of rgbench.
        """
        meta = read_json(self.run_file)
        found = meta.get("schema_version") if isinstance(meta, dict) else None
        if found != SCHEMA_VERSION:
            raise UsageError(f"{self.run_file}: schema version {found}; this rgbench reads {SCHEMA_VERSION}")
        return meta

    def update(self, **fields: Any) -> None:
        """Change fields of ``run.json``, atomically."""
        write_json_atomic(self.run_file, {**self.read(), **fields})

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one row to ``log.jsonl``; ``record["step"]`` is the optimiser step it belongs to."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with open(self.log_file, "ab", buffering=0) as file:
            file.write(line.encode())

    def read_log(self) -> list[dict[str, Any]]:
        """Rows of ``log.jsonl``; a last row torn by a kill is left out."""
        return [row for row, _ in self._rows()]

    def rewind_log(self, step: int) -> None:
        """Drop rows after ``step``: they are about to be written again."""
        if self.log_file.exists():
            write_bytes_atomic(self.log_file, b"".join(raw for row, raw in self._rows() if row["step"] <= step))

    def _rows(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        data = self.log_file.read_bytes() if self.log_file.exists() else b""
        for raw in data.splitlines(keepends=True):
            try:
                row = parse_json(raw)
            except ValueError:
                continue
            if raw.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row, raw
