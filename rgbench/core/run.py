"""Run directories, provenance, and the seeds of everything random.

Randomness is a pure function of (seed, named stream, optimiser step, position in the global batch), never of rank,
micro-batch or earlier draws. So resuming needs no saved generator state, and LCD, RG-LCD and LRM with one seed see the
same noise.
"""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rgbench import __version__
from rgbench.core.config import dump_yaml
from rgbench.core.errors import UsageError
from rgbench.core.io import (
    check_place,
    is_folder_name,
    parse_json,
    read_json,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

SCHEMA_VERSION = 1
MAX_STEP = 1 << 53  # of a row of the log; a larger one is damage
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")


def _folder_name(name: object) -> object:
    if not is_folder_name(name):
        raise ValueError("is not the name of a folder")
    return name


FolderName = Annotated[str, BeforeValidator(_folder_name)]  # becomes a folder of results


def stream_seed(seed: int, stream: str, step: int, position: int = 0) -> int:
    """Seed of one draw.

    Args:
        seed: the run's, ≥ 0.
        stream: name of the draw, like ``"noise"``; draws of one stream never shift another's.
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


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash (…) uint64 to uint64: the finaliser of splitmix64 (Steele et al., 2014); it wraps by intent."""
    import numpy as np

    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Reward(TypedDict):
    name: str
    fingerprint: dict[str, Any]
    fingerprint_id: str


class _Teacher(TypedDict, total=False):
    preset: str | None
    path: str
    sha256: str


class _Sampling(TypedDict, total=False):
    sampler: str
    steps: PositiveInt
    guidance_scale: float


class _Meta(TypedDict, total=False):
    """Fields of ``run.json`` that are used; there are others, and older runs lack some."""

    name: str
    recipe: str
    world: FolderName
    method: FolderName
    seed: NonNegativeInt
    status: str
    step: NonNegativeInt
    steps: NonNegativeInt
    teacher: _Teacher
    rewards: list[_Reward]
    sampling: _Sampling | None
    data: dict[str, Any]
    cost: dict[str, float | None]
    student_sha256: str


_META = TypeAdapter(_Meta)


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
        """Start a run, or open the one that exists, and lock the directory for this process.

        Args:
            config: the resolved recipe, plain data.
            meta: the first contents of ``run.json``.
            device_type: ``cpu`` or ``cuda``, for ``environment.json``.

        Raises:
            UsageError: the directory holds something that is no run, or a run that another process is training.
                Nothing is overwritten.
        """
        if self.run_file.is_file():
            self._lock_for_writing()
            for leftover in self.path.rglob(".*.????????.tmp"):  # of atomic writes that were killed
                leftover.unlink()
            return self
        self.check_place()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; choose another place with --out") from error
        self._lock_for_writing()
        for folder in (self.tensorboard, self.samples, self.checkpoints):
            folder.mkdir(exist_ok=True)
        write_json_atomic(self.path / "environment.json", provenance(device_type))
        write_text_atomic(self.config_file, dump_yaml(dict(config)))
        write_json_atomic(self.run_file, {"schema_version": SCHEMA_VERSION, **meta})  # last: now it is a run
        return self

    def check_place(self) -> None:
        """Refuse a place where no run can begin.

        Raises:
            UsageError: something that is no run lies there, or no folder can be made there.
        """
        check_place(self.path)
        if self.path.exists() and not self._is_unstarted():
            raise UsageError(f"{self.path}: exists and is not a run; choose another place with --out")

    def place(self) -> Path | None:
        """Where the folder that :meth:`create` locked lies now; None where it was removed.

        Linux alone tells where a folder was moved to; elsewhere it counts as removed.
        """
        if self._lock is None:
            return self.path
        own = os.fstat(self._lock)
        if own.st_nlink == 0:  # of the lock's file, perhaps of that alone
            return self.path if self.run_file.is_file() else None
        for file in (self.path / ".lock", Path(f"/proc/self/fd/{self._lock}")):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(file), own):
                    return self.path if file.name == ".lock" else Path(os.readlink(file)).parent
        return None

    def _is_unstarted(self) -> bool:
        """Whether the folder is empty, or its run was killed before it wrote run.json."""
        own = {".lock", "environment.json", "config.yaml", "tensorboard", "samples", "checkpoints"}
        return (
            self.path.is_dir()
            and all(name in own or name.endswith(".tmp") for name in os.listdir(self.path))
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
        """Read ``run.json``.

        Raises:
            UsageError: damaged, written by another version of rgbench, or with a field of another type; one that
                becomes a folder of results must be the name of one.
        """
        meta = read_json(self.run_file)
        version = meta.get("schema_version") if isinstance(meta, dict) else None
        if version != SCHEMA_VERSION:
            raise UsageError(f"{self.run_file}: schema version {version}; this rgbench reads {SCHEMA_VERSION}")
        try:
            _META.validate_python(meta, strict=True)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key, found = ".".join(map(str, fault["loc"])), fault["input"]
            reason = fault["msg"].removeprefix("Value error, ")
            raise UsageError(f"{self.run_file}: {key} {found!r:.80}: {reason}; correct it") from error
        return meta

    def update(self, **fields: Any) -> None:
        """Change fields of ``run.json``, atomically."""
        write_json_atomic(self.run_file, {**self.read(), **fields})

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one row to ``log.jsonl``; ``record["step"]`` is its optimiser step."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with open(self.log_file, "ab", buffering=0) as file:
            file.write(line.encode())

    def read_log(self) -> list[dict[str, Any]]:
        """Read the rows of ``log.jsonl``, without one torn by a kill."""
        return [row for row, _ in self._rows()]

    def rewind_log(self, step: int) -> None:
        """Drop the rows after ``step``, which a resumed run writes again."""
        if self.log_file.exists():
            write_bytes_atomic(self.log_file, b"".join(raw for row, raw in self._rows() if row["step"] <= step))

    def _rows(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        data = self.log_file.read_bytes() if self.log_file.exists() else b""
        for raw in data.splitlines(keepends=True):
            try:
                row = parse_json(raw)
            except (ValueError, RecursionError):
                continue
            if (
                raw.endswith(b"\n")
                and isinstance(row, dict)
                and type(step := row.get("step")) is int
                and step < MAX_STEP
            ):
                yield row, raw


def provenance(device_type: str = "cpu") -> dict[str, Any]:
    """Describe the code, packages and machine of this process.

    Args:
        device_type: ``cuda`` names the GPU (which takes some of its memory), all else the CPU.

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
